// Where everything lies in the sm_90a engine, and in which order: plain C++, shared by the device code, the host
// code that launches it and the tests that check it without a GPU.
//
// y[b,o] = sum_ij z[b,i] x[b,j] W[o,i,j] + U z + V x + c is computed in tiles of 128 rows b and kOut outputs o. A tile
// is a sequence of steps, each of which brings one block of at most kOut x 64 elements into a stage of shared memory:
//
//     for each block j of 64 inputs:    x[b, j]         an operand: the consumers take it into registers
//                                       W[o, i, j]      for each i: multiplied with z_i x
//                                       V[o, j]         multiplied with x
//     for each block i of 64 contexts:  z[b, i]         an operand
//                                       U[o, i]         multiplied with z
//
// Every block is a box of a four-dimensional tensor map, 64 elements (128 bytes) wide and swizzled.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace mi_kernels::cuda::sm90 {

constexpr int kRows = 128;          // rows of a tile
constexpr int kWarpgroupRows = 64;  // rows of one wgmma, hence of one consumer warpgroup
constexpr int kDepth = 64;          // elements of a row of a block: 128 bytes, the width of the swizzle
constexpr int kRowBytes = 128;
constexpr int kInstructionDepth = 16;  // elements along the sum that one wgmma of 16-bit types takes
constexpr int kInstructions = kDepth / kInstructionDepth;
constexpr int kWarpgroups = kRows / kWarpgroupRows;
constexpr int kWarpgroupThreads = 128;
constexpr int kConsumerWarps = kWarpgroups * 4;
constexpr int kThreads = (kWarpgroups + 1) * kWarpgroupThreads;  // the third warpgroup loads; one thread does it
// Registers of a thread, multiples of 8. A block starts with 65536 / 384 = 168 each; the loader gives most of its away.
constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroupThreads * (kLoaderRegisters + kWarpgroups * kConsumerRegisters) <= 65536);
constexpr int kSharedBytes = 227 * 1024;  // what a block may have on sm_90
constexpr int kAlignment = 1024;          // the swizzle repeats after eight rows of 128 bytes

MI_HOST_DEVICE constexpr int divide_up(int a, int b) { return a / b + (a % b != 0); }

// ---- shared memory ----

// The 128-byte swizzle: address bits 4..6 (which 16 bytes of a row) are XORed with bits 7..9 (which row of eight).
MI_HOST_DEVICE constexpr uint32_t swizzle(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// The byte of element (row, col) within a block that starts on a multiple of 1024.
MI_HOST_DEVICE constexpr uint32_t block_byte(int row, int col) { return swizzle(uint32_t(row * kRowBytes + col * 2)); }

MI_HOST_DEVICE constexpr uint64_t descriptor_field(uint32_t bytes) { return (bytes & 0x3FFFF) >> 4; }

// The matrix descriptor of wgmma for a block [rows, 64] whose rows lie 128 bytes apart, swizzled, with the sum along
// the row ("K-major"): start address in bits 0..13, leading offset in 16..29 (unused here, 1), offset of the next eight
// rows in 32..45, base offset in 49..51 (0: the block starts on a multiple of 1024), swizzle in 62..63 (1: 128 bytes).
MI_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address) {
  return descriptor_field(address) | descriptor_field(16) << 16 | descriptor_field(8 * kRowBytes) << 32 | 1ull << 62;
}
// The same 16 elements further along the sum. The swizzle acts on addresses, so that the start may lie inside a row.
MI_HOST_DEVICE constexpr uint64_t advance(uint64_t descriptor, int instruction) {
  return descriptor + descriptor_field(uint32_t(instruction * kInstructionDepth * 2));
}

// ---- registers ----

struct Place {
  int row, col;
};

// Element `half` (0 low, 1 high) of register `r` (0..3) of the left operand [64, 16] that a thread of a warpgroup
// holds.
MI_HOST_DEVICE constexpr Place operand_place(int thread, int r, int half) {
  return {thread / 32 * 16 + thread % 32 / 4 + 8 * (r & 1), thread % 4 * 2 + 8 * (r >> 1) + half};
}
// Register `r` (0..kOut/2 - 1) of the accumulator [64, kOut].
MI_HOST_DEVICE constexpr Place sum_place(int thread, int r) {
  return {thread / 32 * 16 + thread % 32 / 4 + 8 * (r >> 1 & 1), (r >> 2) * 8 + thread % 4 * 2 + (r & 1)};
}
// Which row a thread names to ldmatrix.x4 so that the four 8 x 8 matrices arrive as the four registers above: lanes
// 0..7 name the rows of the first matrix, 8..15 those of the second, and so on.
MI_HOST_DEVICE constexpr Place operand_row(int thread) {
  const int lane = thread % 32;
  return {thread / 32 * 16 + lane % 8 + lane / 8 % 2 * 8, lane / 16 * 8};
}

// ---- stages ----

// A place in the ring of stages. The barriers of a stage complete once per round; `phase` is the parity of the round.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
};
template <int kStages>
MI_HOST_DEVICE constexpr void advance(Ring& ring) {
  ring.stage = ring.stage + 1 == kStages ? 0 : ring.stage + 1;
  ring.phase ^= ring.stage == 0 ? 1u : 0u;
}

