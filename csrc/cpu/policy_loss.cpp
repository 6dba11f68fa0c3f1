// The rows of a policy loss: what each weighs before its log-prob is known, what a sequence's add up to, and what all come to afterwards.
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
                     const R* ref_logp, const R* rollout_logp, R divisor, R token_divisor, int64_t weighing, R* lines, bool* live,
                     R* counts) {
  const std::vector<int64_t> lengths = lengths_of(mask, cu_seqlens, sequences, rows);
  int64_t tokens = 0, counting = 0;
  for (const int64_t length : lengths) tokens += length, counting += length > 0;
  counts[0] = R(tokens), counts[1] = R(counting);
  if (weighing & COUNTED) divisor = R(weighing & BY_SEQUENCES ? counting : tokens) * divisor;
  if (weighing & TOKENS_COUNTED) token_divisor = R(tokens);
  const R inverse = reciprocal_or_0(divisor);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = cu_seqlens ? cu_seqlens[s] : 0, end = cu_seqlens ? cu_seqlens[s + 1] : rows;
    const R weight = weighing & SEQUENCE_MEAN ? inverse * reciprocal_or_0(R(lengths[s])) : inverse;
    bool alive = weighing & REGULARISED;  // all of the sequence
    double sum = 0;
    auto advantage = [&](int64_t n) { return advantages[weighing & PER_SEQUENCE ? s : n]; };
    for (int64_t n = begin; weighing & JOINED && n < end; ++n) {
      if (mask && !mask[n]) continue;
      alive = alive || advantage(n) != 0;
      sum += advantage(n);
    }
    for (int64_t n = begin; n < end; ++n) {
      const R a = advantage(n);
      lines[LINE_ADVANTAGE * rows + n] = weighing & ONE_TERM && !(weighing & PER_SEQUENCE) ? R(sum * reciprocal_or_0(double(lengths[s]))) : a;
      lines[LINE_WEIGHT * rows + n] = weight;
      live[n] = (!mask || mask[n]) && (alive || (!(weighing & JOINED) && a != 0));
    }
  }
  auto copy = [&](LossLine line, const R* from) {
    if (from) std::copy(from, from + rows, lines + line * rows);
    else std::fill(lines + line * rows, lines + (line + 1) * rows, R(0));
  };
  if (weighing & ONE_TERM) std::fill(lines + LINE_REGULARISER * rows, lines + (LINE_REGULARISER + 1) * rows, reciprocal_or_0(token_divisor));
  else copy(LINE_REGULARISER, lines + LINE_WEIGHT * rows);
  copy(LINE_OLD, old_logp);
  copy(LINE_REF, ref_logp);
  copy(LINE_ROLLOUT, rollout_logp);
  copy(LINE_RATIO, nullptr);
  copy(LINE_CORRECTION, nullptr);
}

// A line's numbers of row n.
template <class R>
void load_line(const R* lines, int64_t rows, int64_t n, double line[LOSS_LINES]) {
  for (int i = 0; i < LOSS_LINES; ++i) line[i] = double(lines[i * rows + n]);
}

template <class R>
void join_sequences(int64_t rows, const R* logp, const int64_t* cu_seqlens, int64_t sequences, const bool* which, const Loss<R>& loss, bool product,
                    R* lines) {
  auto sequence = [&](int64_t s) {
    SequenceSums<double> sums;
    for (int64_t n = cu_seqlens[s]; n < cu_seqlens[s + 1]; ++n) {
      if (which && !which[n]) continue;
      double line[LOSS_LINES];
      load_line(lines, rows, n, line);
      add_token<double>(logp ? double(logp[n]) : 0, line, loss.numbers, loss.kind, loss.correction, loss.present, product, sums);
    }
    if (sums.tokens == 0) return;
    for (int64_t n = cu_seqlens[s]; n < cu_seqlens[s + 1]; ++n) {
      if (loss.present & HAS_RATIO) lines[LINE_RATIO * rows + n] = R(sequence_ratio(sums));
      if (loss.present & HAS_CORRECTION) lines[LINE_CORRECTION * rows + n] = R(sequence_correction(sums, loss.numbers, loss.correction, product));
    }
  };
  share_out(sequences, 1, [&](int64_t begin, int64_t end) { for (int64_t s = begin; s < end; ++s) sequence(s); });
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
        load_line(loss.lines, rows, n, line);
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
               MaybeTensor denominator, double number, MaybeTensor token_denominator, double token_number, int64_t weighing, Tensor lines,
               Tensor live, Tensor counts) {
  with_type(lines, [&](auto type) {
    using R = decltype(type);
    const R divisor = denominator ? *pointer<R>(denominator) : R(number);
    const R token_divisor = token_denominator ? *pointer<R>(token_denominator) : R(token_number);
    write_loss_rows<R>(live.numel(), static_cast<const R*>(advantages.data_ptr()), pointer<bool>(mask), pointer<int64_t>(cu_seqlens),
                       cu_seqlens ? cu_seqlens->numel() - 1 : 1, pointer<R>(old_logp), pointer<R>(ref_logp), pointer<R>(rollout_logp),
                       divisor, token_divisor, weighing, static_cast<R*>(lines.data_ptr()), static_cast<bool*>(live.data_ptr()),
                       static_cast<R*>(counts.data_ptr()));
  });
}

void join(MaybeTensor logp, Tensor cu_seqlens, MaybeTensor which, int64_t present, int64_t kind, int64_t correction, bool product,
          std::vector<double> numbers, Tensor lines) {
  with_type(lines, [&](auto type) {
    using R = decltype(type);
    R* of_rows = static_cast<R*>(lines.data_ptr());
    const int64_t rows = lines.size(1), sequences = cu_seqlens.numel() - 1;
    const int64_t* cuts = static_cast<const int64_t*>(cu_seqlens.data_ptr());
    for (int64_t s = 0; s < sequences; ++s) {
      const bool rises = 0 <= cuts[s] && cuts[s] <= cuts[s + 1] && cuts[s + 1] <= rows;
      STD_TORCH_CHECK(rises, "urlvr_fast: cu_seqlens must rise from 0 to ", rows, ", the number of rows");
    }
    const Loss<R> loss{of_rows, present, int(kind), NO_KL, int(correction), loss_numbers(numbers)};
    join_sequences<R>(rows, pointer<R>(logp), cuts, sequences, pointer<bool>(which), loss, product, of_rows);
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
