// The rows of a policy loss: what each weighs before its log-prob is known, what a sequence's add up to, and what all come to afterwards.
//
// A row to a thread, and sums in an order that the rows' number alone fixes. Nobody on the host waits for a number: where one kernel needs
// what another has counted, every block adds it up for itself.
#pragma once

#include "segment_gradient.cuh"

namespace urlvr::cuda {

struct Loss {
  const float* lines;  // (LOSS_LINES, N)
  int64_t present;
  int kind, kl, correction;
  LossNumbers<float> numbers;
  float* row_scale;  // (N,) of a gradient that is made in the forward, or null
};

// Row n of the lines; those that are absent are not read.
DEVICE_FN void load_lines(const Loss& loss, int n, int64_t rows, float (&line)[LOSS_LINES]) {
  const float* at = loss.lines + n;
  line[LINE_ADVANTAGE] = at[LINE_ADVANTAGE * rows];
  line[LINE_WEIGHT] = at[LINE_WEIGHT * rows];
  line[LINE_REGULARISER] = at[LINE_REGULARISER * rows];
  line[LINE_OLD] = loss.present & HAS_OLD ? at[LINE_OLD * rows] : 0;
  line[LINE_REF] = loss.present & HAS_REF ? at[LINE_REF * rows] : 0;
  line[LINE_ROLLOUT] = loss.present & HAS_ROLLOUT ? at[LINE_ROLLOUT * rows] : 0;
  line[LINE_RATIO] = loss.present & HAS_RATIO ? at[LINE_RATIO * rows] : 0;
  line[LINE_CORRECTION] = loss.present & HAS_CORRECTION ? at[LINE_CORRECTION * rows] : 0;
}
DEVICE_FN LossTerms<float> terms_of(const Loss& loss, float logp, const float (&line)[LOSS_LINES]) {
  return loss_terms<float>(logp, line, loss.numbers, loss.kind, loss.kl, loss.correction, loss.present);
}

constexpr int LOSS_THREADS = 256;  // and rows
constexpr int LOSS_WARPS = LOSS_THREADS / WARP;
inline int64_t loss_blocks(int64_t rows) { return (rows + LOSS_THREADS - 1) / LOSS_THREADS; }

// ---- before: weights and liveness -----------------------------------------------------------------------------------------------------

struct RowsOfLoss {
  int count;
  const bool* mask;           // null: every row counts
  const int64_t* cu_seqlens;  // (sequences + 1,) or null: one sequence
  int sequences;
  const float* advantages;    // a row or, PER_SEQUENCE, a sequence
  const float* old_logp;
  const float* ref_logp;
  const float* rollout_logp;
  const float* denominator;   // null: `number`
  float number;
  const float* token_denominator;  // null: `token_number`
  float token_number;
  int64_t weighing;

