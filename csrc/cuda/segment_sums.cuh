// From logits to the sums of a row: a warp takes a segment, or a part of a keep set; what they leave is merged in index order.
#pragma once

#include "rows.cuh"

namespace urlvr::cuda {

// What the inner loop adds up, each with everything before it.
enum Wanted { S, T_TOO, TOTAL_TOO, EVERYTHING };
inline Wanted wanted_of(int64_t flags) {
  if (flags & NEEDS_RARE) return EVERYTHING;
  if (flags & NEEDS_TOTAL) return TOTAL_TOO;
  return wants_t(flags) ? T_TOO : S;
}

// The sums of one segment, and of one part of a keep set. They cross between warps, blocks and kernels as words.
struct alignas(16) Partial {
  float m, s, t, total, finite, s2, second;
  int argmax;  // a column of these logits
};
struct alignas(16) KeepPartial { float m, s, t, id; };
constexpr int PARTIAL_WORDS = sizeof(Partial) / 4, KEEP_WORDS = sizeof(KeepPartial) / 4;
constexpr int KEEP_PARTS = 8;

// ---- a lane's share of a segment ------------------------------------------------------------------------------------------------------

template <class T, bool GENERAL>
struct Values {
  using Cut = Segments<T, GENERAL>;
  uint32_t word[32];  // pairs of logits, or y as floats

  DEVICE_FN float y(int i) const {
    if constexpr (!Cut::PAIRS) return float_of_bits(word[i]);
    else return from_bits(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xffffu, T());
  }
  // Element i's column is this, a constant once loops are unrolled, and `lane_column`.
  static ROWS_FN int element_column(int i) { return i / Cut::VECTOR * WARP * Cut::VECTOR + i % Cut::VECTOR; }
  static DEVICE_FN int lane_column() { return lane_index() * Cut::VECTOR; }

  DEVICE_FN void set(int pack, const Pack& read, int first, int columns, const Reading& how) {
    constexpr int V = Cut::VECTOR;
#pragma unroll
    for (int i = 0; i < (Cut::PAIRS ? 4 : V); ++i) {
      if constexpr (Cut::PAIRS) word[pack * 4 + i] = read.word[i];
      else if constexpr (!GENERAL) word[pack * V + i] = read.word[i];
      else {
        const int lane_first = first + lane_column(), c = element_column(pack * V + i);
        const bool there = c < columns - lane_first;
        word[pack * V + i] = bits_of_float(there ? y_of<GENERAL>(element<T>(read, i), lane_first + c, how) : -infinity<float>());
      }
    }
  }
  // Columns that the row has not got become −inf: they add nothing to any sum.
  DEVICE_FN void cut_off(int columns_left) {
    const int left = columns_left - lane_column();
    const uint32_t none = Cut::PAIRS ? (std::is_same_v<T, Fp16> ? 0xfc00u : 0xff80u) : 0xff800000u;
#pragma unroll
    for (int i = 0; i < Cut::ELEMENTS; ++i) {
      if (element_column(i) < left) continue;
      if constexpr (Cut::PAIRS) word[i / 2] = i % 2 ? (word[i / 2] & 0xffffu) | none << 16 : (word[i / 2] & 0xffff0000u) | none;
      else word[i] = none;
    }
  }

  // `columns_left` from the segment's first column on.
  template <Memory FROM>
  DEVICE_FN void read(const Bytes& bytes, int first, int columns, const Reading& how) {
    const bool whole = columns - first >= Cut::WIDTH;
    if (whole && bytes.shift == 0) {
      Pack packs[Cut::PACKS];
#pragma unroll
      for (int i = 0; i < Cut::PACKS; ++i) packs[i] = load<FROM>(bytes.aligned + (i * WARP + lane_index()) * 16);
#pragma unroll
      for (int i = 0; i < Cut::PACKS; ++i) set(i, packs[i], first, columns, how);
      return;
    }
#pragma unroll
    for (int i = 0; i < Cut::PACKS; ++i) {
      const int at = (i * WARP + lane_index()) * 16;
      Pack low = {}, high = {};
      if (at < bytes.end) low = load<FROM>(bytes.aligned + at);
      if (bytes.shift && at + 16 < bytes.end) high = load<FROM>(bytes.aligned + at + 16);
      set(i, shifted(low, high, bytes.shift), first, columns, how);
    }
    if (!GENERAL && !whole) cut_off(columns - first);
  }

  // Before another walk over the same values: to the compiler they are new ones, so that it converts them again instead of keeping the
  // results of the first walk in twice the registers.
  DEVICE_FN void forget_conversions(uint32_t zero) {
#pragma unroll
    for (int i = 0; i < 32; ++i) word[i] ^= zero;
  }

  DEVICE_FN float largest() const {
    float out = -infinity<float>();
    if constexpr (Cut::PAIRS) {
      uint32_t two[2] = {word[0], word[1]};  // two chains
#pragma unroll
      for (int i = 2; i < 32; ++i) two[i % 2] = max_of_two(two[i % 2], word[i], T());
      const uint32_t both = max_of_two(two[0], two[1], T());
      return max_number(max_number(out, from_bits(both & 0xffffu, T())), from_bits(both >> 16, T()));
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) out = max_number(out, float_of_bits(word[i]));
      return out;
    }
  }
};

