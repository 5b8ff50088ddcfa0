// Normalisation with modulation and its gradients. A warp or a block has a set, whose first chunks stay in shared
// memory between the sums and what follows from them; longer sets are read again.
//
// Compiled and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/modulate/kernels.cuh"
#include "cuda/modulate/norm.h"

namespace mi_kernels::cuda {

// Chunks of each operand that a thread keeps in shared memory. In registers they would need unrolled loops, and so
// copies of all activations.
inline constexpr int kNormKept = 4;
inline constexpr int kNormSumBytes = 128;  // of shared memory, for the sums of a block's warps
constexpr int norm_shared_bytes(int operands) { return kNormSumBytes + operands * kNormKept * kNormThreads * 16; }

// The offset of a position from the start of each operand.
struct NormOffsets {
  int64_t at[kNormOperands] = {};
  MI_DEVICE void add(const NormAxis& axis, int64_t index) {
    MI_UNROLL
    for (int o = 0; o < kNormOperands; ++o) at[o] += index * axis.stride[o];
  }
  // Adds a linear index over several axes.
  MI_DEVICE void add(const NormAxis* axes, int64_t count, int64_t linear) {
    MI_NO_UNROLL
    for (int64_t a = count - 1; a >= 0; --a) {
      const int64_t next = a > 0 ? divide(linear, axes[a].size) : 0;
      add(axes[a], linear - next * axes[a].size);
      linear = next;
    }
  }
};

// A chunk of the operands of a call: n elements that begin at `offsets`.
template <class T>
struct NormChunk {
  using Acc = AccOf<T>;
  static constexpr int kE = kChunk<T>;
  const NormOperands& params;
  NormOffsets offsets;
  int n;

  MI_DEVICE Chunk<T> load_from(const void* data, Norm operand) const {
    const int o = int(operand);
    return load_chunk_at(static_cast<const T*>(data) + offsets.at[o], params.inner.stride[o], n, params.vectorized[o]);
  }
  MI_DEVICE Chunk<T> load(Norm operand) const { return load_from(params.data[int(operand)], operand); }
  MI_DEVICE bool has(Norm operand) const { return params.data[int(operand)] != nullptr; }
  MI_DEVICE void store(void* data, const Chunk<T>& chunk) const {
    const int o = int(Norm::y);
    store_chunk_at(static_cast<T*>(data) + offsets.at[o], chunk, params.inner.stride[o], n, params.vectorized[o]);
  }
  // values *= F(scale)
  MI_DEVICE void multiply_by_factor(Acc (&values)[kE]) const {
    if (!has(Norm::scale)) return;
    Acc factor[kE];
    activate(params.function, load(Norm::scale), factor);
    MI_UNROLL
    for (int e = 0; e < kE; ++e) values[e] *= factor[e];
  }
  MI_DEVICE void multiply_by(Norm operand, Acc (&values)[kE]) const {
    if (!has(operand)) return;
    const Chunk<T> c = load(operand);
    MI_UNROLL
    for (int e = 0; e < kE; ++e) values[e] *= Acc(c.element[e]);
  }
  MI_DEVICE void add(Norm operand, Acc (&values)[kE]) const {
    if (!has(operand)) return;
    const Chunk<T> c = load(operand);
    MI_UNROLL
    for (int e = 0; e < kE; ++e) values[e] += Acc(c.element[e]);
  }
};

// The set of a thread, and its chunks: `rank`, `rank + kSetThreads` and so on.
template <class Arch, class T, int kSetThreads>
struct NormSet {
  static constexpr int kE = kChunk<T>;
  const NormSetOperands& params;
  int64_t set;
  int rank;
  int64_t line_chunks, chunks;
  NormOffsets offsets;

