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

// ---- functions --------------------------------------------------------------------------------------------------------------------------

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
  F p = fma(f, all<float>(1.3269614428e-3f), all<float>(9.6712941304e-3f));
  p = fma(p, f, all<float>(5.5507108569e-2f));
  p = fma(p, f, all<float>(2.4022246897e-1f));
  p = fma(p, f, all<float>(6.9314700365e-1f));
  p = fma(p, f, all<float>(1.0f));
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

// x of the vector z, whose bias lies at `bias` (null: none), and the softcap's slope.
template <bool PLAIN, class R>
INLINE Vec<R> read(Vec<R> z, const R* bias, const Reading<R>& how, Vec<R>& slope) {
  if (PLAIN) return z * how.factor;
  Vec<R> y = z * how.scale;
  if (bias) y = y + load(bias);
  if (how.softcap > 0) {
    tanh_and_slope(y / how.softcap, y, slope);
    y *= how.softcap;
  }
  return y / how.temperature;
}

// ---- sums -------------------------------------------------------------------------------------------------------------------------------

template <class R>
INLINE double lane_sum(const Vec<R> (&v)[UNROLL]) {
  double sum = 0;
  for (int u = 0; u < UNROLL; ++u)
    for (int i = 0; i < LANES<R>; ++i) sum += v[u][i];
  return sum;
}

// Write x of n columns to scratch, −inf behind them up to a whole step, and return the largest.
template <bool PLAIN, class T, class R>
INLINE R read_segment(const T* z, const R* bias, int64_t n, const Reading<R>& how, R* x) {
  constexpr int W = LANES<R>, STEP = UNROLL * W;
  Vec<R> top[UNROLL], slope{};
  for (auto& v : top) v = all<R>(-infinity<R>());
  int64_t j = 0;
  for (; j + STEP <= n; j += STEP)
    for (int u = 0; u < UNROLL; ++u) {
      Vec<R> v = read<PLAIN, R>(load(z + j + u * W), bias ? bias + j + u * W : nullptr, how, slope);
      store(x + j + u * W, v);
      top[u] = maximum<R>(v, top[u]);
    }
  R m = -infinity<R>();
  if (j < n) {
    T tail[STEP] = {};
    R tail_bias[STEP] = {};
    std::memcpy(tail, z + j, (n - j) * sizeof(T));
    if (bias) std::memcpy(tail_bias, bias + j, (n - j) * sizeof(R));
    for (int u = 0; u < UNROLL; ++u)
      store(x + j + u * W, read<PLAIN, R>(load(tail + u * W), bias ? tail_bias + u * W : nullptr, how, slope));
    for (int64_t k = n; k < j + STEP; ++k) x[k] = -infinity<R>();
    for (int64_t k = j; k < n; ++k) m = x[k] > m ? x[k] : m;
  }
  for (int u = 0; u < UNROLL; ++u)
    for (int i = 0; i < W; ++i) m = top[u][i] > m ? top[u][i] : m;
  return m;
}

// Sums over scratch (whole steps) relative to m.
template <bool T_, bool TOTAL, bool RARE, class R>
INLINE void accumulate(const R* x, int64_t padded, R m, Sums<double>& out, double& total) {
  constexpr int W = LANES<R>, STEP = UNROLL * W;
  constexpr int64_t STRETCH = 64 * STEP;  // additions in a row in one lane, of which rounding would make more and more of an error
  Vec<R> s2[UNROLL] = {}, top[UNROLL], second[UNROLL];
  for (int u = 0; u < UNROLL; ++u) top[u] = second[u] = all<R>(-infinity<R>());
  const Vec<R> shift = all<R>(m);
  for (int64_t begin = 0; begin < padded; begin += STRETCH) {
    Vec<R> s[UNROLL] = {}, t[UNROLL] = {}, sum[UNROLL] = {};
    const int64_t end = begin + STRETCH < padded ? begin + STRETCH : padded;
    for (int64_t j = begin; j < end; j += STEP)
      for (int u = 0; u < UNROLL; ++u) {
        Vec<R> v = load(x + j + u * W), d = v - shift, clamped, e = exponential(d, clamped);
        s[u] += e;
        if (T_) t[u] = fma(e, clamped, t[u]);
        if (TOTAL) sum[u] += d;
        if (RARE) {
          s2[u] = fma(e, e, s2[u]);
          second[u] = maximum<R>(minimum<R>(v, top[u]), second[u]);
          top[u] = maximum<R>(v, top[u]);
        }
      }
    out.s += lane_sum<R>(s);
    if (T_) out.t += lane_sum<R>(t);
    if (TOTAL) total += lane_sum<R>(sum);
  }
  if (!RARE) return;
  out.s2 = lane_sum<R>(s2);
  bool largest_seen = false;
  for (int u = 0; u < UNROLL; ++u)
    for (int i = 0; i < W; ++i)
      for (int k = 0; k < 2; ++k) {
        R value = k ? second[u][i] : top[u][i];
        if (!largest_seen && value == out.m) largest_seen = true;
        else if (value > out.second) out.second = value;
      }
}

