// W copied to contiguous groups [O][Z][X], for kernels that cannot read it where it lies: every element is read and
// written once, both along what is contiguous, through a tile in shared memory.
//
// Compiled and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "common/integers.h"
#include "common/problem_size.h"
#include "common/tensor_ref.h"
#include "cuda/common/numbers.cuh"

namespace mi_kernels::cuda {

struct RepackParams {
  WeightRef src;
  void* dest;
  int64_t groups, out, context, width;
  bool along_outputs;  // src is read along the outputs, which is faster, or along the features
};

inline constexpr int kRepackThreads = 256;

// A tile of kSide outputs and as many features i X + j; `Word` has the size of an element. A line of it is 128 bytes
// (float64: 256), and the padding spreads its columns over the banks.
template <class Word>
struct RepackTile {
  static constexpr int kSide = sizeof(Word) == 2 ? 64 : 32, kPitch = kSide + (sizeof(Word) == 2 ? 2 : 1);
  static constexpr int kSharedBytes = kSide * kPitch * int(sizeof(Word));
  static constexpr int kLines = kRepackThreads / kSide;  // that the threads of a block read or write at once
};

template <class Word>
int64_t repack_blocks(const RepackParams& p) {
  return p.groups * ceil_div(p.out, RepackTile<Word>::kSide) * ceil_div(p.context * p.width, RepackTile<Word>::kSide);
}

template <class Arch, class Word>
MI_DEVICE void repack_block(const RepackParams& p) {
  using Tile = RepackTile<Word>;
  constexpr int kSide = Tile::kSide, kCount = kSide / Tile::kLines;
  const int64_t features = p.context * p.width, k_tiles = ceil_div(features, kSide), out_tiles = ceil_div(p.out, kSide);
  const int64_t k0 = Arch::block_x() % k_tiles * kSide, rest = Arch::block_x() / k_tiles;
  const int64_t o0 = rest % out_tiles * kSide, group = rest / out_tiles;
  const int lane = Arch::thread() % kSide, line = Arch::thread() / kSide;
  auto* tile = reinterpret_cast<Word*>(Arch::shared());

  // Neighbouring threads read along the outputs or along the features.
  const int o = p.along_outputs ? lane : line, k = p.along_outputs ? line : lane;
  const int o_step = p.along_outputs ? 0 : Tile::kLines, k_step = p.along_outputs ? Tile::kLines : 0;
  int64_t i = (k0 + k) / p.width, j = k0 + k - i * p.width;
  const Word* src = static_cast<const Word*>(p.src.data) + group * p.src.group + (o0 + o) * p.src.out;
  Word values[kCount] = {};
  MI_UNROLL
  for (int q = 0; q < kCount; ++q) {
    if (o0 + o + q * o_step < p.out && k0 + k + q * k_step < features)
      values[q] = src[q * o_step * p.src.out + i * p.src.context + j * p.src.width];
    j += k_step;
    for (; j >= p.width; j -= p.width) ++i;
  }
  MI_UNROLL
  for (int q = 0; q < kCount; ++q) tile[(o + q * o_step) * Tile::kPitch + k + q * k_step] = values[q];
  Arch::sync_block();
  Word* dest = static_cast<Word*>(p.dest) + (group * p.out + o0 + line) * features + k0 + lane;
  MI_UNROLL
  for (int q = 0; q < kCount; ++q)
    if (o0 + line + q * Tile::kLines < p.out && k0 + lane < features)
      dest[q * Tile::kLines * features] = tile[(line + q * Tile::kLines) * Tile::kPitch + lane];
}

// Calls f with an unsigned integer of the size of an element.
template <class F>
void for_word(DType dtype, F&& f) {
  switch (storage_bytes(dtype)) {
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return f(uint64_t{});
  }
}

}  // namespace mi_kernels::cuda
