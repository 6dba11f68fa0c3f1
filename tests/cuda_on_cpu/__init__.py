"""The CUDA kernels on the emulated machine of this folder, called through ctypes: the very bodies of csrc/cuda, compiled for the CPU."""

import ctypes
import math
import os
import subprocess
from pathlib import Path

import torch

from urlvr_fast.ops.layout import STATS, Weighing

NAN = math.nan
EVERYTHING = (1 << 9) - 1
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Arguments(ctypes.Structure):
    POINTERS = ("bias", "ids", "mask", "temperatures", "crow", "col")
    _fields_ = (
        [("logits", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in ("a", "b", "columns", "outer_stride", "inner_stride")]
        + [(name, ctypes.c_void_p) for name in POINTERS]
        + [(name, ctypes.c_double) for name in ("temperature", "softcap", "scale")]
        + [(name, ctypes.c_int64) for name in ("id_offset", "total", "flags", "dtype")]
    )


class Settings(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("multiprocessors", "clusters", "slice_bytes", "shared_bytes", "seed")]


def machine(multiprocessors=1, clusters=0, slice_bytes=72 * 1024, seed=1):
    """1 multiprocessor: never more than a block to a row. Many: as many as there are segments for."""
    return Settings(multiprocessors, clusters, slice_bytes, 227 * 1024, seed)


def pointer(t):
    return None if t is None else t.data_ptr()


def plain(value):
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, list):
        return (ctypes.c_double * len(value))(*value)
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_void_p(pointer(value))


def raise_on(error):
    if error:
        raise RuntimeError(error.decode())


def rows_of(logits, **options):
    rows = dict.fromkeys(Arguments.POINTERS)
    rows.update(logits=logits, temperature=1.0, softcap=0.0, scale=1.0, id_offset=0, total=logits.shape[-1])
    rows.update(options)
    return rows


class Kernels:
    """The functions of a kernel package over the harness."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        for name in ("statistics", "gradient", "loss_rows", "policy", "join", "objective", "scale"):
            getattr(self.library, f"cuda_{name}").restype = ctypes.c_char_p
        self.settings = machine()

    def call(self, name, rows, flags, *arguments):
        logits = rows["logits"]
        assert logits.stride(-1) == 1 or logits.shape[-1] == 1
        a, b, v = logits.shape
        packed = Arguments(logits.data_ptr(), a, b, v, logits.stride(0), logits.stride(1), *(pointer(rows[k]) for k in Arguments.POINTERS))
        for k in ("temperature", "softcap", "scale", "id_offset", "total"):
            setattr(packed, k, rows[k])
        packed.flags, packed.dtype = flags, DTYPES[logits.dtype]
        raise_on(getattr(self.library, f"cuda_{name}")(ctypes.byref(packed), ctypes.byref(self.settings), *arguments))

    def call_plain(self, name, *arguments):
        """A function that takes no logits: tensors as pointers, numbers as 64 bits."""
        raise_on(getattr(self.library, f"cuda_{name}")(ctypes.byref(self.settings), *(plain(value) for value in arguments)))

    def statistics(self, rows, flags=EVERYTHING):
        out = torch.full((STATS, rows["logits"].shape[:2].numel()), NAN)
        self.call("statistics", rows, flags, ctypes.c_void_p(out.data_ptr()))
        return out

    def gradient(self, rows, stats, upstream, given, out, flags=EVERYTHING, bias_grad=None):
        strides = (ctypes.c_int64(out.stride(0)), ctypes.c_int64(out.stride(1)))
        vectors = (ctypes.c_void_p(stats.data_ptr()), ctypes.c_void_p(upstream.data_ptr()))
        data = ctypes.c_void_p(out.data_ptr())
        self.call("gradient", rows, flags, *vectors, ctypes.c_int64(given), data, *strides, ctypes.c_void_p(pointer(bias_grad)))
        return out

    def policy(self, rows, loss, out, flags, present=0, kinds=(0, 0, 0), numbers=None, row_scale=None):
        stats = torch.full((STATS, loss.shape[1]), NAN)
        way = ctypes.c_int64(-1)
        values = (ctypes.c_double * 11)(*numbers)
        strides = (ctypes.c_int64(out.stride(0)), ctypes.c_int64(out.stride(1)))
        integers = [ctypes.c_int64(i) for i in (present, *kinds)]
        tensors = (ctypes.c_void_p(stats.data_ptr()), ctypes.c_void_p(out.data_ptr()), *strides, ctypes.c_void_p(pointer(row_scale)))
        self.call("policy", rows, flags, ctypes.c_void_p(loss.data_ptr()), *integers, values, *tensors, ctypes.byref(way))
        return stats, way.value

    def loss_rows(self, advantages, mask, cu_seqlens, *given):
        *rest, weighing, lines, live, counts = given
        sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
        assert len(advantages) == (sequences if weighing & Weighing.PER_SEQUENCE else len(live))
        self.call_plain("loss_rows", len(live), sequences, advantages, mask, cu_seqlens, *rest, int(weighing), lines, live, counts)

    def join(self, logp, cu_seqlens, which, present, kind, correction, product, numbers, lines):
        given = (logp, cu_seqlens, which, present, kind, correction, int(product), numbers, lines)
        self.call_plain("join", lines.shape[1], len(cu_seqlens) - 1, *given)

    def objective(self, logp, *arguments):
        self.call_plain("objective", len(logp), logp, *arguments)

    def scale(self, gradient, factor, row_scale=None):
        by = torch.tensor([factor])
        self.call("scale", rows_of(gradient), 0, ctypes.c_void_p(by.data_ptr()), ctypes.c_void_p(pointer(row_scale)))


def build_harness(folder):
    out = Path(folder) / "cuda_on_cpu.so"
    own = out.with_suffix(f".{os.getpid()}")  # another process may be building it, or running what was built
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-fPIC", "-shared"]
    harness = Path(__file__).parent
    subprocess.run(["g++", *flags, f"-I{harness}", str(harness / "harness.cpp"), "-o", str(own)], check=True)
    return own.replace(out)
