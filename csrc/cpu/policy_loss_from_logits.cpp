// A policy loss whose rows are not joined, its gradient by the logits made while the row is in the cache: one read and one write of memory.
#include "ops.h"
#include "policy_loss.h"
#include "rows.h"

namespace urlvr::cpu {

// Upstream gradients of row n from its statistics; returns the power of two that they were divided by (1 unless `scaled`).
template <class T, class R>
static double loss_gradients(const Rows<T, R>& rows, const Loss<R>& loss, int64_t n, const R* stats, bool scaled, double g[GRADS]) {
  double line[LOSS_LINES];
  for (int i = 0; i < LOSS_LINES; ++i) line[i] = double(loss.lines[i * rows.count + n]);
  for (int i = 0; i < GRADS; ++i) g[i] = 0;
  g[LOGP] = loss_terms<double>(double(stats[LOGP * rows.count + n]), line, loss.numbers, loss.kind, loss.kl, loss.correction,
                               loss.present).gradient;
  g[ENTROPY] = regulariser_gradient(loss.numbers.entropy_coef, line[LINE_REGULARISER]);
  g[SELF_CERTAINTY] = regulariser_gradient(loss.numbers.self_certainty_coef, line[LINE_REGULARISER]);
  if (!scaled) return 1;
  const double size = std::fabs(g[LOGP]) + std::fabs(g[ENTROPY]) + std::fabs(g[SELF_CERTAINTY]);
  const double power = power_of_two_below(size * std::fabs(rows.scale));
  for (int i = 0; i < GRADS; ++i) g[i] /= power;
  return power;
}

template <class T, class R>
static void policy_of(const Rows<T, R>& rows, const Loss<R>& loss, R* stats, const View<T>& out, R* row_scale) {
  auto gradient_row = [&](int64_t n, int64_t first, int64_t width) {
    Coefficients<double> co;
    double power = 1, g[GRADS];
    if (rows.counts(n)) {
      power = loss_gradients(rows, loss, n, stats, row_scale != nullptr, g);
      co = rows.coefficients(n, stats, g);
    }
    if (row_scale && first == 0) row_scale[n] = R(power);
    write_gradient(rows, n, co, out.row(n), first, width);
  };
  if (rows.few()) {  // columns are shared out, which needs the row's statistics first
    write_statistics(rows, stats);
    const int64_t segments = rows.segments();
    share_out(rows.count * segments, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gradient_row(i / segments, i % segments * SEGMENT, rows.width(i % segments));
    });
    return;
  }
  share_out(rows.count, rows.piece(), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (rows.counts(n)) {
        const Reading<R> how = rows.reading(n);
        rows.finish(n, how, rows.sums(n, how), stats);
      } else {
        write_masked(rows.flags, stats + n, rows.count);
      }
      gradient_row(n, 0, rows.columns);
    }
  });
}

void policy(ROW_ARGUMENTS, Tensor loss, int64_t present, int64_t kind, int64_t kl, int64_t correction, std::vector<double> numbers, Tensor stats,
            Tensor out, MaybeTensor row_scale) {
  with_rows([&](const auto& rows) {
    using T = typename std::decay_t<decltype(rows)>::T;
    using R = typename std::decay_t<decltype(rows)>::R;
    const Loss<R> of{static_cast<const R*>(loss.data_ptr()), present, int(kind), int(kl), int(correction), loss_numbers(numbers)};
    policy_of(rows, of, static_cast<R*>(stats.data_ptr()), View<T>(out), row_scale ? static_cast<R*>(row_scale->data_ptr()) : nullptr);
  }, ROWS);
}

}  // namespace urlvr::cpu
