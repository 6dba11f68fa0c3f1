// A policy loss whose rows are not joined and its gradient by the logits, on tensors. The kernels are in the header of the same name.
#include "policy_loss_from_logits.cuh"

#include "tensors.h"

namespace urlvr::cuda {

TOKEN_STATS_LAUNCHES(extern template)  // the ones of token_stats.cu, not compiled again

void policy(ROW_ARGUMENTS, Tensor loss, int64_t present, int64_t loss_kind, int64_t kl_kind, int64_t correction,
            std::vector<double> numbers, Tensor stats, Tensor out, MaybeTensor row_scale) {
  constexpr const char* OP = "cuda_policy";
  const Rows rows = rows_of(OP, ROW_VALUES);
  check_like_logits(OP, "out", out, logits);
  float* of_rows = lines(OP, "stats", stats, STATS, logits);
  const float* loss_lines = lines(OP, "loss", loss, LOSS_LINES, logits);
  float* scale_of_rows = row_scale ? lines(OP, "row_scale", *row_scale, 1, logits) : nullptr;
  const Loss of = {loss_lines, present, int(loss_kind), int(kl_kind), int(correction), numbers_of(OP, numbers), scale_of_rows};
  if (rows.count == 0) return;
  const int32_t index = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  Device device = device_of(OP, index);
  with_kind(OP, logits, rows, [&](auto type, auto general) {
    using T = decltype(type);
    constexpr bool GENERAL = decltype(general)::value;
    device.clusters = device.clusters && compiled_with_clusters(OP, cluster_kernel<T, GENERAL>);
    const PolicyPlan plan = plan_policy<T, GENERAL>(rows, device);
    std::optional<Tensor> scratch;
    if (plan.scratch_bytes) scratch = scratch_of(stats, plan.scratch_bytes);
    launch_policy<T, GENERAL>(OP, rows, of, plan, device, scratch ? scratch->data_ptr() : nullptr, of_rows, out_of(out), stream_of(index));
  });
}

}  // namespace urlvr::cuda
