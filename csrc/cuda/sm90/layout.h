// Layout and order of everything in the sm_90a engine: plain C++, shared by device code, the host code that launches it
// and the tests that check it without a GPU.
//
// y[b,o] = sum_ij z[b,i] x[b,j] W[o,i,j] + U z + V x + bias is computed in tiles of kTileM rows b by kTileN outputs o.
// A tile is a sequence of steps, each of which loads one box of at most kTileN x 64 elements into a stage of shared
// memory:
//
//     for each block j of 64 inputs:    x[b, j]         an A operand, which the consumers load into registers
//                                       W[o, i, j]      for each context i: multiplied with z_i x
//                                       V[o, j]         multiplied with x
//     for each block i of 64 contexts:  z[b, i]         an A operand
//                                       U[o, i]         multiplied with z
//
// Every box is one of a four-dimensional tensor map, 64 elements (128 bytes) wide and swizzled.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/integers.h"

namespace mi_kernels::cuda::sm90 {

constexpr int kTileM = 128;
constexpr int kTileK = 64;       // elements of a row of a box: 128 bytes, the width of the swizzle
constexpr int kWarpgroupM = 64;  // rows of one wgmma, hence of one consumer warpgroup
constexpr int kMmaK = 16;        // elements along K of one wgmma of 16-bit types
constexpr int kMmasPerStep = kTileK / kMmaK;
constexpr int kRowBytes = 128;
constexpr int kConsumerWarpgroups = kTileM / kWarpgroupM;
constexpr int kWarpgroupThreads = 128;
constexpr int kConsumerWarps = kConsumerWarpgroups * 4;
constexpr int kThreads = (kConsumerWarpgroups + 1) * kWarpgroupThreads;  // one thread of the third warpgroup loads
// Registers of a thread, multiples of 8. A block starts with 65536 / 384 = 168 each, of which the producer releases
// most to the consumers.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroupThreads * (kProducerRegisters + kConsumerWarpgroups * kConsumerRegisters) <= 65536);
constexpr int kMaxSharedBytes = 227 * 1024;  // of a block on sm_90
constexpr int kAlignment = 1024;             // the swizzle repeats after eight rows of 128 bytes

// ---- shared memory ----

// The 128-byte swizzle: address bits 4..6 (which 16 bytes of a row) are XORed with bits 7..9 (which row of eight).
MI_HOST_DEVICE constexpr uint32_t swizzle(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// The offset of element (row, col) in a box that starts on a multiple of 1024.
MI_HOST_DEVICE constexpr uint32_t box_byte(int row, int col) { return swizzle(uint32_t(row * kRowBytes + col * 2)); }

MI_HOST_DEVICE constexpr uint64_t descriptor_field(uint32_t bytes) { return (bytes & 0x3FFFF) >> 4; }

// The matrix descriptor of wgmma for a K-major box [rows, 64], swizzled, with rows of 128 bytes: start address in bits
// 0..13, leading offset in 16..29 (unused here, 1), offset of the next eight rows in 32..45, base offset in 49..51 (0:
// the box starts on a multiple of 1024), swizzle in 62..63 (1: 128 bytes).
MI_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address) {
  return descriptor_field(address) | descriptor_field(16) << 16 | descriptor_field(8 * kRowBytes) << 32 | 1ull << 62;
}
// The descriptor of a later wgmma of the step, 16 elements further along K each. It may start inside a row because the
// swizzle acts on addresses.
MI_HOST_DEVICE constexpr uint64_t advance_k(uint64_t descriptor, int mma) {
  return descriptor + descriptor_field(uint32_t(mma * kMmaK * 2));
}

// ---- registers ----

struct MatrixCoord {
  int row, col;
};

// Element `half` (0 low, 1 high) of register `r` (0..3) of a thread's fragment of the A operand [64, 16].
MI_HOST_DEVICE constexpr MatrixCoord a_coord(int thread, int r, int half) {
  return {thread / 32 * 16 + thread % 32 / 4 + 8 * (r & 1), thread % 4 * 2 + 8 * (r >> 1) + half};
}
// Register `r` (0..kTileN/2 - 1) of the accumulator [64, kTileN].
MI_HOST_DEVICE constexpr MatrixCoord accumulator_coord(int thread, int r) {
  return {thread / 32 * 16 + thread % 32 / 4 + 8 * (r >> 1 & 1), (r >> 2) * 8 + thread % 4 * 2 + (r & 1)};
}
// The row whose address a thread passes to ldmatrix.x4 to get the fragment of a_coord: lanes 0..7 pass the rows of the
// first 8 x 8 matrix, 8..15 those of the second, and so on.
MI_HOST_DEVICE constexpr MatrixCoord ldmatrix_row(int thread) {
  const int lane = thread % 32;
  return {thread / 32 * 16 + lane % 8 + lane / 8 % 2 * 8, lane / 16 * 8};
}

// ---- stages ----

// The barriers of a stage complete once per round through the stages; `phase` is the parity of the round.
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;
};
template <int kStages>
MI_HOST_DEVICE constexpr void advance(PipelineState& state) {
  state.stage = state.stage + 1 == kStages ? 0 : state.stage + 1;
  state.phase ^= state.stage == 0 ? 1u : 0u;
}

