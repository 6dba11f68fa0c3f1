// The arguments of the kernel functions as torch's schemas write them: those of `urlvr_fast/ops/layout.py`, in that order.
#pragma once

#define ROWS_SCHEMA                                                                                                              \
  "Tensor logits, Tensor? bias, Tensor? ids, Tensor? mask, Tensor? temperatures, Tensor? crow, Tensor? col, float temperature, " \
  "float softcap, float scale, int id_offset, int total, int flags"

#define LOSS_ROWS_SCHEMA                                                                                                         \
  "Tensor advantages, Tensor? mask, Tensor? cu_seqlens, Tensor? old_logp, Tensor? ref_logp, Tensor? rollout_logp, "              \
  "Tensor? denominator, float number, Tensor? token_denominator, float token_number, int weighing, Tensor(a!) lines, "            \
  "Tensor(b!) live, Tensor(c!) counts"
#define JOIN_SCHEMA                                                                                                              \
  "Tensor? logp, Tensor cu_seqlens, Tensor? which, int present, int kind, int correction, bool product, float[] numbers, "       \
  "Tensor(a!) lines"
#define OBJECTIVE_SCHEMA                                                                                                         \
  "Tensor logp, Tensor? entropy, Tensor? self_certainty, Tensor lines, Tensor live, Tensor counts, int present, int kind, "      \
  "int kl, int correction, float[] numbers, Tensor(a!) metrics, Tensor(b!)? upstream"
