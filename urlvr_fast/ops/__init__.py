"""The ops: from logits, or hidden states and an lm_head weight, to per-token statistics and policy losses with their gradients.

Conventions, once for all of them:

* Rows are tokens (N), columns the vocabulary (V), H is the hidden size, B sequences. logits (…, V) and hidden (…, H) take any leading
  shape; everything per token has that shape and is flattened in that order. weight is (V, H), bias (V,). Sequences are runs of the
  flattened rows, given by `cu_seqlens` (B + 1,).
* Inputs are fp16, bf16, fp32 or fp64. 16-bit numbers count as exact; everything is computed, and every statistic and loss returned, in fp32
  (fp64 for fp64). Gradients have their tensor's dtype and are rounded to it once. Logarithms are natural.
* x = softcap(logits · scale + bias) / temperature. Statistics and losses are of softmax(x).
* `mask` is bool, True counts. What a masked row holds never matters; its outputs and gradients are 0.
* −inf logits are columns of probability 0, gradient exactly 0. A NaN spoils its own row only. A row that gets no
  gradient from upstream has gradient 0, whatever it holds.
* Derivatives are of first order; asking for a second one raises.
* A row's bits depend on the row alone: not on the number of rows, threads or programs.
* On CUDA nothing waits for the device: contents that cannot be checked for that reason (ids, temperatures, rewards) make their row, or
  their group, NaN. On the CPU they raise. Exceptions, in the torch backend: `group_advantages`, and `shard_group`, which learns the
  sizes of the shards.
* torch.compile(fullgraph=True) takes all six functions, with every loss and backend.
* `shard_group`: columns are this rank's slice of the vocabulary, in rank order; ids are global; every rank calls alike.
* `backend`: see `backend.py`. A backend that cannot be had raises.

Files, from the top down: one file per op checks its arguments and carries autograd; `row_ops.py` and `packed_loss.py` hold what torch sees
of rows of logits and of a loss, through `registered.py`; `layout.py` is what goes from there to a kernel package; the packages are
`csrc/cpu`, `csrc/cuda`, `kernels/` (Triton) and `rows.py` (PyTorch). `head.py` makes the products with the lm_head. `reference.py` defines
every op and the loss table in plain torch.
"""

from urlvr_fast.ops.backend import available_backends
from urlvr_fast.ops.group_advantages import group_advantages
from urlvr_fast.ops.linear_policy_loss import linear_policy_loss
from urlvr_fast.ops.linear_token_stats import linear_token_stats
from urlvr_fast.ops.policy_loss import policy_loss
from urlvr_fast.ops.policy_loss_from_logits import policy_loss_from_logits
from urlvr_fast.ops.reference import LOSS_TYPES, TokenStats
from urlvr_fast.ops.token_stats import token_stats

__all__ = [
    "LOSS_TYPES",
    "TokenStats",
    "available_backends",
    "group_advantages",
    "linear_policy_loss",
    "linear_token_stats",
    "policy_loss",
    "policy_loss_from_logits",
    "token_stats",
]
