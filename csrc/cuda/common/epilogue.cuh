// What happens to the sums of a product: they are stored as partial sums, or get a bias, a gate and become the result.
#pragma once

#include "common/activation_math.h"
#include "cuda/common/numbers.cuh"

namespace mi_kernels::cuda {

// Turns p, the biased sums, into y = (act(p) + offset) * x + second sums + shift_bias.
template <class T>
struct GateEpilogue {
  bool present = false;
  Activation activation = Activation::identity;
  double offset = 0;
  const T* x = nullptr;
  int64_t x_row = 0, x_col = 0;  // strides
  T* pre_activation = nullptr;   // p for the backward pass, laid out as y; null if it is not wanted
  const T* shift_bias = nullptr;
  int64_t shift_bias_stride = 0;
};

// Results are contiguous, [groups][rows][cols]. A split reduction writes `partials`, [split][groups][rows][cols], from
// which reduce_block makes the results.
template <class T>
struct Epilogue {
  T* y = nullptr;
  AccOf<T>* partials = nullptr;
  const T* bias = nullptr;
  int64_t bias_group = 0, bias_col = 0;  // strides
  int64_t groups = 1, rows = 0, cols = 0;
  GateEpilogue<T> gate = {};

  MI_DEVICE int64_t dest_index(int64_t group, int64_t row, int64_t col) const {
    return (group * rows + row) * cols + col;
  }
  MI_DEVICE AccOf<T> add_bias(int64_t group, int64_t col, AccOf<T> sum) const {
    return bias ? sum + AccOf<T>(bias[group * bias_group + col * bias_col]) : sum;
  }
  // Stores a sum of one split, which is the result if the reduction is not split.
  MI_DEVICE void store(int64_t split, int64_t group, int64_t row, int64_t col, AccOf<T> sum, AccOf<T> second) const {
    if (partials)
      partials[split * groups * rows * cols + dest_index(group, row, col)] = sum;
    else
      finish(group, row, col, sum, second);
  }
  MI_DEVICE void finish(int64_t group, int64_t row, int64_t col, AccOf<T> sum, AccOf<T> second) const {
    using Acc = AccOf<T>;
    Acc p = add_bias(group, col, sum);
    if (gate.present) {
      if (gate.pre_activation) gate.pre_activation[dest_index(group, row, col)] = T(p);
      for_activation<ScalarMath>(gate.activation, [&](auto act) { p = act.value(p); });
      p = (p + Acc(gate.offset)) * Acc(gate.x[row * gate.x_row + col * gate.x_col]) + second;
      if (gate.shift_bias) p += Acc(gate.shift_bias[col * gate.shift_bias_stride]);
    }
    y[dest_index(group, row, col)] = T(p);
  }
};

// y = sum over the ranks of f(p) h(q), with p and q the biased sums of a rank. Results are contiguous.
template <class T>
struct DualLinearEpilogue {
  T* y = nullptr;                // [rows][cols]
  T *p = nullptr, *q = nullptr;  // [rows][ranks][cols], for the backward pass; null if they are not wanted
  const T* bias[2] = {};         // [ranks][cols], of p and of q
  int64_t bias_stride[2] = {};
  int64_t rows = 0, cols = 0, ranks = 1;
  Activation activation[2] = {};

  // f(p) h(q) of one rank.
  MI_DEVICE AccOf<T> product(int64_t rank, int64_t row, int64_t col, AccOf<T> sum, AccOf<T> second) const {
    using Acc = AccOf<T>;
    const int64_t feature = rank * cols + col;
    Acc value[2] = {sum, second};
    T* const kept[2] = {p, q};
    MI_UNROLL
    for (int s = 0; s < 2; ++s) {
      if (bias[s]) value[s] += Acc(bias[s][feature * bias_stride[s]]);
      if (kept[s]) kept[s][row * (ranks * cols) + feature] = T(value[s]);
      for_activation<ScalarMath>(activation[s], [&](auto act) { value[s] = act.value(value[s]); });
    }
    return value[0] * value[1];
  }
};

}  // namespace mi_kernels::cuda