template <bool T_, bool TOTAL, bool RARE, class R>
void sums_of(const R* x, int64_t n, int64_t padded, R m, Sums<double>& out) {
  double total = 0;
  // Padding is −inf as well: it adds nothing to s and t, and the total is made again below wherever it holds a −inf.
  accumulate<T_, TOTAL, RARE, R>(x, padded, m, out, total);
  if (!TOTAL) return;
  out.finite = double(n);
  if (total > -infinity<double>()) { out.total = total; return; }
  double finite = 0;
  total = 0;
  for (int64_t j = 0; j < n; ++j)
    if (x[j] != -infinity<R>()) { total += double(x[j] - m); finite += 1; }
  out.total = total;
  out.finite = finite;
}

template <class T, class R>
Sums<double> segment(const T* z, int64_t first, int64_t n, const Reading<R>& how, int64_t flags) {
  constexpr int STEP = UNROLL * LANES<R>;
  alignas(64) R x[SEGMENT + STEP];
  const R* bias = how.bias ? how.bias + first : nullptr;
  R m = how.plain ? read_segment<true, T, R>(z + first, bias, n, how, x) : read_segment<false, T, R>(z + first, bias, n, how, x);
  Sums<double> out;
  out.m = m;
  const int64_t padded = (n + STEP - 1) / STEP * STEP;
  const R base = safe(m);
  const bool t = wants_t(flags), total = flags & NEEDS_TOTAL;
  if (flags & NEEDS_RARE) sums_of<true, true, true, R>(x, n, padded, base, out);
  else if (t && total) sums_of<true, true, false, R>(x, n, padded, base, out);
  else if (t) sums_of<true, false, false, R>(x, n, padded, base, out);
  else if (total) sums_of<false, true, false, R>(x, n, padded, base, out);
  else sums_of<false, false, false, R>(x, n, padded, base, out);
  if (wants(flags, ARGMAX)) {
    int64_t at = 0;
    while (at < n && x[at] != m) ++at;
    out.argmax = first + at;
  }
  return out;
}

// ---- gradient ---------------------------------------------------------------------------------------------------------------------------

template <bool PLAIN, bool B, bool D_, class R>
INLINE Vec<R> derivative(Vec<R> z, const R* bias, const Reading<R>& how, const Coefficients<R>& co) {
  Vec<R> slope = all<R>(R(1));
  Vec<R> x = read<PLAIN, R>(z, bias, how, slope);
  Vec<R> log_p, p = exponential((x - co.m) - co.log_s, log_p);
  Vec<R> factor = B ? fma(log_p, all<R>(co.b), all<R>(co.a)) : all<R>(co.a);
  Vec<R> dx = D_ ? fma(p, factor, x == all<R>(-infinity<R>()) ? Vec<R>{} : all<R>(co.d)) : p * factor;
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
void point(const T* z, int64_t column, const Reading<R>& how, R& x, R& slope) {
  constexpr int W = LANES<R>;
  T one[W] = {z[column]};
  R bias[W] = {how.bias ? how.bias[column] : R(0)};
  Vec<R> s = all<R>(R(1));
  x = (how.plain ? read<true, R>(load(one), bias, how, s) : read<false, R>(load(one), how.bias ? bias : nullptr, how, s))[0];
  slope = s[0];
}

template <class T, class R>
T narrow(R value) {
  T out[LANES<R>];
  store(out, all<R>(value));
  return out[0];
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
