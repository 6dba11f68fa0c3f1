// Statistics of rows of logits and their gradient, on the CPU.
#include "ops.h"
#include "rows.h"

namespace urlvr::cpu {

template <class T, class R>
static Coefficients<double> upstream_coefficients(const Rows<T, R>& rows, int64_t n, const R* stats, const R* upstream, int64_t given) {
  double g[GRADS];
  for (int i = 0; i < GRADS; ++i) g[i] = (given >> i) & 1 ? double(upstream[i * rows.count + n]) : 0.0;
  return rows.coefficients(n, stats, g);
}

template <class T, class R>
static void write_gradients(const Rows<T, R>& rows, const R* stats, const R* upstream, int64_t given, const View<T>& out) {
  const int64_t blocks = rows.few() ? rows.segments() : 1;
  share_out(rows.count * blocks, blocks == 1 ? rows.piece() : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, block = i % blocks;
      const auto co = rows.counts(n) ? upstream_coefficients(rows, n, stats, upstream, given) : Coefficients<double>();
      const int64_t first = blocks == 1 ? 0 : block * SEGMENT;
      write_gradient(rows, n, co, out.row(n), first, blocks == 1 ? rows.columns : rows.width(block));
    }
  });
}

// Sums of dL/d(logits · scale + bias) over the rows, in row order: threads share out columns.
template <class T, class R>
static void add_bias_gradient(const Rows<T, R>& rows, const R* stats, const R* upstream, int64_t given, R* bias_grad) {
  share_out(rows.segments(), 1, [&](int64_t begin, int64_t end) {
    std::vector<R> dx(SEGMENT);
    for (int64_t block = begin; block < end; ++block)
      for (int64_t n = 0; n < rows.count; ++n) {
        if (!rows.counts(n)) continue;
        const auto co = upstream_coefficients(rows, n, stats, upstream, given);
        if (co.dead) continue;
        const T* z = rows.logits.row(n);
        const Reading<R> how = rows.reading(n);
        const int64_t first = block * SEGMENT, width = rows.width(block), id = rows.id_column(n);
        const double post = 1 / double(how.temperature);
        row_kernels<T, R>().wide_gradient(z, dx.data() - first, first, width, how, narrowed<R>(co), R(post));
        auto replace = [&](int64_t j, bool kept) {
          if (j >= first && j < first + width) dx[j - first] = column_gradient<T, R>(z, j, how, co, post, j == id, kept);
        };
        if (id >= 0) replace(id, false);
        if (rows.crow) rows.each_kept(n, [&](int64_t j) { replace(j, true); });
        for (int64_t j = 0; j < width; ++j) bias_grad[first + j] += dx[j];
      }
  });
}

void statistics(ROW_ARGUMENTS, Tensor out) {
  with_rows([&](const auto& rows) {
    using R = typename std::decay_t<decltype(rows)>::R;
    write_statistics(rows, static_cast<R*>(out.data_ptr()));
  }, ROWS);
}

void gradient(ROW_ARGUMENTS, Tensor stats, Tensor upstream, int64_t given, Tensor out, MaybeTensor bias_grad) {
  with_rows([&](const auto& rows) {
    using T = typename std::decay_t<decltype(rows)>::T;
    using R = typename std::decay_t<decltype(rows)>::R;
    const R* s = static_cast<const R*>(stats.data_ptr());
    const R* g = static_cast<const R*>(upstream.data_ptr());
    if (bias_grad) add_bias_gradient(rows, s, g, given, static_cast<R*>(bias_grad->data_ptr()));  // before the logits are overwritten
    write_gradients(rows, s, g, given, View<T>(out));
  }, ROWS);
}

}  // namespace urlvr::cpu
