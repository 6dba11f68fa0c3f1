// From the tensors of a call to the plain structs that the kernels take, with the checks that spare them a fault on the device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "ops.h"
#include "rows.cuh"

namespace urlvr::cuda {

using torch::headeronly::ScalarType;

inline void check_dense(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Tensor& logits) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == logits.get_device_index(), "urlvr_fast ", op, ": ", name,
                  " is not on the device of the others");
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous(), "urlvr_fast ", op, ": ", name,
                  " has the wrong dtype or is not contiguous");
}
inline void check_like_logits(const char* op, const char* name, const Tensor& t, const Tensor& logits) {
  STD_TORCH_CHECK(t.dim() == 3 && (t.size(2) <= 1 || t.stride(2) == 1), "urlvr_fast ", op, ": ", name,
                  " must be (A, B, V) with a last stride of 1");
  const bool same_place = t.is_cuda() && t.get_device_index() == logits.get_device_index();
  const bool same_shape = t.size(0) == logits.size(0) && t.size(1) == logits.size(1) && t.size(2) == logits.size(2);
  STD_TORCH_CHECK(same_place && same_shape && t.scalar_type() == logits.scalar_type(), "urlvr_fast ", op, ": ", name,
                  " is not like the logits");
}

// The elements of a dense tensor, which must be `number` where that is not −1. `logits`: any tensor of the device.
template <class P>
P* elements(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Tensor& logits, int64_t number) {
  check_dense(op, name, t, dtype, logits);
  STD_TORCH_CHECK(number < 0 || t.numel() == number, "urlvr_fast ", op, ": ", name, " has ", t.numel(), " elements, not ", number);
  return static_cast<P*>(t.data_ptr());
}
template <class P>
const P* pointer(const char* op, const char* name, const MaybeTensor& t, ScalarType dtype, const Tensor& logits, int64_t number = -1) {
  return t ? elements<P>(op, name, *t, dtype, logits, number) : nullptr;
}
inline float* lines(const char* op, const char* name, const Tensor& t, int64_t number, const Tensor& logits) {
  return elements<float>(op, name, t, ScalarType::Float, logits, number * logits.size(0) * logits.size(1));
}

inline Rows rows_of(const char* op, ROW_ARGUMENTS) {
  check_like_logits(op, "logits", logits, logits);
  STD_TORCH_CHECK(logits.size(2) <= INT32_MAX - 4096, "urlvr_fast ", op, ": more columns than 2^31");
  STD_TORCH_CHECK(crow.has_value() == col.has_value(), "urlvr_fast ", op, ": a keep set is both crow and col");
  Rows rows = {};
  rows.logits = logits.data_ptr();
  STD_TORCH_CHECK(logits.size(0) * logits.size(1) <= INT32_MAX - 4096, "urlvr_fast ", op, ": more rows than 2^31");
  rows.inner = int(logits.size(1)), rows.outer_stride = logits.stride(0), rows.inner_stride = logits.stride(1);
  rows.count = int(logits.size(0) * logits.size(1));
  rows.columns = int(logits.size(2));
  rows.bias = pointer<float>(op, "bias", bias, ScalarType::Float, logits, logits.size(2));
  rows.ids = pointer<int64_t>(op, "ids", ids, ScalarType::Long, logits, rows.count);
  rows.mask = pointer<bool>(op, "mask", mask, ScalarType::Bool, logits, rows.count);
  rows.temperatures = pointer<float>(op, "temperatures", temperatures, ScalarType::Float, logits, rows.count);
  rows.crow = pointer<int64_t>(op, "crow", crow, ScalarType::Long, logits, rows.count + 1);
  rows.col = pointer<int64_t>(op, "col", col, ScalarType::Long, logits);
  rows.set_numbers(temperature, softcap, scale);
  rows.id_offset = id_offset, rows.total = total, rows.flags = flags;
  return rows;
}
inline Out out_of(const Tensor& out) { return {out.data_ptr(), int(out.size(1)), out.stride(0), out.stride(1)}; }

inline Device device_of(const char* op, int32_t index) {
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(op, cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  Device device;
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.clusters = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && attribute(cudaDevAttrClusterLaunch);
  return device;
}
inline Stream stream_of(int32_t index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == AOTI_TORCH_SUCCESS, "urlvr_fast: torch has no current CUDA stream");
  return static_cast<Stream>(stream);
}
// From torch's allocator, which gives the memory to nobody else before the stream is done with it.
inline Tensor scratch_of(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {int64_t((bytes + 3) / 4)}, ScalarType::Float);
}

inline LossNumbers<float> numbers_of(const char* op, const std::vector<double>& numbers) {
  STD_TORCH_CHECK(numbers.size() == LOSS_NUMBERS, "urlvr_fast ", op, ": a policy loss has ", LOSS_NUMBERS, " numbers, not ",
                  numbers.size());
  float as_float[LOSS_NUMBERS];
  for (int i = 0; i < LOSS_NUMBERS; ++i) as_float[i] = float(numbers[i]);
  static_assert(sizeof(LossNumbers<float>) == sizeof(as_float), "the numbers of a loss are floats in the order of their declaration");
  LossNumbers<float> out;
  std::memcpy(&out, as_float, sizeof(out));
  return out;
}

// f(T, GENERAL) for the logits' dtype and the way they are read.
template <class Function>
void with_kind(const char* op, const Tensor& logits, const Rows& rows, const Function& f) {
  auto with_dtype = [&](auto type) {
    if (rows.plain()) f(type, std::false_type());
    else f(type, std::true_type());
  };
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16: return with_dtype(Bf16());
    case ScalarType::Half: return with_dtype(Fp16());
    case ScalarType::Float: return with_dtype(float());
    default: STD_TORCH_CHECK(false, "urlvr_fast ", op, ": logits must be fp16, bf16 or fp32; float64 is for the torch backend");
  }
}

}  // namespace urlvr::cuda
