// What differs between instruction sets: three functions over pieces of a row, one table of them per instruction set and dtype.
#pragma once

#include "../rows.h"

namespace urlvr::cpu {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

constexpr int64_t SEGMENT = 4096;  // columns summed in one go: 16 KiB of scratch, which stays in the L1 cache

// How logits become x. Without bias and softcap that is one multiplication, by a positive number: the largest logit has the largest x.
template <class R>
struct Reading {
  R factor = 1;       // scale / temperature
  bool plain = true;  // x = z · factor
  R scale = 1, softcap = 0, temperature = 1;
  const R* bias = nullptr;  // of the row's first column
};

template <class T, class R>
struct RowKernels {
  // Sums over columns [first, first + n), n <= SEGMENT, of the row that starts at z.
  Sums<double> (*segment)(const T* z, int64_t first, int64_t n, const Reading<R>& how, int64_t flags);
  // out_j = post · slope_j · dx_j for the same columns, without the terms of the id and the keep set. `out` is the row's first column.
  void (*gradient)(const T* z, T* out, int64_t first, int64_t n, const Reading<R>& how, const Coefficients<R>& co, R post);
  // The same into full precision, for the sums over rows that the bias wants.
  void (*wide_gradient)(const T* z, R* out, int64_t first, int64_t n, const Reading<R>& how, const Coefficients<R>& co, R post);
  // x at one column and the slope of the softcap there.
  void (*point)(const T* z, int64_t column, const Reading<R>& how, double& x, R& slope);
  T (*narrow)(R value);  // rounded to nearest even
};

template <class T, class R> struct Tables { const RowKernels<T, R>* best; };

#define ROW_KERNEL_TABLES(space)                          \
  namespace space {                                       \
  extern const RowKernels<bf16, float> kernels_bf16;      \
  extern const RowKernels<fp16, float> kernels_fp16;      \
  extern const RowKernels<float, float> kernels_float;    \
  extern const RowKernels<double, double> kernels_double; \
  }
ROW_KERNEL_TABLES(portable)
#if defined(__x86_64__)
ROW_KERNEL_TABLES(avx2)
ROW_KERNEL_TABLES(avx512)
#endif

}  // namespace urlvr::cpu
