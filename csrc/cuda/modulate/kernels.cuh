// Modulation, y = F(scale) * x + shift, mixtures, F(scale) * (x - shift) + shift, and their gradients, 16 bytes at a
// time.
//
// Compiled and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "common/activation_math.h"
#include "cuda/common/numbers.cuh"
#include "cuda/modulate/modulate.h"

namespace mi_kernels::cuda {

// A 64-bit division takes a hundred instructions; most operands fit into 32 bits.
MI_DEVICE int64_t divide(int64_t a, int64_t b) {
  return ((a | b) >> 31) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// The offset of a position from the start of each operand.
struct Offsets {
  int64_t at[kOperands] = {};
  // Adds a linear index over several axes.
  MI_DEVICE void add(const Axis* axes, int64_t count, int64_t linear) {
    MI_NO_UNROLL
    for (int64_t a = count - 1; a >= 0; --a) {
      int64_t index = linear;
      if (a > 0) {
        const int64_t next = divide(linear, axes[a].size);
        index = linear - next * axes[a].size;
        linear = next;
      }
      MI_UNROLL
      for (int o = 0; o < kOperands; ++o) at[o] += index * axes[a].stride[o];
    }
  }
  MI_DEVICE void add(const Axis& axis, int64_t index) {
    MI_UNROLL
    for (int o = 0; o < kOperands; ++o) at[o] += index * axis.stride[o];
  }
};

// A chunk of an operand, at once if it is vectorized and otherwise element by element; past n elements it is zero. The
// stride is 0 if the operand is broadcast along the inner axis.
template <class T>
MI_DEVICE Chunk<T> load_chunk_at(const T* p, int64_t stride, int n, bool vectorized) {
  if (vectorized) return load_chunk(p);
  Chunk<T> c;
  MI_UNROLL
  for (int e = 0; e < kChunk<T>; ++e)
    if (e < n) c.element[e] = p[e * stride];
  return c;
}
template <class T>
MI_DEVICE void store_chunk_at(T* p, const Chunk<T>& c, int64_t stride, int n, bool vectorized) {
  if (vectorized) return store_chunk(p, c);
  MI_UNROLL
  for (int e = 0; e < kChunk<T>; ++e)
    if (e < n) p[e * stride] = c.element[e];
}

template <class T>
MI_DEVICE void activate(const ScaleFunction& function, const Chunk<T>& scale, AccOf<T> (&gate)[kChunk<T>]) {
  using Acc = AccOf<T>;
  const Acc factor = Acc(function.factor), offset = Acc(function.offset);
  for_activation<ScalarMath>(function.activation, [&](auto act) {
    MI_UNROLL
    for (int e = 0; e < kChunk<T>; ++e) gate[e] = act.value(Acc(scale.element[e])) * factor + offset;
  });
}

MI_DEVICE int elements_in_chunk(int64_t first, int64_t size, int chunk) {
  return size - first < chunk ? int(size - first) : chunk;
}

template <class Arch, class T>
MI_DEVICE void modulate_block(const ModulateParams& params) {
  using Acc = AccOf<T>;
  constexpr int kE = kChunk<T>;
  const int64_t chunk = Arch::block_x() * kModulateThreads + Arch::thread();
  const int64_t row = divide(chunk, params.chunks), first = (chunk - row * params.chunks) * kE;
  if (row >= params.rows) return;
  Offsets o;
  o.add(params.outer, params.axes, row);
  o.add(params.inner, first);
  const int n = elements_in_chunk(first, params.inner.size, kE);
  const auto& stride = params.inner.stride;
  const auto x = load_chunk_at(static_cast<const T*>(params.x) + o.at[kX], stride[kX], n, params.vectorized[kX]);
  const auto scale =
      load_chunk_at(static_cast<const T*>(params.scale) + o.at[kScale], stride[kScale], n, params.vectorized[kScale]);
  Chunk<T> shift, y;
  if (params.shift)
    shift =
        load_chunk_at(static_cast<const T*>(params.shift) + o.at[kShift], stride[kShift], n, params.vectorized[kShift]);
  Acc gate[kE];
  activate(params.function, scale, gate);
  MI_UNROLL
  for (int e = 0; e < kE; ++e) {
    const Acc from = params.mixes ? Acc(x.element[e]) - Acc(shift.element[e]) : Acc(x.element[e]);
    const Acc product = gate[e] * from;
    y.element[e] = T(params.shift ? product + Acc(shift.element[e]) : product);
  }
  store_chunk_at(static_cast<T*>(params.y) + o.at[kY], y, stride[kY], n, params.vectorized[kY]);
}

// A thread's sums of x g and of g, for each element of its chunk, in summation blocks of kBlock terms: one sequential
// sum over a long batch would round more than PyTorch's pairwise sum does.
template <class T>
struct GradSums {
  static constexpr int kE = kChunk<T>, kBlock = 32;
  AccOf<T> sum[2][kE] = {}, part[2][kE] = {};
  int count = 0;
  MI_DEVICE void add(const AccOf<T> (&x)[kE], const Chunk<T>& g) {
    MI_UNROLL
    for (int e = 0; e < kE; ++e) {
      part[0][e] += x[e] * AccOf<T>(g.element[e]);
      part[1][e] += AccOf<T>(g.element[e]);
    }
    if (++count == kBlock) fold();
  }
  MI_DEVICE void fold() {
    MI_UNROLL
    for (int e = 0; e < kE; ++e) {
      MI_UNROLL
      for (int q = 0; q < 2; ++q) {
        sum[q][e] += part[q][e];
        part[q][e] = 0;
      }
    }
    count = 0;
  }
};

// Whether a unit has sums: dshift of a mixture is none.
MI_DEVICE bool sums_shift(const ModulateGradsParams& params) { return params.dshift && !params.other; }

// The offset of a unit, and its first element along the inner axis.
template <class T>
MI_DEVICE void locate_unit(const ModulateGradsParams& params, const ModulateGradsPlan& plan, int64_t unit, Offsets& o,
                           int64_t& first) {
  const int64_t outer = params.inner_kept ? divide(unit, plan.chunks) : unit;
  first = params.inner_kept ? (unit - outer * plan.chunks) * kChunk<T> : 0;
  o.add(params.kept, params.kept_axes, outer);
  if (params.inner_kept) o.add(params.inner, first);
}

// Stores the gradients of a unit from its sums of x g, sum[0], and of g, sum[1].
template <class T>
MI_DEVICE void store_grads(const ModulateGradsParams& params, const ModulateGradsPlan& plan, int64_t unit,
                           const AccOf<T> (&sum)[2][kChunk<T>]) {
  using Acc = AccOf<T>;
  Offsets o;
  int64_t first = 0;
  locate_unit<T>(params, plan, unit, o, first);
  const int n = params.inner_kept ? elements_in_chunk(first, params.inner.size, kChunk<T>) : 1;
  MI_UNROLL
  for (int e = 0; e < kChunk<T>; ++e) {
    if (e >= n) continue;
    const int64_t dest_index = o.at[kShift] + e * params.inner.stride[kShift];
    if (params.dscale) {
      const Acc scale = Acc(static_cast<const T*>(params.scale)[o.at[kScale] + e * params.inner.stride[kScale]]);
      static_cast<T*>(params.dscale)[dest_index] =
          T(tangent(params.function.activation, scale, Acc(params.function.factor) * sum[0][e]));
    }
    if (sums_shift(params)) static_cast<T*>(params.dshift)[dest_index] = T(sum[1][e]);
  }
}

// One term of a unit: stores dx, and dshift of a mixture, and adds to the sums.
template <class T>
MI_DEVICE void add_term(const ModulateGradsParams& params, const ModulateGradsPlan& plan, Offsets o, int64_t first,
                        int64_t term, const AccOf<T> (&gate)[kChunk<T>], GradSums<T>& sums) {
  int64_t row = term;
  if (!params.inner_kept) {
    row = divide(term, plan.chunks);
    first = (term - row * plan.chunks) * kChunk<T>;
    o.add(params.inner, first);
  }
  o.add(params.reduced, params.reduced_axes, row);
  const int n = elements_in_chunk(first, params.inner.size, kChunk<T>);
  const auto& stride = params.inner.stride;
  const auto g =
      load_chunk_at(static_cast<const T*>(params.grad) + o.at[kGrad], stride[kGrad], n, params.vectorized[kGrad]);
  const auto store = [&](void* result, bool complement) {
    Chunk<T> chunk;
    MI_UNROLL
    for (int e = 0; e < kChunk<T>; ++e) {
      const AccOf<T> grad = AccOf<T>(g.element[e]), part = gate[e] * grad;
      chunk.element[e] = T(complement ? grad - part : part);
    }
    store_chunk_at(static_cast<T*>(result) + o.at[kY], chunk, stride[kY], n, params.vectorized[kY]);
  };
  if (params.dx) store(params.dx, false);
  if (params.dshift && params.other) store(params.dshift, true);
  AccOf<T> from[kChunk<T>] = {};
  if (params.dscale) {
    const auto add = [&](const void* data, int operand, AccOf<T> sign) {
      const auto c =
          load_chunk_at(static_cast<const T*>(data) + o.at[operand], stride[operand], n, params.vectorized[operand]);
      MI_UNROLL
      for (int e = 0; e < kChunk<T>; ++e) from[e] += sign * AccOf<T>(c.element[e]);
    };
    add(params.x, kX, 1);
    if (params.other) add(params.other, kOther, -1);
  }
  sums.add(from, g);
}

template <class T>
constexpr int modulate_grads_shared_bytes() {
  return kModulateThreads * 2 * 16 / int(sizeof(T)) * int(sizeof(AccOf<T>));
}

template <class Arch, class T>
MI_DEVICE void modulate_grads_block(const ModulateGradsParams& params, const ModulateGradsPlan& plan,
                                    AccOf<T>* partials) {
  using Acc = AccOf<T>;
  constexpr int kE = kChunk<T>;
  const int units_per_block = int(plan.units_per_block), group_threads = kModulateThreads / units_per_block,
            thread = Arch::thread();
  // Neighbouring threads read neighbouring chunks: of different units if the inner axis is kept, else of one.
  const int slot = params.inner_kept ? thread % units_per_block : thread / group_threads;
  const int thread_rank = params.inner_kept ? thread / units_per_block : thread % group_threads;
  const int64_t unit = Arch::block_x() * units_per_block + slot, split = Arch::block_y();
  GradSums<T> sums;
  if (unit < plan.units) {
    Offsets o;
    int64_t first = 0;
    locate_unit<T>(params, plan, unit, o, first);
    Acc gate[kE] = {};
    if (params.dx || params.other) {
      const int n = params.inner_kept ? elements_in_chunk(first, params.inner.size, kE) : kE;
      const int64_t stride = params.inner.stride[kScale];
      const bool vectorized = params.inner_kept && params.vectorized[kScale];
      activate(params.function,
               load_chunk_at(static_cast<const T*>(params.scale) + o.at[kScale], stride, n, vectorized), gate);
    }
    const int64_t begin = split * plan.split_size;
    const int64_t end = begin + plan.split_size < plan.terms ? begin + plan.split_size : plan.terms;
    MI_NO_UNROLL
    for (int64_t term = begin + thread_rank; term < end; term += group_threads)
      add_term<T>(params, plan, o, first, term, gate, sums);
  }
  if (!params.dscale && !sums_shift(params)) return;
  sums.fold();
  if (!params.inner_kept) {  // the elements of a chunk are terms of one sum
    MI_UNROLL
    for (int e = 1; e < kE; ++e) {
      sums.sum[0][0] += sums.sum[0][e];
      sums.sum[1][0] += sums.sum[1][e];
    }
  }
  auto* shared = reinterpret_cast<Acc(*)[2][kE]>(Arch::shared());  // [thread_rank][slot]
  MI_UNROLL
  for (int e = 0; e < kE; ++e) {
    shared[thread_rank * units_per_block + slot][0][e] = sums.sum[0][e];
    shared[thread_rank * units_per_block + slot][1][e] = sums.sum[1][e];
  }
  MI_NO_UNROLL
  for (int half = group_threads / 2; half > 0; half /= 2) {
    Arch::sync_block();
    if (thread_rank >= half) continue;
    MI_UNROLL
    for (int e = 0; e < kE; ++e) {
      shared[thread_rank * units_per_block + slot][0][e] += shared[(thread_rank + half) * units_per_block + slot][0][e];
      shared[thread_rank * units_per_block + slot][1][e] += shared[(thread_rank + half) * units_per_block + slot][1][e];
    }
  }
  if (thread_rank > 0 || unit >= plan.units) return;
  MI_UNROLL
  for (int e = 0; e < kE; ++e) {
    sums.sum[0][e] = shared[slot][0][e];
    sums.sum[1][e] = shared[slot][1][e];
  }
  if (plan.splits == 1) return store_grads<T>(params, plan, unit, sums.sum);
  auto* out = reinterpret_cast<Acc(*)[2][kE]>(partials) + split * plan.units + unit;
  MI_UNROLL
  for (int e = 0; e < kE; ++e) {
    (*out)[0][e] = sums.sum[0][e];
    (*out)[1][e] = sums.sum[1][e];
  }
}

// Adds the partial sums in the order of the splits.
template <class Arch, class T>
MI_DEVICE void modulate_grads_reduce_splits(const ModulateGradsParams& params, const ModulateGradsPlan& plan,
                                            const AccOf<T>* partials) {
  constexpr int kE = kChunk<T>;
  const int64_t unit = Arch::block_x() * kModulateThreads + Arch::thread();
  if (unit >= plan.units) return;
  AccOf<T> sum[2][kE] = {};
  MI_NO_UNROLL
  for (int64_t split = 0; split < plan.splits; ++split) {
    const auto& part = reinterpret_cast<const AccOf<T>(*)[2][kE]>(partials)[split * plan.units + unit];
    MI_UNROLL
    for (int e = 0; e < kE; ++e) {
      sum[0][e] += part[0][e];
      sum[1][e] += part[1][e];
    }
  }
  store_grads<T>(params, plan, unit, sum);
}

}  // namespace mi_kernels::cuda