  // What `lengths_kernel` counts on its own: sequences, or so many rows at a time where all are one sequence.
  ROWS_FN bool counted() const { return mask || cu_seqlens; }
  ROWS_FN int parts() const { return !counted() ? 0 : cu_seqlens ? sequences : (count + PART - 1) / PART; }
  static constexpr int PART = 16 * LOSS_THREADS;  // a load of 16 bytes to a thread
  // Whether sequences are told of their tokens' advantages.
  ROWS_FN bool asks_tokens() const { return weighing & JOINED && !(weighing & PER_SEQUENCE); }
  size_t scratch_bytes() const { return parts() * (asks_tokens() ? 3 : 1) * sizeof(int); }
};

// What is counted of the parts.
struct OfParts {
  int* lengths;
  float* means;  // where sequences ask their tokens: the mean advantage, and
  int* alive;    // whether one is not 0
};
inline OfParts parts_in(void* scratch, int parts) {
  int* lengths = static_cast<int*>(scratch);
  return {lengths, reinterpret_cast<float*>(lengths) + parts, lengths + 2 * parts};
}

constexpr int BROKEN = -1;  // length of a sequence that cannot be: nobody on the host has seen the cu_seqlens of a compiled graph

DEVICE_FN int block_add(int x, int* of_warps) {
  x = warp_add(x);
  if (lane_index() == 0) of_warps[warp_index()] = x;
  sync_block();
  int sum = 0;
  for (int i = 0; i < LOSS_WARPS; ++i) sum += of_warps[i];
  return sum;
}

DEVICE_FN float block_add(float x, float* of_warps) {
  x = warp_add(x);
  if (lane_index() == 0) of_warps[warp_index()] = x;
  sync_block();
  float sum = 0;
  for (int i = 0; i < LOSS_WARPS; ++i) sum = add(sum, of_warps[i]);
  return sum;
}

// A thread's share of the mask's rows begin … end − 1, which the block counts. A bool is a byte that is 0 or 1.
DEVICE_FN int count_true(const bool* mask, int begin, int end) {
  const Pieces<bool> pieces(mask, begin, end);
  const int thread = thread_index();
  int count = 0;
  if (thread < pieces.head) count += mask[begin + thread];
  for (int i = thread; i < pieces.packs; i += LOSS_THREADS) {
    const Pack pack = load_streamed(mask + pieces.body() + i * Pieces<bool>::VECTOR);
#pragma unroll
    for (int j = 0; j < 4; ++j) count += int(pack.word[j] * 0x01010101u >> 24);  // the sum of its bytes
  }
  if (thread < end - pieces.tail()) count += mask[pieces.tail() + thread];
  return count;
}

// A block to a part. Templates, so that they may stand in a header.
template <class>
ROW_KERNEL(LOSS_THREADS, 4) lengths_kernel(RowsOfLoss rows, OfParts out) {
  int* lengths = out.lengths;
  const int part = int(block_index());
  int64_t begin = int64_t(part) * RowsOfLoss::PART, end = begin + RowsOfLoss::PART < rows.count ? begin + RowsOfLoss::PART : rows.count;
  if (rows.cu_seqlens) {
    begin = rows.cu_seqlens[part], end = rows.cu_seqlens[part + 1];
    const bool first_fits = part > 0 || begin == 0, last_fits = part + 1 < rows.sequences || end == rows.count;
    if (!(0 <= begin && begin <= end && end <= rows.count && first_fits && last_fits)) {  // the whole block
      if (thread_index() == 0) lengths[part] = BROKEN;
      return;
    }
  }
  int length = int(end - begin);
  if (rows.mask) length = block_add(count_true(rows.mask, int(begin), int(end)), reinterpret_cast<int*>(dynamic_shared()));
  if (thread_index() == 0) lengths[part] = length;
  if (!rows.asks_tokens()) return;
  float sum = 0;
  int found = 0;
  for (int n = int(begin) + thread_index(); n < int(end); n += LOSS_THREADS) {
    if (rows.mask && !rows.mask[n]) continue;
    sum = add(sum, rows.advantages[n]), found |= rows.advantages[n] != 0;
  }
  int* of_warps = reinterpret_cast<int*>(dynamic_shared()) + LOSS_WARPS;
  sum = block_add(sum, reinterpret_cast<float*>(of_warps + LOSS_WARPS));
  found = block_add(found, of_warps);
  if (thread_index() == 0) out.means[part] = mul(sum, reciprocal_or_0(float(length))), out.alive[part] = found > 0;
}

struct LossCounts {  // of the whole call
  int tokens, sequences;
  bool broken;
};

// By a block: the same in every thread.
DEVICE_FN LossCounts add_lengths(const RowsOfLoss& rows, const int* lengths) {
  if (!rows.counted()) return {rows.count, rows.count > 0, false};
  int tokens = 0, sequences = 0, broken = 0;
  for (int i = thread_index(); i < rows.parts(); i += LOSS_THREADS) {
    const int length = lengths[i];
    tokens += length, sequences += length > 0, broken += length == BROKEN;
  }
  int* of_warps = reinterpret_cast<int*>(dynamic_shared());
  LossCounts out;
  out.tokens = block_add(tokens, of_warps);
  out.sequences = block_add(sequences, of_warps + LOSS_WARPS);
  out.broken = block_add(broken, of_warps + 2 * LOSS_WARPS) > 0;
  if (!rows.cu_seqlens) out.sequences = out.tokens > 0;
  return out;
}

// The last sequence that begins at or before row n: cu_seqlens rises from 0 to more than n.
DEVICE_FN int sequence_of(const RowsOfLoss& rows, int n) {
  if (!rows.cu_seqlens) return 0;
  int low = 0, high = rows.sequences;  // cu_seqlens[low] ≤ n < cu_seqlens[high]
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (rows.cu_seqlens[middle] <= n) low = middle;
    else high = middle;
  }
  return low;
}

