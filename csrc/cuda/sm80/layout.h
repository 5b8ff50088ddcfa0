// Layout of the tiles of the sm_80 engine in shared memory and in registers: plain C++, for device code, plans and
// tests.
//
// A stage holds kStageBytes of each row of both operands along the reduction (K). Operands are copied in chunks of 16
// bytes, and a tile keeps the order in which its operand is stored:
//
//     Major::k     a line is a row of the tile, four chunks along K       [rows][64 bytes]
//     Major::mn    a line is one element of K, its chunks along the rows  [K][rows]
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace mi_kernels::cuda {

enum class Major : int { k, mn };

inline constexpr int kEngineThreads = 256;
inline constexpr int kStageBytes = 64;
inline constexpr int kStages = 4;

// Shared memory delivers 128 bytes at a time. The swizzle puts the eight lines that ldmatrix reads at one logical chunk
// into eight different chunks of those 128 bytes: two 64-byte lines share them, longer lines do not. Elements of four
// bytes in long lines are read one by one, two neighbouring chunks of four lines by each warp.
MI_HOST_DEVICE constexpr int swizzled_chunk(int line, int chunk, int chunks_per_line, int element_bytes) {
  if (chunks_per_line == 4) return chunk ^ ((line >> 1) & 3);
  return element_bytes == 4 ? chunk ^ ((line & 3) << 1) : chunk ^ (line & 7);
}

template <int kElementBytes, int kRows, Major kMajor>
struct TileLayout {
  static constexpr int kElementsPerChunk = 16 / kElementBytes;
  static constexpr int kStageK = kStageBytes / kElementBytes;
  static constexpr int kLines = kMajor == Major::k ? kRows : kStageK;
  static constexpr int kChunksPerLine = kMajor == Major::k ? kStageBytes / 16 : kRows / kElementsPerChunk;
  static constexpr int kChunks = kLines * kChunksPerLine;
  static constexpr int kBytes = kChunks * 16;
  static constexpr int kChunksPerThread = kChunks / kEngineThreads;
  static_assert(kChunks % kEngineThreads == 0 && (kChunksPerLine == 4 || kChunksPerLine % 8 == 0));

  static MI_HOST_DEVICE constexpr int chunk_byte(int line, int chunk) {
    return (line * kChunksPerLine + swizzled_chunk(line, chunk, kChunksPerLine, kElementBytes)) * 16;
  }
  // The element at `row` of the tile and `k` of the stage.
  static MI_HOST_DEVICE constexpr int byte(int row, int k) {
    const int line = kMajor == Major::k ? row : k, inner = kMajor == Major::k ? k : row;
    return chunk_byte(line, inner / kElementsPerChunk) + inner % kElementsPerChunk * kElementBytes;
  }
};

// A tile of rows x cols accumulators and how the warps share it. `dual`: two accumulators for each output (gate and
// shift); the second half of the columns is the second accumulator, and a thread owns both of an output.
template <int kRows_, int kCols_, int kWarpRows_>
struct MmaTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kWarpRows = kWarpRows_;
  static constexpr int kWarpCols = kEngineThreads / 32 / kWarpRows;
  static constexpr int kM = kRows / kWarpRows / 16, kN = kCols / kWarpCols / 8;  // fragments of a warp
  static constexpr int kAccumulators = kM * kN * 4;                              // of a thread
  static constexpr int kThreadsPerRow = kWarpCols * 4;
  static_assert(kM * kWarpRows * 16 == kRows && kN * kWarpCols * 8 == kCols && kN % 4 == 0);

  static MI_HOST_DEVICE constexpr int fragment_row(int warp, int m) { return (warp / kWarpCols * kM + m) * 16; }
  static MI_HOST_DEVICE constexpr int fragment_col(int warp, int n, bool dual) {
    const int warp_col = warp % kWarpCols;
    return dual ? n / (kN / 2) * (kCols / 2) + (warp_col * (kN / 2) + n % (kN / 2)) * 8 : (warp_col * kN + n) * 8;
  }
  // Of accumulator `s` = (m, n, e) of a thread: the result layout of mma.m16n8k16 and .m16n8k8.
  static MI_HOST_DEVICE constexpr int row(int thread, int s) {
    return fragment_row(thread / 32, s / (kN * 4)) + thread % 32 / 4 + (s % 4 / 2) * 8;
  }
  static MI_HOST_DEVICE constexpr int col(int thread, int s, bool dual) {
    return fragment_col(thread / 32, s / 4 % kN, dual) + thread % 4 * 2 + s % 2;
  }
  // The rows in which a thread has accumulators are its local rows, 0 .. kLocalRows - 1.
  static constexpr int kLocalRows = kM * 2;
  static MI_HOST_DEVICE constexpr int local_row(int s) { return s / (kN * 4) * 2 + s % 4 / 2; }
  static MI_HOST_DEVICE constexpr int first_in_local_row(int local) { return local / 2 * (kN * 4) + local % 2 * 2; }
  // The index of a thread among those that share its rows.
  static MI_HOST_DEVICE constexpr int rank_in_row(int thread) { return thread / 32 % kWarpCols * 4 + thread % 4; }
};

// The same without matrix instructions: 16 x 16 threads with 4 x 4 accumulators each.
struct SimtTile {
  static constexpr int kRows = 64, kCols = 64, kM = 4, kN = 4, kAccumulators = 16, kThreadsPerRow = 16, kLocalRows = 4;
  static MI_HOST_DEVICE constexpr int row(int thread, int s) { return thread / 16 * 4 + s / kN; }
  static MI_HOST_DEVICE constexpr int col(int thread, int s, bool dual) {
    const int n = s % kN, thread_col = thread % 16;
    return dual ? n / 2 * (kCols / 2) + thread_col * 2 + n % 2 : thread_col * 4 + n;
  }
  static MI_HOST_DEVICE constexpr int local_row(int s) { return s / kN; }
  static MI_HOST_DEVICE constexpr int first_in_local_row(int local) { return local * kN; }
  static MI_HOST_DEVICE constexpr int rank_in_row(int thread) { return thread % 16; }
};

}  // namespace mi_kernels::cuda
