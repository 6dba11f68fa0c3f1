"""What a result was measured on."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def describe(device: torch.device) -> dict:
    found = {
        "device": device_name(device),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"cuda": torch.version.cuda, "capability": f"sm_{major}{minor}"}
    else:
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def commit() -> str | None:
    """Short hash of the checkout, with a + where it has changes that the hash does not name; None outside a checkout.

    URLVR_FAST_COMMIT says it for a copy of one."""
    if said := os.environ.get("URLVR_FAST_COMMIT"):
        return said

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "urlvr_fast", "kernels", "csrc", "benches", "setup.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(result: dict, prefix: str, device: torch.device, out: Path | None, wanted: bool) -> None:
    """Write a result to `out`, or without one, where it is `wanted`, to benches/results under a name that says what, where and when."""
    if out is None and not wanted:
        return
    path = out or ROOT / "benches" / "results" / f"{prefix}{slug(device)}-{result['time'][:10]}-{commit() or 'unknown'}.json"
    write_whole(path, result)
    print(f"\nwritten: {path}", file=sys.stderr)


def write_whole(path: Path, result: dict) -> None:
    """Whoever is killed while writing leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(path)


def slug(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