// Sequences that do not rise from 0 to the number of rows leave no row a weight: what one of them has got is no more to be trusted than
// what two have got or none.
template <class>
ROW_KERNEL(LOSS_THREADS, 4) loss_rows_kernel(RowsOfLoss rows, OfParts parts, float* lines, bool* live, float* counts) {
  const int* lengths = parts.lengths;
  const float nan = nan_<float>();
  const LossCounts all = add_lengths(rows, lengths);
  if (block_index() == 0 && thread_index() == 0) {
    counts[0] = all.broken ? nan : float(all.tokens);
    counts[1] = all.broken ? nan : float(all.sequences);
  }
  const int n = int(block_index()) * LOSS_THREADS + thread_index();
  if (n >= rows.count) return;
  float advantage = nan, weight = nan, regulariser = nan;
  bool matters = true;
  if (!all.broken) {
    float divisor = rows.denominator ? *rows.denominator : rows.number;
    if (rows.weighing & COUNTED) divisor = mul(float(rows.weighing & BY_SEQUENCES ? all.sequences : all.tokens), divisor);
    weight = reciprocal_or_0(divisor);
    const int sequence = rows.weighing & (PER_SEQUENCE | SEQUENCE_MEAN | JOINED) ? sequence_of(rows, n) : 0;
    if (rows.weighing & SEQUENCE_MEAN) {
      weight = mul(weight, reciprocal_or_0(float(rows.cu_seqlens ? lengths[sequence] : all.tokens)));
    }
    advantage = rows.advantages[rows.weighing & PER_SEQUENCE ? sequence : n];
    matters = rows.asks_tokens() ? parts.alive[sequence] : advantage != 0;
    if (rows.asks_tokens() && rows.weighing & ONE_TERM) advantage = parts.means[sequence];
    regulariser = weight;
    if (rows.weighing & ONE_TERM) {
      const float given = rows.token_denominator ? *rows.token_denominator : rows.token_number;
      regulariser = reciprocal_or_0(rows.weighing & TOKENS_COUNTED ? float(all.tokens) : given);
    }
  }
  const int64_t stride = rows.count;
  lines[LINE_ADVANTAGE * stride + n] = advantage;
  lines[LINE_WEIGHT * stride + n] = weight;
  lines[LINE_REGULARISER * stride + n] = regulariser;
  lines[LINE_OLD * stride + n] = rows.old_logp ? rows.old_logp[n] : 0;
  lines[LINE_REF * stride + n] = rows.ref_logp ? rows.ref_logp[n] : 0;
  lines[LINE_ROLLOUT * stride + n] = rows.rollout_logp ? rows.rollout_logp[n] : 0;
  lines[LINE_RATIO * stride + n] = 0;
  lines[LINE_CORRECTION * stride + n] = 0;
  live[n] = (!rows.mask || rows.mask[n]) && (rows.weighing & REGULARISED || matters);
}

