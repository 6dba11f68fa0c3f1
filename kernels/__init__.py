"""Triton kernels, one file per op. `urlvr_fast.ops` is the only importer; nothing here is imported without Triton."""
