// What a row of logits is reduced to, and back: the numbers that every compiled kernel shares, for the CPU and for CUDA.
//
//   x_j = softcap(z_j · scale + bias_j) / temperature,   m = max x_j,   s = Σ e^(x_j − m),   p_j = e^(x_j − m − log s),   ℓ_j = log p_j
//   dx_j = p_j (a + b ℓ_j) + c [j = id] + d [x_j finite]  (+ p'_j (keep_a + keep_b ℓ'_j) over a keep set with its own softmax p')
//
// Row maximum and log s stay apart, so that a common offset of the logits costs no digit. The kernels cut a row into segments of fixed
// width and merge them in index order: the bits of a row depend on nothing but the row.
// `urlvr_fast/ops/rows.py` says the same in PyTorch; `layout.py` beside it repeats the enums.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define ROWS_FN __host__ __device__ __forceinline__
#else
#define ROWS_FN inline
#endif

namespace urlvr {

// Lines of the packed result, (STATS, N). The first nine are what users see, the rest is kept for the gradient.
enum Stat : int {
  LOGP, LSE, ENTROPY, SELF_CERTAINTY, MEAN_LOGIT, MAX_PROB, PROB_GAP, SUM_P2, ARGMAX,
  ROW_MAX, LOG_S, FINITE, KEEP_LOG_S, ID_COUNTS, STATS
};
// Lines of the packed sums, (STATS, N) too, that a vocabulary shard hands out instead (flag RAW).
enum RawSum : int {
  RAW_M, RAW_S, RAW_T, RAW_TOTAL, RAW_FINITE, RAW_X_ID, RAW_BAD_ID, RAW_S2, RAW_SECOND, RAW_ARGMAX, RAW_KEEP_M, RAW_KEEP_S, RAW_KEEP_T, RAW_KEEP_ID
};
// Lines of the upstream gradient, (GRADS, N): the differentiable statistics, LOGP … MEAN_LOGIT. `given` has bit 1 << line where it is not 0.
constexpr int GRADS = 5;
// Bits of `flags`: 1 << LOGP … 1 << ARGMAX say what is wanted; beside them:
constexpr int64_t ENTROPY_ON_KEEP = 1 << 9;  // the entropy is that of the keep set
constexpr int64_t RAW = 1 << 10;             // write sums for a merge over shards, not statistics
constexpr int64_t NEEDS_T = 1 << ENTROPY;
constexpr int64_t NEEDS_TOTAL = (1 << SELF_CERTAINTY) | (1 << MEAN_LOGIT);
constexpr int64_t NEEDS_RARE = (1 << PROB_GAP) | (1 << SUM_P2) | (1 << ARGMAX);
ROWS_FN bool wants(int64_t flags, int stat) { return (flags >> stat) & 1; }
ROWS_FN bool wants_t(int64_t flags) { return (flags & NEEDS_T) && !(flags & ENTROPY_ON_KEEP); }

// exp(x) is 0 below this, so it may stand for −inf where that meets a probability of 0: 0 · LOWEST is 0, 0 · −inf is not.
constexpr float LOWEST = -1e20f;

template <class R> ROWS_FN R infinity() { return std::numeric_limits<R>::infinity(); }
template <class R> ROWS_FN R nan_() { return std::numeric_limits<R>::quiet_NaN(); }
template <class R> ROWS_FN R safe(R m) { return m == -infinity<R>() ? R(0) : m; }  // of a maximum over nothing but −inf

// ---- sums -------------------------------------------------------------------------------------------------------------------------------

template <class R>
struct Sums {           // over a segment, or over all that came before, relative to safe(m)
  R m = -infinity<R>();
  R s = 0;              // Σ e^(x − m)
  R t = 0;              // Σ e^(x − m) (x − m)
  R total = 0;          // Σ x − m over finite x
  R finite = 0;         // number of finite x
  R s2 = 0;             // Σ e^2(x − m)
  R second = -infinity<R>();  // second largest x
  int64_t argmax = 0;   // first column that has the largest
};

// What is in `before` has the smaller columns. Calls in index order give the same bits however the work was split.
template <class R>
ROWS_FN Sums<R> merge(const Sums<R>& before, const Sums<R>& next) {
  Sums<R> out;
  bool up = next.m > before.m;
  R m = up ? next.m : before.m, other = up ? before.m : next.m;
  out.m = m;
  // A side that is −inf throughout has sums of 0: any finite shift keeps them 0 and the product 0 · −inf out.
  R shift_a = before.m == -infinity<R>() ? R(LOWEST) : before.m - safe(m);
  R shift_b = next.m == -infinity<R>() ? R(LOWEST) : next.m - safe(m);
  R wa = shift_a == 0 ? R(1) : std::exp(shift_a), wb = shift_b == 0 ? R(1) : std::exp(shift_b);
  if (before.m == -infinity<R>() && m == -infinity<R>()) wa = wb = 1;  // nothing but −inf, or NaN sums that must survive
  out.s = wa * before.s + wb * next.s;
  // Differences of numbers near the largest are −inf or beyond LOWEST; their weight is 0, and 0 · −inf has to be kept out here too.
  R t_a = shift_a > R(LOWEST) ? shift_a : R(LOWEST), t_b = shift_b > R(LOWEST) ? shift_b : R(LOWEST);
  out.t = wa * (before.t + t_a * before.s) + wb * (next.t + t_b * next.s);
  out.total = (before.total + shift_a * before.finite) + (next.total + shift_b * next.finite);
  out.finite = before.finite + next.finite;
  out.s2 = wa * wa * before.s2 + wb * wb * next.s2;
  R seconds = before.second > next.second ? before.second : next.second;
  out.second = other > seconds ? other : seconds;
  out.argmax = up ? next.argmax : before.argmax;
  return out;
}

template <class R>
struct KeepSums {  // over the kept columns of this shard, relative to safe(m)
  R m = -infinity<R>(), s = 0, t = 0, id = 0;  // id: how often the id occurs
};

// ---- statistics -------------------------------------------------------------------------------------------------------------------------

// Write a row's column of the packed result. `x_id` is x at the id and −inf where the id lies in another shard; `has_keep` without keep
// entries is a keep set that is empty.
template <class R, class Out>
ROWS_FN void write_raw(const Sums<R>& sums, R x_id, bool bad_id, const KeepSums<R>& keep, Out* out, int64_t stride) {
  const R m = sums.s != sums.s && sums.m == -infinity<R>() ? nan_<R>() : sums.m;  // NaN and −inf only: not a row that is −inf throughout
  const R lines[STATS] = {m, sums.s, sums.t, sums.total, sums.finite, x_id, R(bad_id), sums.s2, sums.second, R(sums.argmax),
                          keep.m, keep.s, keep.t, keep.id};
  for (int i = 0; i < STATS; ++i) out[i * stride] = Out(lines[i]);
}

template <class R, class Out>
ROWS_FN void write_stats(const Sums<R>& sums, R x_id, bool bad_id, bool has_keep, const KeepSums<R>& keep, int64_t flags, Out* out, int64_t stride) {
  const R nan = nan_<R>(), inf = infinity<R>();
  R m = sums.m;
  if (sums.s != sums.s && m == -inf) m = nan;  // nothing but NaN and −inf: NaN, not a row that is −inf throughout
  bool nowhere = m == -inf || bad_id;          // no distribution, or no such id
  R log_s = nowhere ? nan : std::log(sums.s);
  R poison = log_s - log_s;                    // 0, or NaN in a row that is NaN
  R keep_m = m, keep_log_s = log_s;            // relative to keep_m
  bool id_counts = x_id != -inf;
  if (has_keep) {
    keep_m = keep.m;
    keep_log_s = (keep_m == -inf ? nan : std::log(keep.s)) + poison;
    id_counts = id_counts && keep.id > 0;
  }
  R logp = (id_counts ? x_id - keep_m : -inf) - keep_log_s;
  R entropy = (flags & ENTROPY_ON_KEEP) ? keep_log_s - keep.t / keep.s : log_s - sums.t / sums.s;
  R mean = sums.total / sums.finite;
  R lines[STATS];
  lines[LOGP] = wants(flags, LOGP) ? logp : R(0);
  lines[LSE] = m + log_s;
  lines[ENTROPY] = wants(flags, ENTROPY) ? entropy : R(0);
  lines[SELF_CERTAINTY] = wants(flags, SELF_CERTAINTY) ? log_s - mean - std::log(sums.finite) : R(0);
  lines[MEAN_LOGIT] = wants(flags, MEAN_LOGIT) ? m + mean + poison : R(0);
  lines[MAX_PROB] = std::exp(-log_s);
  lines[PROB_GAP] = wants(flags, PROB_GAP) ? (1 - std::exp(sums.second - m)) * std::exp(-log_s) : R(0);
  lines[SUM_P2] = wants(flags, SUM_P2) ? sums.s2 / (sums.s * sums.s) + poison : R(0);
  lines[ARGMAX] = log_s != log_s ? R(-1) : R(sums.argmax);
  lines[ROW_MAX] = m;
  lines[LOG_S] = log_s;
  lines[FINITE] = sums.finite;
  lines[KEEP_LOG_S] = (keep_m - m) + keep_log_s;  // relative to m
  lines[ID_COUNTS] = R(id_counts);
  for (int i = 0; i < STATS; ++i) out[i * stride] = Out(lines[i]);
}

// A row that `mask` leaves out: statistics 0, and sums that add nothing to the other shards'.
template <class Out>
ROWS_FN void write_masked(int64_t, Out* out, int64_t stride) {
  for (int i = 0; i < STATS; ++i) out[i * stride] = Out(0);
}

// ---- gradient ---------------------------------------------------------------------------------------------------------------------------

template <class R>
struct Coefficients {
  R a = 0, b = 0, c = 0, d = 0, keep_a = 0, keep_b = 0;
  R m = 0, log_s = 0, keep_log_s = 0;  // what ℓ and ℓ' are relative to
  bool dead = true;                    // the gradient is 0 and the row need not be read
};

// From a row's column of the packed statistics and of the upstream gradient g; terms whose bit is not in `given` are 0.
template <class R>
ROWS_FN Coefficients<R> coefficients(R m, R log_s, R entropy, R finite, R keep_log_s, bool id_counts, const R g[GRADS], bool has_keep, int64_t flags) {
  Coefficients<R> out;
  const bool on_keep = flags & ENTROPY_ON_KEEP;
  R g_logp = g[LOGP], g_h = g[ENTROPY], g_sc = g[SELF_CERTAINTY], g_mean = g[MEAN_LOGIT];
  R zero = 0, b_times_h = g_h == zero ? zero : -g_h * entropy;  // the entropy of a row that has none in its loss may be anything
  out.a = g[LSE] + g_sc + (has_keep ? zero : -g_logp) + (on_keep ? zero : b_times_h);
  out.b = on_keep ? zero : -g_h;
  out.c = id_counts ? g_logp : zero;
  out.d = (g_mean - g_sc) == zero ? zero : (g_mean - g_sc) / finite;
  out.keep_a = has_keep ? -g_logp + (on_keep ? b_times_h : zero) : zero;
  out.keep_b = on_keep ? -g_h : zero;
  out.m = m;
  out.log_s = log_s;
  out.keep_log_s = keep_log_s;
  // Dead: x is −inf throughout, or nothing comes from upstream. NaN compares false with 0, so a NaN row is not dead.
  bool nothing = g_logp == zero && g[LSE] == zero && g_h == zero && g_sc == zero && g_mean == zero;
  out.dead = m == -infinity<R>() || nothing;
  return out;
}

// ---- policy losses ----------------------------------------------------------------------------------------------------------------------
//
// A loss with one term a sequence is a sum over tokens too: each adds the same term, at an L-th of its weight, and the derivative by its
// log-prob is that term's by the mean log-ratio. So a row needs two numbers of its sequence, which `join` writes into the row's lines.

enum LossKind : int { REINFORCE, CLIPPED, CISPO, SAPO, GMPO };  // CLIPPED: grpo, dapo, bnpo, dr_grpo, gspo, luspo
enum KlKind : int { NO_KL, K1, K2, K3 };
enum Correction : int { NO_CORRECTION, TRUNCATE, MASK };
// Lines of the packed (LOSS_LINES, N) loss rows. The last two are the sequence's: its mean log-ratio and its rollout weight.
enum LossLine : int {
  LINE_ADVANTAGE, LINE_WEIGHT, LINE_REGULARISER, LINE_OLD, LINE_REF, LINE_ROLLOUT, LINE_RATIO, LINE_CORRECTION, LOSS_LINES
};
constexpr int64_t HAS_OLD = 1, HAS_REF = 2, HAS_ROLLOUT = 4, HAS_RATIO = 8, HAS_CORRECTION = 16;  // bits of `present`

constexpr float MAX_LOG_RATIO = 60;

template <class R>
struct LossNumbers {
  R low, high;            // of the clip range: 1 − eps_low, 1 + eps_high
  R log_delta;            // inf: no dual clip
  R beta, entropy_coef, self_certainty_coef;
  R ratio_cap, tau_pos, tau_neg, rollout_cap, rollout_floor;
};
constexpr int LOSS_NUMBERS = 11;  // in this order

template <class R> ROWS_FN R smaller(R x, R bound) { return x > bound ? bound : x; }  // NaN stays
template <class R> ROWS_FN R larger(R x, R bound) { return x < bound ? bound : x; }

// Of a token, or of a sequence: what a policy term is multiplied by, from log(old / rollout).
template <class R>
ROWS_FN R rollout_weight(R log_weight, const LossNumbers<R>& n, int correction) {
  const R w = std::exp(smaller(log_weight, R(MAX_LOG_RATIO)));
  if (correction == TRUNCATE) return smaller(w, n.rollout_cap);
  return w < n.rollout_floor || w > n.rollout_cap ? R(0) : w;
}

// What one token brings to the loss and to its metrics. The table of the losses is in reference.py.
template <class R>
struct LossTerms {
  R policy;  // the table's term, times the weight of the rollout correction
  R ratio, rollout_weight, kl, gap;  // gap: |logp − rollout_logp|
  R clipped_low, clipped_high;       // 0 or 1
  R gradient;                        // d loss / d logp
};

template <class R>
ROWS_FN LossTerms<R> loss_terms(R logp, const R row[LOSS_LINES], const LossNumbers<R>& n, int loss, int kl, int correction, int64_t present) {
  LossTerms<R> out = {};
  const bool has_old = present & HAS_OLD;
  const R a = row[LINE_ADVANTAGE];
  R raw = has_old ? logp - row[LINE_OLD] : logp - logp;  // 0, or NaN with logp
  R log_ratio = smaller(raw, R(MAX_LOG_RATIO));
  bool moves = !(raw > R(MAX_LOG_RATIO));                // a clamped log-ratio has no derivative
  const R of_token = log_ratio;
  if (present & HAS_RATIO) log_ratio = row[LINE_RATIO];
  if (loss == CLIPPED || loss == GMPO) {
    moves = moves && !(log_ratio > n.log_delta);
    log_ratio = smaller(log_ratio, n.log_delta);
  }
  const R r = log_ratio == 0 ? R(1) : R(std::exp(log_ratio));
  out.ratio = r;
  R slope;  // d policy / d logp
  if (loss == REINFORCE) {
    out.policy = -a * logp;
    slope = -a;
  } else if (loss == CISPO) {
    slope = -smaller(r, n.ratio_cap) * a;
    out.policy = slope * logp;
    out.clipped_high = r > n.ratio_cap;
  } else if (loss == SAPO) {
    R tau = a > 0 ? n.tau_pos : n.tau_neg;
    R sigma = 1 / (1 + std::exp(-tau * (r - 1)));
    out.policy = -a * 4 * sigma / tau;
    slope = moves ? -a * 4 * sigma * (1 - sigma) * r : R(0);
  } else {
    const R side = loss == GMPO ? R(std::exp(of_token)) : r;  // gmpo clips tokens, on the way to the sequence's ratio
    const bool below = side < n.low, above = side > n.high;
    const R product = r * a, clipped = (below ? n.low : above ? n.high : r) * a;
    out.policy = loss != GMPO && clipped < product ? -clipped : -product;
    out.clipped_low = below && a < 0;
    out.clipped_high = above && a > 0;
    bool pessimistic = a > 0 ? above : below;  // the clipped product is the smaller one: constant
    slope = moves && !pessimistic ? -a * r : R(0);
    if (product != product) slope = product;
  }
  out.rollout_weight = 1;
  if (correction != NO_CORRECTION) {
    const R own = (has_old ? row[LINE_OLD] : logp) - row[LINE_ROLLOUT];
    const R w = present & HAS_CORRECTION ? row[LINE_CORRECTION] : rollout_weight(own, n, correction);
    out.rollout_weight = w;
    out.policy *= w;
    slope *= w;
  }
  out.gradient = row[LINE_WEIGHT] * slope;
  if (present & HAS_REF) {
    R d = row[LINE_REF] - logp, e = std::expm1(d);
    out.kl = kl == K1 ? -d : kl == K2 ? d * d / 2 : e - d;
    if (n.beta != 0) out.gradient += n.beta * row[LINE_REGULARISER] * (kl == K1 ? R(1) : kl == K2 ? -d : -e);
  }
  if (present & HAS_ROLLOUT) out.gap = std::fabs(logp - row[LINE_ROLLOUT]);
  return out;
}

// What the tokens of a sequence add up to. `product`: the rollout weight is one of the sequence, of the product of its tokens' ratios;
// otherwise it is the mean of its tokens' weights.
template <class R>
struct SequenceSums {
  R tokens = 0, ratio = 0, correction = 0;
};
template <class R>
ROWS_FN void add_token(R logp, const R row[LOSS_LINES], const LossNumbers<R>& n, int loss, int correction, int64_t present, bool product,
                       SequenceSums<R>& sums) {
  sums.tokens += 1;
  if (present & HAS_RATIO) {
    R log_ratio = smaller(present & HAS_OLD ? logp - row[LINE_OLD] : logp - logp, R(MAX_LOG_RATIO));
    if (loss == GMPO && row[LINE_ADVANTAGE] >= 0) log_ratio = smaller(log_ratio, R(std::log(n.high)));
    else if (loss == GMPO && n.low > 0) log_ratio = larger(log_ratio, R(std::log(n.low)));
    sums.ratio += log_ratio;
  }
  if (present & HAS_CORRECTION) {
    const R log_weight = (present & HAS_OLD ? row[LINE_OLD] : logp) - row[LINE_ROLLOUT];
    sums.correction += product ? log_weight : rollout_weight(log_weight, n, correction);
  }
}
template <class R> ROWS_FN R sequence_ratio(const SequenceSums<R>& sums) { return sums.ratio / sums.tokens; }
template <class R>
ROWS_FN R sequence_correction(const SequenceSums<R>& sums, const LossNumbers<R>& n, int correction, bool product) {
  return product ? rollout_weight(sums.correction, n, correction) : sums.correction / sums.tokens;
}

// d loss / d entropy or self-certainty. A coefficient of 0 is no term at all, whatever the row's weight is.
template <class R> ROWS_FN R regulariser_gradient(R coefficient, R weight) { return coefficient == 0 ? R(0) : -coefficient * weight; }

// What the rows come to. Sums first, then the two maxima; `finish_metrics` makes of them what users see, in the lines of Metric.
enum LossSum : int {
  SUM_POLICY, SUM_KL_TERM, SUM_ENTROPY_TERM, SUM_SELF_CERTAINTY_TERM,  // weighted: parts of the loss
  SUM_LIVE, SUM_RATIO, SUM_LOW, SUM_HIGH, SUM_ROLLOUT_WEIGHT, SUM_KL, SUM_ENTROPY, SUM_SELF_CERTAINTY, SUM_GAP,
  MAX_RATIO, MAX_GAP, LOSS_SUMS
};
enum Metric : int {
  METRIC_LOSS, METRIC_POLICY, METRIC_TOKENS, METRIC_LIVE, METRIC_SEQUENCES, METRIC_RATIO, METRIC_LOW, METRIC_HIGH, METRIC_ROLLOUT_WEIGHT,
  METRIC_KL, METRIC_ENTROPY, METRIC_SELF_CERTAINTY, METRIC_GAP_MEAN, METRIC_RATIO_MAX, METRIC_GAP_MAX, METRICS
};
// Bits of how `loss_rows` weighs rows (reference.py: loss_rows).
enum Weighing : int64_t {
  PER_SEQUENCE = 1,    // an advantage a sequence, not a token
  COUNTED = 2,         // the divisor is `number` times the tokens that count in this call, or
  BY_SEQUENCES = 4,    // the sequences
  SEQUENCE_MEAN = 8,   // a term is divided by the tokens of its sequence as well
  REGULARISED = 16,    // a row with advantage 0 is not dead
  JOINED = 32,         // nor is one whose sequence has another advantage
  ONE_TERM = 64,       // a sequence's advantage is the mean over its tokens, and regularisers are divided by `token_number`, or with
  TOKENS_COUNTED = 128,  // this by the tokens that count
};

template <class R> ROWS_FN R larger_or_nan(R x, R y) { return x > y || x != x ? x : y; }
template <class R> ROWS_FN R reciprocal_or_0(R x) { return x == 0 ? R(0) : 1 / x; }  // a batch in which nothing counts has loss 0

// What a live row adds. `entropy` and `self_certainty` are 0 where there is none.
template <class R>
ROWS_FN void row_sums(const LossTerms<R>& t, R weight, R regulariser, R entropy, R self_certainty, R out[LOSS_SUMS]) {
  out[SUM_POLICY] = t.policy * weight;
  out[SUM_KL_TERM] = t.kl * regulariser;
  out[SUM_ENTROPY_TERM] = entropy * regulariser;
  out[SUM_SELF_CERTAINTY_TERM] = self_certainty * regulariser;
  out[SUM_LIVE] = 1;
  out[SUM_RATIO] = t.ratio;
  out[SUM_LOW] = t.clipped_low;
  out[SUM_HIGH] = t.clipped_high;
  out[SUM_ROLLOUT_WEIGHT] = t.rollout_weight;
  out[SUM_KL] = t.kl;
  out[SUM_ENTROPY] = entropy;
  out[SUM_SELF_CERTAINTY] = self_certainty;
  out[SUM_GAP] = t.gap;
  out[MAX_RATIO] = t.ratio;
  out[MAX_GAP] = t.gap;
}
template <class R>
ROWS_FN void add_sums(const R next[LOSS_SUMS], R into[LOSS_SUMS]) {
  for (int i = 0; i < MAX_RATIO; ++i) into[i] += next[i];
  for (int i = MAX_RATIO; i < LOSS_SUMS; ++i) into[i] = larger_or_nan(next[i], into[i]);
}

template <class R, class Out>
ROWS_FN void finish_metrics(const R sums[LOSS_SUMS], R tokens, R sequences, const LossNumbers<R>& n, Out out[METRICS]) {
  R loss = sums[SUM_POLICY];
  // A coefficient of 0 is no term at all, whatever its sum is.
  if (n.beta != 0) loss += n.beta * sums[SUM_KL_TERM];
  if (n.entropy_coef != 0) loss -= n.entropy_coef * sums[SUM_ENTROPY_TERM];
  if (n.self_certainty_coef != 0) loss -= n.self_certainty_coef * sums[SUM_SELF_CERTAINTY_TERM];
  const R each = reciprocal_or_0(sums[SUM_LIVE]);
  out[METRIC_LOSS] = Out(loss);
  out[METRIC_POLICY] = Out(sums[SUM_POLICY]);
  out[METRIC_TOKENS] = Out(tokens);
  out[METRIC_LIVE] = Out(sums[SUM_LIVE]);
  out[METRIC_SEQUENCES] = Out(sequences);
  for (int i = METRIC_RATIO; i <= METRIC_GAP_MEAN; ++i) out[i] = Out(sums[SUM_RATIO + (i - METRIC_RATIO)] * each);
  out[METRIC_RATIO_MAX] = Out(sums[MAX_RATIO]);
  out[METRIC_GAP_MAX] = Out(sums[MAX_GAP]);
}

// 2^⌊log2 size⌋, and 1 where that is no number above 0: what an fp16 gradient is divided by until the backward.
template <class R>
ROWS_FN R power_of_two_below(R size) {
  return size > 0 && size < infinity<R>() ? std::ldexp(R(1), std::ilogb(size)) : R(1);
}

}  // namespace urlvr
