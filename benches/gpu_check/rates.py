"""What the GPU does at its best at this moment: a copy's bandwidth and the rates of large products, each a median over random data."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROUNDS = 15
QUERIES = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit")
QUERIES += ("temperature.gpu", "ecc.mode.current")


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; {} where there is none."""
    try:
        command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERIES, (value.strip() for value in said.strip().split(",")), strict=False))


def milliseconds(run: Callable[[], object], flushed: Tensor) -> list[float]:
    samples = []
    for _ in range(3 + ROUNDS):
        flushed.zero_()  # nothing of the last round is left in L2
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return samples[3:]


def measure(size: int, copied: int) -> dict:
    """size: of the square products. copied: bytes of the copy."""
    device = torch.device("cuda")
    flushed = torch.zeros(max(1, torch.cuda.get_device_properties(device).L2_cache_size // 2), device=device)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    found = {"copy_": (milliseconds(lambda: target.copy_(source), flushed), 2 * copied, "GB/s")}
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    narrow, wide = torch.empty(size, size, dtype=torch.bfloat16, device=device), torch.empty(size, size, device=device)
    operations = 2 * size**3
    found["bf16 product"] = (milliseconds(lambda: torch.mm(a, b, out=narrow), flushed), operations, "TFLOP/s")
    found["bf16 product into fp32"] = (
        milliseconds(lambda: torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=wide), flushed),
        operations,
        "TFLOP/s",
    )
    scale = {"GB/s": 1e6, "TFLOP/s": 1e9}
    return {
        name: {"samples_ms": samples, "rate": amount / statistics.median(samples) / scale[unit], "unit": unit}
        for name, (samples, amount, unit) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_check.rates", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tensors, for tests")
    parser.add_argument("--out", type=Path, required=True, help="where to write the JSON")
    options = parser.parse_args()
    before = clocks()
    found = measure(64, 1 << 16) if options.quick else measure(8192, 4 << 30)
    options.out.write_text(json.dumps({"rates": found, "clocks_before": before, "clocks_after": clocks()}) + "\n")
    for name, entry in found.items():
        print(f"{name}: {entry['rate']:.4g} {entry['unit']}")


if __name__ == "__main__":
    main()
