"""The ops: from logits, or hidden states and an lm_head weight, to per-token statistics and policy losses with their gradients.

Conventions, once for all of them:

* Rows are tokens (N), columns the vocabulary (V), H is the hidden size, B sequences. logits (…, V) and hidden (…, H) take any leading
  shape; everything per token has that shape and is flattened in that order. weight is (V, H), bias (V,). Sequences are runs of the
  flattened rows, given by `cu_seqlens` (B + 1,).
* Inputs are fp16, bf16, fp32 or fp64. 16-bit numbers count as exact; everything is computed, and every statistic and loss returned, in fp32
  (fp64 for fp64). Gradients have their tensor's dtype and are rounded to it once. Logarithms are natural.
* x = softcap(logits · scale + bias) / temperature. Statistics and losses are of softmax(x).
* `mask` is bool, True counts. What a masked row holds never matters; its outputs and gradients are 0.
* −inf logits are columns of probability 0, gradient exactly 0. A NaN spoils its own row only.
* Derivatives are of first order; asking for a second one raises.
* On CUDA nothing waits for the device: contents that cannot be checked for that reason (ids, temperatures) make their row NaN. On the
  CPU they
  raise. Exceptions: `group_advantages`, and `shard_group` in the torch backend, which learns the sizes of the shards.
* torch.compile(fullgraph=True) takes token_stats, linear_token_stats and policy_loss. The two ops that make their gradient in the forward
  differentiate small vectors there, which breaks the graph in the torch backend.
* `shard_group`: columns are this rank's slice of the vocabulary, in rank order; ids are global; every rank calls alike.
* `backend`: see `backend.py`. A backend that cannot be had raises.

Files: `reference.py` defines every op and the loss table in plain torch; `rows.py` (rows of logits) and `head.py` (the lm_head) are what
the torch backend runs; one file per op checks the arguments, picks the backend and carries autograd.
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
