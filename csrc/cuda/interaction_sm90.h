// The dense forward pass on the sm_90a engine, host side: which tensors it takes, which kernel, with which arguments.
#pragma once

#include "engine_sm90.cuh"

struct CUstream_st;  // cudaStream_t, without the headers of CUDA

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
  bool exact;
  int blocks;
};

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
  if (p.weight_z && p.context > 0 && !(loadable(f.z) && loadable(f.weight_z))) return "weight_z: not aligned to 16 bytes";
  return nullptr;
}

// Times of a tile relative to 256 outputs on all processors. *Estimates*: a step takes 16 packed products for 4 wgmmas
// of kOut columns, so that a narrow tile spends more of its time on them; nothing has been measured.
inline ForwardChoice choose_forward(const Problem& p, bool bfloat16, int processors) {
  // Products z x overflow float16 where z W x does not.
  ForwardChoice best{0, 1, !bfloat16, 0};
  best.cluster = p.rows > kRows ? 2 : 1;
  const int units = divide_up(p.rows, kRows * best.cluster) * p.groups, at_once = processors / best.cluster;
  double least = 0;
  for (const int out : {64, 128, 256}) {
    if (best.exact && out > 128) continue;  // two accumulators of 256 columns do not fit into the registers
    const int64_t tiles = int64_t(units) * divide_up(p.out, out);
    const double time = double((tiles + at_once - 1) / at_once) * (out + 16);
    if (best.out_tile != 0 && time > least) continue;
    least = time;
    best.out_tile = out;
    best.blocks = int(tiles < at_once ? tiles : at_once) * best.cluster;
  }
  return best;
}

// The arguments of the kernel of a shape. encode(view, rows of a box) makes a tensor map of boxes [rows, 64].
template <class M, class Shape, class Encode>
Call<M> forward_call(const ForwardOperands& f, Encode&& encode) {
  Call<M> call = {};
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
void run_forward(const ForwardOperands& f, const ForwardChoice& choice, bool bfloat16, CUstream_st* stream);

}  // namespace mi_kernels::cuda::sm90