// `scratch` has scratch_bytes().
inline void launch_loss_rows(const char* op, const RowsOfLoss& rows, void* scratch, float* lines, bool* live, float* counts, Stream stream) {
  const OfParts parts = parts_in(scratch, rows.parts());
  launch(op, lengths_kernel<void>, rows.parts(), LOSS_THREADS, 3 * LOSS_WARPS * sizeof(int), 0, stream, rows, parts);
  const int64_t blocks = rows.count > 0 ? loss_blocks(rows.count) : 1;  // the counts of no rows are 0
  launch(op, loss_rows_kernel<void>, blocks, LOSS_THREADS, 3 * LOSS_WARPS * sizeof(int), 0, stream, rows, parts, lines, live, counts);
}

// ---- between: the rows of a sequence ----------------------------------------------------------------------------------------------------

struct RowsToJoin {
  int count;
  const float* logp;          // (N,), or null where only the correction is wanted, which old_logp tells
  const int64_t* cu_seqlens;  // (sequences + 1,)
  int sequences;
  const bool* which;          // (N,) of a sequence's rows that are added up; null: all
  bool product;
};

// A block to a sequence. Offsets that leave the rows are cut: such rows weigh NaN.
template <class>
ROW_KERNEL(LOSS_THREADS, 4) join_kernel(RowsToJoin rows, Loss loss, float* lines) {
  auto within = [&](int64_t n) { return int(n < 0 ? 0 : n > rows.count ? rows.count : n); };
  const int begin = within(rows.cu_seqlens[block_index()]), end = within(rows.cu_seqlens[block_index() + 1]);
  SequenceSums<float> sums;
  for (int n = begin + thread_index(); n < end; n += LOSS_THREADS) {
    if (rows.which && !rows.which[n]) continue;
    float line[LOSS_LINES];
    load_lines(loss, n, rows.count, line);
    add_token<float>(rows.logp ? rows.logp[n] : 0, line, loss.numbers, loss.kind, loss.correction, loss.present, rows.product, sums);
  }
  float* of_warps = reinterpret_cast<float*>(dynamic_shared());
  sums.tokens = block_add(sums.tokens, of_warps);
  sums.ratio = block_add(sums.ratio, of_warps + LOSS_WARPS);
  sums.correction = block_add(sums.correction, of_warps + 2 * LOSS_WARPS);
  if (sums.tokens == 0) return;
  const float ratio = sequence_ratio(sums), correction = sequence_correction(sums, loss.numbers, loss.correction, rows.product);
  for (int n = begin + thread_index(); n < end; n += LOSS_THREADS) {
    if (loss.present & HAS_RATIO) lines[LINE_RATIO * int64_t(rows.count) + n] = ratio;
    if (loss.present & HAS_CORRECTION) lines[LINE_CORRECTION * int64_t(rows.count) + n] = correction;
  }
}

inline void launch_join(const char* op, const RowsToJoin& rows, const Loss& loss, float* lines, Stream stream) {
  launch(op, join_kernel<void>, rows.sequences, LOSS_THREADS, 3 * LOSS_WARPS * sizeof(float), 0, stream, rows, loss, lines);
}

// ---- afterwards: loss, metrics and gradients --------------------------------------------------------------------------------------------

struct RowValues {  // (N,)
  int count;
  const float* logp;
  const float* entropy;         // or null
  const float* self_certainty;  // or null
  const bool* live;
};

DEVICE_FN float join_sums(int which, float a, float b) { return which < MAX_RATIO ? add(a, b) : larger_or_nan(a, b); }

// Over a block, whose threads bring `sums`: thread i < LOSS_SUMS returns with the i-th. Shared memory: LOSS_WARPS · LOSS_SUMS numbers.
DEVICE_FN float block_sums(const float (&sums)[LOSS_SUMS], float* of_warps) {
#pragma unroll
  for (int i = 0; i < LOSS_SUMS; ++i) {
    float x = sums[i];
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = join_sums(i, x, shuffle_xor(x, lanes));
    if (lane_index() == 0) of_warps[warp_index() * LOSS_SUMS + i] = x;
  }
  sync_block();
  const int which = thread_index();
  if (which >= LOSS_SUMS) return 0;
  float out = of_warps[which];
  for (int i = 1; i < LOSS_WARPS; ++i) out = join_sums(which, out, of_warps[i * LOSS_SUMS + which]);
  return out;
}

