// The forms of the interaction as pairs of operands and epilogues on the mma engine. G groups, rows B, outputs O.
#pragma once

#include "common/activation_math.h"
#include "cuda/host/plan.h"
#include "cuda/sm80/engine.cuh"

namespace mi_kernels::cuda {

// What becomes of the sums p of a gated form: y = (act(p) + offset) * x + second sums + shift_bias.
template <class T>
struct Gate {
  bool present = false;
  Activation activation = Activation::identity;
  double offset = 0;
  const T* x = nullptr;
  int64_t x_row = 0, x_col = 0;
  T* kept = nullptr;  // p for the backward pass, laid out as y, where it is wanted
  const T* shift_bias = nullptr;
  int64_t shift_col = 0;
};

// Results [groups][rows][cols], contiguous. Sums go to `partials` [split][groups][rows][cols] where there are any;
// reduce_block makes the results of them.
template <class T>
struct Output {
  T* y = nullptr;
  AccOf<T>* partials = nullptr;
  const T* bias = nullptr;
  int64_t bias_group = 0, bias_col = 0;
  int64_t groups = 1, rows = 0, cols = 0;
  Gate<T> gate = {};

  MI_DEVICE int64_t place(int64_t group, int64_t row, int64_t col) const { return (group * rows + row) * cols + col; }
  MI_DEVICE AccOf<T> biased(int64_t group, int64_t col, AccOf<T> sum) const {
    return bias ? sum + AccOf<T>(bias[group * bias_group + col * bias_col]) : sum;
  }
  // A sum that this split has, which is a result where there are no other splits.
  MI_DEVICE void put(int64_t split, int64_t group, int64_t row, int64_t col, AccOf<T> sum, AccOf<T> second) const {
    if (partials)
      partials[split * groups * rows * cols + place(group, row, col)] = sum;
    else
      finish(group, row, col, sum, second);
  }
  MI_DEVICE void finish(int64_t group, int64_t row, int64_t col, AccOf<T> sum, AccOf<T> second) const {
    using Acc = AccOf<T>;
    Acc p = biased(group, col, sum);
    if (gate.present) {
      if (gate.kept) gate.kept[place(group, row, col)] = T(p);
      for_activation<ScalarMath>(gate.activation, [&](auto act) { p = act.value(p); });
      p = (p + Acc(gate.offset)) * Acc(gate.x[row * gate.x_row + col * gate.x_col]) + second;
      if (gate.shift_bias) p += Acc(gate.shift_bias[col * gate.shift_col]);
    }
    y[place(group, row, col)] = T(p);
  }
};

template <class T>
struct ForwardCall {            // W first, then U and V
  bool streams, stream_chunks;  // a few rows: the grid is one of stream.cuh, which reads chunks or elements
  Grid grid;
  bool by_items;  // W_i x first, then z_i; the items of weight are the i
  Products<T> products;
  Matrix<T> weight;
  int64_t depth;  // Z X, or of the items X; 0 without W
  Matrix<T> left[2], right[2];
  int64_t depths[2];
  Output<T> out;
};

template <class T>
struct GateCall {  // gate and shift of z, then the gate of x
  Grid grid;
  Matrix<T> left[2];
  Pair<T> right[2];
  int64_t depths[2];
  Output<T> out;
};

template <class T>
struct WeightGradsCall {  // g^T (z x), or g^T of one of them
  Grid grid;
  Matrix<T> grad;
  bool made;
  Products<T> products;
  Matrix<T> features;
  int64_t depth;
  Output<T> out;
};

template <class T>
struct LinearCall {  // g M for a matrix [O][features]
  Grid grid;
  Matrix<T> grad, matrix;
  int64_t depth;
  Output<T> out;
};

template <class T>
struct InputGradsCall {  // T_i = g W_i tile by tile, dx = sum_i z_i T_i, dz_i = sum_j x_j T_ij
  bool stream_chunks;    // whether stream_grads.cuh reads chunks or elements
  GradsStream stream;
  Grid grid;
  Matrix<T> grad, weight;  // the items of weight are the i
  int64_t depth, rows, context, width;
  const T *x, *z;
  int64_t x_group, x_row, x_col, z_group, z_row, z_col;
  AccOf<T>*dx, *dz;  // partial sums [split][G][B][X] and [output split][width tile][G][B][Z]; null where not wanted
};

// Where a block is in its grid.
struct TilePlace {
  int64_t row_tile, col_tile, split, group;
};
MI_HOST_DEVICE TilePlace tile_place(const Grid& grid, int64_t block) {
  TilePlace p;
  p.row_tile = block % grid.row_tiles;
  block /= grid.row_tiles;
  p.col_tile = block % grid.col_tiles;
  block /= grid.col_tiles;
  p.split = block % grid.splits;
  p.group = block / grid.splits;
  return p;
}

// Stages of a split of a sum.
MI_HOST_DEVICE int64_t steps_of(const Grid& grid, int64_t split, int64_t depth, int64_t stage) {
  const int64_t begin = split * grid.step, rest = depth - begin < grid.step ? depth - begin : grid.step;
  return rest <= 0 ? 0 : (rest + stage - 1) / stage;
}

struct Nothing {
  MI_DEVICE void operator()(int64_t) const {}
};

// The epilogue of every form but the input gradients: sums through shared memory, so that neighbouring threads have
// neighbouring results and the activation's code is there once.
template <class Gpu, class Math>
MI_DEVICE void store_sums(const Output<typename Math::T>& out, const typename Math::Sums& sums, const TilePlace& p) {
  using Acc = typename Math::Acc;
  using Tile = typename Math::Tile;
  constexpr int kPitch = sums_pitch<Math>(), kCols = Math::kTwo ? Tile::kCols / 2 : Tile::kCols;
  auto* shared = reinterpret_cast<Acc*>(Gpu::shared());
  const int thread = Gpu::thread();
  Gpu::sync_block();
  MI_UNROLL for (int s = 0; s < Tile::kSums; ++s)
      shared[Tile::row(thread, s) * kPitch + Tile::col(thread, s, Math::kTwo)] = sums.at(s);
  Gpu::sync_block();
  MI_NO_UNROLL for (int at = thread; at < Tile::kRows * kCols; at += kEngineThreads) {
    const int r = at / kCols, c = at % kCols;
    const int64_t row = p.row_tile * Tile::kRows + r, col = p.col_tile * kCols + c;
    if (row >= out.rows || col >= out.cols) continue;
    const Acc sum = shared[r * kPitch + c], second = Math::kTwo ? shared[r * kPitch + kCols + c] : Acc(0);
    out.put(p.split, p.group, row, col, sum, second);
  }
}

template <class Math>
MI_DEVICE auto in_group(const Matrix<typename Math::T>& matrix, int64_t group) {
  auto operand = Math::operand(matrix);
  operand.to_group(group);
  return operand;
}

// U z + V x, by the first split.
template <class Gpu, class Math>
MI_DEVICE void add_linear_terms(const ForwardCall<typename Math::T>& call, const TilePlace& p,
                                typename Math::Sums& sums) {
  using Tile = typename Math::Tile;
  MI_NO_UNROLL for (int q = 0; q < 2 && p.split == 0; ++q) accumulate<Gpu, Math, Major::depth, Major::depth>(
      in_group<Math>(call.left[q], p.group), in_group<Math>(call.right[q], p.group), p.row_tile * Tile::kRows,
      p.col_tile * Tile::kCols, 0, (call.depths[q] + Math::kDepth - 1) / Math::kDepth, 1, sums, Nothing{});
}

template <class Gpu, class Math>
MI_DEVICE void forward_block(const ForwardCall<typename Math::T>& call) {
  using Tile = typename Math::Tile;
  const TilePlace p = tile_place(call.grid, Gpu::block_x());
  typename Math::Sums sums;
  if (call.depth > 0) {
    auto products = call.products;
    products.to_group(p.group);
    accumulate<Gpu, Math, Major::depth, Major::depth>(
        products, in_group<Math>(call.weight, p.group), p.row_tile * Tile::kRows, p.col_tile * Tile::kCols,
        p.split * call.grid.step, steps_of(call.grid, p.split, call.depth, Math::kDepth), 1, sums, Nothing{});
  }
  add_linear_terms<Gpu, Math>(call, p, sums);
  store_sums<Gpu, Math>(call.out, sums, p);
}

// The same without products z x, which float16 cannot hold: x W_i for one i after the other, times z_i in float.
template <class Gpu, class Math>
MI_DEVICE void forward_items_block(const ForwardCall<typename Math::T>& call) {
  using Tile = typename Math::Tile;
  const TilePlace p = tile_place(call.grid, Gpu::block_x());
  const int64_t row0 = p.row_tile * Tile::kRows, i0 = p.split * call.grid.step, rest = call.products.context - i0;
  typename Math::Sums sums, total;
  if (call.depth > 0) {
    auto products = call.products;
    auto weight = call.weight;
    products.to_group(p.group);
    weight.to_group(p.group);
    weight.data += i0 * weight.item;
    const int64_t items = rest < call.grid.step ? rest : call.grid.step;
    float own_z[Tile::kOwnRows];  // read an item ahead
    const auto read_z = [&](int64_t item) {
      MI_UNROLL for (int own = 0; own < Tile::kOwnRows; ++own) {
        const int64_t row = row0 + Tile::row(Gpu::thread(), Tile::first_of(own));
        const bool inside = row < call.out.rows && item < items;
        own_z[own] = inside ? float(products.z[row * products.z_line + (i0 + item) * products.z_along]) : 0.0f;
      }
    };
    read_z(0);
    const auto consume = [&](int64_t item) {
      MI_UNROLL for (int s = 0; s < Tile::kSums; ++s) total.value[s] += own_z[Tile::own_row(s)] * sums.at(s);
      sums.clear();
      read_z(item + 1);
    };
    accumulate<Gpu, Math, Major::depth, Major::depth>(
        in_group<Math>(call.left[1], p.group), weight, row0, p.col_tile * Tile::kCols, 0,
        (call.depth + Math::kDepth - 1) / Math::kDepth, items, sums, consume);
  }
  add_linear_terms<Gpu, Math>(call, p, total);
  store_sums<Gpu, Math>(call.out, total, p);
}

template <class Gpu, class Math>
MI_DEVICE void gate_block(const GateCall<typename Math::T>& call) {
  using Tile = typename Math::Tile;
  const TilePlace p = tile_place(call.grid, Gpu::block_x());
  const int64_t row0 = p.row_tile * Tile::kRows, col0 = p.col_tile * (Tile::kCols / 2);
  typename Math::Sums sums;
  const auto steps = [&](int q) { return (call.depths[q] + Math::kDepth - 1) / Math::kDepth; };
  accumulate<Gpu, Math, Major::depth, Major::depth>(call.left[0], call.right[0], row0, col0, 0, steps(0), 1, sums,
                                                    Nothing{});
  // x has no part in the shift, whose sums an infinite x would spoil by way of 0 * Inf.
  accumulate<Gpu, Math, Major::depth, Major::depth, true>(call.left[1], call.right[1], row0, col0, 0, steps(1), 1, sums,
                                                          Nothing{});
  store_sums<Gpu, Math>(call.out, sums, p);
}

template <class Gpu, class Math, bool kMade>
MI_DEVICE void weight_grads_block(const WeightGradsCall<typename Math::T>& call) {
  using Tile = typename Math::Tile;
  const TilePlace p = tile_place(call.grid, Gpu::block_x());
  const int64_t row0 = p.row_tile * Tile::kRows, col0 = p.col_tile * Tile::kCols, k0 = p.split * call.grid.step;
  const int64_t steps = steps_of(call.grid, p.split, call.depth, Math::kDepth);
  typename Math::Sums sums;
  const auto multiply = [&](const auto& right) {
    accumulate<Gpu, Math, Major::row, Major::row>(in_group<Math>(call.grad, p.group), right, row0, col0, k0, steps, 1,
                                                  sums, Nothing{});
  };
  if constexpr (kMade) {
    auto products = call.products;
    products.to_group(p.group);
    multiply(products);
  } else {
    multiply(in_group<Math>(call.features, p.group));
  }
  store_sums<Gpu, Math>(call.out, sums, p);
}

template <class Gpu, class Math>
MI_DEVICE void linear_block(const LinearCall<typename Math::T>& call) {
  using Tile = typename Math::Tile;
  const TilePlace p = tile_place(call.grid, Gpu::block_x());
  typename Math::Sums sums;
  accumulate<Gpu, Math, Major::depth, Major::row>(
      in_group<Math>(call.grad, p.group), in_group<Math>(call.matrix, p.group), p.row_tile * Tile::kRows,
      p.col_tile * Tile::kCols, p.split * call.grid.step, steps_of(call.grid, p.split, call.depth, Math::kDepth), 1,
      sums, Nothing{});
  store_sums<Gpu, Math>(call.out, sums, p);
}

template <class Math>
constexpr int input_grads_shared_bytes() {
  return kStages * stage_bytes<Math>() + Math::Tile::kRows * Math::Tile::kTeam * int(sizeof(typename Math::Acc));
}

template <class Gpu, class Math>
MI_DEVICE void input_grads_block(const InputGradsCall<typename Math::T>& call) {
  using T = typename Math::T;
  using Acc = typename Math::Acc;
  using Tile = typename Math::Tile;
  const TilePlace p = tile_place(call.grid, Gpu::block_x());
  const int64_t row0 = p.row_tile * Tile::kRows, col0 = p.col_tile * Tile::kCols, i0 = p.split * call.grid.step;
  const int64_t rest = call.context - i0, items = rest < call.grid.step ? rest : call.grid.step;
  const int thread = Gpu::thread();
  auto grad = call.grad, weight = call.weight;
  grad.to_group(p.group);
  weight.to_group(p.group);
  weight.data += i0 * weight.item;
  const T* z = call.z + p.group * call.z_group;
  const T* x = call.x + p.group * call.x_group;
  auto* shares = reinterpret_cast<Acc*>(Gpu::shared() + kStages * stage_bytes<Math>());  // [row][member of its team]
  Acc dx[Tile::kSums] = {};
  T own_x[Tile::kSums];
  MI_UNROLL for (int s = 0; s < Tile::kSums; ++s) {
    const int64_t row = row0 + Tile::row(thread, s), col = col0 + Tile::col(thread, s, false);
    own_x[s] = call.dz && row < call.rows && col < call.width ? x[row * call.x_row + col * call.x_col] : T(0.0f);
  }
  typename Math::Sums sums;
  const auto consume = [&](int64_t item) {
    Acc own_z[Tile::kOwnRows], share[Tile::kOwnRows] = {};
    if (call.dx) {
      MI_UNROLL for (int own = 0; own < Tile::kOwnRows; ++own) {
        const int64_t row = row0 + Tile::row(thread, Tile::first_of(own));
        own_z[own] = row < call.rows ? Acc(z[row * call.z_row + (i0 + item) * call.z_col]) : Acc(0);
      }
    }
    MI_UNROLL for (int s = 0; s < Tile::kSums; ++s) {
      const int own = Tile::own_row(s);
      if (call.dx) dx[s] += own_z[own] * sums.at(s);
      // Beyond the width a sum may be 0 * Inf.
      if (col0 + Tile::col(thread, s, false) < call.width) share[own] += Acc(own_x[s]) * sums.at(s);
    }
    sums.clear();
    if (!call.dz) return;
    MI_UNROLL for (int own = 0; own < Tile::kOwnRows; ++own)
        shares[Tile::row(thread, Tile::first_of(own)) * Tile::kTeam + Tile::member(thread)] = share[own];
    Gpu::sync_block();
    const int64_t row = row0 + thread;
    if (thread >= Tile::kRows || row >= call.rows) return;
    Acc sum = 0;
    MI_NO_UNROLL for (int m = 0; m < Tile::kTeam; ++m) sum += shares[thread * Tile::kTeam + m];
    call.dz[((p.col_tile * call.grid.groups + p.group) * call.rows + row) * call.context + i0 + item] = sum;
  };
  accumulate<Gpu, Math, Major::depth, Major::row>(grad, weight, row0, col0, 0,
                                                  (call.depth + Math::kDepth - 1) / Math::kDepth, items, sums, consume);
  if (!call.dx) return;
  MI_UNROLL for (int s = 0; s < Tile::kSums; ++s) {
    const int64_t row = row0 + Tile::row(thread, s), col = col0 + Tile::col(thread, s, false);
    if (row < call.rows && col < call.width)
      call.dx[((p.split * call.grid.groups + p.group) * call.rows + row) * call.width + col] = dx[s];
  }
}

inline constexpr int kReduceThreads = 256;

// Results of the partial sums of `splits` splits, in their order.
template <class Gpu, class T>
MI_DEVICE void reduce_block(const Output<T>& out, int64_t splits) {
  const int64_t size = out.groups * out.rows * out.cols;
  const int64_t at = Gpu::block_x() * kReduceThreads + Gpu::thread();
  if (at >= size) return;
  double sum = 0;  // hundreds of floats in a chain would round more than PyTorch's blocked sums
  MI_NO_UNROLL for (int64_t s = 0; s < splits; ++s) sum += double(out.partials[s * size + at]);
  const int64_t row = at / out.cols;
  out.finish(row / out.rows, row % out.rows, at % out.cols, AccOf<T>(sum), AccOf<T>(0));
}

// Sums `mine` (or takes the largest) over the threads of a block, the same in every thread.
template <class Gpu, bool kLargest, class Acc>
MI_DEVICE Acc over_block(Acc mine) {
  auto* shared = reinterpret_cast<Acc*>(Gpu::shared());
  const int thread = Gpu::thread();
  Gpu::sync_block();
  shared[thread] = mine;
  MI_NO_UNROLL for (int half = kReduceThreads / 2; half > 0; half /= 2) {
    Gpu::sync_block();
    if (thread < half) {
      const Acc a = shared[thread], b = shared[thread + half];
      shared[thread] = kLargest ? (a > b || a != a ? a : b) : a + b;
    }
  }
  Gpu::sync_block();
  return shared[0];
}

// A gate of softmax: one block for each row of p, given as partial sums without bias, and of the shift, likewise.
template <class Gpu, class T>
MI_DEVICE void softmax_block(const Output<T>& out, int64_t splits, const AccOf<T>* shift, int64_t shift_splits) {
  using Acc = AccOf<T>;
  const int64_t row = Gpu::block_x(), size = out.rows * out.cols;
  const auto summed = [&](const Acc* partials, int64_t count, int64_t col) {
    double sum = 0;
    MI_NO_UNROLL for (int64_t s = 0; s < count; ++s) sum += double(partials[s * size + row * out.cols + col]);
    return Acc(sum);
  };
  const auto p = [&](int64_t col) { return out.biased(0, col, summed(out.partials, splits, col)); };
  Acc largest = -INFINITY, total = 0;
  MI_NO_UNROLL for (int64_t col = Gpu::thread(); col < out.cols; col += kReduceThreads) {
    const Acc value = p(col);
    largest = value > largest || value != value ? value : largest;
  }
  largest = over_block<Gpu, true>(largest);
  MI_NO_UNROLL for (int64_t col = Gpu::thread(); col < out.cols; col += kReduceThreads) total +=
      std::exp(p(col) - largest);
  total = over_block<Gpu, false>(total);
  MI_NO_UNROLL for (int64_t col = Gpu::thread(); col < out.cols; col += kReduceThreads) {
    const Gate<T>& gate = out.gate;
    const Acc value = p(col);
    if (gate.kept) gate.kept[row * out.cols + col] = T(value);
    Acc y = (std::exp(value - largest) / total + Acc(gate.offset)) * Acc(gate.x[row * gate.x_row + col * gate.x_col]);
    if (shift) y += summed(shift, shift_splits, col);
    if (gate.shift_bias) y += Acc(gate.shift_bias[col * gate.shift_col]);
    out.y[row * out.cols + col] = T(y);
  }
}

}  // namespace mi_kernels::cuda
