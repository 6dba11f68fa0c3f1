// The arguments that every op on rows begins with, as torch's schemas write them: those of `urlvr_fast/ops/layout.py`, in that order.
#pragma once

#define ROWS_SCHEMA                                                                                                              \
  "Tensor logits, Tensor? bias, Tensor? ids, Tensor? mask, Tensor? temperatures, Tensor? crow, Tensor? col, float temperature, " \
  "float softcap, float scale, int id_offset, int total, int flags"