// ---- a segment ------------------------------------------------------------------------------------------------------------------------

// The rare statistics need the largest value first, so they get a loop of their own.
template <class T, bool GENERAL>
DEVICE_FN void find_largest(Values<T, GENERAL>& values, float y_max, const Reading& how, int first, Partial& out) {
  int at = -1, ties = 0;
  float below = -infinity<float>();
  values.forget_conversions(how.zero);
#pragma unroll
  for (int i = Segments<T, GENERAL>::ELEMENTS - 1; i >= 0; --i) {
    const float y = values.y(i);
    if (y == y_max) {
      at = i;
      ++ties;
    } else {
      below = max_number(below, y);
    }
  }
  out.argmax = first + warp_min(at < 0 ? INT32_MAX - first : values.element_column(at) + values.lane_column());
  below = warp_max(below);
  out.second = warp_add(ties) > 1 ? out.m : mul(below, how.factor);
}

// Sums of the segment that begins at column `first`; every lane gets them.
template <class T, bool GENERAL, Wanted WANTED>
DEVICE_FN Partial sum_values(Values<T, GENERAL>& values, const Reading& how, int first, int columns) {
  const float factor = how.factor;
  constexpr int ELEMENTS = Segments<T, GENERAL>::ELEMENTS;
  constexpr int CHAINS = 4, PAIR = 2;  // sums that do not wait for each other
  const float y_max = warp_max(values.largest());
  Partial out = {mul(y_max, factor), 0, 0, 0, 0, 0, -infinity<float>(), 0};
  const float m = safe(out.m);
  float s[CHAINS] = {}, t[PAIR] = {}, total[PAIR] = {}, s2[PAIR] = {};
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) {
    // Exact but for one rounding: a large common offset, or its product with the factor, costs no digit of the difference.
    const float d = fma(values.y(i), factor, -m);
    const float e = exp_approx(d);
    s[i % CHAINS] = add(s[i % CHAINS], e);
    // A NaN that is lost here is still in s.
    if (WANTED >= T_TOO) t[i % PAIR] = fma(e, max_number(d, LOWEST), t[i % PAIR]);
    if (WANTED >= TOTAL_TOO) total[i % PAIR] = add(total[i % PAIR], d);
    if (WANTED >= EVERYTHING) s2[i % PAIR] = fma(e, e, s2[i % PAIR]);
  }
  out.s = warp_add(add(add(s[0], s[1]), add(s[2], s[3])));
  out.finite = float(smaller_of(columns - first, Segments<T, GENERAL>::WIDTH));
  if (WANTED >= T_TOO) out.t = warp_add(add(t[0], t[1]));
  if (WANTED >= TOTAL_TOO) {
    float sum = add(total[0], total[1]);
    int finite = ELEMENTS;
    if (!(sum > -infinity<float>())) {  // rare but for the last segment: some are −inf and do not count
      sum = 0, finite = 0;
      values.forget_conversions(how.zero);
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) {
        const float y = values.y(i);
        if (y == -infinity<float>()) continue;
        sum = add(sum, fma(y, factor, -m));
        ++finite;
      }
    }
    out.total = warp_add(sum);
    out.finite = float(warp_add(finite));
  }
  if (WANTED >= EVERYTHING) {
    out.s2 = warp_add(add(s2[0], s2[1]));
    find_largest(values, y_max, how, first, out);
  }
  return out;
}

template <class T, bool GENERAL, Memory FROM>
DEVICE_FN Partial segment_sums(const Bytes& bytes, const Reading& how, int segment, int columns, Wanted wanted) {
  const int first = segment * Segments<T, GENERAL>::WIDTH;
  Values<T, GENERAL> values;
  values.template read<FROM>(bytes, first, columns, how);
  int which = wanted;
  forget(which);
  switch (which) {
    case S: return sum_values<T, GENERAL, S>(values, how, first, columns);
    case T_TOO: return sum_values<T, GENERAL, T_TOO>(values, how, first, columns);
    case TOTAL_TOO: return sum_values<T, GENERAL, TOTAL_TOO>(values, how, first, columns);
    default: return sum_values<T, GENERAL, EVERYTHING>(values, how, first, columns);
  }
}

// ---- a part of a keep set -------------------------------------------------------------------------------------------------------------

DEVICE_FN float shift_to(float m, float reference) { return m == -infinity<float>() ? LOWEST : m - safe(reference); }