  MI_DEVICE explicit NormSet(const NormSetOperands& p) : params(p) {
    set = Arch::block_x() * (kNormThreads / kSetThreads) + Arch::thread() / kSetThreads;
    rank = Arch::thread() % kSetThreads;
    line_chunks = (p.inner.size + kE - 1) / kE;
    chunks = line_chunks * p.line.size;
    if (set < p.sets) offsets.add(p.outer, p.outer_axes, set);
  }
  MI_DEVICE NormChunk<T> chunk(int64_t index) const {
    NormChunk<T> c{params, offsets, 0};
    const int64_t line = divide(index, line_chunks), first = (index - line * line_chunks) * kE;
    c.offsets.add(params.line, line);
    c.offsets.add(params.inner, first);
    c.n = elements_in_chunk(first, params.inner.size, kE);
    return c;
  }
  // visit(k, chunk) for all chunks of the thread; the first kNormKept of an operand can be kept.
  template <class F>
  MI_DEVICE void each(F&& visit) const {
    int64_t k = 0;
    MI_NO_UNROLL
    for (int64_t index = rank; index < chunks; index += kSetThreads) visit(k++, chunk(index));
  }
  MI_DEVICE static Chunk<T>& kept(int operand, int64_t k) {
    auto* chunks = reinterpret_cast<Chunk<T>*>(Arch::shared() + kNormSumBytes);
    return chunks[(operand * kNormKept + k) * kNormThreads + Arch::thread()];
  }
};

// The sum over the threads of a set, the same in each of them.
template <class Arch, int kSetThreads>
MI_DEVICE double sum_over_set(double mine) {
  MI_UNROLL
  for (int by = kWarpThreads / 2; by > 0; by /= 2) mine += Arch::shuffle_xor(mine, by);
  if (kSetThreads == kWarpThreads) return mine;
  auto* shared = reinterpret_cast<double*>(Arch::shared());
  Arch::sync_block();
  if (Arch::thread() % kWarpThreads == 0) shared[Arch::thread() / kWarpThreads] = mine;
  Arch::sync_block();
  double total = 0;
  MI_UNROLL
  for (int w = 0; w < kNormThreads / kWarpThreads; ++w) total += shared[w];
  return total;
}

template <class Arch, class T, int kSetThreads>
MI_DEVICE void norm_block(const NormParams& params) {
  using Acc = AccOf<T>;
  constexpr int kE = kChunk<T>;
  const NormSet<Arch, T, kSetThreads> set(params);
  if (set.set >= params.sets) return;  // a whole warp, or a whole block
  const double size = double(params.inner.size) * double(params.line.size);
  // x_new of a chunk; it is stored when it is first made.
  const auto made = [&](const NormChunk<T>& c) {
    Chunk<T> x = c.load(Norm::x);
    if (!c.has(Norm::h)) return x;
    const Chunk<T> h = c.load(Norm::h);
    Acc gated[kE];
    MI_UNROLL
    for (int e = 0; e < kE; ++e) gated[e] = Acc(h.element[e]);
    c.multiply_by(Norm::gate, gated);
    MI_UNROLL
    for (int e = 0; e < kE; ++e) x.element[e] = T(Acc(x.element[e]) + gated[e]);
    return x;
  };
  double sum = 0;
  set.each([&](int64_t k, const NormChunk<T>& c) {
    const Chunk<T> x = made(c);
    if (k < kNormKept) set.kept(0, k) = x;
    if (params.x_new) c.store(params.x_new, x);
    Acc part = 0;
    MI_UNROLL
    for (int e = 0; e < kE; ++e) part += e < c.n ? Acc(x.element[e]) : Acc(0);
    sum += double(part);
  });
  const Acc mean = params.mean_out ? Acc(sum_over_set<Arch, kSetThreads>(sum) / size) : Acc(0);
  double squares = 0;
  set.each([&](int64_t k, const NormChunk<T>& c) {
    const Chunk<T> x = k < kNormKept ? set.kept(0, k) : made(c);
    Acc part = 0;
    MI_UNROLL
    for (int e = 0; e < kE; ++e) {
      const Acc centered = e < c.n ? Acc(x.element[e]) - mean : Acc(0);
      part += centered * centered;
    }
    squares += double(part);
  });
  const Acc rstd = Acc(1 / std::sqrt(sum_over_set<Arch, kSetThreads>(squares) / size + params.eps));
  if (set.rank == 0) {
    if (params.mean_out) static_cast<Acc*>(params.mean_out)[set.set] = mean;
    static_cast<Acc*>(params.rstd_out)[set.set] = rstd;
  }
  set.each([&](int64_t k, const NormChunk<T>& c) {
    const Chunk<T> x = k < kNormKept ? set.kept(0, k) : made(c);
    Acc values[kE];
    MI_UNROLL
    for (int e = 0; e < kE; ++e) values[e] = (Acc(x.element[e]) - mean) * rstd;
    c.multiply_by(Norm::weight, values);
    c.add(Norm::bias, values);
    c.multiply_by_factor(values);
    c.add(Norm::shift, values);
    Chunk<T> y;
    MI_UNROLL
    for (int e = 0; e < kE; ++e) y.element[e] = T(values[e]);
    c.store(params.y, y);
  });
}

template <class Arch, class T, int kSetThreads>
MI_DEVICE void norm_input_grads_block(const NormInputGradsParams& params) {
  using Acc = AccOf<T>;
  constexpr int kE = kChunk<T>;
  const NormSet<Arch, T, kSetThreads> set(params);
  if (set.set >= params.sets) return;
  const double size = double(params.inner.size) * double(params.line.size);
  const Acc mean = params.mean ? static_cast<const Acc*>(params.mean)[set.set] : Acc(0);
  const Acc rstd = static_cast<const Acc*>(params.rstd)[set.set];
  // a and n of a chunk.
  const auto both = [&](const NormChunk<T>& c, const Chunk<T>& x, const Chunk<T>& g, Acc(&a)[kE], Acc(&normed)[kE]) {
    MI_UNROLL
    for (int e = 0; e < kE; ++e) {
      a[e] = Acc(g.element[e]);
      normed[e] = e < c.n ? (Acc(x.element[e]) - mean) * rstd : Acc(0);
    }
    c.multiply_by_factor(a);
    c.multiply_by(Norm::weight, a);
  };
  double sums[2] = {};
  set.each([&](int64_t k, const NormChunk<T>& c) {
    const Chunk<T> x = c.load(Norm::x), g = c.load(Norm::grad);
    if (k < kNormKept) set.kept(0, k) = x, set.kept(1, k) = g;
    Acc a[kE], normed[kE], part[2] = {};
    both(c, x, g, a, normed);
    MI_UNROLL
    for (int e = 0; e < kE; ++e) {
      if (e >= c.n) continue;
      part[0] += a[e];
      part[1] += a[e] * normed[e];
    }
    sums[0] += double(part[0]);
    sums[1] += double(part[1]);
  });
  const Acc mean_a = params.mean ? Acc(sum_over_set<Arch, kSetThreads>(sums[0]) / size) : Acc(0);
  const Acc mean_an = Acc(sum_over_set<Arch, kSetThreads>(sums[1]) / size);
  if (set.rank == 0) {
    static_cast<Acc*>(params.means)[set.set] = mean_a;
    static_cast<Acc*>(params.means)[params.sets + set.set] = mean_an;
  }
  if (!params.dx && !params.dh) return;
  set.each([&](int64_t k, const NormChunk<T>& c) {
    const Chunk<T> x = k < kNormKept ? set.kept(0, k) : c.load(Norm::x);
    const Chunk<T> g = k < kNormKept ? set.kept(1, k) : c.load(Norm::grad);
    Acc values[kE], normed[kE];
    both(c, x, g, values, normed);
    MI_UNROLL
    for (int e = 0; e < kE; ++e) values[e] = (values[e] - normed[e] * mean_an - mean_a) * rstd;
    c.add(Norm::grad_x, values);
    Chunk<T> result;
    MI_UNROLL
    for (int e = 0; e < kE; ++e) result.element[e] = T(values[e]);
    if (params.dx) c.store(params.dx, result);
    if (!params.dh) return;
    c.multiply_by(Norm::gate, values);
    MI_UNROLL
    for (int e = 0; e < kE; ++e) result.element[e] = T(values[e]);
    c.store(params.dh, result);
  });
}

// A warp for each set that it can keep, else a block.
template <class T>
MI_HOST_DEVICE bool norm_by_warp(const NormOperands& params) {
  constexpr int64_t kE = kChunk<T>;
  return (params.inner.size + kE - 1) / kE * params.line.size <= kNormKept * kWarpThreads;
}
template <class T>
MI_HOST_DEVICE int64_t norm_blocks(const NormOperands& params) {
  constexpr int64_t sets = kNormThreads / kWarpThreads;
  return norm_by_warp<T>(params) ? (params.sets + sets - 1) / sets : params.sets;
}

}  // namespace mi_kernels::cuda
