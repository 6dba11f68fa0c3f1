// From a row's coefficients to its gradient, a segment at a time, each element with everything it needs in registers: the id and the kept
// columns get their terms where the rest is computed, so that one rounding is made and the gradient may take the place of the logits.
#pragma once

#include "segment_sums.cuh"

namespace urlvr::cuda {

// `Coefficients` of rows.h, times dx / dlogit, and how to read the row.
struct RowGradient {
  float m, log_s, keep_log_s;
  float a, b, c, d, keep_a, keep_b;
  int id_column;
  bool dead;    // 0 throughout, whatever the logits are
  bool simple;  // b = d = 0: nothing but p · a, and c at the id
  bool keeps;   // a keep set has terms
};

// Upstream gradients of a row, as a struct so that they stay in registers.
struct Upstream { float g[GRADS]; };

DEVICE_FN RowGradient row_gradient(const Rows& rows, int n, const float* stats, int64_t stride, const Upstream& up, float out_factor) {
  const Coefficients<float> co =
      coefficients<float>(stats[ROW_MAX * stride], stats[LOG_S * stride], stats[ENTROPY * stride], stats[FINITE * stride],
                          stats[KEEP_LOG_S * stride], stats[ID_COUNTS * stride] != 0, up.g, rows.crow != nullptr, rows.flags);
  RowGradient out;
  out.m = co.m, out.log_s = co.log_s, out.keep_log_s = co.keep_log_s;
  out.a = mul(co.a, out_factor), out.b = mul(co.b, out_factor), out.c = mul(co.c, out_factor), out.d = mul(co.d, out_factor);
  out.keep_a = mul(co.keep_a, out_factor), out.keep_b = mul(co.keep_b, out_factor);
  out.id_column = id_column(rows, n);
  out.dead = co.dead;
  out.simple = co.b == 0 && co.d == 0;
  out.keeps = !(co.keep_a == 0 && co.keep_b == 0);
  return out;
}

// p · (a + b ℓ) with ℓ = log p; 0 where p is, NaN where the row is.
DEVICE_FN float weighted(float log_p, float a, float b) { return mul(exp_approx(log_p), fma(b, max_number(log_p, LOWEST), a)); }

// `kept` has a bit for each of the COUNT columns from `column` on.
template <bool GENERAL, int COUNT>
DEVICE_FN void gradient_of(const float (&z)[COUNT], int column, const Reading& how, const RowGradient& row, uint32_t kept,
                           float (&dz)[COUNT]) {
  float d[COUNT];  // x − m
#pragma unroll
  for (int i = 0; i < COUNT; ++i) d[i] = fma(y_of<GENERAL>(z[i], column + i, how), how.factor, -row.m);
  if (row.simple) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) dz[i] = mul(exp_approx(add(d[i], -row.log_s)), row.a);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float log_p = add(d[i], -row.log_s);
      dz[i] = add(weighted(log_p, row.a, row.b), log_p == -infinity<float>() ? 0 : row.d);
    }
  }
  if (kept != 0 && row.keeps) {  // without a term not even a NaN may come from there
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (kept >> i & 1) dz[i] = add(dz[i], weighted(add(d[i], -row.keep_log_s), row.keep_a, row.keep_b));
    }
  }
  if (uint32_t(row.id_column - column) < uint32_t(COUNT)) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (column + i == row.id_column) dz[i] = add(dz[i], row.c);
    }
  }
  if (GENERAL && how.softcap > 0) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) dz[i] = mul(dz[i], softcap_slope(z[i], column + i, how));
  }
}

// ---- the keep set as a bitmap of columns ------------------------------------------------------------------------------------------------

// Bits of columns first … end − 1; first is a multiple of 32. One word more than that, so that a look-up may read on.
ROWS_FN int bitmap_words(int columns) { return columns / 32 + 2; }

struct KeptColumns {
  const uint32_t* bitmap;  // null: no keep set
  int first;
  DEVICE_FN uint32_t at(int column, int count) const {
    if (!bitmap) return 0;
    const int i = column - first;
    return funnel_right(bitmap[i / 32], bitmap[i / 32 + 1], i % 32) & ((1u << count) - 1);
  }
};

DEVICE_FN void clear_bitmap(uint32_t* bitmap, int columns, int thread, int threads) {
  for (int i = thread; i < bitmap_words(columns); i += threads) bitmap[i] = 0;
}
DEVICE_FN void mark_kept(const Rows& rows, int n, uint32_t* bitmap, int first, int end, int thread, int threads) {
  for (int64_t i = rows.crow[n] + thread; i < rows.crow[n + 1]; i += threads) {
    const int64_t column = rows.col[i] - rows.id_offset;
    if (column >= first && column < end) set_bits(bitmap + (column - first) / 32, 1u << ((column - first) % 32));
  }
}

