// A CUDA device as far as PyTorch's host side can tell: tensors whose memory is the host's, operators that are the CPU's.
//
// PyTorch's CPU build has no CUDA, but dispatches on the CUDA key, differentiates on it and asks hooks and a device guard about it like any
// other build. Here are those: allocation, views and copies, and for every other operator the fallback that torch offers makers of devices,
// which runs the CPU's and brings the result back. A tensor of the host in the place of a device's fails as it would on a GPU.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <string>

using at::IntArrayRef;
using at::Tensor;

// ---- what the tests ask ----------------------------------------------------------------------------------------------------------------

static std::atomic<int64_t> allocated{0}, peak{0};
static std::atomic<int64_t> host_reads{0};  // what would have made the host wait for the device

extern "C" {
int64_t simulated_allocated() { return allocated; }
int64_t simulated_peak() { return peak; }
void simulated_reset_peak() { peak = int64_t(allocated); }
int64_t simulated_host_reads() { return host_reads; }
void simulated_set_host_reads(int64_t count) { host_reads = count; }
}

// ---- the device ------------------------------------------------------------------------------------------------------------------------

static const c10::Device DEVICE(c10::DeviceType::CUDA, 0);

struct Allocator final : c10::Allocator {
  struct Block { int64_t bytes; };
  static constexpr size_t HEAD = 512;  // the size of a block stands before it, on the alignment of CUDA's own allocations
  static void release(void* at) {
    if (at == nullptr) return;
    char* head = static_cast<char*>(at) - HEAD;
    allocated -= reinterpret_cast<Block*>(head)->bytes;
    std::free(head);
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, DEVICE};
    char* head = static_cast<char*>(std::aligned_alloc(HEAD, HEAD + (bytes + HEAD - 1) / HEAD * HEAD));
    TORCH_CHECK(head, "out of memory");
    reinterpret_cast<Block*>(head)->bytes = int64_t(bytes);
    std::memset(head + HEAD, 0xff, bytes);  // NaN: nothing relies on fresh memory
    const int64_t now = allocated += int64_t(bytes);
    for (int64_t before = peak; now > before && !peak.compare_exchange_weak(before, now);) {}
    return {head + HEAD, head + HEAD, &release, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
static Allocator memory;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void*) const override { return false; }
  void deviceSynchronize(DeviceIndex) const override {}
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// ---- operators -------------------------------------------------------------------------------------------------------------------------

// The same memory to the CPU's eyes.
static Tensor on_host(const Tensor& t) {
  if (!t.is_cuda()) return t;
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), c10::DataPtr(t.storage().data_ptr().get(), c10::Device(c10::kCPU)));
  auto impl = c10::make_intrusive<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  Tensor out(std::move(impl));
  if (t.is_conj()) out._set_conj(true);
  if (t.is_neg()) out._set_neg(true);
  return out;
}

static Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
                    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(c10::get_default_dtype_as_scalartype()), format);
}
static Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                            std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype.value_or(c10::get_default_dtype_as_scalartype()));
}
static const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  const size_t bytes = at::detail::computeStorageNbytesContiguous(size, self.dtype().itemsize(), self.storage_offset());
  if (bytes > self.storage().nbytes()) {
    c10::DataPtr larger = memory.allocate(bytes);
    if (self.storage().nbytes()) std::memcpy(larger.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(larger));
    self.storage().set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}
static Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (self.is_cuda() != from.is_cuda() && !non_blocking) ++host_reads;  // a copy to the device too, unless it says that it need not wait
  on_host(self).copy_(on_host(from));
  return self;
}
static Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}
static Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}
static Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}
static Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  const int64_t elements = int64_t(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {elements}, {1});
}
static Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return set_storage(self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}
static at::Scalar local_scalar_dense(const Tensor& self) {
  ++host_reads;
  return on_host(self).item();
}

// 16-bit operands into fp32 results, which the CPU does not have.
static Tensor product(const Tensor& a, const Tensor& b, at::ScalarType dtype) { return on_host(a).to(dtype).mm(on_host(b).to(dtype)); }
static Tensor& mm_out(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) {
  on_host(out).copy_(product(a, b, dtype));
  return out;
}
static Tensor mm(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  Tensor out = at::empty({a.size(0), b.size(1)}, a.options().dtype(dtype));
  return mm_out(a, b, dtype, out);
}
static Tensor& addmm_out(const Tensor& to, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta,
                         const at::Scalar& alpha, Tensor& out) {
  on_host(out).copy_(on_host(to) * beta + product(a, b, dtype) * alpha);
  return out;
}

// Operators whose result tells the host a shape: on a GPU it waits for it.
static bool tells_the_host(const std::string& name) {
  return name == "aten::nonzero" || name == "aten::masked_select" || name == "aten::_unique2" || name == "aten::unique_consecutive" ||
         name == "aten::equal" || name == "aten::unique_dim";
}
static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (tells_the_host(op.schema().name())) ++host_reads;
  const int64_t before = host_reads;
  at::native::cpu_fallback(op, stack);
  host_reads = before;  // its own way to the host and back is none of ours
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize_);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("mm.dtype", &mm);
  m.impl("mm.dtype_out", &mm_out);
  m.impl("addmm.dtype_out", &addmm_out);
}
