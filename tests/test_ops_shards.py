"""Vocabulary shards: two gloo processes that hold slices of different sizes against one process that holds the whole vocabulary."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from urlvr_fast import TokenStats, linear_policy_loss, linear_token_stats, policy_loss_from_logits, token_stats
from urlvr_fast.ops.shards import Shard

N, H, V = 19, 5, 16
SIZES = (11, 5)
CU = torch.tensor([0, 7, 7, 19])
DTYPE = torch.float64
ALL = TokenStats._fields
DIFFERENTIABLE = ALL[:5]


def inputs(needed: int = V):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=g, dtype=DTYPE), torch.randn(V, H, generator=g, dtype=DTYPE)
    logits, bias = torch.randn(N, V, generator=g, dtype=DTYPE) * 2, torch.randn(V, generator=g, dtype=DTYPE)
    logits[3, 11:] = float("-inf")  # a row that the second shard has nothing of
    logits[4, :9] = float("-inf")
    logits[5] = float("-inf")
    ids = torch.randint(0, needed, (N,), generator=g)
    ids[3], ids[4] = 2, 10
    kept = torch.rand(N, V, generator=g) < 0.4
    kept[torch.arange(N), ids] = True
    kept[:, needed:] = False
    keep = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]), kept.nonzero()[:, 1]
    mask = torch.rand(N, generator=g) < 0.7
    mask[5] = False
    return hidden, weight, logits, bias, ids, keep, mask, torch.randn(5, N, generator=g, dtype=DTYPE)


OPTIONS = {
    "plain": lambda keep: {},
    "transformed": lambda keep: {"temperature": 0.7, "softcap": 3.0, "scale": 1.3},
    "keep": lambda keep: {"keep": keep, "entropy_support": "keep"},
    "vocab_size": lambda keep: {"vocab_size": 14},
}
LOSSES = ("dapo", "gspo")


def columns(rank: int | None) -> slice:
    return slice(None) if rank is None else slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))


def everything(rank: int | None, group) -> dict[str, torch.Tensor]:
    """All sharded calls and their gradients: of one rank's slice, or (rank None) of the whole."""
    out, here = {}, columns(rank)
    for name, options in OPTIONS.items():
        hidden, weight, logits, bias, ids, keep, mask, g = inputs(14 if name == "vocab_size" else V)
        shared = {**options(keep), "mask": mask, "shard_group": group}
        leaves = [t[..., here].clone().requires_grad_() for t in (logits, bias)]
        if name == "transformed":
            leaves[0] = logits.clamp(min=-9)[:, here].clone().requires_grad_()
        stats = token_stats(leaves[0], ids, outputs=ALL, bias=leaves[1], **shared)
        loss = sum((u * getattr(stats, field)).sum() for u, field in zip(g, DIFFERENTIABLE, strict=True))
        gradients = torch.autograd.grad(loss, leaves)
        out |= {f"{name}/{field}": value.detach() for field, value in zip(ALL, stats, strict=True)}
        out |= {f"{name}/d_logits": gradients[0], f"{name}/d_bias": gradients[1]}
        head = [hidden.clone().requires_grad_(), weight[here].clone().requires_grad_()]
        for save in ("logits", "recompute"):
            stats = linear_token_stats(*head, ids, outputs=DIFFERENTIABLE, save=save, chunk_bytes=8 * 11 * 4, **shared)
            loss = sum((u * getattr(stats, field)).sum() for u, field in zip(g, DIFFERENTIABLE, strict=True))
            gradients = torch.autograd.grad(loss, head)
            out |= {f"{name}/{save}/logp": stats.logp.detach(), f"{name}/{save}/h": gradients[0], f"{name}/{save}/d_weight": gradients[1]}
        for kind in LOSSES:
            loss_options = {
                "advantages": torch.tensor([1.0, 2.0, -1.0], dtype=DTYPE),
                "cu_seqlens": CU,
                "loss_type": kind,
                "entropy_coef": 0.1,
            }
            for chunk_bytes in (8 * 11 * 4, 1 << 20):
                loss, metrics = linear_policy_loss(*head, ids, chunk_bytes=chunk_bytes, **loss_options, **shared)
                gradients = torch.autograd.grad(0.5 * loss, head)
                where = f"{name}/{kind}/{chunk_bytes}"
                out |= {f"{where}/loss": loss.detach(), f"{where}/h": gradients[0], f"{where}/d_weight": gradients[1], **metrics}
            leaf = leaves[0].detach()[:].requires_grad_()
            loss, _ = policy_loss_from_logits(leaf, ids, **loss_options, **shared)
            out |= {f"{name}/{kind}/d_logits": torch.autograd.grad(loss, leaf)[0]}
    return out


def check_what_is_exchanged(rank: int) -> None:
    """Numbers a row: five for the differentiable set, one more where logits may be −inf, three for log-prob alone."""
    seen = []
    original = Shard.gather
    Shard.gather = lambda self, values: seen.append((len(values), values.dtype)) or original(self, values)
    hidden, weight, logits, _, ids, *_ = inputs()
    here, group = columns(rank), dist.group.WORLD
    linear_token_stats(hidden.float(), weight[here].float(), ids, outputs=DIFFERENTIABLE, shard_group=group)
    token_stats(logits[:, here].float(), ids, outputs=DIFFERENTIABLE, shard_group=group)
    linear_token_stats(hidden.float(), weight[here].float(), ids, outputs="logp", shard_group=group)
    Shard.gather = original
    assert seen == [(5, torch.float32), (6, torch.float32), (3, torch.float32)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES))
    results = everything(rank, dist.group.WORLD)
    with pytest.raises(ValueError, match=r"vocab_size=9 leaves a shard without a column \(shards end at \[11, 16\]\)"):
        token_stats(torch.zeros(1, SIZES[rank]), None, outputs="lse", vocab_size=9, shard_group=dist.group.WORLD)
    with pytest.raises(IndexError, match=r"ids\[0\] = 16 is not a column of 0..15"):
        token_stats(torch.zeros(1, SIZES[rank]), torch.tensor([16]), outputs="logp", shard_group=dist.group.WORLD)
    check_what_is_exchanged(rank)
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    # As a script: pytest imports test files under names that a spawned process does not know.
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(len(SIZES))]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands]
    for process in processes:
        try:
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, output
    whole = everything(None, None)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
    for name, expected in whole.items():
        parts = [results[name] for results in ranks]
        if name.endswith(("d_logits", "d_bias")):
            torch.testing.assert_close(torch.cat(parts, -1), expected, msg=lambda m, n=name: f"{n}: {m}")
        elif name.endswith("d_weight"):
            torch.testing.assert_close(torch.cat(parts), expected, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(parts[0], parts[1]), name
            torch.testing.assert_close(parts[0], expected, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
