"""Vocabulary shards: what the ranks of a process group tell each other about their slices of one row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's slice of the vocabulary: columns [offset, offset + size) of `total`, slices contiguous in rank order."""

    group: dist.ProcessGroup
    offset: int
    size: int
    total: int
    sizes: tuple[int, ...]  # of all slices
    widest: int  # columns of the largest slice before `total` cut it: chunks are cut by it, so that every rank cuts alike

    @staticmethod
    def of(group: dist.ProcessGroup, columns: int, device: torch.device, vocab_size: int | None) -> Shard:
        """Learn everyone's sizes (one small collective and one host read). `vocab_size` is global and cuts the last slices."""
        ranks = dist.get_world_size(group)
        sizes = torch.empty(ranks, dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(sizes, torch.tensor([columns], device=device), group=group)
        bounds = [0]
        for size in sizes.tolist():
            bounds.append(bounds[-1] + size)
        total = bounds[-1] if vocab_size is None else vocab_size
        if not 0 < total <= bounds[-1]:
            raise ValueError(f"vocab_size={total} must lie in 1..{bounds[-1]}, the columns of all shards together")
        if total <= bounds[-2]:  # every rank sees this alike, so that none is left waiting for the others
            raise ValueError(f"vocab_size={total} leaves a shard without a column (shards end at {bounds[1:]}); use fewer shards")
        rank = dist.get_rank(group)
        cut = tuple(min(after, total) - before for before, after in pairwise(bounds))
        return Shard(group, bounds[rank], cut[rank], total, cut, max(sizes.tolist()))

    def gather(self, values: Tensor) -> Tensor:
        """(K, N) from every rank: (ranks, K, N), in rank order."""
        ranks = dist.get_world_size(self.group)
        out = values.new_empty(ranks * values.shape[0], *values.shape[1:])
        dist.all_gather_into_tensor(out, values.contiguous(), group=self.group)
        return out.view(ranks, *values.shape)

    def sum_(self, values: Tensor) -> Tensor:
        """Add up over the ranks, in place."""
        dist.all_reduce(values, group=self.group)
        return values
