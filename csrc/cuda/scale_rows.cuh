// A gradient that was made in the forward times what the backward brings: a number, and a power of two a row. Nobody on the host knows that
// the number is 1, as it nearly always is, so the kernel finds out, and then touches nothing.
#pragma once

#include "segment_gradient.cuh"

namespace urlvr::cuda {

constexpr int SCALE_THREADS = 256;
constexpr int SCALE_COLUMNS = 4096;  // of a row, a warp

template <class T>
ROW_KERNEL(SCALE_THREADS, 4)
scale_kernel(Out gradient, int count, int columns, const float* factor, const float* row_scale) {
  const int pieces_of_row = (columns + SCALE_COLUMNS - 1) / SCALE_COLUMNS;
  const int64_t work = int64_t(block_index()) * (SCALE_THREADS / WARP) + warp_index();
  const int n = int(work / pieces_of_row), first = int(work % pieces_of_row) * SCALE_COLUMNS;
  if (n >= count) return;
  const float by = row_scale ? mul(*factor, row_scale[n]) : *factor;
  if (by == 1) return;
  constexpr int VECTOR = Pieces<T>::VECTOR;
  T* row = row_of<T>(gradient, n);
  const Pieces<T> pieces(row, first, smaller_of(first + SCALE_COLUMNS, columns));
  const int lane = lane_index();
  if (lane < pieces.head) put(row + first + lane, mul(number(row[first + lane]), by));
  for (int i = lane; i < pieces.packs; i += WARP) {
    T* at = row + pieces.body() + i * VECTOR;
    const Pack in = load_streamed(at);
    Pack out;
#pragma unroll
    for (int j = 0; j < VECTOR; j += 4) {
      float four[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) four[k] = mul(element<T>(in, j + k), by);
      put_four(out, j, four, T());
    }
    store_streamed(at, out);
  }
  if (lane < pieces.end - pieces.tail()) put(row + pieces.tail() + lane, mul(number(row[pieces.tail() + lane]), by));
}

template <class T>
void launch_scale(const char* op, const Out& gradient, int count, int columns, const float* factor, const float* row_scale, Stream stream) {
  const int64_t warps = int64_t(count) * ((columns + SCALE_COLUMNS - 1) / SCALE_COLUMNS), a_block = SCALE_THREADS / WARP;
  launch(op, scale_kernel<T>, (warps + a_block - 1) / a_block, SCALE_THREADS, 0, 0, stream, gradient, count, columns, factor, row_scale);
}

}  // namespace urlvr::cuda