// ---- stores ---------------------------------------------------------------------------------------------------------------------------

DEVICE_FN void put(float* to, float x) { *to = x; }
DEVICE_FN void put(Bf16* to, float x) { to->bits = uint16_t(two_bf16(x, 0)); }
DEVICE_FN void put(Fp16* to, float x) { to->bits = uint16_t(two_fp16(x, 0)); }

// Four numbers into a pack, from element `at` on.
DEVICE_FN void put_four(Pack& to, int, const float (&x)[4], float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to.word[i] = bits_of_float(x[i]);
}
DEVICE_FN void put_four(Pack& to, int at, const float (&x)[4], Bf16) {
  to.word[at / 2] = two_bf16(x[0], x[1]), to.word[at / 2 + 1] = two_bf16(x[2], x[3]);
}
DEVICE_FN void put_four(Pack& to, int at, const float (&x)[4], Fp16) {
  to.word[at / 2] = two_fp16(x[0], x[1]), to.word[at / 2 + 1] = two_fp16(x[2], x[3]);
}

// Columns first … end − 1 of a row, seen from where its gradient goes: single ones up to a multiple of 16 bytes, packs, single ones.
template <class T>
struct Pieces {
  static constexpr int VECTOR = 16 / int(sizeof(T));
  int first, end, head, packs;
  DEVICE_FN Pieces(const T* out, int first_, int end_) : first(first_), end(end_) {
    const int over = int(reinterpret_cast<uintptr_t>(out + first) & 15) / int(sizeof(T));
    head = smaller_of(over ? VECTOR - over : 0, end - first);
    packs = (end - first - head) / VECTOR;
  }
  DEVICE_FN int body() const { return first + head; }
  DEVICE_FN int tail() const { return body() + packs * VECTOR; }
};

// One warp, one segment: zeros.
template <class T>
DEVICE_FN void write_zeros(T* out, int first, int end) {
  const Pieces<T> pieces(out, first, end);
  const int lane = lane_index();
  if (lane < pieces.head) put(out + first + lane, 0);
  for (int i = lane; i < pieces.packs; i += WARP) store_streamed(out + pieces.body() + i * Pieces<T>::VECTOR, Pack{});
  if (lane < end - pieces.tail()) put(out + pieces.tail() + lane, 0);
}

// One warp, one segment. `bytes` are the logits from column `first` on.
template <class T, bool GENERAL, Memory FROM>
DEVICE_FN void write_gradient(const Bytes& bytes, T* out, int first, int end, const Reading& how, const RowGradient& row,
                              const KeptColumns& kept) {
  constexpr int V = Pieces<T>::VECTOR, LOADS = FROM == SHARED ? 1 : 4;  // in flight, of a lane
  const Pieces<T> pieces(out, first, end);
  const int lane = lane_index();
  auto single = [&](int column) {
    const float z[1] = {number(*reinterpret_cast<const T*>(bytes.aligned + bytes.shift + (column - first) * int(sizeof(T))))};
    float dz[1];
    gradient_of<GENERAL>(z, column, how, row, kept.at(column, 1), dz);
    put(out + column, dz[0]);
  };
  if (lane < pieces.head) single(first + lane);
  const int offset = bytes.shift + pieces.head * int(sizeof(T));
#pragma unroll 1
  for (int from = lane; from < pieces.packs; from += LOADS * WARP) {
    Pack read[LOADS] = {};
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      if (from + i * WARP < pieces.packs) read[i] = load_at<FROM>(bytes.aligned, offset + (from + i * WARP) * 16);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      if (from + i * WARP >= pieces.packs) continue;
      const int column = pieces.body() + (from + i * WARP) * V;
      const uint32_t kept_here = kept.at(column, V);
#pragma unroll
      for (int half = 0; half < V; half += 4) {  // four at a time: registers
        float z[4], dz[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) z[j] = element<T>(read[i], half + j);
        gradient_of<GENERAL>(z, column + half, how, row, kept_here >> half & 15u, dz);
        put_four(read[i], half, dz, T());
      }
      store_streamed(out + column, read[i]);
    }
  }
  if (lane < end - pieces.tail()) single(pieces.tail() + lane);
}

}  // namespace urlvr::cuda