// The shape of a kernel: kOut outputs per tile; kCluster blocks, neighbours along the rows, that share their weights;
// or kSplit: a cluster of blocks for one tile, each with a share of the steps, where there are few tiles.
template <int kOutputs, int kBlocks, bool kShareTile = false>
struct Shape {
  static constexpr int kOut = kOutputs, kCluster = kBlocks;
  static constexpr bool kSplit = kShareTile;
  static_assert(!kSplit || kCluster == 1);
  static constexpr int kWeightBytes = kOut * kRowBytes;
  static constexpr int kOperandBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = kWeightBytes > kOperandBytes ? kWeightBytes : kOperandBytes;
  // One result block [64, 64] per warpgroup and 64 outputs.
  static constexpr int kResultBytes = kRows * kOut * 2;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kFit = (kSharedBytes - kAlignment - kResultBytes - kBarrierBytes) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  // From the first multiple of 1024: stages, results, then the barriers: full and empty of each stage. Where blocks
  // share a tile, their sums take the place of the stages at the end.
  static constexpr int kResults = kStages * kStageBytes;
  static constexpr int kBarriers = kResults + kResultBytes;
  static constexpr int kBytes = kAlignment + kBarriers + kBarrierBytes;
  static_assert(kOut % 64 == 0 && kOut <= 256 && (kCluster == 1 || kCluster == 2));
  static_assert(kStages >= 3 && 2 * kStages * 8 <= kBarrierBytes && kBytes <= kSharedBytes);
  static_assert(kRows * kOut * 4 <= kResults, "the sums do not fit into the stages");
  static_assert(kStageBytes % kAlignment == 0 && kResultBytes % kAlignment == 0);
  static_assert(kWeightBytes / kCluster % kAlignment == 0, "each block of a cluster loads whole groups of eight rows");

  // The r-th sum of a thread, where all threads of a warp write to different banks.
  MI_HOST_DEVICE static constexpr int sum_byte(int thread, int r) { return (r * kConsumerWarps * 32 + thread) * 4; }
  MI_HOST_DEVICE static constexpr int full(int stage) { return kBarriers + 8 * stage; }
  MI_HOST_DEVICE static constexpr int empty(int stage) { return kBarriers + 8 * (kStages + stage); }
};

// ---- order ----

// Sizes and the number of tiles fit into an int: refusal() in host/sm90_args.h sees to it.
struct Problem {
  int groups, rows, context, width, out;
  bool weight, weight_z, weight_x, bias;
};

struct Tile {
  int group;
  int row, out;  // of its first element
};

// Tiles in the order in which they are handed out. Row tiles come first, so that the blocks that run together read the
// same weights, out of L2. The blocks of a cluster take neighbouring row tiles; the last may lie past the end.
template <class Shape>
struct Schedule {
  int row_units, out_tiles, units;
  MI_HOST_DEVICE constexpr explicit Schedule(const Problem& p)
      : row_units(divide_up(p.rows, kRows * Shape::kCluster)),
        out_tiles(divide_up(p.out, Shape::kOut)),
        units(p.groups * row_units * out_tiles) {}
  MI_HOST_DEVICE constexpr Tile tile(int unit, int rank) const {
    const int rest = unit / row_units;
    return {rest / out_tiles, (unit % row_units * Shape::kCluster + rank) * kRows, rest % out_tiles * Shape::kOut};
  }
};

enum class Factor { x, z };

// The part of a tile's steps that one block takes where several share them: each takes a part of the contexts, V counts
// as one more, and there are at least as many as shares.
struct Share {
  int index = 0, count = 1;
};

// Walks the steps of a tile, or a share of them: visitor.operand(factor, block) for an operand, then
// visitor.weights(factor, block, first, contexts, plain) for the blocks of W from context `first` on and, if `plain`,
// the block of V or U that are multiplied with it.
template <class Visitor>
MI_HOST_DEVICE void walk(const Problem& p, Share share, Visitor& visitor) {
  const int contexts = p.weight ? p.context : 0, all = contexts + (p.weight_x ? 1 : 0);
  const int first = int(int64_t(all) * share.index / share.count);
  const int last = int(int64_t(all) * (share.index + 1) / share.count);
  const bool plain = last > contexts;
  if (last > first)
    for (int block = 0; block < divide_up(p.width, kDepth); ++block) {
      visitor.operand(Factor::x, block);
      visitor.weights(Factor::x, block, first, last - first - (plain ? 1 : 0), plain);
    }
  if (p.weight_z)
    for (int block = share.index; block < divide_up(p.context, kDepth); block += share.count) {
      visitor.operand(Factor::z, block);
      visitor.weights(Factor::z, block, 0, 0, true);
    }
}

// ---- tensors ----

// A 16-bit tensor as the tensor maps see it: four dimensions, innermost first, strides in elements. W [G,O,Z,X] is
// (X, Z, O, G); U, V, x, z and y have size 1 in the second dimension. Groups that share one tensor have size 1 and
// `group` 0, otherwise `group` is 1: what to multiply the index of the group with.
struct View {
  const void* data = nullptr;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {1, 0, 0, 0};
  int group = 0;
};

// What the copy engine asks of a tensor: innermost dimension contiguous, address and strides multiples of 16 bytes,
// sizes that fit its 32-bit coordinates, strides below 2^40 bytes, and no dimension that overlaps the one inside it.
constexpr bool loadable(const View& v) {
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
