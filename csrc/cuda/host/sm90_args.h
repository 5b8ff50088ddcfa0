// The dense forward pass on the sm_90a engine, host side: which tensors it takes, which kernel, with which arguments.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/problem_size.h"
#include "common/tensor_ref.h"
#include "cuda/sm90/engine.cuh"

namespace mi_kernels::cuda::sm90 {

struct ForwardOperands {
  Problem problem;
  View x, z, weight, weight_z, weight_x;  // without data where absent
  Elements scales, bias;
  uint16_t* result;
};

// Which kernel, and how many blocks of it run at a time.
struct ForwardChoice {
  int out_tile;  // Shape::kOut: 64, 128 or 256
  int cluster;   // Shape::kCluster
  int split;     // blocks that share a tile; more than 1: Shape::kSplit
  bool exact;
  int blocks;
};

// Groups that share one matrix have a stride of 0 between them.
inline View view(const TensorRef& o, int64_t groups, int64_t rows, int64_t cols) {
  if (!o.data) return {};
  const bool apart = groups > 1 && o.group != 0;
  return {o.data, {cols, 1, rows, apart ? groups : 1}, {o.col, 0, o.row, o.group}, apart ? 1 : 0};
}
inline View weight_view(const TensorRef& o, const mi_kernels::ProblemSize& p) {  // contiguous within a group
  View v = view(o, p.groups, p.out, p.width);
  v.size[1] = p.context;
  v.stride[0] = 1;
  v.stride[1] = p.width;
  v.stride[2] = p.context * p.width;
  return v;
}
inline Elements elements(const TensorRef& o, int64_t row, int64_t col) {
  return {static_cast<const uint16_t*>(o.data), o.group, row, col};
}

inline bool fits_int(const mi_kernels::ProblemSize& p) {
  for (const int64_t size : {p.groups, p.rows, p.context, p.width, p.out})
    if (size >= int64_t(1) << 30) return false;
  return true;
}
inline Problem problem(const mi_kernels::ProblemSize& p, bool weight, bool weight_z, bool weight_x, bool bias) {
  return {int(p.groups), int(p.rows), int(p.context), int(p.width), int(p.out), weight, weight_z, weight_x, bias};
}

// W is contiguous within a group, y altogether.
inline ForwardOperands forward_operands(const mi_kernels::ProblemSize& p, const TensorRef& x, const TensorRef& z,
                                        const TensorRef& weight, const TensorRef& weight_z, const TensorRef& weight_x,
                                        const TensorRef& bias, void* y) {
  ForwardOperands f{};
  f.problem = problem(p, weight.data, weight_z.data, weight_x.data, bias.data);
  f.x = view(x, p.groups, p.rows, p.width);
  f.z = view(z, p.groups, p.rows, p.context);
  if (weight.data) f.weight = weight_view(weight, p);
  f.weight_z = view(weight_z, p.groups, p.out, p.context);
  f.weight_x = view(weight_x, p.groups, p.out, p.width);
  f.scales = elements(z, z.row, z.col);
  f.bias = elements(bias, 0, bias.row);  // its only dimension
  f.result = static_cast<uint16_t*>(y);
  return f;
}

inline bool reads_x(const Problem& p) { return (p.weight && p.context > 0) || p.weight_x; }

inline View result_view(const ForwardOperands& f) {
  const Problem& p = f.problem;
  return {f.result, {p.out, 1, p.rows, p.groups}, {1, 0, p.out, int64_t(p.rows) * p.out}, 1};
}

// Why this call cannot run on the engine, or null. Whether it should is the plan's decision.
inline const char* refusal(const ForwardOperands& f) {
  const Problem& p = f.problem;
  if (int64_t(p.groups) * divide_up(p.rows, kRows) * divide_up(p.out, 64) >= int64_t(1) << 30) return "too many tiles";
  if (reads_x(p) && p.width > 0) {
    if (!loadable(f.x)) return "x: not aligned to 16 bytes";
    if (p.weight && p.context > 0 && !loadable(f.weight)) return "weight: not aligned to 16 bytes";
    if (p.weight_x && !loadable(f.weight_x)) return "weight_x: not aligned to 16 bytes";
  }
  if (p.weight_z && p.context > 0 && !(loadable(f.z) && loadable(f.weight_z)))
    return "weight_z: not aligned to 16 bytes";
  return nullptr;
}

// The choice with the least time by these *estimates*, in steps of one column; nothing has been measured. A step takes
// the tensor cores kOut columns and the consumers 16 packed products; a tile has an end worth 8 steps; and the exchange
// of sums through another block's shared memory is worth 16.
inline ForwardChoice choose_forward(const Problem& p, bool bfloat16, int processors) {
  const auto steps = double(divide_up(p.width, kDepth)) * ((p.weight ? p.context : 0) + (p.weight_x ? 1 : 0)) +
                     (p.weight_z ? divide_up(p.context, kDepth) : 0);
  ForwardChoice best{};
  double least = 0;
  for (const int out : {64, 128, 256})
    for (const int split : {1, 2, 4, 8}) {
      // Products z x overflow float16 where z W x does not: the exact form. Two accumulators of 256 columns do not fit.
      ForwardChoice c{out, split == 1 && p.rows > kRows ? 2 : 1, split, !bfloat16, 0};
      if ((c.exact || split > 1) && out > 128) continue;
      const int64_t units = int64_t(divide_up(p.rows, kRows * c.cluster)) * divide_up(p.out, out) * p.groups;
      const int at_once = std::max(processors / (c.cluster * split), 1);
      if (split > 1 && (units > at_once || !p.weight || p.context < 2 * split)) continue;
      const auto waves = double((units + at_once - 1) / at_once);
      const double time = waves * (steps / split + 8 + (split > 1 ? 16 : 0)) * (out + 16);
      if (best.out_tile != 0 && time >= least) continue;
      least = time;
      best = c;
      best.blocks = int(units < at_once ? units : at_once) * c.cluster * split;
    }
  return best;
}

// The arguments of the kernel of a shape. encode(view, rows of a box) makes a tensor map of boxes [rows, 64].
template <class M, class Shape, class Encode>
Call<M> forward_call(const ForwardOperands& f, int split, Encode&& encode) {
  Call<M> call = {};
  call.split = split;
  call.problem = f.problem;
  call.scales = f.scales;
  call.bias = f.bias;
  call.result = f.result;
  const auto take = [&](const View& view, int rows, typename M::TensorMap& map, int& group) {
    map = encode(view, rows);
    group = view.group;
  };
  const Problem& p = f.problem;
  if (reads_x(p) && p.width > 0) {
    take(f.x, kRows, call.x, call.x_group);
    if (p.weight && p.context > 0) take(f.weight, Shape::kOut / Shape::kCluster, call.weight, call.weight_group);
    if (p.weight_x) take(f.weight_x, Shape::kOut / Shape::kCluster, call.weight_x, call.weight_x_group);
  }
  if (p.weight_z && p.context > 0) {
    take(f.z, kRows, call.z, call.z_group);
    take(f.weight_z, Shape::kOut / Shape::kCluster, call.weight_z, call.weight_z_group);
  }
  const View y = result_view(f);
  call.store_blocks = loadable(y);
  if (call.store_blocks) call.y = encode(y, kWarpgroupRows);
  return call;
}

// Launches it on the current device. The caller has seen to it that refusal() is null and no dimension of y is empty.
void run_forward(const ForwardOperands& f, const ForwardChoice& choice, bool bfloat16, void* stream);

}  // namespace mi_kernels::cuda::sm90
