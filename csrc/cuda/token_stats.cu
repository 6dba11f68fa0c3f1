// Statistics of rows of logits and their gradient, on tensors. The kernels are in the header of the same name.
#include "token_stats.cuh"

#include "tensors.h"

namespace urlvr::cuda {

TOKEN_STATS_LAUNCHES(template)

void statistics(ROW_ARGUMENTS, Tensor out) {
  constexpr const char* OP = "cuda_statistics";
  const Rows rows = rows_of(OP, ROW_VALUES);
  float* stats = lines(OP, "out", out, STATS, logits);
  if (rows.count == 0) return;
  const int32_t index = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Device device = device_of(OP, index);
  with_kind(OP, logits, rows, [&](auto type, auto general) {
    using T = decltype(type);
    constexpr bool GENERAL = decltype(general)::value;
    const StatisticsPlan plan = plan_statistics<T, GENERAL>(rows, device);
    std::optional<Tensor> scratch;
    if (plan.scratch_bytes) scratch = scratch_of(out, plan.scratch_bytes);
    launch_statistics<T, GENERAL>(OP, rows, plan, scratch ? scratch->data_ptr() : nullptr, stats, stream_of(index));
  });
}

void gradient(ROW_ARGUMENTS, Tensor stats, Tensor upstream, int64_t given, Tensor out, MaybeTensor bias_grad) {
  constexpr const char* OP = "cuda_gradient";
  const Rows rows = rows_of(OP, ROW_VALUES);
  check_like_logits(OP, "out", out, logits);
  const float* of_rows = lines(OP, "stats", stats, STATS, logits);
  const float* from_loss = lines(OP, "upstream", upstream, GRADS, logits);
  if (bias_grad) check_dense(OP, "bias_grad", *bias_grad, ScalarType::Float, logits);
  STD_TORCH_CHECK(!bias_grad || bias_grad->numel() == rows.columns, "urlvr_fast ", OP, ": bias_grad must be (V,)");
  if (rows.count == 0) return;
  const int32_t index = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Device device = device_of(OP, index);
  with_kind(OP, logits, rows, [&](auto type, auto general) {
    using T = decltype(type);
    const Stream stream = stream_of(index);
    // First, because the gradient by the logits may overwrite them.
    if (bias_grad) launch_bias_gradient<T>(OP, rows, of_rows, from_loss, given, static_cast<float*>(bias_grad->data_ptr()), stream);
    launch_gradient<T, decltype(general)::value>(OP, rows, device, of_rows, from_loss, given, out_of(out), stream);
  });
}

}  // namespace urlvr::cuda
