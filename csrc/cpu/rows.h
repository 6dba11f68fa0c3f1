// The arguments of a call, unpacked from tensors, and rows of them: what the CPU ops of every file share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "row_kernels.h"

namespace urlvr::cpu {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The table of the instruction set in use: the best that this processor has, unless `use_instruction_set` chose another.
template <class T, class R> const RowKernels<T, R>& row_kernels();

// A (A, B, V) view with any leading strides; row n is [n / B][n % B].
template <class T>
struct View {
  T* data = nullptr;
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
  explicit View(const Tensor& t)
      : data(static_cast<T*>(t.data_ptr())), inner(t.size(1)), outer_stride(t.stride(0)), inner_stride(t.stride(1)) {}
  T* row(int64_t n) const { return data + n / inner * outer_stride + n % inner * inner_stride; }
};

template <class T> const T* pointer(const MaybeTensor& t) { return t ? static_cast<const T*>(t->data_ptr()) : nullptr; }

template <class T_, class R_>
struct Rows {
  using T = T_;  // of the logits
  using R = R_;  // that everything is computed and returned in
  View<const T> logits;
  int64_t count, columns;
  const R* bias;
  const int64_t* ids;
  const bool* mask;
  const R* temperatures;
  const int64_t* crow;
  const int64_t* col;
  double temperature, softcap, scale;
  int64_t id_offset, total, flags;

  bool counts(int64_t n) const { return !mask || mask[n]; }
  R temperature_of(int64_t n) const { return temperatures ? temperatures[n] : R(temperature); }

  Reading<R> reading(int64_t n) const {
    Reading<R> how;
    double t = temperatures ? double(temperatures[n]) : temperature;
    how.plain = !bias && !(softcap > 0) && scale > 0;
    how.factor = R(scale / t);
    how.scale = R(scale), how.softcap = R(softcap), how.temperature = R(t);
    how.bias = bias;
    return how;
  }

  // Column of the row's id in these logits, or −1 where it lies elsewhere.
  int64_t id_column(int64_t n) const {
    if (!ids) return -1;
    int64_t local = ids[n] - id_offset;
    return local >= 0 && local < columns ? local : -1;
  }
  // No such id, or no such temperature: callers on the CPU were checked, so this is for compiled graphs.
  bool impossible(int64_t n) const { return (ids && (ids[n] < 0 || ids[n] >= total)) || !(temperature_of(n) > 0); }

  // f(column in these logits) for every kept column that is here.
  template <class Function>
  void each_kept(int64_t n, const Function& f) const {
    for (int64_t i = crow[n]; i < crow[n + 1]; ++i) {
      int64_t local = col[i] - id_offset;
      if (local >= 0 && local < columns) f(local);
    }
  }

  int64_t segments() const { return (columns + SEGMENT - 1) / SEGMENT; }
  int64_t width(int64_t segment) const { return segment + 1 == segments() ? columns - segment * SEGMENT : SEGMENT; }
  int64_t piece() const { return std::max<int64_t>(1, 4 * SEGMENT / columns); }  // of rows: enough work to be worth taking
  // Too few rows to give every thread some: the columns are shared out instead.
  bool few() const { return count < 8 * int64_t(torch::stable::get_num_threads()); }

  Sums<double> segment(int64_t n, const Reading<R>& how, int64_t index) const {
    return row_kernels<T, R>().segment(logits.row(n), index * SEGMENT, width(index), how, flags);
  }
  Sums<double> sums(int64_t n, const Reading<R>& how) const {
    Sums<double> all;
    for (int64_t i = 0; i < segments(); ++i) all = merge(all, segment(n, how, i));
    return all;
  }

  // Write the packed statistics (or sums) of row n.
  void finish(int64_t n, const Reading<R>& how, Sums<double> sums, R* out) const {
    const T* z = logits.row(n);
    double x_id = -infinity<double>(), x;
    R slope;
    if (int64_t id = id_column(n); id >= 0) row_kernels<T, R>().point(z, id, how, x_id, slope);
    KeepSums<double> keep;
    if (crow) {
      each_kept(n, [&](int64_t j) {
        row_kernels<T, R>().point(z, j, how, x, slope);
        if (x > keep.m) keep.m = x;
        if (ids && j + id_offset == ids[n]) keep.id += 1;
      });
      each_kept(n, [&](int64_t j) {
        row_kernels<T, R>().point(z, j, how, x, slope);
        double d = x - safe(keep.m), e = std::exp(d);
        keep.s += e;
        keep.t += e == 0 ? 0 : e * d;
      });
    }
    sums.argmax += id_offset;
    if (flags & RAW) write_raw(sums, x_id, impossible(n), keep, out + n, count);
    else write_stats(sums, x_id, impossible(n), crow != nullptr, keep, flags, out + n, count);
  }

