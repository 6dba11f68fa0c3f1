// The rows of a policy loss, on tensors. The kernels are in the header of the same name.
#include "policy_loss.cuh"

#include "tensors.h"

namespace urlvr::cuda {

static int rows_in(const char* op, const Tensor& live) {
  STD_TORCH_CHECK(live.numel() <= INT32_MAX - 4096, "urlvr_fast ", op, ": more rows than 2^31");
  return int(live.numel());
}

void loss_rows(Tensor advantages, MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor old_logp, MaybeTensor ref_logp,
               MaybeTensor rollout_logp, MaybeTensor denominator, double number, MaybeTensor token_denominator, double token_number,
               int64_t weighing, Tensor lines, Tensor live, Tensor counts) {
  constexpr const char* OP = "cuda_loss_rows";
  auto vector = [&](const char* name, const MaybeTensor& t, int64_t expected) {
    return pointer<float>(OP, name, t, ScalarType::Float, lines, expected);
  };
  RowsOfLoss rows = {};
  rows.count = rows_in(OP, live);
  rows.mask = pointer<bool>(OP, "mask", mask, ScalarType::Bool, lines, rows.count);
  rows.cu_seqlens = pointer<int64_t>(OP, "cu_seqlens", cu_seqlens, ScalarType::Long, lines);
  const int64_t sequences = cu_seqlens ? cu_seqlens->numel() - 1 : 1;
  STD_TORCH_CHECK(sequences >= (rows.count > 0 ? 1 : 0) && sequences <= INT32_MAX, "urlvr_fast ", OP, ": cu_seqlens has ", sequences + 1,
                  " elements for ", rows.count, " rows");
  rows.sequences = int(sequences);
  rows.weighing = weighing, rows.number = float(number), rows.token_number = float(token_number);
  rows.advantages = vector("advantages", advantages, weighing & PER_SEQUENCE ? sequences : rows.count);
  rows.old_logp = vector("old_logp", old_logp, rows.count);
  rows.ref_logp = vector("ref_logp", ref_logp, rows.count);
  rows.rollout_logp = vector("rollout_logp", rollout_logp, rows.count);
  rows.denominator = vector("denominator", denominator, 1);
  rows.token_denominator = vector("token_denominator", token_denominator, 1);
  float* of_rows = elements<float>(OP, "lines", lines, ScalarType::Float, lines, int64_t(LOSS_LINES) * rows.count);
  bool* live_rows = elements<bool>(OP, "live", live, ScalarType::Bool, lines, rows.count);
  float* of_call = elements<float>(OP, "counts", counts, ScalarType::Float, lines, 2);
  const int32_t index = lines.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  std::optional<Tensor> scratch;
  if (rows.parts()) scratch = scratch_of(lines, rows.scratch_bytes());
  launch_loss_rows(OP, rows, scratch ? scratch->data_ptr() : nullptr, of_rows, live_rows, of_call, stream_of(index));
}

void join(MaybeTensor logp, Tensor cu_seqlens, MaybeTensor which, int64_t present, int64_t kind, int64_t correction, bool product,
          std::vector<double> numbers, Tensor lines) {
  constexpr const char* OP = "cuda_join";
  STD_TORCH_CHECK(lines.dim() == 2 && lines.size(0) == LOSS_LINES && lines.size(1) <= INT32_MAX - 4096, "urlvr_fast ", OP,
                  ": lines must be (", int(LOSS_LINES), ", N) with less than 2^31 rows");
  STD_TORCH_CHECK(logp || !(present & HAS_RATIO), "urlvr_fast ", OP, ": a ratio needs logp");
  RowsToJoin rows = {};
  rows.count = int(lines.size(1));
  rows.logp = pointer<float>(OP, "logp", logp, ScalarType::Float, lines, rows.count);
  rows.cu_seqlens = elements<int64_t>(OP, "cu_seqlens", cu_seqlens, ScalarType::Long, lines, -1);
  rows.sequences = int(cu_seqlens.numel()) - 1;
  rows.which = pointer<bool>(OP, "which", which, ScalarType::Bool, lines, rows.count);
  rows.product = product;
  float* of_rows = elements<float>(OP, "lines", lines, ScalarType::Float, lines, int64_t(LOSS_LINES) * rows.count);
  const Loss loss = {of_rows, present, int(kind), NO_KL, int(correction), numbers_of(OP, numbers), nullptr};
  const int32_t index = lines.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  launch_join(OP, rows, loss, of_rows, stream_of(index));
}

void objective(Tensor logp, MaybeTensor entropy, MaybeTensor self_certainty, Tensor lines, Tensor live, Tensor counts, int64_t present,
               int64_t kind, int64_t kl, int64_t correction, std::vector<double> numbers, Tensor metrics, MaybeTensor upstream) {
  constexpr const char* OP = "cuda_objective";
  auto vector = [&](const char* name, const MaybeTensor& t, int64_t expected) {
    return pointer<float>(OP, name, t, ScalarType::Float, lines, expected);
  };
  RowValues rows = {};
  rows.count = rows_in(OP, live);
  rows.logp = vector("logp", logp, rows.count);
  rows.entropy = vector("entropy", entropy, rows.count);
  rows.self_certainty = vector("self_certainty", self_certainty, rows.count);
  rows.live = elements<bool>(OP, "live", live, ScalarType::Bool, lines, rows.count);
  Loss loss = {vector("lines", lines, int64_t(LOSS_LINES) * rows.count), present, int(kind), int(kl), int(correction), {}, nullptr};
  loss.numbers = numbers_of(OP, numbers);
  const float* of_call = vector("counts", counts, 2);
  float* results = elements<float>(OP, "metrics", metrics, ScalarType::Float, lines, METRICS);
  float* gradients = upstream ? elements<float>(OP, "upstream", *upstream, ScalarType::Float, lines, int64_t(GRADS) * rows.count) : nullptr;
  const int32_t index = lines.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  std::optional<Tensor> partial;
  if (rows.count) partial = scratch_of(lines, LOSS_SUMS * loss_blocks(rows.count) * sizeof(float));
  float* sums = partial ? static_cast<float*>(partial->data_ptr()) : nullptr;
  launch_objective(OP, loss, rows, of_call, sums, results, gradients, stream_of(index));
}

}  // namespace urlvr::cuda
