// Where everything lies in the tiles of the mma engine: plain C++, shared by device code, plans and tests.
//
// A stage holds kStageBytes of each row of both operands along the sum. An operand is brought in chunks of sixteen
// bytes, and a tile keeps the order in which the operand lies in memory:
//
//     Major::depth   a line is a row of the tile, four chunks along the sum      [rows][64 bytes]
//     Major::row     a line is one place of the sum, chunks along the rows       [depth][rows]
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace mi_kernels::cuda {

enum class Major : int { depth, row };

inline constexpr int kEngineThreads = 256;
inline constexpr int kStageBytes = 64;
inline constexpr int kStages = 4;

// Eight lines that ldmatrix reads together, at one logical chunk, lie in eight different chunks of the 128 bytes that
// shared memory gives at a time: with 64-byte lines two of them share those 128 bytes, with longer ones none do. Items
// of four bytes in long lines are read one by one, a warp two neighbouring chunks of four lines.
MI_HOST_DEVICE constexpr int swizzled(int line, int chunk, int per_line, int item) {
  if (per_line == 4) return chunk ^ ((line >> 1) & 3);
  return item == 4 ? chunk ^ ((line & 3) << 1) : chunk ^ (line & 7);
}

template <int kItem, int kRows, Major kMajor>
struct TileLayout {
  static constexpr int kElements = 16 / kItem;  // of a chunk
  static constexpr int kDepth = kStageBytes / kItem;
  static constexpr int kLines = kMajor == Major::depth ? kRows : kDepth;
  static constexpr int kPerLine = kMajor == Major::depth ? kStageBytes / 16 : kRows / kElements;
  static constexpr int kChunks = kLines * kPerLine;
  static constexpr int kBytes = kChunks * 16;
  static constexpr int kPerThread = kChunks / kEngineThreads;
  static_assert(kChunks % kEngineThreads == 0 && (kPerLine == 4 || kPerLine % 8 == 0));

  static MI_HOST_DEVICE constexpr int chunk_byte(int line, int chunk) {
    return (line * kPerLine + swizzled(line, chunk, kPerLine, kItem)) * 16;
  }
  // Of the element in `row` of the tile and place `k` of the stage.
  static MI_HOST_DEVICE constexpr int byte(int row, int k) {
    const int line = kMajor == Major::depth ? row : k, along = kMajor == Major::depth ? k : row;
    return chunk_byte(line, along / kElements) + along % kElements * kItem;
  }
};

// A tile of rows x cols sums and how the warps share it. With two sums for each output (a gate and a shift) the second
// half of the columns belongs to the second one, and a thread has the same outputs of both.
template <int kRows_, int kCols_, int kWarpRows_>
struct MmaTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kWarpRows = kWarpRows_;
  static constexpr int kWarpCols = kEngineThreads / 32 / kWarpRows;
  static constexpr int kM = kRows / kWarpRows / 16, kN = kCols / kWarpCols / 8;  // fragments of a warp
  static constexpr int kSums = kM * kN * 4;
  static constexpr int kTeam = kWarpCols * 4;  // threads that share a row
  static_assert(kM * kWarpRows * 16 == kRows && kN * kWarpCols * 8 == kCols && kN % 4 == 0);

  static MI_HOST_DEVICE constexpr int fragment_row(int warp, int m) { return (warp / kWarpCols * kM + m) * 16; }
  static MI_HOST_DEVICE constexpr int fragment_col(int warp, int n, bool two) {
    const int place = warp % kWarpCols;
    return two ? n / (kN / 2) * (kCols / 2) + (place * (kN / 2) + n % (kN / 2)) * 8 : (place * kN + n) * 8;
  }
  // Of sum `s` = (m, n, e) of a thread: the layout of the results of mma.m16n8k16 and .m16n8k8.
  static MI_HOST_DEVICE constexpr int row(int thread, int s) {
    return fragment_row(thread / 32, s / (kN * 4)) + thread % 32 / 4 + (s % 4 / 2) * 8;
  }
  static MI_HOST_DEVICE constexpr int col(int thread, int s, bool two) {
    return fragment_col(thread / 32, s / 4 % kN, two) + thread % 4 * 2 + s % 2;
  }
  // Sums of a thread with the same row have the same of these, 0 .. kM * 2 - 1, and threads of a row different members.
  static MI_HOST_DEVICE constexpr int own_row(int s) { return s / (kN * 4) * 2 + s % 4 / 2; }
  static constexpr int kOwnRows = kM * 2;
  // The first sum in an own row.
  static MI_HOST_DEVICE constexpr int first_of(int own) { return own / 2 * (kN * 4) + own % 2 * 2; }
  static MI_HOST_DEVICE constexpr int member(int thread) { return thread / 32 % kWarpCols * 4 + thread % 4; }
};

// The same for the exact path: 16 x 16 threads with 4 x 4 sums each.
struct FmaTile {
  static constexpr int kRows = 64, kCols = 64, kM = 4, kN = 4, kSums = 16, kTeam = 16, kOwnRows = 4;
  static MI_HOST_DEVICE constexpr int row(int thread, int s) { return thread / 16 * 4 + s / kN; }
  static MI_HOST_DEVICE constexpr int col(int thread, int s, bool two) {
    const int n = s % kN, place = thread % 16;
    return two ? n / 2 * (kCols / 2) + place * 2 + n % 2 : place * 4 + n;
  }
  static MI_HOST_DEVICE constexpr int own_row(int s) { return s / kN; }
  static MI_HOST_DEVICE constexpr int first_of(int own) { return own * kN; }
  static MI_HOST_DEVICE constexpr int member(int thread) { return thread % 16; }
};

}  // namespace mi_kernels::cuda
