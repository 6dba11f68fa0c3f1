"""Launches of the Triton kernels as a GPU gets them, without one: Triton's own driver and launcher on a libcuda that notes what it is told.

The ops run on the simulated device, or on the host's memory where torch has CUDA, in a process of their own: arguments are bound and
specialised, kernels compiled for sm_90 and loaded, parameters packed. Nothing is computed. `test_kernels_triton_compile.py` compiles what
it thinks that a launch asks for; here it is held to that. `python tests/test_kernels_triton_launch.py` prints what was compiled.
"""

import ctypes
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

HEADER = Path(sysconfig.get_paths()["include"]) / "Python.h"

if __name__ != "__main__":
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler; run this file without it", allow_module_level=True)
    if shutil.which("gcc") is None or shutil.which("g++") is None or not HEADER.is_file():
        pytest.skip("Triton builds its launcher with a compiler and Python's headers, and they are not here", allow_module_level=True)

SHARED, THREADS, REGISTERS = 227 << 10, 1024, 65536  # of a block on sm_90; a thread's registers are taken in eights
STREAM = 0x5EED

# A module is nothing, a function its name. What Triton asks about the device is answered for an H100.
LIBCUDA = r"""
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Seen)(unsigned, unsigned, unsigned, unsigned, unsigned, void *, char *, void **);
static Seen seen;
void noted_by(Seen by) { seen = by; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  seen(c->gridDimX, c->gridDimY * c->gridDimZ, c->blockDimX * c->blockDimY * c->blockDimZ, c->sharedMemBytes, c->numAttrs, c->hStream,
       (char *)f, params);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)1; return image ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (CUfunction)strdup(name); return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice d) {
  *value = which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 << 10
         : which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : which == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 1;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr at) {
  *(CUdeviceptr *)value = at;
  return which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "not on this device"; return CUDA_SUCCESS; }
#define ABSENT(name) __typeof__(name) name __attribute__((alias("absent")));
CUresult absent() { return CUDA_ERROR_NOT_SUPPORTED; }
"""
ABSENT = (
    *("cuCtxGetDevice", "cuCtxGetLimit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"),
    *("cuDriverGetVersion", "cuStreamIsCapturing"),
)


# ---- in a process of its own: the driver -----------------------------------------------------------------------------------------------


