// The kernel of dual_linear_grads.h: a thread has a chunk of features of one row. g, of the outputs, comes again for
// each rank.
//
// Compiled and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/modulate/dual_linear_grads.h"
#include "cuda/modulate/kernels.cuh"

namespace mi_kernels::cuda {

// g of a chunk of features from `first` on; without `vectorized` a chunk may go on in the next rank.
template <class T>
MI_DEVICE Chunk<T> load_grad(const DualLinearGradsParams& params, int64_t row, int64_t first, int n) {
  const auto& grad = params.grad;
  const auto* const line = static_cast<const T*>(grad.data) + row * grad.row;
  int64_t o = first - divide(first, params.out) * params.out;
  if (grad.vectorized) return load_chunk(line + o);
  Chunk<T> c;
  MI_UNROLL
  for (int e = 0; e < kChunk<T>; ++e) {
    if (e < n) c.element[e] = line[o * grad.col];
    if (++o == params.out) o = 0;
  }
  return c;
}

// f'(t) times g and a factor: tangent() of a chunk.
template <class T>
MI_DEVICE Chunk<T> tangents(Activation activation, const Chunk<T>& t, const Chunk<T>& g,
                            const AccOf<T> (&factor)[kChunk<T>]) {
  using Acc = AccOf<T>;
  Acc slope[kChunk<T>];
  for_activation<ScalarMath>(activation, [&](auto act) {
    MI_UNROLL
    for (int e = 0; e < kChunk<T>; ++e) slope[e] = act.derivative(Acc(t.element[e]));
  });
  const bool selects = backward_selects(activation);
  Chunk<T> c;
  MI_UNROLL
  for (int e = 0; e < kChunk<T>; ++e) {
    const Acc product = slope[e] * (Acc(g.element[e]) * factor[e]);
    c.element[e] = T(selects && slope[e] == Acc(0) ? Acc(0) : product);
  }
  return c;
}

template <class Arch, class T>
MI_DEVICE void dual_linear_grads_block(const DualLinearGradsParams& params) {
  using Acc = AccOf<T>;
  const int64_t chunk = Arch::block_x() * kModulateThreads + Arch::thread();
  const int64_t row = divide(chunk, params.chunks), first = (chunk - row * params.chunks) * kChunk<T>;
  if (row >= params.rows) return;
  const int n = elements_in_chunk(first, params.features, kChunk<T>);
  const auto load = [&](const ElementwiseOperand& a) {
    return load_chunk_at(static_cast<const T*>(a.data) + row * a.row + first * a.col, a.col, n, a.vectorized);
  };
  const Chunk<T> g = load_grad<T>(params, row, first, n), p = load(params.p), q = load(params.q);
  Acc f[kChunk<T>], h[kChunk<T>];
  activate<T>({params.activation[0]}, p, f);
  activate<T>({params.activation[1]}, q, h);
  T* const dest = static_cast<T*>(params.d) + row * (2 * params.features) + first;
  store_chunk_at(dest, tangents(params.activation[0], p, g, h), 1, n, params.stores_chunks);
  store_chunk_at(dest + params.features, tangents(params.activation[1], q, g, f), 1, n, params.stores_chunks);
}

}  // namespace mi_kernels::cuda
