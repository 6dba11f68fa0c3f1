"""A CUDA device for tests on machines that have none: `install()` before torch is imported, then `device="cuda"` works.

Memory is the host's and operators are the CPU's (`device.cpp`), so results are real and times mean nothing. What it shows is the host's
side of a GPU: tensors on the wrong device, reads that make the host wait, operators and arguments that a device refuses. Kernels of ours
run as they do in the other tests without a GPU: Triton's with TRITON_INTERPRET=1, the CUDA ones on the machine of `cuda_on_cpu`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "simulated_gpu"
GIB = 1 << 30
ROWS = {"logits": "Tensor", **dict.fromkeys(("bias", "ids", "mask", "temperatures", "crow", "col"), "Tensor?")}
ROWS |= {**dict.fromkeys(("temperature", "softcap", "scale"), "float"), **dict.fromkeys(("id_offset", "total", "flags"), "int")}


def compiled(source: Path, flags: list[str], include: list[Path]) -> Path:
    """The shared library of a source, compiled once for each state of the files that it is made of."""
    parts = [source, *(path for folder in include for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cuh", ".inl"))]
    key = hashlib.sha256(repr(flags).encode() + b"".join(path.read_bytes() for path in parts)).hexdigest()[:16]
    out = BUILT / f"{source.stem}-{key}.so"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-shared", str(source), *flags, "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[-4000:]}")
        partial.replace(out)
    return out


def _device_library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    version = (torch / "version.py").read_text()
    link = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"]
    about = f"-DTORCH_BUILD={hashlib.sha256(version.encode()).hexdigest()[:8]}"
    # The libraries after the source: the linker resolves in the order of its arguments.
    path = compiled(HERE / "device.cpp", [about, *link, "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"], [])
    library = ctypes.CDLL(str(path))
    for name in ("allocated", "peak", "host_reads"):
        getattr(library, f"simulated_{name}").restype = ctypes.c_int64
    return library


class Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


library: ctypes.CDLL | None = None
_kept: list[Any] = []  # a library's operators go with it


def host_reads() -> int:
    """How often the host has waited for the device so far."""
    assert library is not None
    return library.simulated_host_reads()


def install() -> None:
    """Must come before torch is imported: it looks for devices once."""
    global library
    if library is not None:
        return
    library = _device_library()
    import torch

    assert torch.accelerator.current_accelerator().type == "cuda", "torch was imported before the simulated GPU"
    properties = SimpleNamespace(
        name="simulated", major=9, minor=0, multi_processor_count=4, L2_cache_size=1 << 16, total_memory=4 * GIB, warp_size=32
    )
    patches: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (properties.total_memory, properties.total_memory),
        "synchronize": lambda *_: None,
        "_sleep": lambda _: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *_: library.simulated_allocated(),
        "max_memory_allocated": lambda *_: library.simulated_peak(),
        "reset_peak_memory_stats": lambda *_: library.simulated_reset_peak(),
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "Event": Event,
    }
    for name, value in patches.items():
        setattr(torch.cuda, name, value)
    _add_kernels(library)


def _add_kernels(device: ctypes.CDLL) -> None:
    """Those of Triton take this device's tensors, and those of csrc/cuda are there, as `register.cpp` beside them declares them."""
    import torch
    from cuda_on_cpu import Kernels, build_harness
    from urlvr_fast.kernels.targets import Launch

    from urlvr_fast.ops import backend

    BUILT.mkdir(parents=True, exist_ok=True)
    kernels = Kernels(build_harness(BUILT))

    def rows_of(values: tuple) -> tuple[dict[str, Any], int]:
        rows = dict(zip(ROWS, values, strict=True))
        return rows, rows.pop("flags")

    def unnoticed(function: Any) -> Any:
        """What an emulator looks at on its own account makes nobody wait."""

        def run(*arguments: Any) -> None:
            before = host_reads()
            function(*arguments)
            device.simulated_set_host_reads(before)

        return run

    def statistics(*arguments: Any) -> None:
        rows, flags = rows_of(arguments[:13])
        arguments[13].copy_(kernels.statistics(rows, flags))

    def gradient(*arguments: Any) -> None:
        rows, flags = rows_of(arguments[:13])
        stats, upstream, given, out, bias_grad = arguments[13:]
        kernels.gradient(rows, stats, upstream, given, out, flags, bias_grad)

    def policy(*arguments: Any) -> None:
        rows, flags = rows_of(arguments[:13])
        loss, present, kind, kl, correction, numbers, stats, out, row_scale = arguments[13:]
        stats.copy_(kernels.policy(rows, loss, out, flags, present, (kind, kl, correction), numbers, row_scale)[0])

    def scale(gradient: torch.Tensor, factor: torch.Tensor, row_scale: torch.Tensor | None) -> None:
        kernels.scale(gradient, ctypes.c_float.from_address(factor.data_ptr()).value, row_scale)

    library = torch.library.Library("urlvr_fast", "FRAGMENT")
    rows = ", ".join(f"{kind} {name}" for name, kind in ROWS.items())
    library.define(f"cuda_statistics({rows}, Tensor(a!) out) -> ()")
    library.define(f"cuda_gradient({rows}, Tensor stats, Tensor upstream, int given, Tensor(a!) out, Tensor(b!)? bias_grad) -> ()")
    loss = "Tensor loss, int present, int loss_kind, int kl_kind, int correction, float[] numbers"
    library.define(f"cuda_policy({rows}, {loss}, Tensor(a!) stats, Tensor(b!) out, Tensor(c!)? row_scale) -> ()")
    library.define("cuda_scale(Tensor(a!) gradient, Tensor factor, Tensor? row_scale) -> ()")
    schemas = (HERE.parents[1] / "csrc" / "schema.h").read_text()
    for name in ("loss_rows", "join", "objective"):
        macro = schemas.partition(f"#define {name.upper()}_SCHEMA")[2].partition("#define")[0]
        arguments = "".join(re.findall(r'"([^"]*)"', macro))
        library.define(f"cuda_{name}({arguments}) -> ()")
    for function in (statistics, gradient, kernels.loss_rows, policy, kernels.join, kernels.objective, scale):
        library.impl(f"cuda_{function.__name__}", unnoticed(function), "CUDA")
    _kept.append(library)
    Launch.run = unnoticed(Launch.run)
    backend._interpreting = lambda: False
    backend._MISSING["cuda"] = ""
