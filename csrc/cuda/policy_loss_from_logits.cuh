// A policy loss whose rows are not joined: statistics of a row, its coefficient, and the gradient while the row is still at hand.
//
// Three ways, with the same bits: a cluster of blocks keeps the row in its shared memory (sm_90: one read, one write); a block goes over
// the row twice, the second time from its end, where L2 still has it; and, for few rows without clusters or very long ones, the kernels of
// token_stats one after the other.
#pragma once

#include "policy_loss.cuh"
#include "token_stats.cuh"

namespace urlvr::cuda {

// `reports`: this thread writes the row's scale.
DEVICE_FN Upstream loss_gradients(const Loss& loss, int n, int64_t rows, float logp, float scale, bool reports) {
  float line[LOSS_LINES];
  load_lines(loss, n, rows, line);
  Upstream up = {};
  up.g[LOGP] = terms_of(loss, logp, line).gradient;
  up.g[ENTROPY] = regulariser_gradient(loss.numbers.entropy_coef, line[LINE_REGULARISER]);
  up.g[SELF_CERTAINTY] = regulariser_gradient(loss.numbers.self_certainty_coef, line[LINE_REGULARISER]);
  if (loss.row_scale) {
    const float size = mul(add(add(fabsf(up.g[LOGP]), fabsf(up.g[ENTROPY])), fabsf(up.g[SELF_CERTAINTY])), fabsf(scale));
    const float power = power_of_two_below(size);
    if (reports) loss.row_scale[n] = power;
    up.g[LOGP] = up.g[LOGP] / power;
    up.g[ENTROPY] = up.g[ENTROPY] / power;
    up.g[SELF_CERTAINTY] = up.g[SELF_CERTAINTY] / power;
  }
  return up;
}

// What the merging warp leaves for the others of its row.
struct RowShared {
  float x_id;  // read before the gradient takes the logits' place
  float stats[STATS];
  RowGradient gradient;
};

// By a warp: merge, and one lane derives everything that the gradient needs. Returns with the statistics in shared memory only.
DEVICE_FN void merge_and_weigh(const Rows& rows, const Loss& loss, int n, const Partial* partials, const KeepPartial* keep, int segments,
                               float out_factor, bool reports, RowShared* to) {
  merge_row(rows, n, partials, keep, segments, to->x_id, to->stats, 1);
  if (lane_index() == 0) {
    const Upstream up = loss_gradients(loss, n, rows.count, to->stats[LOGP], rows.scale, reports);
    to->gradient = row_gradient(rows, n, to->stats, 1, up, out_factor);
  }
  sync_warp();
}
DEVICE_FN void copy_stats(const RowShared* from, float* stats, int64_t stride) {
  if (lane_index() < STATS) stats[lane_index() * stride] = from->stats[lane_index()];
}
DEVICE_FN void leave_out(const Rows& rows, const Loss& loss, int n, float* stats) {
  write_masked(rows.flags, stats + n, rows.count);
  if (loss.row_scale) loss.row_scale[n] = 1;
}

// ---- a block, twice over the row ------------------------------------------------------------------------------------------------------

constexpr int TWICE_WARPS = 16;  // one block to a multiprocessor, so that few rows are under way and L2 can hold them
constexpr int TWICE_SHARED = 46 * 1024;

struct TwicePlan : Plan {
  int segments;
  int bitmap_bytes;  // of one row; 0 without a keep set
  static ROWS_FN int row_bytes(int segments, int bitmap_bytes) {
    return segments * int(sizeof(Partial)) + KEEP_PARTS * int(sizeof(KeepPartial)) + (int(sizeof(RowShared)) + 15) / 16 * 16 + bitmap_bytes;
  }
};

template <class T, bool GENERAL>
ROW_KERNEL(TWICE_WARPS * WARP, 1) twice_kernel(Rows rows, Loss loss, TwicePlan plan, Wanted wanted, float* stats, Out out) {
  const int n = plan.row();
  const bool here = n < rows.count, live = here && counts(rows, n);
  char* memory = dynamic_shared() + plan.slot() * TwicePlan::row_bytes(plan.segments, plan.bitmap_bytes);
  Partial* partials = reinterpret_cast<Partial*>(memory);
  KeepPartial* keep = reinterpret_cast<KeepPartial*>(partials + plan.segments);
  RowShared* shared = reinterpret_cast<RowShared*>(keep + KEEP_PARTS);
  uint32_t* bitmap = reinterpret_cast<uint32_t*>(memory + TwicePlan::row_bytes(plan.segments, 0));
  Reading how = {};
  if (rows.crow) {
    clear_bitmap(bitmap, rows.columns, plan.thread(), plan.warps * WARP);
    sync_block();
    if (live) mark_kept(rows, n, bitmap, 0, rows.columns, plan.thread(), plan.warps * WARP);
  }
  if (live) {
    how = reading_of<GENERAL>(rows, n);
    if (plan.thread() == 0) shared->x_id = x_at_id<T, GENERAL>(rows, n, how);
    sum_row<T, GENERAL, KEPT>(rows, n, how, wanted, plan.warp(), plan.warps, plan.segments, partials, keep);
  }
  sync_block();
  if (live && plan.warp() == 0) {
    merge_and_weigh(rows, loss, n, partials, keep, plan.segments, how.out_factor, true, shared);
    copy_stats(shared, stats + n, rows.count);
  }
  sync_block();
  if (!here) return;
  RowGradient gradient = {};
  gradient.dead = true;
  if (live) gradient = shared->gradient;
  else if (plan.thread() == 0) leave_out(rows, loss, n, stats);
  const KeptColumns kept = {rows.crow ? bitmap : nullptr, 0};
  const int rounds = (plan.segments + plan.warps - 1) / plan.warps;
  for (int round = rounds - 1; round >= 0; --round) {
    const int i = round * plan.warps + plan.warp();
    write_segments<T, GENERAL, STREAMED>(rows, n, out, how, gradient, kept, i, smaller_of(i + 1, plan.segments), 1);
  }
}

// ---- a cluster, with the row in its shared memory -------------------------------------------------------------------------------------

constexpr int MOST_IN_CLUSTER = 8;  // what every device with clusters can schedule

struct ClusterPlan {
  int blocks;    // of a cluster: a row
  int segments;  // of the row
  int most;      // segments of one block
  int warps;     // of a block: each has nearly as many segments as the others
  int bitmap_bytes;
  // Shared memory of a block: partial sums of the whole row, what the merging warp leaves, kept columns of the slice, the slice.
  ROWS_FN int keep_at() const { return segments * int(sizeof(Partial)); }
  ROWS_FN int row_at() const { return keep_at() + KEEP_PARTS * int(sizeof(KeepPartial)); }
  ROWS_FN int bitmap_at() const { return row_at() + (int(sizeof(RowShared)) + 15) / 16 * 16; }
  ROWS_FN int slice_at() const { return bitmap_at() + bitmap_bytes; }
};

// A segment's 16-byte blocks, and one more: a row that begins between multiples of 16 reaches into it.
template <class T, bool GENERAL>
ROWS_FN int slot_bytes() { return Segments<T, GENERAL>::BYTES + 16; }

#if HAS_CLUSTERS
// Words of this block's shared memory to the same place in the others of the cluster, by a warp. `words` divides WARP.
DEVICE_FN void share_words(void* own, int words, int rank, int blocks) {
  uint32_t* word = static_cast<uint32_t*>(own) + lane_index() % words;
  sync_warp();
  for (int to = lane_index() / words; to < blocks; to += WARP / words) {
    if (to != rank) store_in_cluster(word, to, *word);
  }
}

template <class T, bool GENERAL>
DEVICE_FN void fetch_segments(const T* row, int columns, int begin, int end, int warps, char* slice) {
  using Cut = Segments<T, GENERAL>;
  for (int i = begin + warp_index(); i < end; i += warps) {
    const int first = i * Cut::WIDTH;
    const Bytes bytes = bytes_from(row + first, int64_t(columns - first) * int(sizeof(T)));
    char* slot = slice + (i - begin) * slot_bytes<T, GENERAL>();
    const int blocks = Cut::BYTES / 16 + (bytes.shift ? 1 : 0);
    for (int at = lane_index() * 16; at < blocks * 16 && at < bytes.end; at += WARP * 16) copy_async(slot + at, bytes.aligned + at);
  }
}
#endif

template <class T, bool GENERAL>
ROW_KERNEL(BLOCK, GENERAL ? 2 : 3) cluster_kernel(Rows rows, Loss loss, ClusterPlan plan, Wanted wanted, float* stats, Out out) {
#if HAS_CLUSTERS
  using Cut = Segments<T, GENERAL>;
  const int n = int(block_index() / unsigned(plan.blocks));
  const int rank = int(block_index() % unsigned(plan.blocks));  // the grid's only dimension is cut into clusters in order
  const int begin = part_begin(plan.segments, plan.blocks, rank), end = part_begin(plan.segments, plan.blocks, rank + 1);
  const int first = begin * Cut::WIDTH, last = smaller_of(end * Cut::WIDTH, rows.columns);
  T* to = row_of<T>(out, n);
  if (!counts(rows, n)) {  // the whole cluster
    for (int i = begin + warp_index(); i < end; i += plan.warps) {
      write_zeros(to, i * Cut::WIDTH, smaller_of((i + 1) * Cut::WIDTH, rows.columns));
    }
    if (rank == 0 && thread_index() == 0) leave_out(rows, loss, n, stats);
    return;
  }
  cluster_arrive();  // I have begun: others may write into my memory
  char* memory = dynamic_shared();
  Partial* partials = reinterpret_cast<Partial*>(memory);
  KeepPartial* keep = reinterpret_cast<KeepPartial*>(memory + plan.keep_at());
  RowShared* shared = reinterpret_cast<RowShared*>(memory + plan.row_at());
  uint32_t* bitmap = reinterpret_cast<uint32_t*>(memory + plan.bitmap_at());
  char* slice = memory + plan.slice_at();
  const T* row = row_of<T>(rows, n);
  fetch_segments<T, GENERAL>(row, rows.columns, begin, end, plan.warps, slice);
  const Reading how = reading_of<GENERAL>(rows, n);
  if (thread_index() == 0) shared->x_id = x_at_id<T, GENERAL>(rows, n, how);
  if (rows.crow) {
    clear_bitmap(bitmap, last - first, thread_index(), plan.warps * WARP);
    sync_block();
    mark_kept(rows, n, bitmap, first, last, thread_index(), plan.warps * WARP);
  }
  cluster_wait();
  if (rows.crow) {
    for (int part = warp_index() * plan.blocks + rank; part < KEEP_PARTS; part += plan.warps * plan.blocks) {
      const KeepPartial sums = keep_sums<T, GENERAL>(rows, row, n, how, part);
      if (lane_index() == 0) keep[part] = sums;
      share_words(keep + part, KEEP_WORDS, rank, plan.blocks);
    }
  }
  copy_async_wait();
  sync_warp();  // a warp reads what it has fetched itself
  auto segment = [&](int i) {
    Bytes bytes = bytes_from(row + i * Cut::WIDTH, int64_t(rows.columns - i * Cut::WIDTH) * int(sizeof(T)));
    bytes.aligned = slice + (i - begin) * slot_bytes<T, GENERAL>();
    return bytes;
  };
  for (int i = begin + warp_index(); i < end; i += plan.warps) {
    const Partial sums = segment_sums<T, GENERAL, SHARED>(segment(i), how, i, rows.columns, wanted);
    if (lane_index() == 0) partials[i] = sums;
    share_words(partials + i, PARTIAL_WORDS, rank, plan.blocks);
  }
  // All partial sums are everywhere after this; nobody touches another block's memory any more, nor reads the row in global memory.
  cluster_arrive();
  cluster_wait();
  if (warp_index() == 0) {
    merge_and_weigh(rows, loss, n, partials, keep, plan.segments, how.out_factor, rank == 0, shared);
    if (rank == 0) copy_stats(shared, stats + n, rows.count);
  }
  sync_block();
  const RowGradient gradient = shared->gradient;
  const KeptColumns kept = {rows.crow ? bitmap : nullptr, first};
  for (int i = begin + warp_index(); i < end; i += plan.warps) {
    const int from = i * Cut::WIDTH, until = smaller_of(from + Cut::WIDTH, rows.columns);
    if (gradient.dead) write_zeros(to, from, until);
    else write_gradient<T, GENERAL, SHARED>(segment(i), to, from, until, how, gradient, kept);
  }
#else
  unreachable();  // such devices are not given this kernel
#endif
}

// ---- few rows -------------------------------------------------------------------------------------------------------------------------

// A template, so that it may stand in a header.
template <class>
ROW_KERNEL(BLOCK, 1) upstream_kernel(Rows rows, Loss loss, const float* stats, float* upstream) {
  const int n = int(block_index()) * BLOCK + thread_index();
  if (n >= rows.count) return;
  Upstream up = {};
  if (counts(rows, n)) up = loss_gradients(loss, n, rows.count, stats[LOGP * int64_t(rows.count) + n], rows.scale, true);
  else if (loss.row_scale) loss.row_scale[n] = 1;
  for (int i = 0; i < GRADS; ++i) upstream[int64_t(i) * rows.count + n] = up.g[i];
}

// ---- which way ------------------------------------------------------------------------------------------------------------------------

enum Way { IN_CLUSTER, TWICE, ONE_AFTER_THE_OTHER };

struct PolicyPlan {
  Way way;
  ClusterPlan cluster;
  TwicePlan twice;
  StatisticsPlan statistics;
  size_t shared, scratch_bytes;
};

template <class T, bool GENERAL>
bool fits_cluster(const Rows& rows, const Device& device, PolicyPlan& plan) {
  const int segments = segments_of<T, GENERAL>(rows.columns);
  if (!device.clusters || segments < BLOCK_WARPS) return false;  // a short row would leave warps without work
  ClusterPlan& cluster = plan.cluster;
  for (cluster.blocks = 1; cluster.blocks <= MOST_IN_CLUSTER; cluster.blocks *= 2) {
    cluster.segments = segments;
    cluster.most = (segments + cluster.blocks - 1) / cluster.blocks;
    const int rounds = (cluster.most + BLOCK_WARPS - 1) / BLOCK_WARPS;
    cluster.warps = (cluster.most + rounds - 1) / rounds;
    cluster.bitmap_bytes = rows.crow ? (bitmap_words(cluster.most * Segments<T, GENERAL>::WIDTH) * 4 + 15) / 16 * 16 : 0;
    const int64_t slice = int64_t(cluster.most) * slot_bytes<T, GENERAL>();
    const int64_t shared = int64_t(cluster.slice_at()) + slice;
    const bool last = cluster.blocks == MOST_IN_CLUSTER;
    if (shared > (last ? device.shared_bytes : device.slice_bytes)) continue;
    plan.shared = size_t(shared);
    return int64_t(rows.count) * cluster.blocks <= INT32_MAX;
  }
  return false;
}

template <class T, bool GENERAL>
PolicyPlan plan_policy(const Rows& rows, const Device& device) {
  PolicyPlan plan = {};
  plan.way = IN_CLUSTER;
  if (fits_cluster<T, GENERAL>(rows, device, plan)) return plan;
  const int segments = segments_of<T, GENERAL>(rows.columns);
  TwicePlan& twice = plan.twice;
  for (twice.warps = 1; twice.warps < TWICE_WARPS && twice.warps < segments;) twice.warps *= 2;
  const int block_warps = larger_of(twice.warps, BLOCK_WARPS);
  twice.rows_per_block = block_warps / twice.warps;
  twice.parts = 1;
  twice.segments = segments;
  const int64_t bitmap_bytes = rows.crow ? (int64_t(rows.columns) / 32 + 2 + 3) / 4 * 16 : 0;
  const bool few = segments > BLOCK_WARPS && rows.count < device.multiprocessors;
  const int64_t shared = int64_t(twice.rows_per_block) * (int64_t(segments) * int(sizeof(Partial)) + 512 + bitmap_bytes);
  if (!few && shared <= TWICE_SHARED) {
    plan.way = TWICE;
    twice.bitmap_bytes = int(bitmap_bytes);
    plan.shared = size_t(twice.rows_per_block) * TwicePlan::row_bytes(segments, twice.bitmap_bytes);
    return plan;
  }
  plan.way = ONE_AFTER_THE_OTHER;
  plan.statistics = plan_statistics<T, GENERAL>(rows, device);
  plan.scratch_bytes = plan.statistics.scratch_bytes + size_t(rows.count) * GRADS * sizeof(float);
  return plan;
}

template <class T, bool GENERAL>
void launch_policy(const char* op, const Rows& rows, const Loss& loss, const PolicyPlan& plan, const Device& device, void* scratch,
                   float* stats, const Out& out, Stream stream) {
  const Wanted wanted = wanted_of(rows.flags);
  if (plan.way == IN_CLUSTER) {
    const ClusterPlan& cluster = plan.cluster;
    launch(op, cluster_kernel<T, GENERAL>, int64_t(rows.count) * cluster.blocks, cluster.warps * WARP, plan.shared, cluster.blocks, stream,
           rows, loss, cluster, wanted, stats, out);
  } else if (plan.way == TWICE) {
    const TwicePlan& twice = plan.twice;
    const int block = twice.warps * twice.rows_per_block * WARP;
    launch(op, twice_kernel<T, GENERAL>, twice.grid(rows.count), block, plan.shared, 0, stream, rows, loss, twice, wanted, stats, out);
  } else {
    float* upstream = reinterpret_cast<float*>(static_cast<char*>(scratch) + plan.statistics.scratch_bytes);
    launch_statistics<T, GENERAL>(op, rows, plan.statistics, scratch, stats, stream);
    launch(op, upstream_kernel<void>, (rows.count + BLOCK - 1) / BLOCK, BLOCK, 0, 0, stream, rows, loss, stats, upstream);
    const int64_t given = 1 << LOGP | 1 << ENTROPY | 1 << SELF_CERTAINTY;
    launch_gradient<T, GENERAL>(op, rows, device, stats, upstream, given, out, stream);
  }
}

}  // namespace urlvr::cuda
