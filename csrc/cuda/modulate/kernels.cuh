// Modulation: y = (act(scale) + s) * x + shift in one pass, sixteen bytes at a time, and its gradients.
// Compiled, and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "common/activation_math.h"
#include "cuda/common/numbers.cuh"
#include "cuda/modulate/modulate.h"

namespace mi_kernels::cuda {

// 64-bit division takes a hundred instructions; most numbers need none.
MI_DEVICE int64_t divided(int64_t a, int64_t b) {
  return ((a | b) >> 31) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// How far a place on some axes is from the start of each operand.
struct Offsets {
  int64_t at[kOperands] = {};
  MI_DEVICE void add(const Axis* axes, int64_t count, int64_t place) {
    MI_NO_UNROLL for (int64_t a = count - 1; a >= 0; --a) {
      int64_t index = place;
      if (a > 0) {
        const int64_t next = divided(place, axes[a].size);
        index = place - next * axes[a].size;
        place = next;
      }
      MI_UNROLL for (int o = 0; o < kOperands; ++o) at[o] += index * axes[a].stride[o];
    }
  }
  MI_DEVICE void along(const Axis& axis, int64_t index) {
    MI_UNROLL for (int o = 0; o < kOperands; ++o) at[o] += index * axis.stride[o];
  }
};

// A chunk of an operand: whole, the same number throughout, or element by element; beyond n it is zero.
template <class T>
MI_DEVICE Chunk<T> load_run(const T* p, int64_t stride, int n, bool whole) {
  if (whole) return load_chunk(p);
  Chunk<T> c;
  MI_UNROLL for (int e = 0; e < kChunk<T>; ++e) if (e < n) c.element[e] = p[e * stride];
  return c;
}
template <class T>
MI_DEVICE void store_run(T* p, const Chunk<T>& c, int64_t stride, int n, bool whole) {
  if (whole) return store_chunk(p, c);
  MI_UNROLL for (int e = 0; e < kChunk<T>; ++e) if (e < n) p[e * stride] = c.element[e];
}

template <class T>
MI_DEVICE void activate(Activation activation, double offset, const Chunk<T>& scale, AccOf<T> (&gate)[kChunk<T>]) {
  using Acc = AccOf<T>;
  for_activation<ScalarMath>(activation, [&](auto act) {
    MI_UNROLL for (int e = 0; e < kChunk<T>; ++e) gate[e] = act.value(Acc(scale.element[e])) + Acc(offset);
  });
}

MI_DEVICE int run_length(int64_t first, int64_t size, int chunk) {
  return size - first < chunk ? int(size - first) : chunk;
}

template <class Gpu, class T>
MI_DEVICE void modulate_block(const ModulateCall& call) {
  using Acc = AccOf<T>;
  constexpr int E = kChunk<T>;
  const int64_t chunk = Gpu::block_x() * kModulateThreads + Gpu::thread();
  const int64_t row = divided(chunk, call.chunks), first = (chunk - row * call.chunks) * E;
  if (row >= call.rows) return;
  Offsets o;
  o.add(call.outer, call.axes, row);
  o.along(call.inner, first);
  const int n = run_length(first, call.inner.size, E);
  const auto& stride = call.inner.stride;
  const auto x = load_run(static_cast<const T*>(call.x) + o.at[kX], stride[kX], n, call.whole[kX]);
  const auto scale = load_run(static_cast<const T*>(call.scale) + o.at[kScale], stride[kScale], n, call.whole[kScale]);
  Chunk<T> shift, y;
  if (call.shift)
    shift = load_run(static_cast<const T*>(call.shift) + o.at[kShift], stride[kShift], n, call.whole[kShift]);
  Acc gate[E];
  activate(call.activation, call.offset, scale, gate);
  MI_UNROLL for (int e = 0; e < E; ++e) {
    const Acc product = gate[e] * Acc(x.element[e]);
    y.element[e] = T(call.shift ? product + Acc(shift.element[e]) : product);
  }
  store_run(static_cast<T*>(call.y) + o.at[kY], y, stride[kY], n, call.whole[kY]);
}

// What a thread sums: of x g and of g, for each element of its chunk. Sums of up to kRun terms are added to sums of
// those: one chain over a long batch would round more than PyTorch's pairwise sum.
template <class T>
struct GradSums {
  static constexpr int E = kChunk<T>, kRun = 32;
  AccOf<T> sum[2][E] = {}, part[2][E] = {};
  int count = 0;
  MI_DEVICE void add(const Chunk<T>& x, const Chunk<T>& g) {
    MI_UNROLL for (int e = 0; e < E; ++e) {
      part[0][e] += AccOf<T>(x.element[e]) * AccOf<T>(g.element[e]);
      part[1][e] += AccOf<T>(g.element[e]);
    }
    if (++count == kRun) fold();
  }
  MI_DEVICE void fold() {
    MI_UNROLL for (int e = 0; e < E; ++e) {
      MI_UNROLL for (int q = 0; q < 2; ++q) {
        sum[q][e] += part[q][e];
        part[q][e] = 0;
      }
    }
    count = 0;
  }
};

// Where unit `unit` of a call begins: its place on the kept axes and along the inner one.
template <class T>
MI_DEVICE void unit_place(const ModulateGradsCall& call, const ModulateGradsPlan& plan, int64_t unit, Offsets& o,
                          int64_t& first) {
  const int64_t group = call.inner_kept ? divided(unit, plan.chunks) : unit;
  first = call.inner_kept ? (unit - group * plan.chunks) * kChunk<T> : 0;
  o.add(call.kept, call.kept_axes, group);
  if (call.inner_kept) o.along(call.inner, first);
}

// The sums of one unit, q = 0 of x g and q = 1 of g, as gradients.
template <class T>
MI_DEVICE void store_grads(const ModulateGradsCall& call, const ModulateGradsPlan& plan, int64_t unit,
                           const AccOf<T> (&sum)[2][kChunk<T>]) {
  using Acc = AccOf<T>;
  Offsets o;
  int64_t first = 0;
  unit_place<T>(call, plan, unit, o, first);
  const int n = call.inner_kept ? run_length(first, call.inner.size, kChunk<T>) : 1;
  MI_UNROLL for (int e = 0; e < kChunk<T>; ++e) {
    if (e >= n) continue;
    const int64_t to = o.at[kShift] + e * call.inner.stride[kShift];
    if (call.dscale) {
      const Acc scale = Acc(static_cast<const T*>(call.scale)[o.at[kScale] + e * call.inner.stride[kScale]]);
      static_cast<T*>(call.dscale)[to] = T(tangent(call.activation, scale, sum[0][e]));
    }
    if (call.dshift) static_cast<T*>(call.dshift)[to] = T(sum[1][e]);
  }
}

// One place of a unit: dx is written and the sums go on.
template <class T>
MI_DEVICE void grads_place(const ModulateGradsCall& call, const ModulateGradsPlan& plan, Offsets o, int64_t first,
                           int64_t place, const AccOf<T> (&gate)[kChunk<T>], GradSums<T>& sums) {
  int64_t row = place;
  if (!call.inner_kept) {
    row = divided(place, plan.chunks);
    first = (place - row * plan.chunks) * kChunk<T>;
    o.along(call.inner, first);
  }
  o.add(call.reduced, call.reduced_axes, row);
  const int n = run_length(first, call.inner.size, kChunk<T>);
  const auto& stride = call.inner.stride;
  const auto g = load_run(static_cast<const T*>(call.grad) + o.at[kGrad], stride[kGrad], n, call.whole[kGrad]);
  if (call.dx) {
    Chunk<T> dx;
    MI_UNROLL for (int e = 0; e < kChunk<T>; ++e) dx.element[e] = T(gate[e] * AccOf<T>(g.element[e]));
    store_run(static_cast<T*>(call.dx) + o.at[kY], dx, stride[kY], n, call.whole[kY]);
  }
  Chunk<T> x;
  if (call.dscale) x = load_run(static_cast<const T*>(call.x) + o.at[kX], stride[kX], n, call.whole[kX]);
  sums.add(x, g);
}

template <class T>
constexpr int modulate_grads_shared_bytes() {
  return kModulateThreads * 2 * 16 / int(sizeof(T)) * int(sizeof(AccOf<T>));
}

template <class Gpu, class T>
MI_DEVICE void modulate_grads_block(const ModulateGradsCall& call, const ModulateGradsPlan& plan, AccOf<T>* partials) {
  using Acc = AccOf<T>;
  constexpr int E = kChunk<T>;
  const int keeps = int(plan.keeps), team = kModulateThreads / keeps, thread = Gpu::thread();
  // Neighbouring threads take neighbouring chunks of memory.
  const int keep = call.inner_kept ? thread % keeps : thread / team;
  const int member = call.inner_kept ? thread / keeps : thread % team;
  const int64_t unit = Gpu::block_x() * keeps + keep, split = Gpu::block_y();
  GradSums<T> sums;
  if (unit < plan.units) {
    Offsets o;
    int64_t first = 0;
    unit_place<T>(call, plan, unit, o, first);
    Acc gate[E] = {};
    if (call.dx) {
      const int n = call.inner_kept ? run_length(first, call.inner.size, E) : E;
      const int64_t stride = call.inner.stride[kScale];
      const bool whole = call.inner_kept && call.whole[kScale];
      activate(call.activation, call.offset,
               load_run(static_cast<const T*>(call.scale) + o.at[kScale], stride, n, whole), gate);
    }
    const int64_t begin = split * plan.step;
    const int64_t end = begin + plan.step < plan.places ? begin + plan.step : plan.places;
    MI_NO_UNROLL for (int64_t place = begin + member; place < end; place += team)
        grads_place<T>(call, plan, o, first, place, gate, sums);
  }
  if (!call.dscale && !call.dshift) return;
  sums.fold();
  if (!call.inner_kept) {  // one sum for all elements
    MI_UNROLL for (int e = 1; e < E; ++e) {
      sums.sum[0][0] += sums.sum[0][e];
      sums.sum[1][0] += sums.sum[1][e];
    }
  }
  auto* shared = reinterpret_cast<Acc(*)[2][E]>(Gpu::shared());  // [member][keep]
  MI_UNROLL for (int e = 0; e < E; ++e) {
    shared[member * keeps + keep][0][e] = sums.sum[0][e];
    shared[member * keeps + keep][1][e] = sums.sum[1][e];
  }
  MI_NO_UNROLL for (int half = team / 2; half > 0; half /= 2) {
    Gpu::sync_block();
    if (member < half) MI_UNROLL for (int e = 0; e < E; ++e) {
        shared[member * keeps + keep][0][e] += shared[(member + half) * keeps + keep][0][e];
        shared[member * keeps + keep][1][e] += shared[(member + half) * keeps + keep][1][e];
      }
  }
  if (member > 0 || unit >= plan.units) return;
  MI_UNROLL for (int e = 0; e < E; ++e) {
    sums.sum[0][e] = shared[keep][0][e];
    sums.sum[1][e] = shared[keep][1][e];
  }
  if (plan.splits == 1) return store_grads<T>(call, plan, unit, sums.sum);
  auto* out = reinterpret_cast<Acc(*)[2][E]>(partials) + split * plan.units + unit;
  MI_UNROLL for (int e = 0; e < E; ++e) {
    (*out)[0][e] = sums.sum[0][e];
    (*out)[1][e] = sums.sum[1][e];
  }
}

// The second stage: the sums of the splits, in their order.
template <class Gpu, class T>
MI_DEVICE void modulate_grads_finish(const ModulateGradsCall& call, const ModulateGradsPlan& plan,
                                     const AccOf<T>* partials) {
  constexpr int E = kChunk<T>;
  const int64_t unit = Gpu::block_x() * kModulateThreads + Gpu::thread();
  if (unit >= plan.units) return;
  AccOf<T> sum[2][E] = {};
  MI_NO_UNROLL for (int64_t split = 0; split < plan.splits; ++split) {
    const auto& part = reinterpret_cast<const AccOf<T>(*)[2][E]>(partials)[split * plan.units + unit];
    MI_UNROLL for (int e = 0; e < E; ++e) {
      sum[0][e] += part[0][e];
      sum[1][e] += part[1][e];
    }
  }
  store_grads<T>(call, plan, unit, sum);
}

}  // namespace mi_kernels::cuda
