// The arguments of the dense forward pass on the sm_90a engine: which calls it can take, with which kernel and with
// which parameters.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/problem_size.h"
#include "common/tensor_ref.h"
#include "cuda/sm90/engine.cuh"

namespace mi_kernels::cuda::sm90 {

struct ForwardArgs {
  ProblemShape shape;
  TensorView x, z, weight, weight_z, weight_x;  // without data if absent
  StridedTensor z_values, bias;
  uint16_t* y;
};

// A kernel and its grid.
struct KernelConfig {
  int tile_n;   // KernelTraits::kTileN: 64, 128 or 256
  int cluster;  // KernelTraits::kCluster
  int splits;   // blocks of a split tile; more than 1: KernelTraits::kSplit
  bool exact;
  int blocks;
};

// A tensor that groups share has a stride of 0 between them.
inline TensorView tensor_view(const TensorRef& t, int64_t groups, int64_t rows, int64_t cols) {
  if (!t.data) return {};
  const bool per_group = groups > 1 && t.group != 0;
  return {t.data, {cols, 1, rows, per_group ? groups : 1}, {t.col, 0, t.row, t.group}, per_group ? 1 : 0};
}
inline TensorView weight_view(const WeightRef& w, const ProblemSize& p) {
  TensorView v = tensor_view({w.data, w.group, w.out, w.width}, p.groups, p.out, p.width);
  v.size[1] = p.context;
  v.stride[1] = w.context;
  return v;
}
inline StridedTensor strided_tensor(const TensorRef& t, int64_t row, int64_t col) {
  return {static_cast<const uint16_t*>(t.data), t.group, row, col};
}

inline bool fits_int(const ProblemSize& p) {
  for (const int64_t size : {p.groups, p.rows, p.context, p.width, p.out})
    if (size >= int64_t(1) << 30) return false;
  return true;
}
inline ProblemShape problem_shape(const ProblemSize& p, bool weight, bool weight_z, bool weight_x, bool bias) {
  return {int(p.groups), int(p.rows), int(p.context), int(p.width), int(p.out), weight, weight_z, weight_x, bias};
}

// W is contiguous along x, y is contiguous.
inline ForwardArgs forward_args(const ProblemSize& p, const TensorRef& x, const TensorRef& z, const WeightRef& weight,
                                const TensorRef& weight_z, const TensorRef& weight_x, const TensorRef& bias, void* y) {
  ForwardArgs args{};
  args.shape = problem_shape(p, weight.data, weight_z.data, weight_x.data, bias.data);
  args.x = tensor_view(x, p.groups, p.rows, p.width);
  args.z = tensor_view(z, p.groups, p.rows, p.context);
  if (weight.data) args.weight = weight_view(weight, p);
  args.weight_z = tensor_view(weight_z, p.groups, p.out, p.context);
  args.weight_x = tensor_view(weight_x, p.groups, p.out, p.width);
  args.z_values = strided_tensor(z, z.row, z.col);
  args.bias = strided_tensor(bias, 0, bias.row);  // the only dimension within a group
  args.y = static_cast<uint16_t*>(y);
  return args;
}

inline bool reads_x(const ProblemShape& p) { return (p.weight && p.context > 0) || p.weight_x; }

inline TensorView result_view(const ForwardArgs& args) {
  const ProblemShape& p = args.shape;
  return {args.y, {p.out, 1, p.rows, p.groups}, {1, 0, p.out, int64_t(p.rows) * p.out}, 1};
}

// Why this call cannot run on the engine, or null. Whether it should is the plan's decision.
inline const char* why_not(const ForwardArgs& args) {
  const ProblemShape& p = args.shape;
  if (p.groups * ceil_div(p.rows, kTileM) * ceil_div(p.out, 64) >= int64_t(1) << 30) return "too many tiles";
  if (reads_x(p) && p.width > 0) {
    if (!tma_compatible(args.x)) return "x: not aligned to 16 bytes";
    if (p.weight && p.context > 0 && !tma_compatible(args.weight)) return "weight: not aligned to 16 bytes";
    if (p.weight_x && !tma_compatible(args.weight_x)) return "weight_x: not aligned to 16 bytes";
  }
  if (p.weight_z && p.context > 0 && !(tma_compatible(args.z) && tma_compatible(args.weight_z)))
    return "weight_z: not aligned to 16 bytes";
  return nullptr;
}

// The configuration with the least time by these *estimates*, in steps of one column; nothing has been measured. A step
// takes the tensor cores kTileN columns and the consumers 16 packed products, the end of a tile is worth 8 steps, and
// the exchange of accumulators between blocks 16.
inline KernelConfig choose_config(const ProblemShape& p, bool bfloat16, int sm_count) {
  const auto steps = double(ceil_div(p.width, kTileK)) * ((p.weight ? p.context : 0) + (p.weight_x ? 1 : 0)) +
                     (p.weight_z ? ceil_div(p.context, kTileK) : 0);
  KernelConfig best{};
  double best_time = 0;
  for (const int tile_n : {64, 128, 256})
    for (const int splits : {1, 2, 4, 8}) {
      // z x overflows float16 where z W x does not: exact. Its two accumulators of 256 columns do not fit.
      KernelConfig c{tile_n, splits == 1 && p.rows > kTileM ? 2 : 1, splits, !bfloat16, 0};
      if ((c.exact || splits > 1) && tile_n > 128) continue;
      const int64_t units = ceil_div(p.rows, kTileM * c.cluster) * ceil_div(p.out, tile_n) * p.groups;
      const int at_once = std::max(sm_count / (c.cluster * splits), 1);
      if (splits > 1 && (units > at_once || !p.weight || p.context < 2 * splits)) continue;
      const auto waves = double((units + at_once - 1) / at_once);
      const double time = waves * (steps / splits + 8 + (splits > 1 ? 16 : 0)) * (tile_n + 16);
      if (best.tile_n != 0 && time >= best_time) continue;
      best_time = time;
      best = c;
      best.blocks = int(units < at_once ? units : at_once) * c.cluster * splits;
    }
  return best;
}

// encode(view, rows of a box) makes a tensor map of boxes [rows, 64].
template <class Arch, class Traits, class Encode>
Params<Arch> forward_params(const ForwardArgs& args, int splits, Encode&& encode) {
  Params<Arch> params = {};
  params.splits = splits;
  params.shape = args.shape;
  params.z_values = args.z_values;
  params.bias = args.bias;
  params.y_data = args.y;
  const auto set_map = [&](const TensorView& view, int rows, typename Arch::TensorMap& map, int& per_group) {
    map = encode(view, rows);
    per_group = view.per_group;
  };
  constexpr int kWeightRows = Traits::kTileN / Traits::kCluster;
  const ProblemShape& p = args.shape;
  if (reads_x(p) && p.width > 0) {
    set_map(args.x, kTileM, params.x, params.x_per_group);
    if (p.weight && p.context > 0) set_map(args.weight, kWeightRows, params.weight, params.weight_per_group);
    if (p.weight_x) set_map(args.weight_x, kWeightRows, params.weight_x, params.weight_x_per_group);
  }
  if (p.weight_z && p.context > 0) {
    set_map(args.z, kTileM, params.z, params.z_per_group);
    set_map(args.weight_z, kWeightRows, params.weight_z, params.weight_z_per_group);
  }
  const TensorView y = result_view(args);
  params.tma_store = tma_compatible(y);
  if (params.tma_store) params.y = encode(y, kWarpgroupM);
  return params;
}

// Launches the kernel on the current device. why_not() is null and y has elements: the caller has checked both.
void launch_forward(const ForwardArgs& args, const KernelConfig& config, bool bfloat16, void* stream);

}  // namespace mi_kernels::cuda::sm90