def stand_in_for_libcuda(folder: Path) -> ctypes.CDLL:
    """Loaded before anything asks for it by its soname, so that whoever does gets this one."""
    include = Path(find_spec("triton").submodule_search_locations[0]) / "backends" / "nvidia" / "include"
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(LIBCUDA + "".join(f"ABSENT({name})\n" for name in ABSENT))
    command = ["gcc", "-shared", "-fPIC", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class Recorder:
    """Runs every `Launch` and compares what reached libcuda with what was planned."""

    def __init__(self, libcuda: ctypes.CDLL) -> None:
        import triton
        from test_kernels_triton_compile import specialisation
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver
        from urlvr_fast.kernels.targets import Launch

        class Driver(CudaDriver):
            def __init__(self) -> None:
                super().__init__()
                self.get_current_device, self.set_current_device = lambda: 0, lambda _: None
                self.get_current_stream = lambda _: STREAM

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", 90, 32)

        self.specialisation, self.run = specialisation, Launch.run
        self.expected: list[str] = []
        self.seen: list[dict] = []
        self.compiled: list[str] = []
        self.used: dict[str, dict[str, str]] = {}
        seen = ctypes.CFUNCTYPE(None, *[ctypes.c_uint] * 5, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
        self._kept = seen(self._note)
        libcuda.noted_by(self._kept)
        triton.runtime.driver.set_active(Driver())
        triton.knobs.runtime.jit_post_compile_hook = lambda *_, fn, **__: self.compiled.append(fn.name.rpartition(".")[2])
        Launch.run = lambda launch: self._checked(launch)

    def _note(self, grid, planes, threads, shared, attributes, stream, function, parameters) -> None:
        """Reads the parameters while they are there. An exception would be lost in the caller, which is C."""
        types = {"*": ctypes.c_uint64, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
        values = [types[kind].from_address(parameters[i]).value for i, kind in enumerate(self.expected)]
        scratch = [ctypes.c_uint64.from_address(parameters[len(values) + i]).value for i in (0, 1)]
        call = {"grid": grid, "planes": planes, "threads": threads, "shared": shared, "attributes": attributes, "stream": stream}
        self.seen.append(call | {"function": function, "values": values, "scratch": scratch})

    def _checked(self, launch) -> None:
        import torch

        _, name, signature, constants, tensors, options = self.specialisation(launch)
        runtime = {argument: launch.arguments[argument] for argument, kind in signature.items() if kind != "constexpr"}
        self.expected = ["*" if isinstance(value, torch.Tensor) else signature[argument] for argument, value in runtime.items()]
        self.seen.clear()
        self.run(launch)
        (call,) = self.seen  # nothing, where an exception was lost
        what = f"{name} of {launch.grid} programs"
        (binary,) = [b for b in launch.kernel.device_caches[0][0].values() if b.function == call["function"]]

        # What the compile tests compile is what a launch compiles, and nothing of a length, a number or an address is in it.
        bound = {argument: kind.replace("u1", "i1") for argument, kind in binary.src.signature.items()}  # two names of one type
        assert bound == {argument: kind.replace("u1", "i1") for argument, kind in signature.items()}, what
        assert {launch.kernel.arg_names[i]: value for (i,), value in binary.src.constants.items()} == constants, what
        aligned = {(i,) for i in tensors if launch.arguments[launch.kernel.arg_names[i]].data_ptr() % 16 == 0}
        assert {i: value for i, value in binary.src.attrs.items() if value} == {i: [["tt.divisibility", 16]] for i in aligned}, what
        assert {option: getattr(binary.metadata, option) for option in options} == options, what

        # The binary takes these parameters, and two of Triton's own that it does not need.
        declared = binary.asm["ptx"].partition(".entry ")[2].partition(")")[0]
        sizes = [int(bits) // 8 for bits in re.findall(r"^\s*\.param \.[a-z](\d+) ", declared, re.M)]
        assert sizes == [{"*": 8, "i64": 8}.get(kind, 4) for kind in (*self.expected, "*", "*")], what
        assert call["scratch"] == [0, 0], what
        for (argument, value), got in zip(runtime.items(), call["values"], strict=True):
            wanted = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if isinstance(wanted, float):
                wanted = struct.unpack("f", struct.pack("f", wanted))[0]
            assert got == wanted or (got != got and wanted != wanted), (what, argument, got, wanted)

        # It fits, and runs as often as planned.
        registers = struct.unpack_from("<I", binary.kernel, binary.kernel.index(b"\x04\x2f\x08\x00") + 8)[0]  # of .nv.info, as ptxas wrote
        assert 0 < registers <= min(255, launch.registers or 255), what
        assert (registers + 7) // 8 * 8 * call["threads"] <= REGISTERS, what
        assert (call["threads"], call["shared"]) == (32 * launch.warps, binary.metadata.shared), what
        assert call["threads"] <= THREADS, what
        assert call["shared"] <= SHARED, what
        assert (call["grid"], call["planes"]) == (launch.grid, 1), what
        assert 0 < launch.grid < 2**31, what
        assert (call["attributes"], call["stream"]) == (0, STREAM), what  # no clusters, nothing cooperative
        kind = signature.get("logits", signature.get("out", ""))
        self.used.setdefault(name, {})[binary.hash] = f"{kind} {registers} registers".strip()

    def during(self, part) -> dict:
        """Runs it: what was launched, how many binaries that took, and which of them were new."""
        self.compiled.clear()
        self.used.clear()
        start = time.perf_counter()
        part()
        seconds = round(time.perf_counter() - start, 1)
        binaries = {name: sorted(of.values()) for name, of in self.used.items()}
        return {"binaries": binaries, "compiled": sorted(self.compiled), "seconds": seconds}


# ---- what is run -----------------------------------------------------------------------------------------------------------------------


class Calls:
    """Ops on tensors whose numbers do not matter."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device = torch, device

    def rows(self, n, columns, dtype, pad=0):
        """Logits whose rows start on a vector boundary, or with `pad`, at odd addresses, do not."""
        storage = self.torch.zeros(n, columns + pad, dtype=dtype, device=self.device)
        return storage[:, pad:].requires_grad_()

    def per_row(self, n):
        torch, device = self.torch, self.device
        return {
            "ids": torch.arange(n, device=device),
            "mask": torch.arange(n, device=device) % 3 > 0,
            "temperature": torch.linspace(0.5, 1, n, device=device),
            "keep": (torch.arange(0, 4 * n + 1, 4, device=device), torch.arange(4, device=device).repeat(n)),
            "advantages": torch.linspace(-1, 1, n, device=device),
        }

    def training(self, n, columns, temperature, beta, **loss):
        """A step of a loop that has whole logits, and one of the trainer, which has hidden states and the head."""
        torch = self.torch
        from urlvr_fast import group_advantages, linear_policy_loss, linear_token_stats, policy_loss, policy_loss_from_logits, token_stats

        per_row, bf16 = self.per_row(n), torch.bfloat16
        ids, mask = per_row["ids"], per_row["mask"]
        options = {"temperature": temperature, "backend": "triton"}
        loss = {"old_logp": torch.zeros(n, device=self.device), "beta": beta, "ref_logp": torch.zeros(n, device=self.device), **loss}
        rewards = torch.linspace(0, 1, n, device=self.device)
        advantages = group_advantages(rewards, ids // 4, eps=beta, backend="triton")
        with torch.no_grad():
            token_stats(self.rows(n, columns, bf16), ids, outputs="logp", mask=mask, **options)
        stats = token_stats(self.rows(n, columns, bf16), ids, outputs=("logp", "entropy"), mask=mask, **options)
        (stats.logp * advantages + beta * stats.entropy).sum().backward()
        logits = self.rows(n, columns, bf16)
        policy_loss_from_logits(logits, ids, advantages=advantages, mask=mask, **options, **loss)[0].backward()
        hidden = torch.zeros(n, 8, dtype=bf16, device=self.device, requires_grad=True)
        head = torch.zeros(columns, 8, dtype=bf16, device=self.device, requires_grad=True)
        with torch.no_grad():
            linear_token_stats(hidden, head, ids, outputs=("logp", "entropy"), mask=mask, **options)
        linear_policy_loss(hidden, head, ids, advantages=advantages, mask=mask, **options, **loss)[0].backward()
        logp = torch.zeros(n, device=self.device, requires_grad=True)
        ends = torch.arange(0, n + 1, n, device=self.device)
        policy_loss(logp, advantages=advantages, cu_seqlens=ends, denominator=torch.ones((), device=self.device), backend="triton")[
            0
        ].backward()

    def few_rows(self, n, columns, softcap):
        """So few that rows are split over programs: plain ones, with what a row can have, with nothing but themselves, and of a shard."""
        from test_kernels_triton_compile import EVERYTHING, RAW, of_statistics

        from urlvr_fast import token_stats

        torch, per_row = self.torch, self.per_row(n)
        ids, options = per_row["ids"], {"backend": "triton", "mask": per_row["mask"]}
        with torch.no_grad():
            token_stats(self.rows(n, columns, torch.bfloat16), ids, outputs=("logp", "entropy"), **options)
            options |= {"softcap": softcap, "keep": per_row["keep"], "temperature": per_row["temperature"]}
            token_stats(self.rows(n, columns, torch.bfloat16, pad=1), ids, outputs=("logp", "argmax"), **options)
            token_stats(self.rows(n, columns, torch.float32), None, outputs="entropy", backend="triton")
        for launch in of_statistics(n, columns, torch.bfloat16, EVERYTHING | RAW, "mask"):
            launch.run()

    def shifted(self, n, columns):
        """(B, L, V) logits without the last of each sequence, whose gradient takes their place; int32 ids, a padded vocabulary, and a bias
        that begins anywhere."""
        from urlvr_fast import token_stats

        torch = self.torch
        logits = 1 * self.rows(2 * n, columns, torch.float16).view(2, n, columns)
        ids = torch.zeros(2, n - 1, dtype=torch.int32, device=self.device)
        bias = torch.zeros(columns + 1, device=self.device)[1:]
        options = {"bias": bias, "vocab_size": columns - 5, "inplace_backward": True, "backend": "triton"}
        token_stats(logits[:, :-1], ids, outputs="logp", **options).logp.sum().backward()

    def options(self, n, columns, softcap, scale):
        """Everything that a row can have, and rows that do not start on a vector boundary."""
        torch = self.torch
        from urlvr_fast import group_advantages, policy_loss, policy_loss_from_logits, token_stats

        per_row = self.per_row(n)
        ids, advantages = per_row.pop("ids"), per_row.pop("advantages")
        bias = torch.zeros(columns, device=self.device, requires_grad=True)
        capped = {"softcap": softcap, "scale": scale, "backend": "triton"}
        names = ("logp", "lse", "entropy", "self_certainty", "mean_logit", "max_prob", "prob_gap", "sum_p2", "argmax")
        stats = token_stats(self.rows(n, columns, torch.bfloat16), ids, outputs=names, bias=bias, **per_row, **capped)
        (stats.logp + stats.entropy + stats.self_certainty).sum().backward()

        alone = {"scale": scale, "backend": "triton", "mask": per_row["mask"]}
        odd = {"entropy_coef": 0.01, "self_certainty_coef": 0.01, "loss_type": "reinforce", **alone}
        logits = self.rows(n, columns, torch.bfloat16, pad=1)
        policy_loss_from_logits(logits, ids, advantages=advantages, temperature=per_row["temperature"], **odd)[0].backward()
        half = self.rows(n, columns, torch.float16)
        (3 * policy_loss_from_logits(half, ids, advantages=advantages, keep=per_row["keep"], **alone)[0]).backward()
        sequences = {"cu_seqlens": torch.tensor([0, n // 2, n], device=self.device), "rollout_correction": "truncate"}
        old = torch.full((n,), -scale, device=self.device)
        for joined in ({"loss_type": "gspo", "rollout_cap": 1 / scale}, {"rollout_level": "sequence", "eps_high": scale}):
            policy_loss(-old.abs(), advantages=advantages, old_logp=old, rollout_logp=old, **joined, **sequences, backend="triton")
        rewards = torch.linspace(0, 1, n, dtype=torch.float64, device=self.device)
        masked = {"mask": per_row["mask"], "scale": "batch", "baseline": "leave_one_out", "backend": "triton"}
        for eps in (scale / 1e6, 0.0):  # as bits beyond int32, and within
            group_advantages(rewards, ids.int() // 3, eps=eps, **masked)

    def long_strides(self, rows, columns):
        """Numbers beyond int32, of tensors without memory: what the compile tests plan."""
        from test_kernels_triton_compile import EVERYTHING, G_LOGP, of_gradient, of_policy, of_statistics

        bf16 = self.torch.bfloat16
        plans = (of_statistics(rows, columns, bf16, 1, stride=2**31 + 8), of_gradient(rows, columns, bf16, G_LOGP, stride=2**33))
        for launch in itertools.chain(*plans, of_policy(rows, columns, bf16, G_LOGP, stride=2**31 + 8)):
            assert launch.arguments["stride_b"] >= 2**31
            launch.run()
        # More elements than an int32 counts, in rows that have no gap between them.
        for launch in (*of_statistics(rows, columns, bf16, EVERYTHING), *of_gradient(rows, columns, bf16, G_LOGP)):
            launch.run()


def run(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        libcuda = stand_in_for_libcuda(Path(folder))
        device = "cpu"
        if os.environ.get("URLVR_FAST_TEST_DEVICE") == "simulated":
            import simulated_gpu

            simulated_gpu.install()
            device = "cuda"
        from urlvr_fast.ops import backend

        if device == "cpu":  # the ops take the host's tensors for Triton only where it interprets
            backend._interpreting = lambda: True
        recorder, calls = Recorder(libcuda), Calls(device)
        parts = {
            "training": lambda: calls.training(24, 151936, 1.0, 0.1),
            "training again": lambda: calls.training(39, 32008, 0.7, 0.2, loss_type="cispo", eps_high=0.5),
            "few rows": lambda: calls.few_rows(3, 151936, 30.0),
            "few rows again": lambda: calls.few_rows(2, 32008, 20.0),
            "options": lambda: calls.options(24, 4104, 30.0, 0.5),
            "options again": lambda: calls.options(31, 32008, 20.0, 0.25),
            "shifted": lambda: calls.shifted(24, 32008),
            "shifted again": lambda: calls.shifted(31, 4104),
            "long strides": lambda: calls.long_strides(4096, 151936),
            "long strides again": lambda: calls.long_strides(1 << 20, 1 << 18),
        }
        out.write_text(json.dumps({name: recorder.during(part) for name, part in parts.items()}, indent=1))


# ---- the tests -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("launched")
    device = "simulated" if torch.version.cuda is None else "cpu"  # CUDA's build of torch has no place for another device
    environment = {**os.environ, "URLVR_FAST_TEST_DEVICE": device, "TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "0"}
    command = [sys.executable, __file__, str(folder / "parts.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return json.loads((folder / "parts.json").read_text())


def test_every_kernel_is_launched(parts):
    """That each launch is what was planned was checked where it happened."""
    from urlvr_fast.kernels import group_advantages, policy_loss, policy_loss_from_logits, scale_rows, token_stats

    modules = (group_advantages, policy_loss, policy_loss_from_logits, scale_rows, token_stats)
    there_are = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {name for part in parts.values() for name in part["binaries"]} == there_are
    assert parts["few rows"]["binaries"].keys() == {"segments_kernel", "merge_kernel"}


@pytest.mark.parametrize("part", ["training", "few rows", "options", "shifted", "long strides"])
def test_lengths_and_numbers_cost_no_compilation(parts, part):
    assert parts[part]["compiled"] != []
    assert parts[part + " again"]["compiled"] == []
    assert parts[part + " again"]["binaries"].keys() == parts[part]["binaries"].keys()


def test_training_takes_few_binaries(parts):
    binaries = sum(map(len, parts["training"]["binaries"].values()))
    assert len(parts["training"]["compiled"]) == binaries <= 18, parts["training"]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        run(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            run(Path(folder) / "parts.json")
            print((Path(folder) / "parts.json").read_text())
