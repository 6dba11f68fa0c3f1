// The rows of a policy loss with one term a token: what each weighs before its log-prob is known, and what they come to afterwards.
#include "policy_loss.h"

#include "ops.h"

namespace urlvr::cpu {
namespace {

constexpr int64_t BLOCK = 2048;  // rows summed on their own: the sums do not depend on the number of threads

// Tokens that count in each sequence (everything is one where there is no cu_seqlens).
std::vector<int64_t> lengths_of(const bool* mask, const int64_t* cu_seqlens, int64_t sequences, int64_t rows) {
  std::vector<int64_t> lengths(sequences);
  if (cu_seqlens) {  // of a compiled graph nobody has checked them
    const bool rises = cu_seqlens[0] == 0 && cu_seqlens[sequences] == rows && std::is_sorted(cu_seqlens, cu_seqlens + sequences + 1);
    STD_TORCH_CHECK(rises, "urlvr_fast: cu_seqlens must rise from 0 to ", rows, ", the number of rows");
  }
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = cu_seqlens ? cu_seqlens[s] : 0, end = cu_seqlens ? cu_seqlens[s + 1] : rows;
    lengths[s] = mask ? std::count(mask + begin, mask + end, true) : end - begin;
  }
  return lengths;
}

template <class R>
void write_loss_rows(int64_t rows, const R* advantages, const bool* mask, const int64_t* cu_seqlens, int64_t sequences, const R* old_logp,
                     const R* ref_logp, const R* rollout_logp, const R* denominator, double number, int64_t weighing, R* lines, bool* live,
                     R* counts) {
  const std::vector<int64_t> lengths = lengths_of(mask, cu_seqlens, sequences, rows);
  int64_t tokens = 0, counting = 0;
  for (const int64_t length : lengths) tokens += length, counting += length > 0;
  counts[0] = R(tokens), counts[1] = R(counting);
  R divisor = denominator ? *denominator : R(number);
  if (weighing & COUNTED) divisor = R(weighing & BY_SEQUENCES ? counting : tokens) * divisor;
  const R inverse = reciprocal_or_0(divisor);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = cu_seqlens ? cu_seqlens[s] : 0, end = cu_seqlens ? cu_seqlens[s + 1] : rows;
    const R weight = weighing & SEQUENCE_MEAN ? inverse * reciprocal_or_0(R(lengths[s])) : inverse;
    for (int64_t n = begin; n < end; ++n) {
      const R a = advantages[weighing & PER_SEQUENCE ? s : n];
      lines[LINE_ADVANTAGE * rows + n] = a;
      lines[LINE_WEIGHT * rows + n] = weight;
      live[n] = (!mask || mask[n]) && ((weighing & REGULARISED) || a != 0);
    }
  }
  auto copy = [&](LossLine line, const R* from) {
    if (from) std::copy(from, from + rows, lines + line * rows);
    else std::fill(lines + line * rows, lines + (line + 1) * rows, R(0));
  };
  copy(LINE_REGULARISER, lines + LINE_WEIGHT * rows);
  copy(LINE_OLD, old_logp);
  copy(LINE_REF, ref_logp);
  copy(LINE_ROLLOUT, rollout_logp);
}

template <class R>
void write_objective(int64_t rows, const R* logp, const R* entropy, const R* self_certainty, const Loss<R>& loss, const bool* live,
                     const R* counts, R* metrics, R* upstream) {
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  struct Sums { double of[LOSS_SUMS] = {}; };
  std::vector<Sums> partial(blocks);
  auto block = [&](int64_t index) {
    for (int64_t n = index * BLOCK; n < std::min(rows, (index + 1) * BLOCK); ++n) {
      double gradient = 0, regulariser = 0;
      if (live[n]) {
        double line[LOSS_LINES], sums[LOSS_SUMS];
        for (int i = 0; i < LOSS_LINES; ++i) line[i] = double(loss.lines[i * rows + n]);
        const auto terms = loss_terms<double>(double(logp[n]), line, loss.numbers, loss.kind, loss.kl, loss.correction, loss.present);
        gradient = terms.gradient, regulariser = line[LINE_REGULARISER];
        row_sums<double>(terms, line[LINE_WEIGHT], regulariser, entropy ? entropy[n] : 0, self_certainty ? self_certainty[n] : 0, sums);
        add_sums(sums, partial[index].of);
      }
      if (!upstream) continue;
      for (int i = 0; i < GRADS; ++i) upstream[i * rows + n] = 0;
      upstream[LOGP * rows + n] = R(gradient);
      upstream[ENTROPY * rows + n] = R(regulariser_gradient(loss.numbers.entropy_coef, regulariser));
      upstream[SELF_CERTAINTY * rows + n] = R(regulariser_gradient(loss.numbers.self_certainty_coef, regulariser));
    }
  };
  if (blocks == 1) block(0);
  else share_out(blocks, 1, [&](int64_t begin, int64_t end) { for (int64_t i = begin; i < end; ++i) block(i); });
  Sums all;
  for (const Sums& sums : partial) add_sums(sums.of, all.of);
  finish_metrics<double>(all.of, double(counts[0]), double(counts[1]), loss.numbers, metrics);
}

// f(float or double) for the dtype of the packed lines.
template <class Function>
void with_type(const Tensor& lines, const Function& f) {
  using torch::headeronly::ScalarType;
  if (lines.scalar_type() == ScalarType::Double) return f(double());
  STD_TORCH_CHECK(lines.scalar_type() == ScalarType::Float, "urlvr_fast: the rows of a loss must be fp32 or fp64");
  f(float());
}

}  // namespace

void loss_rows(Tensor advantages, MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor old_logp, MaybeTensor ref_logp, MaybeTensor rollout_logp,
               MaybeTensor denominator, double number, int64_t weighing, Tensor lines, Tensor live, Tensor counts) {
  with_type(lines, [&](auto type) {
    using R = decltype(type);
    write_loss_rows<R>(live.numel(), static_cast<const R*>(advantages.data_ptr()), pointer<bool>(mask), pointer<int64_t>(cu_seqlens),
                       cu_seqlens ? cu_seqlens->numel() - 1 : 1, pointer<R>(old_logp), pointer<R>(ref_logp), pointer<R>(rollout_logp),
                       pointer<R>(denominator), number, weighing, static_cast<R*>(lines.data_ptr()), static_cast<bool*>(live.data_ptr()),
                       static_cast<R*>(counts.data_ptr()));
  });
}

void objective(Tensor logp, MaybeTensor entropy, MaybeTensor self_certainty, Tensor lines, Tensor live, Tensor counts, int64_t present,
               int64_t kind, int64_t kl, int64_t correction, std::vector<double> numbers, Tensor metrics, MaybeTensor upstream) {
  with_type(lines, [&](auto type) {
    using R = decltype(type);
    const Loss<R> loss{static_cast<const R*>(lines.data_ptr()), present, int(kind), int(kl), int(correction), loss_numbers(numbers)};
    write_objective<R>(live.numel(), static_cast<const R*>(logp.data_ptr()), pointer<R>(entropy), pointer<R>(self_certainty), loss,
                       static_cast<const bool*>(live.data_ptr()), static_cast<const R*>(counts.data_ptr()),
                       static_cast<R*>(metrics.data_ptr()), upstream ? static_cast<R*>(upstream->data_ptr()) : nullptr);
  });
}

}  // namespace urlvr::cpu