// Entries i of the row's keep set with i / 32 % KEEP_PARTS = part; every lane gets the sums.
template <class T, bool GENERAL>
DEVICE_FN KeepPartial keep_sums(const Rows& rows, const T* row, int n, const Reading& how, int part) {
  float m = -infinity<float>(), s = 0, t = 0, found = 0;
  const int64_t id = rows.ids ? rows.ids[n] : -1;
  for (int64_t i = rows.crow[n] + part * WARP + lane_index(); i < rows.crow[n + 1]; i += KEEP_PARTS * WARP) {
    const int64_t global = rows.col[i], column = global - rows.id_offset;
    if (column < 0 || column >= rows.columns) continue;
    if (global == id) found += 1;
    const float y = y_of<GENERAL>(number(row[column]), int(column), how), x = mul(y, how.factor);
    if (x > m) {
      const float shift = shift_to(m, x), w = std::exp(shift);
      t = mul(w, fma(max_number(shift, LOWEST), s, t));
      s = mul(w, s);
      m = x;
    }
    const float d = fma(y, how.factor, -safe(m)), e = exp_approx(d);
    s = add(s, e);
    t = fma(e, max_number(d, LOWEST), t);
  }
  KeepPartial out;
  out.m = warp_max(m);
  const float shift = shift_to(m, out.m), w = std::exp(shift);
  out.t = warp_add(mul(w, fma(max_number(shift, LOWEST), s, t)));
  out.s = warp_add(mul(w, s));
  out.id = warp_add(found);
  return out;
}

// ---- merges ---------------------------------------------------------------------------------------------------------------------------

// By a warp, the same in every lane: each lane adds up neighbouring segments, lanes are added as a tree. `merge` of rows.h says the same
// for two at a time; with the largest maximum known beforehand every segment needs one exponential and
// the lanes need not wait for each other.
DEVICE_FN Sums<float> merge_segments(const Partial* partials, int segments) {
  const int each = (segments + WARP - 1) / WARP;
  const int begin = smaller_of(lane_index() * each, segments), end = smaller_of(begin + each, segments);
  Sums<float> out;
  for (int i = begin; i < end; ++i) out.m = max_number(out.m, partials[i].m);
  out.m = warp_max(out.m);
  int winner = INT32_MAX;
  for (int i = end - 1; i >= begin; --i) winner = partials[i].m == out.m ? i : winner;
  winner = warp_min(winner);
  for (int i = begin; i < end; ++i) {
    const Partial& p = partials[i];
    const float shift = shift_to(p.m, out.m), w = std::exp(shift);
    out.s = fma(w, p.s, out.s);
    out.t = fma(w, fma(max_number(shift, LOWEST), p.s, p.t), out.t);  // 0 · −inf has to be kept out
    out.total = add(out.total, fma(shift, p.finite, p.total));
    out.finite = add(out.finite, p.finite);
    out.s2 = fma(mul(w, w), p.s2, out.s2);
    out.second = max_number(out.second, i == winner ? p.second : p.m);
  }
  out.s = warp_add(out.s);
  out.t = warp_add(out.t);
  out.total = warp_add(out.total);
  out.finite = warp_add(out.finite);
  out.s2 = warp_add(out.s2);
  out.second = warp_max(out.second);
  out.argmax = winner < segments ? partials[winner].argmax : 0;
  return out;
}

DEVICE_FN KeepSums<float> merge_keep(const KeepPartial* parts) {
  KeepSums<float> out;
  for (int i = 0; i < KEEP_PARTS; ++i) out.m = max_number(out.m, parts[i].m);
  for (int i = 0; i < KEEP_PARTS; ++i) {
    const float shift = shift_to(parts[i].m, out.m), w = std::exp(shift);
    out.s = fma(w, parts[i].s, out.s);
    out.t = fma(w, fma(max_number(shift, LOWEST), parts[i].s, parts[i].t), out.t);
    out.id = add(out.id, parts[i].id);
  }
  return out;
}

// ---- a row's statistics ---------------------------------------------------------------------------------------------------------------

DEVICE_FN bool counts(const Rows& rows, int n) { return !rows.mask || rows.mask[n]; }

// Column of the row's id in these logits, −1 where it lies in another shard or nowhere.
DEVICE_FN int id_column(const Rows& rows, int n) {
  if (!rows.ids) return -1;
  const int64_t column = rows.ids[n] - rows.id_offset;
  return column >= 0 && column < rows.columns ? int(column) : -1;
}

template <class T, bool GENERAL>
DEVICE_FN float x_at_id(const Rows& rows, int n, const Reading& how) {
  const int column = id_column(rows, n);
  if (column < 0) return -infinity<float>();
  return mul(y_of<GENERAL>(number(row_of<T>(rows, n)[column]), column, how), how.factor);
}

// By one lane, from merged sums into a column of the packed result.
DEVICE_FN void finish_row(const Rows& rows, int n, Sums<float> sums, const KeepSums<float>& keep, float x_id, float* out, int64_t stride) {
  const bool bad_id = rows.ids && (rows.ids[n] < 0 || rows.ids[n] >= rows.total);
  sums.argmax += rows.id_offset;
  if (rows.flags & RAW) write_raw(sums, x_id, bad_id, keep, out, stride);
  else write_stats(sums, x_id, bad_id, rows.crow != nullptr, keep, rows.flags, out, stride);
}

}  // namespace urlvr::cuda