// `partial` (LOSS_SUMS, blocks): the sums of each block's rows. `upstream` (GRADS, N) or null.
template <class>
ROW_KERNEL(LOSS_THREADS, 4) objective_kernel(Loss loss, RowValues rows, int blocks, float* partial, float* upstream) {
  const int n = int(block_index()) * LOSS_THREADS + thread_index();
  float sums[LOSS_SUMS] = {}, gradient = 0, by_entropy = 0, by_self_certainty = 0;
  if (n < rows.count && rows.live[n]) {
    float line[LOSS_LINES];
    load_lines(loss, n, rows.count, line);
    const LossTerms<float> terms = terms_of(loss, rows.logp[n], line);
    gradient = terms.gradient;
    by_entropy = regulariser_gradient(loss.numbers.entropy_coef, line[LINE_REGULARISER]);
    by_self_certainty = regulariser_gradient(loss.numbers.self_certainty_coef, line[LINE_REGULARISER]);
    const float entropy = rows.entropy ? rows.entropy[n] : 0, self_certainty = rows.self_certainty ? rows.self_certainty[n] : 0;
    row_sums(terms, line[LINE_WEIGHT], line[LINE_REGULARISER], entropy, self_certainty, sums);
  }
  if (upstream && n < rows.count) {
    const int64_t stride = rows.count;
#pragma unroll
    for (int i = 0; i < GRADS; ++i) {
      upstream[i * stride + n] = i == LOGP ? gradient : i == ENTROPY ? by_entropy : i == SELF_CERTAINTY ? by_self_certainty : 0;
    }
  }
  const float sum = block_sums(sums, reinterpret_cast<float*>(dynamic_shared()));
  if (thread_index() < LOSS_SUMS) partial[int64_t(thread_index()) * blocks + block_index()] = sum;
}

// One block.
template <class>
ROW_KERNEL(LOSS_THREADS, 1)
metrics_kernel(LossNumbers<float> numbers, int blocks, const float* partial, const float* counts, float* metrics) {
  float* of_warps = reinterpret_cast<float*>(dynamic_shared());
  float* all = of_warps + LOSS_WARPS * LOSS_SUMS;
  float sums[LOSS_SUMS] = {};
  for (int block = thread_index(); block < blocks; block += LOSS_THREADS) {
    float next[LOSS_SUMS];
#pragma unroll
    for (int i = 0; i < LOSS_SUMS; ++i) next[i] = partial[int64_t(i) * blocks + block];
    add_sums(next, sums);
  }
  const float sum = block_sums(sums, of_warps);
  if (thread_index() < LOSS_SUMS) all[thread_index()] = sum;
  sync_block();
  if (thread_index() == 0) finish_metrics<float>(all, counts[0], counts[1], numbers, metrics);
}

// `partial` has LOSS_SUMS numbers a block.
inline void launch_objective(const char* op, const Loss& loss, const RowValues& rows, const float* counts, float* partial, float* metrics,
                             float* upstream, Stream stream) {
  const int64_t blocks = loss_blocks(rows.count);
  const size_t shared = LOSS_WARPS * LOSS_SUMS * sizeof(float);
  launch(op, objective_kernel<void>, blocks, LOSS_THREADS, shared, 0, stream, loss, rows, int(blocks), partial, upstream);
  launch(op, metrics_kernel<void>, 1, LOSS_THREADS, shared + LOSS_SUMS * sizeof(float), 0, stream, loss.numbers, int(blocks), partial,
         counts, metrics);
}

}  // namespace urlvr::cuda
