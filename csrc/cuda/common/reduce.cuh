// Results of the partial sums of a split reduction, and gates of softmax.
#pragma once

#include "cuda/common/epilogue.cuh"

namespace mi_kernels::cuda {

inline constexpr int kReduceThreads = 256;

// Adds `count` partial sums `stride` apart in their order, with a few loads in flight.
template <class Acc>
MI_DEVICE double sum_of_splits(const Acc* partials, int64_t count, int64_t stride) {
  constexpr int kInFlight = 8;
  double sum = 0;  // adding hundreds of partial sums in float would round more than PyTorch's blocked sums do
  MI_NO_UNROLL
  for (int64_t s = 0; s < count; s += kInFlight) {
    Acc values[kInFlight];
    MI_UNROLL
    for (int q = 0; q < kInFlight; ++q)
      if (s + q < count) values[q] = partials[(s + q) * stride];
    MI_UNROLL
    for (int q = 0; q < kInFlight; ++q)
      if (s + q < count) sum += double(values[q]);
  }
  return sum;
}

// One result of a thread, out of its partial sums.
template <class Arch, class T>
MI_DEVICE void reduce_block(const Epilogue<T>& epilogue, int64_t splits) {
  const int64_t size = epilogue.groups * epilogue.rows * epilogue.cols;
  const int64_t at = Arch::block_x() * kReduceThreads + Arch::thread();
  if (at >= size) return;
  const double sum = sum_of_splits(epilogue.partials + at, splits, size);
  const int64_t row = at / epilogue.cols;
  epilogue.finish(row / epilogue.rows, row % epilogue.rows, at % epilogue.cols, AccOf<T>(sum), AccOf<T>(0));
}

// The sum (or the maximum, where a NaN wins) over the threads of a block, the same in every thread.
template <class Arch, bool kMaximum, class Acc>
MI_DEVICE Acc reduce_over_block(Acc mine) {
  auto* shared = reinterpret_cast<Acc*>(Arch::shared());
  const int thread = Arch::thread();
  Arch::sync_block();
  shared[thread] = mine;
  MI_NO_UNROLL
  for (int half = kReduceThreads / 2; half > 0; half /= 2) {
    Arch::sync_block();
    if (thread < half) {
      const Acc a = shared[thread], b = shared[thread + half];
      shared[thread] = kMaximum ? (a > b || a != a ? a : b) : a + b;
    }
  }
  Arch::sync_block();
  return shared[0];
}

// A gate of softmax, one block per row. Gate and shift are given as partial sums, without bias.
template <class Arch, class T>
MI_DEVICE void softmax_block(const Epilogue<T>& epilogue, int64_t splits, const AccOf<T>* shift, int64_t shift_splits) {
  using Acc = AccOf<T>;
  const int64_t row = Arch::block_x(), size = epilogue.rows * epilogue.cols;
  const auto summed = [&](const Acc* partials, int64_t count, int64_t col) {
    return Acc(sum_of_splits(partials + row * epilogue.cols + col, count, size));
  };
  const auto p = [&](int64_t col) { return epilogue.add_bias(0, col, summed(epilogue.partials, splits, col)); };
  Acc maximum = -INFINITY, total = 0;
  MI_NO_UNROLL
  for (int64_t col = Arch::thread(); col < epilogue.cols; col += kReduceThreads) {
    const Acc value = p(col);
    maximum = value > maximum || value != value ? value : maximum;
  }
  maximum = reduce_over_block<Arch, true>(maximum);
  MI_NO_UNROLL
  for (int64_t col = Arch::thread(); col < epilogue.cols; col += kReduceThreads) total += std::exp(p(col) - maximum);
  total = reduce_over_block<Arch, false>(total);
  MI_NO_UNROLL
  for (int64_t col = Arch::thread(); col < epilogue.cols; col += kReduceThreads) {
    const GateEpilogue<T>& gate = epilogue.gate;
    const Acc value = p(col);
    if (gate.pre_activation) gate.pre_activation[row * epilogue.cols + col] = T(value);
    Acc y = (std::exp(value - maximum) / total + Acc(gate.offset)) * Acc(gate.x[row * gate.x_row + col * gate.x_col]);
    if (shift) y += summed(shift, shift_splits, col);
    if (gate.shift_bias) y += Acc(gate.shift_bias[col * gate.shift_bias_stride]);
    epilogue.y[row * epilogue.cols + col] = T(y);
  }
}

}  // namespace mi_kernels::cuda
