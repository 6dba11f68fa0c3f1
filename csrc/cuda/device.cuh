// What the kernels ask of the machine, one line each: the kernels themselves are plain C++ over these names, so that the tests can compile
// the very same bodies for the CPU, with a header of their own in the place of this one's second half.
#pragma once

#include "../rows.h"

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace urlvr::cuda {

struct alignas(16) Pack { uint32_t word[4]; };  // 16 bytes of logits: what one load or store moves

// 16-bit logits as bits; fp32 is itself.
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

}  // namespace urlvr::cuda

#if defined(URLVR_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace urlvr::cuda {

#define DEVICE_FN __device__ __forceinline__
#define ROW_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

DEVICE_FN int thread_index() { return int(threadIdx.x); }
DEVICE_FN int block_size() { return int(blockDim.x); }
DEVICE_FN unsigned block_index() { return blockIdx.x; }
DEVICE_FN char* dynamic_shared() {
  extern __shared__ __align__(16) char shared[];
  return shared;
}

// ---- arithmetic that is rounded where it says so: never fused or split by the compiler, whichever kernel it is inlined into ----
DEVICE_FN float mul(float a, float b) { return __fmul_rn(a, b); }
DEVICE_FN float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE_FN float max_number(float a, float b) { return fmaxf(a, b); }  // NaN loses
DEVICE_FN float exp2_approx(float x) {  // 2 ulp, results below 2^-126 are 0
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
DEVICE_FN float reciprocal(float x) { return __frcp_rn(x); }
DEVICE_FN float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DEVICE_FN uint32_t bits_of_float(float x) { return __float_as_uint(x); }
DEVICE_FN uint32_t funnel_right(uint32_t low, uint32_t high, int bits) { return __funnelshift_r(low, high, uint32_t(bits)); }
DEVICE_FN float from_fp16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE_FN uint32_t two_fp16(float low, float high) {
  __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}
DEVICE_FN uint32_t two_bf16(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}
DEVICE_FN uint32_t max_of_two(uint32_t a, uint32_t b, Fp16) {  // of the halves; NaN loses
  __half2 out = __hmax2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<uint32_t*>(&out);
}
DEVICE_FN uint32_t max_of_two(uint32_t a, uint32_t b, Bf16) {
  __nv_bfloat162 out = __hmax2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<uint32_t*>(&out);
}

// To the compiler a new number every time: a loop is not copied for each value that it may have.
DEVICE_FN void forget(int& value) { asm volatile("" : "+r"(value)); }

// ---- memory ----
DEVICE_FN Pack pack_of(uint4 v) { return {{v.x, v.y, v.z, v.w}}; }
DEVICE_FN Pack load_streamed(const void* p) { return pack_of(__ldcs(static_cast<const uint4*>(p))); }  // not wanted again
DEVICE_FN Pack load_kept(const void* p) { return pack_of(__ldcg(static_cast<const uint4*>(p))); }      // stays in L2
DEVICE_FN Pack load_shared(const void* p) { return pack_of(*static_cast<const uint4*>(p)); }
DEVICE_FN void store_streamed(void* p, Pack v) { __stcs(static_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3])); }
DEVICE_FN void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
}
DEVICE_FN void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE_FN void set_bits(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }

// ---- within a warp, a block, a cluster ----
constexpr unsigned ALL_LANES = 0xffffffffu;
DEVICE_FN void sync_warp() { __syncwarp(); }
DEVICE_FN void sync_block() { __syncthreads(); }
DEVICE_FN float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(ALL_LANES, x, lanes); }
DEVICE_FN int warp_max(int x) { return __reduce_max_sync(ALL_LANES, x); }
DEVICE_FN int warp_min(int x) { return __reduce_min_sync(ALL_LANES, x); }
DEVICE_FN int warp_add(int x) { return __reduce_add_sync(ALL_LANES, x); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS 1
DEVICE_FN void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEVICE_FN void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
DEVICE_FN void store_in_cluster(uint32_t* own, int rank, uint32_t value) {  // to where `own` lies in the block of that rank
  asm volatile(
      "{ .reg .u32 remote; mapa.shared::cluster.u32 remote, %0, %1; st.shared::cluster.u32 [remote], %2; }" ::"r"(
          uint32_t(__cvta_generic_to_shared(own))),
      "r"(rank), "r"(value)
      : "memory");
}
#else
#define HAS_CLUSTERS 0
#endif

DEVICE_FN void unreachable() { __trap(); }

// ---- launches ----
using Stream = cudaStream_t;

inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch, of anyone, would report it again
  throw std::runtime_error(std::string("urlvr_fast ") + op + ": " + cudaGetErrorString(error));
}

// `cluster` blocks at a time share their memory; 0: no clusters.
template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), int64_t grid, int block, size_t shared, int cluster, Stream stream,
            const A&... arguments) {
  if (grid == 0) return;
  if (grid > INT32_MAX) throw std::runtime_error(std::string("urlvr_fast ") + op + ": too many rows for one launch");
  if (shared > 48 * 1024) {
    // Always to all there is: two threads, or two launches of one graph, that want different sizes must not take the limit down again.
    int device = 0, most = 0;
    check(op, cudaGetDevice(&device));
    check(op, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  }
  if (cluster > 0) check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid));
  config.blockDim = dim3(unsigned(block));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 0 ? 1 : 0;
  check(op, cudaLaunchKernelEx(&config, kernel, P(arguments)...));  // not cudaGetLastError as well: that may be someone else's
}

// Whether the code that runs here was compiled for an architecture with clusters. A build for older ones alone runs on newer GPUs too, from
// its PTX, in which a kernel that uses clusters has no body.
template <class... P>
bool compiled_with_clusters(const char* op, void (*kernel)(P...)) {
  cudaFuncAttributes attributes = {};
  check(op, cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

}  // namespace urlvr::cuda

#endif

namespace urlvr::cuda {

constexpr int WARP = 32;
DEVICE_FN int lane_index() { return thread_index() % WARP; }
DEVICE_FN int warp_index() { return thread_index() / WARP; }

// The same bits in every lane: a butterfly adds the same two numbers on both sides.
DEVICE_FN float warp_add(float x) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = add(x, shuffle_xor(x, lanes));
  return x;
}
// NaN must have lost already. As integers, negative floats are ordered the other way round.
DEVICE_FN float warp_max(float x) {
  int bits = int(bits_of_float(x));
  bits = warp_max(bits >= 0 ? bits : bits ^ 0x7fffffff);
  return float_of_bits(uint32_t(bits >= 0 ? bits : bits ^ 0x7fffffff));
}

constexpr float LOG2_E = 1.4426950408889634f;
DEVICE_FN float exp_approx(float x) { return exp2_approx(mul(x, LOG2_E)); }

}  // namespace urlvr::cuda
