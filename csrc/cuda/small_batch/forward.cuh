// The forward pass of a few rows: W streams past once. A tile of 128 rows would be padding for the most part, and
// memory is what bounds such a call, so there are no tiles and no shared memory on the way: the threads of a block lie
// along the sum, each with kStreamOutputs rows of W, whose next chunks are under way while these are multiplied. The
// products z x are made in the dtype of accumulation, once for all outputs of a block.
//
// Compiled, and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/sm80/families.cuh"

namespace mi_kernels::cuda {

// Rows and outputs of a block: as many as two blocks of a multiprocessor have registers for.
template <class T>
inline constexpr int kStreamRows = stream_rows(int(sizeof(T)));
template <class T>
using StreamSums = AccOf<T>[kStreamRows<T>][kStreamOutputs];

// Elements k = (i, j) of a row of z x, or of a row of another operand, where i is 0. Lines beyond the last are read as
// the last, and nobody stores what comes of them.
template <class T>
struct StreamProducts {
  const Products<T>& of;
  const T *z, *x;
  MI_DEVICE StreamProducts(const Products<T>& p, int64_t group)
      : of(p), z(p.z + group * p.z_group), x(p.x + group * p.x_group) {}
  MI_DEVICE int64_t within(int64_t line) const { return line < of.lines ? line : of.lines - 1; }
  MI_DEVICE const T* from(int64_t line, int64_t j) const { return x + within(line) * of.x_line + j * of.x_along; }
  MI_DEVICE AccOf<T> factor(int64_t line, int64_t i) const {
    return AccOf<T>(z[within(line) * of.z_line + i * of.z_along]);
  }
};
template <class T>
struct StreamMatrix {
  const Matrix<T>& of;
  const T* data;
  MI_DEVICE StreamMatrix(const Matrix<T>& m, int64_t group) : of(m), data(m.data + group * m.group) {}
  MI_DEVICE int64_t within(int64_t line) const { return line < of.lines ? line : of.lines - 1; }
  MI_DEVICE const T* from(int64_t line, int64_t k) const { return data + within(line) * of.line + k * of.along; }
  MI_DEVICE AccOf<T> factor(int64_t, int64_t) const { return AccOf<T>(1); }
};

template <int kN, class T>
MI_DEVICE Chunk<T> load_elements(const T* from) {
  if constexpr (kN > 1) return load_chunk(from);
  Chunk<T> c;
  c.element[0] = *from;
  return c;
}

// Adds left(row, k) right(col, k) for k from `begin` to `end`, k = (i, j) with j below `width`. A thread reads kN
// elements at a time, a chunk or one; its neighbours have those beside them.
template <class Gpu, class T, int kN, class Left>
MI_DEVICE void stream(const Left& left, int64_t width, const StreamMatrix<T>& right, int64_t row0, int64_t col0,
                      int64_t begin, int64_t end, StreamSums<T>& sums) {
  using Acc = AccOf<T>;
  constexpr int64_t kStride = kEngineThreads * kN;
  int64_t k = begin + Gpu::thread() * kN;
  if (k >= end) return;
  const int64_t whole = kStride / width, rest = kStride - whole * width;
  int64_t i = k / width, j = k - i * width;
  Chunk<T> next[kStreamOutputs];
  const auto fetch = [&] {
    MI_UNROLL for (int m = 0; m < kStreamOutputs; ++m) next[m] = load_elements<kN>(right.from(col0 + m, k));
  };
  fetch();
  MI_NO_UNROLL while (true) {
    Chunk<T> weight[kStreamOutputs], values[kStreamRows<T>];
    Acc factor[kStreamRows<T>];
    MI_UNROLL for (int m = 0; m < kStreamOutputs; ++m) weight[m] = next[m];
    k += kStride;
    if (k < end) fetch();
    MI_UNROLL for (int r = 0; r < kStreamRows<T>; ++r) {
      values[r] = load_elements<kN>(left.from(row0 + r, j));
      factor[r] = left.factor(row0 + r, i);
    }
    MI_UNROLL for (int e = 0; e < kN; ++e) MI_UNROLL for (int r = 0; r < kStreamRows<T>; ++r) {
      const Acc product = factor[r] * Acc(values[r].element[e]);
      MI_UNROLL for (int m = 0; m < kStreamOutputs; ++m) sums[r][m] += product * Acc(weight[m].element[e]);
    }
    if (k >= end) return;
    i += whole;
    j += rest;
    if (j >= width) {
      j -= width;
      ++i;
    }
  }
}

// Adds the products with W of a split and, of the first one, those of z and x with U and V.
template <class Gpu, class T, int kN>
MI_DEVICE void stream_terms(const ForwardCall<T>& call, const TilePlace& p, StreamSums<T>& sums) {
  const int64_t row0 = p.row_tile * kStreamRows<T>, col0 = p.col_tile * kStreamOutputs,
                begin = p.split * call.grid.step;
  const int64_t end = call.depth - begin < call.grid.step ? call.depth : begin + call.grid.step;
  stream<Gpu, T, kN>(StreamProducts<T>(call.products, p.group), call.products.width,
                     StreamMatrix<T>(call.weight, p.group), row0, col0, begin, end, sums);
  MI_NO_UNROLL for (int q = 0; q < 2 && p.split == 0; ++q)
      stream<Gpu, T, kN>(StreamMatrix<T>(call.left[q], p.group), call.depths[q],
                         StreamMatrix<T>(call.right[q], p.group), row0, col0, 0, call.depths[q], sums);
}

template <class T>
constexpr int stream_shared_bytes() {
  return kStreamRows<T> * kStreamOutputs * (kEngineThreads + 1) * int(sizeof(AccOf<T>));
}

template <class Gpu, class T>
MI_DEVICE void stream_block(const ForwardCall<T>& call) {
  using Acc = AccOf<T>;
  constexpr int kValues = kStreamRows<T> * kStreamOutputs, kPitch = kEngineThreads + 1;
  constexpr int kShare = kEngineThreads / kValues;  // threads that add up one value
  const TilePlace p = tile_place(call.grid, Gpu::block_x());
  StreamSums<T> sums = {};
  if (call.stream_chunks)
    stream_terms<Gpu, T, kChunk<T>>(call, p, sums);
  else
    stream_terms<Gpu, T, 1>(call, p, sums);
  // All sums of the block, in an order that depends on nothing.
  auto* shared = reinterpret_cast<Acc*>(Gpu::shared());
  const int thread = Gpu::thread(), value = thread / kShare;
  MI_UNROLL for (int v = 0; v < kValues; ++v) shared[v * kPitch + thread] =
      sums[v / kStreamOutputs][v % kStreamOutputs];
  Gpu::sync_block();
  Acc sum = 0;
  MI_NO_UNROLL for (int t = thread % kShare; t < kEngineThreads; t += kShare) sum += shared[value * kPitch + t];
  Gpu::sync_block();
  shared[thread] = sum;
  Gpu::sync_block();
  const int64_t row = p.row_tile * kStreamRows<T> + thread / kStreamOutputs,
                col = p.col_tile * kStreamOutputs + thread % kStreamOutputs;
  if (thread >= kValues || row >= call.out.rows || col >= call.out.cols) return;
  sum = 0;
  MI_NO_UNROLL for (int t = 0; t < kShare; ++t) sum += shared[thread * kShare + t];
  call.out.put(p.split, p.group, row, col, sum, Acc(0));
}

}  // namespace mi_kernels::cuda
