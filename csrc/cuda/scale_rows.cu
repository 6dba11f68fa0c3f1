// Rows of a gradient times a number, on tensors. The kernel is in the header of the same name.
#include "scale_rows.cuh"

#include "tensors.h"

namespace urlvr::cuda {

void scale(Tensor gradient, Tensor factor, MaybeTensor row_scale) {
  constexpr const char* OP = "cuda_scale";
  check_like_logits(OP, "gradient", gradient, gradient);
  check_dense(OP, "factor", factor, ScalarType::Float, gradient);
  const int64_t count = gradient.size(0) * gradient.size(1);
  STD_TORCH_CHECK(factor.numel() == 1, "urlvr_fast ", OP, ": factor must be one number");
  STD_TORCH_CHECK(count <= INT32_MAX - 4096 && gradient.size(2) <= INT32_MAX - 4096, "urlvr_fast ", OP, ": more rows or columns than 2^31");
  const float* by = static_cast<const float*>(factor.data_ptr());
  const float* by_row = pointer<float>(OP, "row_scale", row_scale, ScalarType::Float, gradient, count);
  if (count == 0) return;
  const int32_t index = gradient.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  Rows rows = {};
  rows.scale = 1;  // plain: how logits are read does not matter here
  with_kind(OP, gradient, rows, [&](auto type, auto) {
    launch_scale<decltype(type)>(OP, out_of(gradient), int(count), int(gradient.size(2)), by, by_row, stream_of(index));
  });
}

}  // namespace urlvr::cuda
