// Statistics of rows of logits and their gradient: one read, and one read and one write.
#pragma once

#include "segment_gradient.cuh"

namespace urlvr::cuda {

// Who does what: `warps` warps to a row in one block, as many rows to a block as fit; where rows are few, `parts` blocks to a row.
struct Plan {
  int warps, rows_per_block, parts;
  DEVICE_FN int row() const { return int(block_index() / unsigned(parts)) * rows_per_block + warp_index() / warps; }
  DEVICE_FN int part() const { return int(block_index() % unsigned(parts)); }
  DEVICE_FN int slot() const { return warp_index() / warps; }
  DEVICE_FN int warp() const { return warp_index() % warps; }
  DEVICE_FN int thread() const { return thread_index() % (warps * WARP); }
  int64_t grid(int64_t rows) const { return (rows + rows_per_block - 1) / rows_per_block * parts; }
};

constexpr int BLOCK_WARPS = 8;
constexpr int BLOCK = BLOCK_WARPS * WARP;
constexpr int MERGED_IN_BLOCK = 1024;  // segments: the 32 KB of their partial sums

inline Plan plan_of(int64_t rows, int segments, const Device& device) {
  Plan plan;
  for (plan.warps = 1; plan.warps < BLOCK_WARPS && plan.warps < segments;) plan.warps *= 2;
  plan.rows_per_block = BLOCK_WARPS / plan.warps;
  const int64_t blocks = rows > plan.rows_per_block ? (rows + plan.rows_per_block - 1) / plan.rows_per_block : 1;
  const int64_t filling = (4 * int64_t(device.multiprocessors) + blocks - 1) / blocks;  // blocks to a row that fill the device
  const int most = larger_of(1, segments / BLOCK_WARPS);
  plan.parts = int(filling < most ? filling : most);
  return plan;
}

// ---- statistics -----------------------------------------------------------------------------------------------------------------------

struct Scratch {  // partial sums of all rows, where a row has more than one block; null otherwise
  Partial* partials;
  KeepPartial* keep;
  static size_t bytes(int64_t rows, int segments) { return size_t(rows) * (segments * sizeof(Partial) + KEEP_PARTS * sizeof(KeepPartial)); }
  static Scratch in(void* memory, int64_t rows, int segments) {
    Partial* partials = static_cast<Partial*>(memory);
    return {partials, reinterpret_cast<KeepPartial*>(partials + rows * segments)};
  }
};

// The partial sums that warps `worker`, `worker` + `workers` … of a row owe.
template <class T, bool GENERAL, Memory FROM>
DEVICE_FN void sum_row(const Rows& rows, int n, const Reading& how, Wanted wanted, int worker, int workers, int segments, Partial* partials,
                       KeepPartial* keep) {
  using Cut = Segments<T, GENERAL>;
  const T* row = row_of<T>(rows, n);
#pragma unroll 1
  for (int i = worker; i < segments; i += workers) {
    const int first = i * Cut::WIDTH;
    const Bytes bytes = bytes_from(row + first, int64_t(rows.columns - first) * int(sizeof(T)));
    const Partial sums = segment_sums<T, GENERAL, FROM>(bytes, how, i, rows.columns, wanted);
    if (lane_index() == 0) partials[i] = sums;
  }
  if (!rows.crow) return;
  for (int part = worker; part < KEEP_PARTS; part += workers) {
    const KeepPartial sums = keep_sums<T, GENERAL>(rows, row, n, how, part);
    if (lane_index() == 0) keep[part] = sums;
  }
}

// By a warp: merge what `sum_row` left and write the row's statistics.
DEVICE_FN void merge_row(const Rows& rows, int n, const Partial* partials, const KeepPartial* keep, int segments, float x_id, float* out,
                         int64_t stride) {
  const Sums<float> sums = merge_segments(partials, segments);
  const KeepSums<float> kept = rows.crow ? merge_keep(keep) : KeepSums<float>();
  if (lane_index() == 0) finish_row(rows, n, sums, kept, x_id, out, stride);
}

template <class T, bool GENERAL>
ROW_KERNEL(BLOCK, GENERAL ? 2 : 3) statistics_kernel(Rows rows, Plan plan, int segments, Wanted wanted, Scratch scratch, float* out) {
  const int n = plan.row();
  const bool live = n < rows.count && counts(rows, n);
  Partial* partials = reinterpret_cast<Partial*>(dynamic_shared()) + plan.slot() * segments;
  KeepPartial* keep = reinterpret_cast<KeepPartial*>(reinterpret_cast<Partial*>(dynamic_shared()) + plan.rows_per_block * segments) +
                      plan.slot() * KEEP_PARTS;
  if (scratch.partials) partials = scratch.partials + int64_t(n) * segments, keep = scratch.keep + int64_t(n) * KEEP_PARTS;
  if (live) {
    const int worker = plan.part() * plan.warps + plan.warp();
    sum_row<T, GENERAL, STREAMED>(rows, n, reading_of<GENERAL>(rows, n), wanted, worker, plan.parts * plan.warps, segments, partials, keep);
  }
  if (scratch.partials) return;
  sync_block();
  if (plan.warp() > 0 || n >= rows.count) return;
  if (live) merge_row(rows, n, partials, keep, segments, x_at_id<T, GENERAL>(rows, n, reading_of<GENERAL>(rows, n)), out + n, rows.count);
  else if (lane_index() == 0) write_masked(rows.flags, out + n, rows.count);
}

// A warp to a row.
template <class T, bool GENERAL>
ROW_KERNEL(BLOCK, 1) merge_kernel(Rows rows, int segments, Scratch scratch, float* out) {
  const int n = int(block_index()) * BLOCK_WARPS + warp_index();
  if (n >= rows.count) return;
  if (counts(rows, n)) {
    const float x_id = x_at_id<T, GENERAL>(rows, n, reading_of<GENERAL>(rows, n));
    const Partial* partials = scratch.partials + int64_t(n) * segments;
    merge_row(rows, n, partials, scratch.keep + int64_t(n) * KEEP_PARTS, segments, x_id, out + n, rows.count);
  } else if (lane_index() == 0) {
    write_masked(rows.flags, out + n, rows.count);
  }
}

struct StatisticsPlan : Plan {
  int segments;
  bool in_block;  // the merge; otherwise partial sums go through scratch
  size_t scratch_bytes;
};

template <class T, bool GENERAL>
StatisticsPlan plan_statistics(const Rows& rows, const Device& device) {
  const int segments = segments_of<T, GENERAL>(rows.columns);
  StatisticsPlan plan = {plan_of(rows.count, segments, device), segments, true, 0};
  plan.in_block = plan.parts == 1 && segments <= MERGED_IN_BLOCK;
  if (!plan.in_block) plan.scratch_bytes = Scratch::bytes(rows.count, segments);
  return plan;
}

template <class T, bool GENERAL>
void launch_statistics(const char* op, const Rows& rows, const StatisticsPlan& plan, void* scratch, float* out, Stream stream) {
  const int segments = plan.segments;
  const Wanted wanted = wanted_of(rows.flags);
  if (plan.in_block) {
    const size_t shared = plan.rows_per_block * (segments * sizeof(Partial) + KEEP_PARTS * sizeof(KeepPartial));
    launch(op, statistics_kernel<T, GENERAL>, plan.grid(rows.count), BLOCK, shared, 0, stream, rows, plan, segments, wanted, Scratch{},
           out);
    return;
  }
  const Scratch through = Scratch::in(scratch, rows.count, segments);
  launch(op, statistics_kernel<T, GENERAL>, plan.grid(rows.count), BLOCK, 0, 0, stream, rows, plan, segments, wanted, through, out);
  launch(op, merge_kernel<T, GENERAL>, (rows.count + BLOCK_WARPS - 1) / BLOCK_WARPS, BLOCK, 0, 0, stream, rows, segments, through, out);
}

// ---- gradient -------------------------------------------------------------------------------------------------------------------------

DEVICE_FN Upstream upstream_of(const float* lines, int64_t stride, int64_t given) {
  Upstream up;
#pragma unroll
  for (int i = 0; i < GRADS; ++i) up.g[i] = given >> i & 1 ? lines[i * stride] : 0;
  return up;
}

// Segments begin, begin + step … end − 1 of a row.
template <class T, bool GENERAL, Memory FROM>
DEVICE_FN void write_segments(const Rows& rows, int n, const Out& out, const Reading& how, const RowGradient& gradient,
                              const KeptColumns& kept, int begin, int end, int step) {
  using Cut = Segments<T, GENERAL>;
  const T* row = row_of<T>(rows, n);
  T* to = row_of<T>(out, n);
  for (int i = begin; i < end; i += step) {
    const int first = i * Cut::WIDTH, last = smaller_of(first + Cut::WIDTH, rows.columns);
    const Bytes bytes = bytes_from(row + first, int64_t(rows.columns - first) * int(sizeof(T)));
    if (gradient.dead) write_zeros(to, first, last);
    else write_gradient<T, GENERAL, FROM>(bytes, to, first, last, how, gradient, kept);
  }
}

struct GradientPlan : Plan {
  int segments, bitmap_columns;  // bits of a keep set that a block needs for each of its rows
};

template <class T, bool GENERAL>
ROW_KERNEL(BLOCK, GENERAL ? 2 : 3)
gradient_kernel(Rows rows, GradientPlan plan, const float* stats, const float* upstream, int64_t given, Out out) {
  const int n = plan.row();
  const bool here = n < rows.count, live = here && counts(rows, n);
  const int begin = part_begin(plan.segments, plan.parts, plan.part()), end = part_begin(plan.segments, plan.parts, plan.part() + 1);
  const int first = begin * Segments<T, GENERAL>::WIDTH, last = smaller_of(end * Segments<T, GENERAL>::WIDTH, rows.columns);
  KeptColumns kept = {nullptr, first};
  if (rows.crow) {  // every thread of the block passes the barriers
    uint32_t* bitmap = reinterpret_cast<uint32_t*>(dynamic_shared()) + plan.slot() * bitmap_words(plan.bitmap_columns);
    clear_bitmap(bitmap, plan.bitmap_columns, plan.thread(), plan.warps * WARP);
    sync_block();
    if (live) mark_kept(rows, n, bitmap, first, last, plan.thread(), plan.warps * WARP);
    sync_block();
    kept.bitmap = bitmap;
  }
  if (!here) return;
  Reading how = {};
  RowGradient gradient = {};
  gradient.dead = true;
  if (live) {
    how = reading_of<GENERAL>(rows, n);
    gradient = row_gradient(rows, n, stats + n, rows.count, upstream_of(upstream + n, rows.count, given), how.out_factor);
  }
  write_segments<T, GENERAL, STREAMED>(rows, n, out, how, gradient, kept, begin + plan.warp(), end, plan.warps);
}

constexpr int MOST_BITMAP_COLUMNS = 8 * 32 * 1024;  // 32 KB of bits, within what a block may have without asking

template <class T, bool GENERAL>
void launch_gradient(const char* op, const Rows& rows, const Device& device, const float* stats, const float* upstream, int64_t given,
                     const Out& out, Stream stream) {
  constexpr int WIDTH = Segments<T, GENERAL>::WIDTH;
  const int segments = segments_of<T, GENERAL>(rows.columns);
  GradientPlan plan = {plan_of(rows.count, segments, device), segments, 0};
  size_t shared = 0;
  if (rows.crow) {
    constexpr int MOST = MOST_BITMAP_COLUMNS / WIDTH;
    plan.parts = larger_of(plan.parts, (segments + MOST - 1) / MOST);
    plan.bitmap_columns = ((segments + plan.parts - 1) / plan.parts) * WIDTH;
    shared = size_t(plan.rows_per_block) * bitmap_words(plan.bitmap_columns) * 4;
  }
  launch(op, gradient_kernel<T, GENERAL>, plan.grid(rows.count), BLOCK, shared, 0, stream, rows, plan, stats, upstream, given, out);
}

// Defined once, in token_stats.cu, for every dtype and way to read.
#define TOKEN_STATS_LAUNCH(declared, T, GENERAL)                                                                                     \
  declared void launch_statistics<T, GENERAL>(const char*, const Rows&, const StatisticsPlan&, void*, float*, Stream);              \
  declared void launch_gradient<T, GENERAL>(const char*, const Rows&, const Device&, const float*, const float*, int64_t, const Out&, \
                                            Stream);
#define TOKEN_STATS_LAUNCHES(declared)                                                                         \
  TOKEN_STATS_LAUNCH(declared, Bf16, false) TOKEN_STATS_LAUNCH(declared, Bf16, true)                           \
  TOKEN_STATS_LAUNCH(declared, Fp16, false) TOKEN_STATS_LAUNCH(declared, Fp16, true)                           \
  TOKEN_STATS_LAUNCH(declared, float, false) TOKEN_STATS_LAUNCH(declared, float, true)

// ---- gradient by the bias ---------------------------------------------------------------------------------------------------------------

constexpr int BIAS_ROWS = 64;  // whose coefficients are in shared memory at a time

constexpr int BIAS_BITMAP_WORDS = BLOCK / 32 + 2;

template <class T>
struct StagedRow {
  const T* row;
  RowGradient gradient;
  Reading how;
};

// A column to a thread; rows in index order, summed BIAS_ROWS at a time so that the error does not grow with their number.
template <class T>
ROW_KERNEL(BLOCK, 1) bias_gradient_kernel(Rows rows, const float* stats, const float* upstream, int64_t given, float* bias_grad) {
  constexpr int WORDS = BIAS_BITMAP_WORDS;
  using Staged = StagedRow<T>;
  Staged* staged = reinterpret_cast<Staged*>(dynamic_shared());
  uint32_t* bitmaps = reinterpret_cast<uint32_t*>(staged + BIAS_ROWS);
  const int first = int(block_index()) * BLOCK, column = first + thread_index();
  float total = 0;
  for (int from = 0; from < rows.count; from += BIAS_ROWS) {
    const int here = smaller_of(rows.count - from, BIAS_ROWS);
    if (rows.crow) {
      for (int i = thread_index(); i < BIAS_ROWS * WORDS; i += BLOCK) bitmaps[i] = 0;
    }
    if (thread_index() < here) {
      const int n = from + thread_index();
      Staged& to = staged[thread_index()];
      to.gradient.dead = !counts(rows, n);
      if (!to.gradient.dead) {
        to.how = reading_of<true>(rows, n);
        to.row = row_of<T>(rows, n);
        to.gradient = row_gradient(rows, n, stats + n, rows.count, upstream_of(upstream + n, rows.count, given), to.how.factor);
      }
    }
    sync_block();
    if (rows.crow) {
      for (int i = warp_index(); i < here; i += BLOCK_WARPS) {
        if (!staged[i].gradient.dead) mark_kept(rows, from + i, bitmaps + i * WORDS, first, first + BLOCK, lane_index(), WARP);
      }
      sync_block();
    }
    float sum = 0;
    for (int i = 0; column < rows.columns && i < here; ++i) {
      const Staged& row = staged[i];
      if (row.gradient.dead) continue;
      const float z[1] = {number(row.row[column])};
      float dz[1];
      const KeptColumns kept = {rows.crow ? bitmaps + i * WORDS : nullptr, first};
      gradient_of<true>(z, column, row.how, row.gradient, kept.at(column, 1), dz);
      sum = add(sum, dz[0]);
    }
    total = add(total, sum);
    sync_block();  // before the next rows take their places
  }
  if (column < rows.columns) bias_grad[column] = add(bias_grad[column], total);
}

template <class T>
void launch_bias_gradient(const char* op, const Rows& rows, const float* stats, const float* upstream, int64_t given, float* bias_grad,
                          Stream stream) {
  const size_t shared = BIAS_ROWS * (sizeof(StagedRow<T>) + BIAS_BITMAP_WORDS * 4);
  launch(op, bias_gradient_kernel<T>, (rows.columns + BLOCK - 1) / BLOCK, BLOCK, shared, 0, stream, rows, stats, upstream, given,
         bias_grad);
}

}  // namespace urlvr::cuda
