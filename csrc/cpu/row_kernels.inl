// The row kernels in terms of the compiler's vector types. Included once per instruction set, with ROW_SPACE (a namespace) and ROW_BYTES
// (the width of a vector) defined, and every header already included before the instruction set was switched on.

namespace urlvr::cpu::ROW_SPACE {

#define INLINE inline __attribute__((always_inline))
#define ROW_SCALEF (ROW_BYTES == 64)  // AVX-512 multiplies by 2^n, down to 0, in one instruction

template <class R> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float V __attribute__((vector_size(ROW_BYTES)));
  typedef int32_t I __attribute__((vector_size(ROW_BYTES)));
};
template <> struct VectorOf<double> {
  typedef double V __attribute__((vector_size(ROW_BYTES)));
  typedef int64_t I __attribute__((vector_size(ROW_BYTES)));
};
template <class R> using Vec = typename VectorOf<R>::V;
template <class R> using Int = typename VectorOf<R>::I;
template <class R> constexpr int LANES = ROW_BYTES / sizeof(R);
constexpr int UNROLL = 4;  // independent accumulators hide the latency of the additions

using F = Vec<float>;
using D = Vec<double>;
using I32 = Int<float>;
typedef uint32_t U32 __attribute__((vector_size(ROW_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(ROW_BYTES / 2)));

template <class R> INLINE Vec<R> all(R value) { return Vec<R>{} + value; }
// A NaN in `a` is dropped, one in `b` stays. GCC does not see the one instruction in the comparison.
template <class R> INLINE Vec<R> maximum(Vec<R> a, Vec<R> b) { return a > b ? a : b; }
template <class R> INLINE Vec<R> minimum(Vec<R> a, Vec<R> b) { return a < b ? a : b; }
#if ROW_BYTES == 64
template <> INLINE F maximum<float>(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
template <> INLINE F minimum<float>(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
#elif ROW_BYTES == 32
template <> INLINE F maximum<float>(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
template <> INLINE F minimum<float>(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
#endif

// a · b + c. Built with -ffp-contract=off: the compiler fuses nothing by itself, so the same expression has the same bits in every kernel.
template <class V> INLINE V fma(V a, V b, V c) { return a * b + c; }
#if ROW_BYTES == 64
template <> INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif ROW_BYTES == 32
template <> INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#endif

// a · b + c, rounded once also where the processor cannot: what a large common offset of the logits hangs on.
INLINE F fma_exact(F a, F b, F c) {
#if ROW_BYTES == 16
  typedef double Wide __attribute__((vector_size(2 * ROW_BYTES)));
  Wide product = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) + __builtin_convertvector(c, Wide);
  return __builtin_convertvector(product, F);
#else
  return fma(a, b, c);
#endif
}
INLINE D fma_exact(D a, D b, D c) { return a * b + c; }

// ---- loads and stores -------------------------------------------------------------------------------------------------------------------

template <class V> INLINE V load_raw(const void* p) { V v; std::memcpy(&v, p, sizeof(V)); return v; }

INLINE F load(const float* p) { return load_raw<F>(p); }
INLINE D load(const double* p) { return load_raw<D>(p); }
template <class V> INLINE void store_raw(void* p, V v) { std::memcpy(p, &v, sizeof(V)); }
INLINE void store(float* p, F v) { store_raw(p, v); }
INLINE void store(double* p, D v) { store_raw(p, v); }

// Conversions round to nearest even. A NaN that goes to bf16 must have its last bits clear (as the processor's own have): see `canonical`.
#if ROW_BYTES == 64
INLINE U32 widen(U16 h) { return (U32)_mm512_cvtepu16_epi32((__m256i)h); }
INLINE U16 shorten(U32 u) { return (U16)_mm512_cvtepi32_epi16((__m512i)u); }
INLINE F load(const fp16* p) { return (F)_mm512_cvtph_ps(load_raw<__m256i>(p)); }
INLINE void store(fp16* p, F v) { store_raw(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#elif ROW_BYTES == 32
INLINE U32 widen(U16 h) { return (U32)_mm256_cvtepu16_epi32((__m128i)h); }
INLINE U16 shorten(U32 u) { return __builtin_convertvector(u, U16); }
INLINE F load(const fp16* p) { return (F)_mm256_cvtph_ps(load_raw<__m128i>(p)); }
INLINE void store(fp16* p, F v) { store_raw(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#else
INLINE U32 widen(U16 h) { return __builtin_convertvector(h, U32); }
INLINE U16 shorten(U32 u) { return __builtin_convertvector(u, U16); }
INLINE F load(const fp16* p) {
  U32 h = widen(load_raw<U16>(p)), magnitude = (h & 0x7fffu) << 13;
  F value = (F)magnitude * 0x1p112f;  // moves the exponent's bias; subnormals come out right
  U32 special = (U32)(magnitude >= (0x7c00u << 13));
  U32 bits = ((U32)value & ~special) | ((magnitude | 0x7f800000u) & special);
  return (F)(bits | ((h & 0x8000u) << 16));
}
INLINE void store(fp16* p, F v) {
  U32 u = (U32)v, sign = (u >> 16) & 0x8000u;
  F magnitude = (F)(u & 0x7fffffffu);
  // Adding 2^(e + 13) for the exponent e, but at least that of the smallest normal number, rounds to the grid of fp16.
  U32 exponent = (U32)magnitude & 0x7f800000u;
  const U32 least = U32{} + 0x38800000u;  // 2^-14
  exponent = exponent > least ? exponent : least;
  F grid = (F)(exponent + (13u << 23));  // its last bit is worth 2^(e − 10)
  F rounded = (magnitude + grid) - grid;
  F scaled = rounded * 0x1p-112f;  // exact: a number of fp16, whose bits are these, shifted
  U32 half = (U32)scaled >> 13;
  U32 over = (U32)(rounded >= 65520.0f), nan = (U32)(v != v);
  half = (half & ~over) | (0x7c00u & over);
  half = (half & ~nan) | (0x7e00u & nan);
  store_raw(p, shorten(half | sign));
}
#endif
INLINE F load(const bf16* p) { return (F)(widen(load_raw<U16>(p)) << 16); }
INLINE U32 rounded_bits(F v) {  // the upper half is bf16
  U32 u = (U32)v;
  return u + 0x7fffu + ((u >> 16) & 1u);
}
INLINE void store(bf16* p, F v) { store_raw(p, shorten(rounded_bits(v) >> 16)); }

// Two vectors at once. The order of the columns in them does not matter where each is treated alike: of bf16 the even columns make one, the
// odd ones the other, which costs no shuffle.
template <class T, class V> INLINE void load_two(const T* p, V& a, V& b) { a = load(p), b = load(p + sizeof(V) / sizeof(a[0])); }
template <class T, class V> INLINE void store_two(T* p, V a, V b) { store(p, a), store(p + sizeof(V) / sizeof(a[0]), b); }
INLINE void load_two(const bf16* p, F& even, F& odd) {
  U32 both = load_raw<U32>(p);
  even = (F)(both << 16), odd = (F)(both & 0xffff0000u);
}
INLINE void store_two(bf16* p, F even, F odd) { store_raw(p, (rounded_bits(even) >> 16) | (rounded_bits(odd) & 0xffff0000u)); }

template <class T, class R>
T narrow(R value) {
  T out[LANES<R>];
  store(out, all<R>(value));
  return out[0];
}

template <class T, class R>
R point_value(const T* z) {
  T one[LANES<R>] = {z[0]};
  return load(one)[0];
}

// ---- functions --------------------------------------------------------------------------------------------------------------------------

// 2^f for |f| <= 1/2, relative error below 1e-7, and exactly 1 at 0.
INLINE F two_to_the(F f) {
  F p = fma(f, all<float>(1.3269614428e-3f), all<float>(9.6712941304e-3f));
  p = fma(p, f, all<float>(5.5507108569e-2f));
  p = fma(p, f, all<float>(2.4022246897e-1f));
  p = fma(p, f, all<float>(6.9314700365e-1f));
  return fma(p, f, all<float>(1.0f));
}

// 2^y for the sums, y <= about 1, relative error below 5e-7. Far below 0 it is 0 or too small to tell. `clamped` is y, or a finite number
// where y is −inf, so that 2^y · clamped is nothing and not NaN; with FINITE, −inf may make that NaN, and the bits for all
// else are the same. Multiplications are what the processor is short of: 2^(j/16) comes out of a register, which leaves a parabola.
#if ROW_BYTES == 64
template <bool FINITE> INLINE F power(F y, F& clamped) {
  const __m512 sixteenths = _mm512_setr_ps(1, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                                           1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f,
                                           1.91520656f);
  const F magic = all<float>(786432.0f);  // 1.5 · 2^19: adding it rounds to sixteenths, and j then stands in the last four bits
  clamped = FINITE ? y : maximum<float>(all<float>(-160.0f), y);
  F shifted = clamped + magic, n = shifted - magic, f = clamped - n;
  F p = fma(fma(f, all<float>(2.4022747576e-1f), all<float>(6.9318771362e-1f)), f, all<float>(1.0f));
  F root = (F)_mm512_permutexvar_ps((__m512i)shifted, sixteenths);
  return (F)_mm512_scalef_ps((__m512)(p * root), (__m512)n);  // which takes the whole part of n
}
#else
template <bool> INLINE F power(F y, F& clamped) {
  const F magic = all<float>(12582912.0f);
  clamped = maximum<float>(all<float>(-125.0f), y);
  F shifted = clamped + magic, n = shifted - magic;
  return (F)((I32)two_to_the(clamped - n) + ((I32)shifted << 23));
}
#endif
template <bool> INLINE D power(D y, D& clamped) {
  clamped = maximum<double>(all<double>(-2e4), y);
  D out;
  for (int i = 0; i < LANES<double>; ++i) out[i] = std::exp2(clamped[i]);
  return out;
}

// e^x for x <= about 1, relative error below 1.5e-7: 2^n · 2^f with a polynomial for 2^f, |f| <= 1/2. NaN stays. `clamped` is x, or where
// that is below anything e^x can tell from 0 a finite number, so that e^x · clamped is 0 and not NaN for −inf.
INLINE F exponential(F x, F& clamped) {
  const F magic = all<float>(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer, which then stands in the last bits
  clamped = maximum<float>(all<float>(ROW_SCALEF ? -110.0f : -87.3f), x);
  const F log2e = all<float>(1.44269504088896341f);
  F shifted = fma(clamped, log2e, magic);
  F n = shifted - magic;
#if ROW_BYTES == 16  // no fused multiplication: the product would be rounded, so n is taken out before it, as n · ln 2 in two parts
  F f = ((clamped - n * 0.693359375f) + n * 2.12194440e-4f) * log2e;
#else
  F f = fma(clamped, log2e, -n);
#endif
  F p = two_to_the(f);
#if ROW_SCALEF
  return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  F result = (F)((I32)p + ((I32)shifted << 23));  // the low bits of `shifted` are n
  return x < all<float>(-87.3f) ? F{} : result;
#endif
}
INLINE D exponential(D x, D& clamped) {
  clamped = maximum<double>(all<double>(-1e4), x);
  D out;
  for (int i = 0; i < LANES<double>; ++i) out[i] = std::exp(clamped[i]);
  return out;
}

// tanh y and 1 − tanh² y, the latter without cancellation.
INLINE void tanh_and_slope(F y, F& tanh, F& slope) {
  F size = (F)((I32)y & 0x7fffffff);
  F unused, q = exponential(size * -2.0f, unused);
  F far = (1.0f - q) / (1.0f + q);
  F square = y * y;
  F p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  F near = p * square * size + size;
  F absolute = size < all<float>(0.625f) ? near : far;
  slope = size < all<float>(0.625f) ? 1.0f - near * near : 4.0f * q / ((1.0f + q) * (1.0f + q));
  tanh = (F)((I32)absolute | ((I32)y & (int32_t)0x80000000));
}
INLINE void tanh_and_slope(D y, D& tanh, D& slope) {
  for (int i = 0; i < LANES<double>; ++i) {
    double e = std::exp(-2 * std::fabs(y[i]));
    tanh[i] = std::tanh(y[i]);
    slope[i] = 4 * e / ((1 + e) * (1 + e));
  }
}

// x of the vector z where it is not plain, whose bias lies at `bias` (null: none), and the softcap's slope.
template <class R>
INLINE Vec<R> read(Vec<R> z, const R* bias, const Reading<R>& how, Vec<R>& slope) {
  Vec<R> y = z * how.scale;
  if (bias) y = y + load(bias);
  if (how.softcap > 0) {
    tanh_and_slope(y / how.softcap, y, slope);
    y *= how.softcap;
  }
  return y / how.temperature;
}

// ---- sums -------------------------------------------------------------------------------------------------------------------------------

// In double, and not one after the other: 64 additions that wait for each other cost as much as a fifth of a segment.
INLINE D widened(F v) {
  typedef float Half __attribute__((vector_size(ROW_BYTES / 2)));
  Half half[2];
  std::memcpy(half, &v, sizeof v);
  return __builtin_convertvector(half[0], D) + __builtin_convertvector(half[1], D);
}
INLINE D widened(D v) { return v; }
template <class R>
INLINE double lane_sum(const Vec<R> (&v)[UNROLL]) {
  static_assert(UNROLL == 4);
  const D four = (widened(v[0]) + widened(v[1])) + (widened(v[2]) + widened(v[3]));
  double sum = 0;
  for (int i = 0; i < LANES<double>; ++i) sum += four[i];
  return sum;
}
template <class R>
INLINE R lane_maximum(const Vec<R> (&v)[UNROLL]) {
  const Vec<R> one = maximum<R>(maximum<R>(v[0], v[1]), maximum<R>(v[2], v[3]));
  R m = -infinity<R>();
  for (int i = 0; i < LANES<R>; ++i) m = one[i] > m ? one[i] : m;
  return m;
}

// A segment in scratch: y, which is the logit itself where it is plain and x where it is not. The sums are made of (x − m) · log2 e, one
// multiplication and addition that is rounded once however large x and m are.
template <class R>
struct Source {
  const R* y;
  Vec<R> factor, minus_m;
  Vec<R> at(int64_t j) const { return fma_exact(load(y + j), factor, minus_m); }
};
constexpr double LOG2_E = 1.44269504088896340736, LN_2 = 0.69314718055994530942;

// The sums of a segment; the two largest x are the two largest of the candidates.
struct Segment : Sums<double> {
  double first = -infinity<double>();
  void add_candidate(double x) {
    if (x > first) second = first, first = x;
    else if (x > second) second = x;
  }
};

// Add the sums over n elements, a multiple of UNROLL vectors.
template <bool FINITE, bool T_, bool TOTAL, bool RARE, class R>
INLINE void accumulate(const Source<R>& source, int64_t n, Segment& out) {
  constexpr int W = LANES<R>, STEP = UNROLL * W;
  constexpr int64_t STRETCH = 64 * STEP;  // additions in a row in one lane, of which rounding would make more and more of an error
  Vec<R> s2[UNROLL] = {}, top[UNROLL], second[UNROLL];
  for (int u = 0; u < UNROLL; ++u) top[u] = second[u] = all<R>(-infinity<R>());
  for (int64_t begin = 0; begin < n; begin += STRETCH) {
    Vec<R> s[UNROLL] = {}, t[UNROLL] = {}, sum[UNROLL] = {};
    const int64_t end = begin + STRETCH < n ? begin + STRETCH : n;
    for (int64_t j = begin; j < end; j += STEP)
      for (int u = 0; u < UNROLL; ++u) {
        Vec<R> d = source.at(j + u * W), clamped, e = power<FINITE>(d, clamped);
        s[u] += e;
        if (T_) t[u] = fma(e, clamped, t[u]);
        if (TOTAL) sum[u] += d;
        if (RARE) {
          s2[u] = fma(e, e, s2[u]);
          second[u] = maximum<R>(minimum<R>(d, top[u]), second[u]);
          top[u] = maximum<R>(d, top[u]);
        }
      }
    out.s += lane_sum<R>(s);
    if (T_) out.t += lane_sum<R>(t);
    if (TOTAL) out.total += lane_sum<R>(sum);
  }
  if (!RARE) return;
  out.s2 += lane_sum<R>(s2);
  for (int u = 0; u < UNROLL; ++u)
    for (int i = 0; i < W; ++i)
      for (int k = 0; k < 2; ++k) out.add_candidate(k ? second[u][i] : top[u][i]);
}

// Total and number of the finite ones.
template <class R>
void finite_total(const Source<R>& source, int64_t begin, int64_t end, Segment& out) {
  constexpr int W = LANES<R>;
  for (int64_t j = begin; j < end; j += W) {
    Vec<R> d = source.at(j);
    for (int i = 0; i < W && j + i < end; ++i)
      if (d[i] != -infinity<R>()) out.total += d[i], out.finite += 1;
  }
}

// Of n elements; behind them −inf up to a multiple of UNROLL vectors, which adds nothing to s and t.
template <bool T_, bool TOTAL, bool RARE, class R>
void sums_of(const Source<R>& source, int64_t n, Segment& out) {
  constexpr int STEP = UNROLL * LANES<R>;
  const int64_t whole = n / STEP * STEP;
  const Segment none = out;
  accumulate<true, T_, TOTAL, RARE, R>(source, whole, out);
  if (out.s != out.s || out.t != out.t) {  // a −inf (or a NaN, which will be back)
    out = none;
    accumulate<false, T_, TOTAL, RARE, R>(source, whole, out);
  }
  const Source<R> rest{source.y + whole, source.factor, source.minus_m};
  if (whole < n) accumulate<false, T_, false, RARE, R>(rest, STEP, out);
  out.finite = double(n);
  if (!TOTAL) return;
  if (out.total > -infinity<double>()) {
    out.finite = double(whole);
    finite_total(source, whole, n, out);
  } else {
    out.total = out.finite = 0;
    finite_total(source, 0, n, out);
  }
}

// Write y of n columns to scratch, −inf behind them, and return the largest. The order within a step is that of load_two where nothing
// else has an order: what is added up does not need one.
template <bool PLAIN, class T, class R>
INLINE R fill(const T* z, const R* bias, int64_t n, const Reading<R>& how, R* y) {
  constexpr int W = LANES<R>, STEP = UNROLL * W;
  Vec<R> top[UNROLL], slope;
  for (auto& v : top) v = all<R>(-infinity<R>());
  auto of = [&](const T* at, const R* bias_at) { return PLAIN ? load(at) : read<R>(load(at), bias_at, how, slope); };
  int64_t j = 0;
  for (; j + STEP <= n; j += STEP)
    for (int u = 0; u < UNROLL; u += 2) {
      const int64_t k = j + u * W, l = k + W;
      Vec<R> a, b;
      if constexpr (PLAIN) load_two(z + k, a, b);
      else a = of(z + k, bias ? bias + k : nullptr), b = of(z + l, bias ? bias + l : nullptr);
      store(y + k, a), store(y + l, b);
      top[u] = maximum<R>(a, top[u]), top[u + 1] = maximum<R>(b, top[u + 1]);
    }
  for (const int64_t end = j + STEP; j < n; j += W) {
    T rest[W] = {};
    R rest_bias[W] = {};
    const int64_t left = n - j < W ? n - j : W;
    std::memcpy(rest, z + j, left * sizeof(T));
    if (bias) std::memcpy(rest_bias, bias + j, left * sizeof(R));
    store(y + j, of(rest, bias ? rest_bias : nullptr));
    if (j + W >= n)
      for (int64_t k = n; k < end; ++k) y[k] = -infinity<R>();
    top[0] = maximum<R>(load(y + j), top[0]);
  }
  return lane_maximum<R>(top);
}

// The first of n columns that holds `value`; n where none does.
template <class T, class R>
int64_t column_of(const T* z, int64_t n, R value) {
  constexpr int W = LANES<R>;
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const Int<R> same = load(z + j) == all<R>(value);
    for (int i = 0; i < W; ++i)
      if (same[i]) return j + i;
  }
  while (j < n && point_value<T, R>(z + j) != value) ++j;
  return j;
}

// From sums of 2^d and d, d = (x − m) log2 e with m rounded in that base, to sums of e^(x − m) and x − m with m rounded in base e: m moves
// by `shift`, which is no more than its rounding.
INLINE void to_base_e(Segment& out, double shift) {
  const double by = 1 + shift + shift * shift / 2;
  out.t = by * (LN_2 * out.t + shift * out.s);
  out.s *= by;
  out.s2 *= by * by;
  out.total = LN_2 * out.total + shift * out.finite;
  out.second = out.second * LN_2 + shift + safe(out.m);
}

template <class T, class R>
Sums<double> segment(const T* z, int64_t first, int64_t n, const Reading<R>& how, int64_t flags) {
  alignas(64) R y[SEGMENT + UNROLL * LANES<R>];
  const R* bias = how.bias ? how.bias + first : nullptr;
  R top = how.plain ? fill<true, T, R>(z + first, bias, n, how, y) : fill<false, T, R>(z + first, bias, n, how, y);
  const double factor = how.plain ? double(how.factor) : 1.0;
  const R by = R(factor * LOG2_E);
  if (top * by == -infinity<R>() && top != -infinity<R>()) {  // all x here are beyond the lowest number, as logits masked by that one are
    for (int64_t i = 0; i < n; ++i) y[i] = -infinity<R>();
    top = -infinity<R>();
  }
  const R m2 = safe(top * by);
  Segment out;
  out.m = R(top * factor);
  const Source<R> source{y, all<R>(by), all<R>(-m2)};
  const bool t = wants_t(flags), total = flags & NEEDS_TOTAL;
  if (flags & NEEDS_RARE) sums_of<true, true, true, R>(source, n, out);
  else if (t && total) sums_of<true, true, false, R>(source, n, out);
  else if (t) sums_of<true, false, false, R>(source, n, out);
  else if (total) sums_of<false, true, false, R>(source, n, out);
  else sums_of<false, false, false, R>(source, n, out);
  const double at_top = double(top) * double(by) - double(m2);  // what the largest logit has become, instead of 0
  to_base_e(out, top == -infinity<R>() ? 0.0 : (double(top) * factor - double(out.m)) - at_top * LN_2);
  if (wants(flags, ARGMAX)) out.argmax = how.plain ? column_of(z + first, n, top) : column_of(y, n, top);
  out.argmax += first;
  return out;
}

// ---- gradient ---------------------------------------------------------------------------------------------------------------------------

template <bool PLAIN, bool B, bool D_, class R>
INLINE Vec<R> derivative(Vec<R> z, const R* bias, const Reading<R>& how, const Coefficients<R>& co) {
  Vec<R> slope = all<R>(R(1));
  Vec<R> d = PLAIN ? fma_exact(z, all<R>(how.factor), all<R>(-co.m)) : read<R>(z, bias, how, slope) - co.m;  // x − m as the statistics have it
  Vec<R> log_p, p = exponential(d - co.log_s, log_p);
  Vec<R> factor = B ? fma(log_p, all<R>(co.b), all<R>(co.a)) : all<R>(co.a);
  Vec<R> dx = D_ ? fma(p, factor, d == all<R>(-infinity<R>()) ? Vec<R>{} : all<R>(co.d)) : p * factor;
  return PLAIN ? dx : dx * slope;
}

template <bool PLAIN, bool B, bool D_, class T, class Out, class R>
INLINE void gradient_loop(const T* z, Out* out, const R* bias, int64_t n, const Reading<R>& how, const Coefficients<R>& co) {
  constexpr int W = LANES<R>;
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    if constexpr (PLAIN && std::is_same_v<T, Out>) {
      Vec<R> a, b;
      load_two(z + j, a, b);
      store_two(out + j, derivative<PLAIN, B, D_, R>(a, nullptr, how, co), derivative<PLAIN, B, D_, R>(b, nullptr, how, co));
    } else {  // the bias comes in the order of the columns
      for (int u = 0; u < 2 * W; u += W)
        store(out + j + u, derivative<PLAIN, B, D_, R>(load(z + j + u), bias ? bias + j + u : nullptr, how, co));
    }
  }
  for (; j < n; j += W) {
    int64_t left = n - j < W ? n - j : W;
    T tail[W] = {};
    R tail_bias[W] = {};
    Out result[W];
    std::memcpy(tail, z + j, left * sizeof(T));
    if (bias) std::memcpy(tail_bias, bias + j, left * sizeof(R));
    store(result, derivative<PLAIN, B, D_, R>(load(tail), bias ? tail_bias : nullptr, how, co));
    std::memcpy(out + j, result, left * sizeof(Out));
  }
}

template <class T, class Out, class R>
void gradient(const T* z, Out* out, int64_t first, int64_t n, const Reading<R>& how, const Coefficients<R>& given, R post) {
  Coefficients<R> co = given;
  co.a *= post, co.b *= post, co.d *= post;
  const R* bias = how.bias ? how.bias + first : nullptr;
  z += first, out += first;
  const bool b = co.b != 0, d = co.d != 0;
#define RUN(PLAIN)                                                               \
  if (b && d) gradient_loop<PLAIN, true, true>(z, out, bias, n, how, co);        \
  else if (b) gradient_loop<PLAIN, true, false>(z, out, bias, n, how, co);       \
  else if (d) gradient_loop<PLAIN, false, true>(z, out, bias, n, how, co);       \
  else gradient_loop<PLAIN, false, false>(z, out, bias, n, how, co);
  if (how.plain) { RUN(true) } else { RUN(false) }
#undef RUN
}

template <class T, class R>
void point(const T* z, int64_t column, const Reading<R>& how, double& x, R& slope) {
  slope = 1;
  if (how.plain) {
    x = double(point_value<T, R>(z + column)) * double(how.factor);
    return;
  }
  R bias[LANES<R>] = {how.bias ? how.bias[column] : R(0)};
  Vec<R> s = all<R>(R(1));
  x = read<R>(all<R>(point_value<T, R>(z + column)), how.bias ? bias : nullptr, how, s)[0];
  slope = s[0];
}

#define TABLE(T, R, name) \
  extern const RowKernels<T, R> name; \
  const RowKernels<T, R> name = {segment<T, R>, gradient<T, T, R>, gradient<T, R, R>, point<T, R>, narrow<T, R>};
TABLE(bf16, float, kernels_bf16)
TABLE(fp16, float, kernels_fp16)
TABLE(float, float, kernels_float)
TABLE(double, double, kernels_double)
#undef TABLE

}  // namespace urlvr::cpu::ROW_SPACE
