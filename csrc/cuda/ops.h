// The CUDA ops, each defined in the file of its name; `register.cpp` hands them to torch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace urlvr::cuda {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

#define ROW_ARGUMENTS                                                                                                                \
  Tensor logits, MaybeTensor bias, MaybeTensor ids, MaybeTensor mask, MaybeTensor temperatures, MaybeTensor crow, MaybeTensor col, \
      double temperature, double softcap, double scale, int64_t id_offset, int64_t total, int64_t flags
#define ROW_VALUES logits, bias, ids, mask, temperatures, crow, col, temperature, softcap, scale, id_offset, total, flags

void statistics(ROW_ARGUMENTS, Tensor out);
void gradient(ROW_ARGUMENTS, Tensor stats, Tensor upstream, int64_t given, Tensor out, MaybeTensor bias_grad);
void policy(ROW_ARGUMENTS, Tensor loss, int64_t present, int64_t loss_kind, int64_t kl_kind, int64_t correction,
            std::vector<double> numbers, Tensor stats, Tensor out, MaybeTensor row_scale);
void loss_rows(Tensor advantages, MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor old_logp, MaybeTensor ref_logp,
               MaybeTensor rollout_logp, MaybeTensor denominator, double number, MaybeTensor token_denominator, double token_number,
               int64_t weighing, Tensor lines, Tensor live, Tensor counts);
void join(MaybeTensor logp, Tensor cu_seqlens, MaybeTensor which, int64_t present, int64_t kind, int64_t correction, bool product,
          std::vector<double> numbers, Tensor lines);
void objective(Tensor logp, MaybeTensor entropy, MaybeTensor self_certainty, Tensor lines, Tensor live, Tensor counts, int64_t present,
               int64_t kind, int64_t kl, int64_t correction, std::vector<double> numbers, Tensor metrics, MaybeTensor upstream);
void scale(Tensor gradient, Tensor factor, MaybeTensor row_scale);

}  // namespace urlvr::cuda