// kCluster: blocks along the rows that share their boxes of weights. kSplit: a cluster of blocks computes one tile,
// each a split of its steps, for calls with few tiles.
template <int kTileN_, int kCluster_, bool kSplit_ = false>
struct KernelTraits {
  static constexpr int kTileN = kTileN_, kCluster = kCluster_;
  static constexpr bool kSplit = kSplit_;
  static_assert(!kSplit || kCluster == 1);
  static constexpr int kWeightBytes = kTileN * kRowBytes;
  static constexpr int kABytes = kTileM * kRowBytes;
  static constexpr int kStageBytes = kWeightBytes > kABytes ? kWeightBytes : kABytes;
  // One box of results [64, 64] per warpgroup and 64 outputs.
  static constexpr int kResultBytes = kTileM * kTileN * 2;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kStagesThatFit = (kMaxSharedBytes - kAlignment - kResultBytes - kBarrierBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 8 ? kStagesThatFit : 8;
  // From the first multiple of 1024: stages, results, then a full and an empty barrier for each stage. A split tile
  // reuses the stages for its accumulators at the end.
  static constexpr int kResultOffset = kStages * kStageBytes;
  static constexpr int kBarrierOffset = kResultOffset + kResultBytes;
  static constexpr int kSharedBytes = kAlignment + kBarrierOffset + kBarrierBytes;
  static_assert(kTileN % 64 == 0 && kTileN <= 256 && (kCluster == 1 || kCluster == 2));
  static_assert(kStages >= 3 && 2 * kStages * 8 <= kBarrierBytes && kSharedBytes <= kMaxSharedBytes);
  static_assert(kTileM * kTileN * 4 <= kResultOffset, "the accumulators do not fit into the stages");
  static_assert(kStageBytes % kAlignment == 0 && kResultBytes % kAlignment == 0);
  static_assert(kWeightBytes / kCluster % kAlignment == 0, "each block of a cluster loads whole groups of eight rows");

  // Register `r` of a thread's accumulator: all lanes of a warp write to different banks.
  MI_HOST_DEVICE static constexpr int accumulator_byte(int thread, int r) {
    return (r * kConsumerWarps * 32 + thread) * 4;
  }
  MI_HOST_DEVICE static constexpr int full_barrier(int stage) { return kBarrierOffset + 8 * stage; }
  MI_HOST_DEVICE static constexpr int empty_barrier(int stage) { return kBarrierOffset + 8 * (kStages + stage); }
};

// ---- order ----

// Sizes, and the terms that are present. Sizes and the number of tiles fit into an int: host/sm90_args.h checks it.
struct ProblemShape {
  int groups, rows, context, width, out;
  bool weight, weight_z, weight_x, bias;
};

struct WorkTile {
  int group;
  int row, out;  // of its first element
};

// Units, the tiles of a cluster, in the order in which they are computed. Row tiles vary fastest, so that blocks that
// run together read the same weights out of L2. The blocks of a cluster take neighbouring row tiles, of which the last
// may lie past the end.
template <class Traits>
struct TileScheduler {
  int row_units, out_tiles, units;
  MI_HOST_DEVICE constexpr explicit TileScheduler(const ProblemShape& p)
      : row_units(int(ceil_div(p.rows, kTileM * Traits::kCluster))),
        out_tiles(int(ceil_div(p.out, Traits::kTileN))),
        units(p.groups * row_units * out_tiles) {}
  MI_HOST_DEVICE constexpr WorkTile tile(int unit, int rank) const {
    const int rest = unit / row_units;
    return {rest / out_tiles, (unit % row_units * Traits::kCluster + rank) * kTileM, rest % out_tiles * Traits::kTileN};
  }
};

enum class AOperand { x, z };

// The part of a split tile's steps that one block computes. The contexts are split, V counts as one more, and there are
// at least as many as splits.
struct Split {
  int index = 0, count = 1;
};

// Visits the steps of a tile, or of a split of it: visitor.a_step(operand, k_block) for an A operand, then
// visitor.b_steps(operand, k_block, first, contexts, linear) for the boxes of W from context `first` on and, if
// `linear`, the box of V or U that is multiplied with the operand itself.
template <class Visitor>
MI_HOST_DEVICE void for_each_step(const ProblemShape& p, Split split, Visitor& visitor) {
  const int contexts = p.weight ? p.context : 0, all = contexts + (p.weight_x ? 1 : 0);
  const int first = int(int64_t(all) * split.index / split.count);
  const int last = int(int64_t(all) * (split.index + 1) / split.count);
  const bool linear = last > contexts;
  if (last > first)
    for (int k_block = 0; k_block < ceil_div(p.width, kTileK); ++k_block) {
      visitor.a_step(AOperand::x, k_block);
      visitor.b_steps(AOperand::x, k_block, first, last - first - (linear ? 1 : 0), linear);
    }
  if (p.weight_z)
    for (int k_block = split.index; k_block < ceil_div(p.context, kTileK); k_block += split.count) {
      visitor.a_step(AOperand::z, k_block);
      visitor.b_steps(AOperand::z, k_block, 0, 0, true);
    }
}

// ---- tensors ----

// A 16-bit tensor as its tensor map describes it: four dimensions, innermost first, strides in elements. W is
// (width, context, out, groups); U, V, x, z and y have size 1 in the second dimension. A tensor that all groups share
// has size 1 in the last one and per_group 0, which the index of the group is multiplied with; otherwise it is 1.
struct TensorView {
  const void* data = nullptr;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {1, 0, 0, 0};
  int per_group = 0;
};

// What TMA requires: contiguous innermost dimension, address and strides multiples of 16 bytes, sizes that fit 32-bit
// coordinates, strides below 2^40 bytes, and no dimension that overlaps the one inside it.
constexpr bool tma_compatible(const TensorView& v) {
  if (v.data == nullptr || reinterpret_cast<uintptr_t>(v.data) % 16 != 0 || (v.size[0] > 1 && v.stride[0] != 1))
    return false;
  int64_t span = v.size[0];
  for (int d = 0; d < 4; ++d) {
    if (v.size[d] < 1 || v.size[d] >= int64_t(1) << 31) return false;
    if (d == 0 || v.size[d] == 1) continue;
    if (v.stride[d] < span || v.stride[d] % 8 != 0 || v.stride[d] >= int64_t(1) << 39) return false;
    span = v.stride[d] * v.size[d];
  }
  return true;
}

}  // namespace mi_kernels::cuda::sm90
