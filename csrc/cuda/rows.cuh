// The rows of a call and how their logits are read: where a row lies, what x is, and 16 bytes of it at any alignment.
#pragma once

#include "device.cuh"

namespace urlvr::cuda {

struct Device {
  int multiprocessors = 1;
  int shared_bytes = 48 * 1024;        // that one block may have
  bool clusters = false;               // sm_90: blocks can read each other's shared memory
  int slice_bytes = 72 * 1024;         // of a row that a block of a cluster should hold: three blocks to a multiprocessor
};

// Arguments of every op, as `urlvr_fast/ops/layout.py` lists them. Pointers that are null are absent.
struct Rows {
  const void* logits;
  int inner;  // row n begins n / inner · outer_stride + n % inner · inner_stride elements in
  int64_t outer_stride, inner_stride;
  int count;
  int columns;
  const float* bias;
  const int64_t* ids;
  const bool* mask;
  const float* temperatures;
  const int64_t* crow;
  const int64_t* col;
  float temperature, softcap, scale;
  float inverse_softcap, scale_by_temperature;
  int64_t id_offset, total, flags;
  uint32_t zero;  // is 0, which the compiler does not know: see `forget_conversions`

  void set_numbers(double temperature_, double softcap_, double scale_) {
    if (!(temperature_ > 0)) temperature_ = nan_<double>();  // no such temperature: every row is NaN
    temperature = float(temperature_), softcap = float(softcap_), scale = float(scale_);
    inverse_softcap = softcap_ > 0 ? float(1 / softcap_) : 0.0f;
    scale_by_temperature = float(scale_ / temperature_);
  }
  // Without bias and softcap x is the logit times a positive number, and the largest logit has the largest x.
  bool plain() const { return !bias && !(softcap > 0) && scale > 0; }
};

// Where a gradient of the shape of the logits goes.
struct Out {
  void* data;
  int inner;
  int64_t outer_stride, inner_stride;
};

DEVICE_FN int64_t row_offset(int n, int inner, int64_t outer_stride, int64_t inner_stride) {
  return int64_t(n / inner) * outer_stride + int64_t(n % inner) * inner_stride;
}
template <class T>
DEVICE_FN const T* row_of(const Rows& rows, int n) {
  return static_cast<const T*>(rows.logits) + row_offset(n, rows.inner, rows.outer_stride, rows.inner_stride);
}
template <class T>
DEVICE_FN T* row_of(const Out& out, int n) {
  return static_cast<T*>(out.data) + row_offset(n, out.inner, out.outer_stride, out.inner_stride);
}

// x = y · factor, where y is the logit, or in GENERAL rows softcap(logit · scale + bias).
struct Reading {
  float factor;
  float out_factor;  // dx / dlogit, but for the slope of the softcap
  float scale, softcap, inverse_softcap;
  const float* bias;
  uint32_t zero;
};

template <bool GENERAL>
DEVICE_FN Reading reading_of(const Rows& rows, int n) {
  Reading how;
  float temperature = rows.temperature;
  how.out_factor = rows.scale_by_temperature;
  if (rows.temperatures) {
    temperature = rows.temperatures[n];
    if (!(temperature > 0)) temperature = nan_<float>();  // no such temperature: the row is NaN
    how.out_factor = rows.scale / temperature;
  }
  how.factor = GENERAL ? 1 / temperature : how.out_factor;
  how.scale = rows.scale;
  how.softcap = rows.softcap;
  how.inverse_softcap = rows.inverse_softcap;
  how.bias = rows.bias;
  how.zero = rows.zero;
  return how;
}

DEVICE_FN float from_bits(uint32_t bits, Fp16) { return from_fp16(uint16_t(bits)); }
DEVICE_FN float from_bits(uint32_t bits, Bf16) { return float_of_bits(bits << 16); }
DEVICE_FN float number(Fp16 z) { return from_bits(z.bits, Fp16()); }
DEVICE_FN float number(Bf16 z) { return from_bits(z.bits, Bf16()); }
DEVICE_FN float number(float z) { return z; }

template <bool GENERAL>
DEVICE_FN float y_of(float z, int column, const Reading& how) {
  if (!GENERAL) return z;
  float y = how.bias ? fma(z, how.scale, how.bias[column]) : mul(z, how.scale);
  return how.softcap > 0 ? mul(how.softcap, tanhf(mul(y, how.inverse_softcap))) : y;
}

// d y / d(logit · scale + bias) = 1 − tanh² = 4 e / (1 + e)² with e = exp(−2 |u|): no cancellation where the softcap saturates.
DEVICE_FN float softcap_slope(float z, int column, const Reading& how) {
  const float y = how.bias ? fma(z, how.scale, how.bias[column]) : mul(z, how.scale);
  const float e = exp_approx(mul(-2, fabsf(mul(y, how.inverse_softcap))));
  const float half = reciprocal(add(1, e));
  return mul(mul(4, e), mul(half, half));
}

// ---- 16 bytes at any alignment --------------------------------------------------------------------------------------------------------

enum Memory { STREAMED, KEPT, SHARED };  // global memory that is read once, or soon again; memory of the block

template <Memory FROM>
DEVICE_FN Pack load(const char* p) {
  return FROM == STREAMED ? load_streamed(p) : FROM == KEPT ? load_kept(p) : load_shared(p);
}

// Bytes shift … shift + 15 of the 32 in `low` and `high`.
DEVICE_FN Pack shifted(const Pack& low, const Pack& high, int shift) {
  const uint32_t all[8] = {low.word[0], low.word[1], low.word[2], low.word[3], high.word[0], high.word[1], high.word[2], high.word[3]};
  uint32_t by_two[6], by_one[5];
  Pack out;
#pragma unroll
  for (int i = 0; i < 6; ++i) by_two[i] = shift & 8 ? all[i + 2] : all[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) by_one[i] = shift & 4 ? by_two[i + 1] : by_two[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) out.word[i] = funnel_right(by_one[i], by_one[i + 1], (shift & 3) * 8);
  return out;
}

// Columns from some first one on, as bytes: column `first + i` lies shift + i · size bytes behind `aligned`, which is a multiple of 16.
// Of the blocks of 16 bytes behind `aligned` only those are read that begin before `end`, where the row ends: each of them has a byte of
// the row in it, so none lies outside the allocation. What they hold of the neighbouring rows is not looked at.
struct Bytes {
  const char* aligned;
  int shift;
  int64_t end;
};
DEVICE_FN Bytes bytes_from(const void* first, int64_t bytes) {
  const int shift = int(reinterpret_cast<uintptr_t>(first) & 15);
  return {static_cast<const char*>(first) - shift, shift, shift + bytes};
}

// 16 bytes that lie `offset` behind `aligned`, all of them in the row.
template <Memory FROM>
DEVICE_FN Pack load_at(const char* aligned, int offset) {
  const int shift = offset & 15;
  const char* block = aligned + (offset - shift);
  const Pack low = load<FROM>(block);
  return shift ? shifted(low, load<FROM>(block + 16), shift) : low;
}

template <class T>
DEVICE_FN float element(const Pack& pack, int i) {
  if constexpr (sizeof(T) == 4) {
    return float_of_bits(pack.word[i]);
  } else {
    return from_bits(i % 2 ? pack.word[i / 2] >> 16 : pack.word[i / 2] & 0xffffu, T());
  }
}

// ---- segments -------------------------------------------------------------------------------------------------------------------------

// A row is cut into segments of WIDTH columns, each of which one warp reduces in an order that is fixed by the columns alone: neither the
// row's alignment nor the number of warps, blocks and rows has a part in its bits. Lane l holds columns (i · 32 + l) · VECTOR …: 32
// registers of them, as 16-bit pairs where that will do.
template <class T, bool GENERAL>
struct Segments {
  static constexpr int VECTOR = 16 / int(sizeof(T));
  static constexpr bool PAIRS = sizeof(T) == 2 && !GENERAL;
  static constexpr int ELEMENTS = PAIRS ? 64 : 32;  // a lane
  static constexpr int PACKS = ELEMENTS / VECTOR;
  static constexpr int WIDTH = WARP * ELEMENTS;
  static constexpr int BYTES = WIDTH * int(sizeof(T));
};
template <class T, bool GENERAL>
ROWS_FN int segments_of(int columns) {
  return (columns + Segments<T, GENERAL>::WIDTH - 1) / Segments<T, GENERAL>::WIDTH;
}
ROWS_FN int smaller_of(int a, int b) { return a < b ? a : b; }
ROWS_FN int larger_of(int a, int b) { return a > b ? a : b; }

// Part p of `parts` nearly equal ones begins here.
ROWS_FN int part_begin(int whole, int parts, int p) { return int(int64_t(whole) * p / parts); }

}  // namespace urlvr::cuda