  // The gradient's scalars, from the packed statistics and the upstream gradients g of row n.
  Coefficients<double> coefficients(int64_t n, const R* stats, const double g[GRADS]) const {
    auto line = [&](int i) { return double(stats[i * count + n]); };
    return urlvr::coefficients<double>(line(ROW_MAX), line(LOG_S), line(ENTROPY), line(FINITE), line(KEEP_LOG_S), line(ID_COUNTS) != 0, g,
                                       crow != nullptr, flags);
  }
};

// A NaN from outside may have any bits; rounded to bf16 by adding to them it could turn into a number.
template <class R> R canonical(double value) { return value == value ? R(value) : nan_<R>(); }

// dx at one column with all of its terms, times post.
template <class T, class R>
R column_gradient(const T* z, int64_t column, const Reading<R>& how, const Coefficients<double>& co, double post, bool id, bool kept) {
  double x;
  R slope;
  row_kernels<T, R>().point(z, column, how, x, slope);
  if (x == -infinity<double>()) return 0;
  double log_p = (x - co.m) - co.log_s;
  double dx = std::exp(log_p) * (co.a + co.b * log_p) + co.d;
  if (id) dx += co.c;
  if (kept) {
    double log_kept = (x - co.m) - co.keep_log_s;
    dx += std::exp(log_kept) * (co.keep_a + co.keep_b * log_kept);
  }
  return canonical<R>(dx * post * slope);
}

// The dense terms as the row kernels take them.
template <class R>
Coefficients<R> narrowed(const Coefficients<double>& co) {
  Coefficients<R> out;
  out.a = canonical<R>(co.a), out.b = canonical<R>(co.b), out.d = canonical<R>(co.d);
  out.m = canonical<R>(co.m), out.log_s = canonical<R>(co.log_s);
  return out;
}

// Gradient of columns [first, first + n) of a row into `out` (the row's first column), which may be z itself.
template <class T, class R>
void write_gradient(const Rows<T, R>& rows, int64_t row, const Coefficients<double>& co, T* out, int64_t first, int64_t n) {
  if (co.dead || !rows.counts(row)) {
    std::memset(static_cast<void*>(out + first), 0, n * sizeof(T));
    return;
  }
  const T* z = rows.logits.row(row);
  const Reading<R> how = rows.reading(row);
  const double post = rows.scale / double(how.temperature);
  const auto& kernels = row_kernels<T, R>();
  // The id's and the kept columns are read before the loop writes, and written after it.
  struct Special { int64_t column; T value; };
  std::vector<Special> special;
  const int64_t id = rows.id_column(row);
  auto add = [&](int64_t j, bool kept) {
    if (j >= first && j < first + n)
      special.push_back({j, kernels.narrow(column_gradient<T, R>(z, j, how, co, post, j == id, kept))});
  };
  if (id >= 0 && co.c != 0) add(id, false);
  if (rows.crow) rows.each_kept(row, [&](int64_t j) { add(j, true); });
  kernels.gradient(z, out, first, n, how, narrowed<R>(co), R(post));
  for (const Special& s : special) out[s.column] = s.value;
}

// f(begin, end) over pieces of 0 … count − 1, which threads take as they get free: on a shared machine no two of them are equally fast.
template <class Function>
void share_out(int64_t count, int64_t piece, const Function& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < count;) f(begin, std::min(begin + piece, count));
  });
}

// The packed statistics (or sums) of every row.
template <class T, class R>
void write_statistics(const Rows<T, R>& rows, R* out) {
  if (!rows.few()) {
    share_out(rows.count, rows.piece(), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        if (!rows.counts(n)) { write_masked(rows.flags, out + n, rows.count); continue; }
        const Reading<R> how = rows.reading(n);
        rows.finish(n, how, rows.sums(n, how), out);
      }
    });
    return;
  }
  // Few rows: every thread takes some segments of some row; merged in index order afterwards they give the bits that the loop above does.
  const int64_t segments = rows.segments();
  std::vector<Sums<double>> parts(rows.count * segments);
  share_out(rows.count * segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (rows.counts(i / segments)) parts[i] = rows.segment(i / segments, rows.reading(i / segments), i % segments);
  });
  for (int64_t n = 0; n < rows.count; ++n) {
    if (!rows.counts(n)) { write_masked(rows.flags, out + n, rows.count); continue; }
    Sums<double> all;
    for (int64_t i = 0; i < segments; ++i) all = merge(all, parts[n * segments + i]);
    rows.finish(n, rows.reading(n), all, out);
  }
}

template <class T, class R>
Rows<T, R> make_rows(const Tensor& logits, const MaybeTensor& bias, const MaybeTensor& ids, const MaybeTensor& mask,
                     const MaybeTensor& temperatures, const MaybeTensor& crow, const MaybeTensor& col, double temperature, double softcap,
                     double scale, int64_t id_offset, int64_t total, int64_t flags) {
  return {View<const T>(logits), logits.size(0) * logits.size(1), logits.size(2), pointer<R>(bias), pointer<int64_t>(ids), pointer<bool>(mask),
          pointer<R>(temperatures), pointer<int64_t>(crow), pointer<int64_t>(col), temperature, softcap, scale, id_offset, total, flags};
}

// f(Rows<T, R>) for the dtype of the logits.
template <class Function, class... Arguments>
void with_rows(const Function& f, const Tensor& logits, const Arguments&... arguments) {
  using torch::headeronly::ScalarType;
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16: return f(make_rows<bf16, float>(logits, arguments...));
    case ScalarType::Half: return f(make_rows<fp16, float>(logits, arguments...));
    case ScalarType::Float: return f(make_rows<float, float>(logits, arguments...));
    case ScalarType::Double: return f(make_rows<double, double>(logits, arguments...));
    default: STD_TORCH_CHECK(false, "urlvr_fast: logits must be fp16, bf16, fp32 or fp64");
  }
}

#define ROW_ARGUMENTS                                                                                                                     \
  Tensor logits, MaybeTensor bias, MaybeTensor ids, MaybeTensor mask, MaybeTensor temperatures, MaybeTensor crow, MaybeTensor col,         \
      double temperature, double softcap, double scale, int64_t id_offset, int64_t total, int64_t flags
#define ROWS logits, bias, ids, mask, temperatures, crow, col, temperature, softcap, scale, id_offset, total, flags

}  // namespace urlvr::cpu
