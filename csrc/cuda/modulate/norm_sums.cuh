// The gradients of gate, scale, shift, weight and bias: sums of g n, g and h dx over the rows of a context, in a fixed
// order.
//
// Compiled and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/modulate/norm.cuh"

namespace mi_kernels::cuda {

// A thread's sums of g n, g and h dx, in blocks of 16 terms; those of threads are added in double.
template <class T>
struct NormSums {
  static constexpr int kE = kChunk<T>, kBlock = 16;
  AccOf<T> sum[3][kE] = {}, part[3][kE] = {};
  int count = 0;
  MI_DEVICE void fold() {
    MI_UNROLL
    for (int q = 0; q < 3; ++q) {
      MI_UNROLL
      for (int e = 0; e < kE; ++e) {
        sum[q][e] += part[q][e];
        part[q][e] = 0;
      }
    }
    count = 0;
  }
};

// The offset of a unit, and its first element along the inner axis.
template <class T>
MI_DEVICE int64_t locate_norm_unit(const NormSumsParams& params, int64_t unit, NormOffsets& o) {
  const int64_t outer = params.channels_inner ? divide(unit, params.chunks) : unit;
  const int64_t first = params.channels_inner ? (unit - outer * params.chunks) * kChunk<T> : 0;
  o.add(params.kept, params.kept_axes, outer);
  o.add(params.inner, first);
  return first;
}

template <class T>
MI_DEVICE void store_norm_sums(const NormSumsParams& params, int64_t unit, const double (&sum)[3][kChunk<T>]) {
  using Acc = AccOf<T>;
  NormOffsets o;
  const int64_t first = locate_norm_unit<T>(params, unit, o);
  const int n = params.channels_inner ? elements_in_chunk(first, params.inner.size, kChunk<T>) : 1;
  const auto value = [&](Norm operand, int e, Acc otherwise) {
    const void* data = params.data[int(operand)];
    const int64_t at = o.at[int(operand)] + e * params.inner.stride[int(operand)];
    return data ? Acc(static_cast<const T*>(data)[at]) : otherwise;
  };
  MI_NO_UNROLL  // of the activations
      for (int e = 0; e < n; ++e) {
    const int64_t at = o.at[int(Norm::sum)] + e * params.inner.stride[int(Norm::sum)];
    double of_scale = sum[0][e];
    if (params.dscale && !params.weighted) {
      of_scale = of_scale * double(value(Norm::weight, e, 1)) + sum[1][e] * double(value(Norm::bias, e, 0));
      of_scale = double(tangent(params.function.activation, value(Norm::scale, e, 0), Acc(of_scale)));
    }
    if (params.dscale) static_cast<T*>(params.dscale)[at] = T(Acc(of_scale));
    if (params.dshift) static_cast<T*>(params.dshift)[at] = T(Acc(sum[1][e]));
    if (params.dgate) static_cast<T*>(params.dgate)[at] = T(Acc(sum[2][e]));
  }
}

template <class T>
MI_DEVICE void add_norm_term(const NormSumsParams& params, NormOffsets o, int64_t first, int64_t term,
                             NormSums<T>& sums) {
  using Acc = AccOf<T>;
  constexpr int kE = kChunk<T>;
  int64_t row = term;
  if (!params.channels_inner) {
    row = divide(term, params.chunks);
    first = (term - row * params.chunks) * kE;
    o.add(params.inner, first);
  }
  o.add(params.reduced, params.reduced_axes, row);
  const NormChunk<T> c{params, o, elements_in_chunk(first, params.inner.size, kE)};
  const int64_t set = o.at[int(Norm::stat)];
  const Acc mean = params.mean ? static_cast<const Acc*>(params.mean)[set] : Acc(0);
  const Acc rstd = static_cast<const Acc*>(params.rstd)[set];
  const Chunk<T> x = c.load(Norm::x), g = c.load(Norm::grad);
  Acc a[kE], normed[kE];
  MI_UNROLL
  for (int e = 0; e < kE; ++e) {
    a[e] = Acc(g.element[e]);
    normed[e] = e < c.n ? (Acc(x.element[e]) - mean) * rstd : Acc(0);
  }
  if (params.weighted) c.multiply_by_factor(a);
  MI_UNROLL
  for (int e = 0; e < kE; ++e) {
    if (e >= c.n) continue;
    sums.part[0][e] += a[e] * normed[e];
    sums.part[1][e] += a[e];
  }
  if (params.dgate) {
    c.multiply_by_factor(a);
    c.multiply_by(Norm::weight, a);
    const Acc* means = static_cast<const Acc*>(params.means);
    const Acc mean_a = means[set], mean_an = means[params.sets + set];
    MI_UNROLL
    for (int e = 0; e < kE; ++e) a[e] = (a[e] - normed[e] * mean_an - mean_a) * rstd;
    c.add(Norm::grad_x, a);
    const Chunk<T> h = c.load(Norm::h);
    MI_UNROLL
    for (int e = 0; e < kE; ++e)
      if (e < c.n) sums.part[2][e] += a[e] * Acc(h.element[e]);
  }
  if (++sums.count == NormSums<T>::kBlock) sums.fold();
}

template <class T>
constexpr int norm_sums_shared_bytes() {
  return kNormThreads * kChunk<T> * int(sizeof(double));
}

template <class Arch, class T>
MI_DEVICE void norm_sums_block(const NormSumsParams& params, double* partials) {
  constexpr int kE = kChunk<T>;
  const int units_per_block = int(params.units_per_block), group_threads = kNormThreads / units_per_block;
  const int slot = Arch::thread() % units_per_block, rank = Arch::thread() / units_per_block;
  const int64_t unit = Arch::block_x() * units_per_block + slot, split = Arch::block_y();
  NormSums<T> sums;
  if (unit < params.units) {
    NormOffsets o;
    const int64_t first = locate_norm_unit<T>(params, unit, o);
    const int64_t begin = split * params.split_size;
    const int64_t end = begin + params.split_size < params.terms ? begin + params.split_size : params.terms;
    MI_NO_UNROLL
    for (int64_t term = begin + rank; term < end; term += group_threads) add_norm_term<T>(params, o, first, term, sums);
  }
  sums.fold();
  auto* shared = reinterpret_cast<double (*)[kE]>(Arch::shared());  // [rank][slot]
  double total[3][kE];
  MI_UNROLL
  for (int q = 0; q < 3; ++q) {
    Arch::sync_block();
    MI_UNROLL
    for (int e = 0; e < kE; ++e) shared[Arch::thread()][e] = double(sums.sum[q][e]);
    if (!params.channels_inner) {  // the elements of a chunk are terms of one sum
      MI_UNROLL
      for (int e = 1; e < kE; ++e) shared[Arch::thread()][0] += double(sums.sum[q][e]);
    }
    MI_NO_UNROLL
    for (int half = group_threads / 2; half > 0; half /= 2) {
      Arch::sync_block();
      if (rank >= half) continue;
      MI_UNROLL
      for (int e = 0; e < kE; ++e) shared[Arch::thread()][e] += shared[Arch::thread() + half * units_per_block][e];
    }
    Arch::sync_block();
    MI_UNROLL
    for (int e = 0; e < kE; ++e) total[q][e] = shared[slot][e];
  }
  if (rank > 0 || unit >= params.units) return;
  if (params.splits == 1) return store_norm_sums<T>(params, unit, total);
  auto* out = reinterpret_cast<double (*)[3][kE]>(partials) + split * params.units + unit;
  MI_UNROLL
  for (int q = 0; q < 3; ++q) {
    MI_UNROLL
    for (int e = 0; e < kE; ++e) (*out)[q][e] = total[q][e];
  }
}

// Adds the partial sums in the order of the splits.
template <class Arch, class T>
MI_DEVICE void norm_sums_reduce_splits(const NormSumsParams& params, const double* partials) {
  constexpr int kE = kChunk<T>;
  const int64_t unit = Arch::block_x() * kNormThreads + Arch::thread();
  if (unit >= params.units) return;
  double sum[3][kE] = {};
  MI_NO_UNROLL
  for (int64_t split = 0; split < params.splits; ++split) {
    const auto& part = reinterpret_cast<const double (*)[3][kE]>(partials)[split * params.units + unit];
    MI_UNROLL
    for (int q = 0; q < 3; ++q) {
      MI_UNROLL
      for (int e = 0; e < kE; ++e) sum[q][e] += part[q][e];
    }
  }
  store_norm_sums<T>(params, unit, sum);
}

}  // namespace mi_kernels::cuda
