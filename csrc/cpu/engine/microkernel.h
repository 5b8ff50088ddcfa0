// The register tile: kTileM x (N vectors) of accumulators, to which each step along K adds the products of kTileM
// broadcast words of A and N vectors of B. It does not depend on where the operands come from.
#pragma once

#include "cpu/engine/simd.h"

namespace mi_kernels::MI_ISA {

// kTileM * kMaxPanelVectors accumulators, kMaxPanelVectors vectors of B and one of A fit the register file: 24 + 4 of
// 32 (AVX-512, NEON), 12 + 4 of 16 (AVX2, SSE).
inline constexpr int kMaxPanelVectors = 3;
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTileM = 8;
#else
inline constexpr int kTileM = 4;
#endif

// How one dtype is multiplied. Operands are packed in words of `pair` consecutive elements along K; `Acc` is the type
// of the accumulators. A summation block has about `sum_block` words at most, and the sums of blocks are then added up:
// the rounding error of a plain sum grows with the square root of its length, and PyTorch's own matrix products in
// float keep several partial sums.
inline constexpr int64_t kUnbounded = 0;

struct MulF64 {
  using Elem = double;
  using Word = double;
  using Acc = double;
  static constexpr int pair = 1;
  static constexpr int64_t sum_block = kUnbounded;  // far below the error rule's 1e-12
  static MI_INLINE void fma(Vec<double>& acc, double a, const Vec<double>& b) { acc += a * b; }
  static MI_INLINE void fma(Vec<double>& acc, const Vec<double>& a, const Vec<double>& b) { acc += a * b; }
};

struct MulF32 {
  using Elem = float;
  using Word = float;
  using Acc = float;
  static constexpr int pair = 1;
  static constexpr int64_t sum_block = 64;
  static MI_INLINE void fma(Vec<float>& acc, float a, const Vec<float>& b) { acc += a * b; }
  static MI_INLINE void fma(Vec<float>& acc, const Vec<float>& a, const Vec<float>& b) { acc += a * b; }
};

#if defined(__AVX512BF16__)
// One instruction multiplies pairs of bf16 and adds them up in float. Instruction sets without it convert bf16 to float
// while packing and use MulF32.
struct MulBF16 {
  using Elem = BFloat16;
  using Word = uint32_t;
  using Acc = float;
  static constexpr int pair = 2;
  static constexpr int64_t sum_block = kUnbounded;  // operands are rounded more coarsely
  static MI_INLINE void fma(Vec<float>& acc, uint32_t a, const Vec<uint32_t>& b) {
    fma(acc, bit_cast<Vec<uint32_t>>(_mm512_set1_epi32(int(a))), b);
  }
  static MI_INLINE void fma(Vec<float>& acc, const Vec<uint32_t>& a, const Vec<uint32_t>& b) {
    acc = _mm512_dpbf16_ps(acc, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }
};
#endif

template <class Mul, int N>
struct Tile {
  static constexpr int vectors = N;
  static constexpr int lanes = Simd<typename Mul::Acc>::lanes;
  Vec<typename Mul::Acc> acc[kTileM][N];
};

// A packed for the tile: word (k, r) at k * kTileM + r, one tile after another.
template <class Mul>
struct PackedA {
  const typename Mul::Word* words;
  MI_INLINE typename Mul::Word at(int64_t k, int r) const { return words[k * kTileM + r]; }
  MI_INLINE PackedA tile(int64_t m, int64_t depth) const { return {words + m * depth}; }
  MI_INLINE void prefetch_next(int64_t) const {}
};

// A with rows that are contiguous along K: W itself, or a copy.
template <class Mul>
struct DirectA {
  const typename Mul::Elem* rows;
  int64_t stride;
  MI_INLINE typename Mul::Word at(int64_t k, int r) const {
    return load<typename Mul::Word>(rows + r * stride + k * Mul::pair);
  }
  MI_INLINE DirectA tile(int64_t m, int64_t) const { return {rows + m * stride, stride}; }
  // Prefetches the next tile of rows.
  MI_INLINE void prefetch_next(int64_t words) const {
    constexpr int64_t line = 64 / int64_t(sizeof(typename Mul::Word));
    for (int r = 0; r < kTileM; ++r)
      for (int64_t k = 0; k < words; k += line) __builtin_prefetch(rows + (kTileM + r) * stride + k * Mul::pair, 0, 2);
  }
};

// tile[r][n] = the sum of a(k, r) * b(k, n) for words k in [begin, end), in order; the vectors of B of one k are
// `b_stride` words behind those of the one before. Rows from R on are 0.
template <int R = kTileM, class Mul, int N, class A>
MI_INLINE void multiply_block(Tile<Mul, N>& tile, const A& a, const typename Mul::Word* b_words, int64_t begin,
                              int64_t end, int64_t b_stride = N * Simd<typename Mul::Word>::lanes) {
  constexpr int L = Simd<typename Mul::Word>::lanes;
  unroll<kTileM>([&](auto r)
                     MI_INLINED { unroll<N>([&](auto n) MI_INLINED { tile.acc[r][n] = Vec<typename Mul::Acc>{}; }); });
  for (int64_t k = begin; k < end; ++k) {
    Vec<typename Mul::Word> b[N];
    unroll<N>([&](auto n) MI_INLINED { b[n] = load<Vec<typename Mul::Word>>(b_words + k * b_stride + n * L); });
    unroll<R>([&](auto r) MI_INLINED {
      const auto a_word = a.at(k, r);
      unroll<N>([&](auto n) MI_INLINED { Mul::fma(tile.acc[r][n], a_word, b[n]); });
    });
  }
}

// Blocks of nearly equal length. Narrow products have blocks half as long, or a quarter if one block would be the whole
// sum: PyTorch computes those as dot products, whose sums are more exact.
template <class Mul>
int64_t sum_block_length(int64_t words, bool narrow) {
  if constexpr (Mul::sum_block == kUnbounded) {
    return words;
  } else {
    const int64_t length = !narrow ? Mul::sum_block : words < Mul::sum_block ? Mul::sum_block / 4 : Mul::sum_block / 2;
    return ceil_div(words, max((words + length / 2) / length, 1));
  }
}

// tile[r][n] = sum_k a(k, r) * b(k, n) for rows r < R, in summation blocks of `sum_block` words.
template <int R = kTileM, class Mul, int N, class A>
MI_INLINE void multiply(Tile<Mul, N>& tile, const A& a, const typename Mul::Word* b, int64_t words, int64_t sum_block,
                        int64_t b_stride = N * Simd<typename Mul::Word>::lanes) {
  if (Mul::sum_block == kUnbounded || sum_block >= words) {
    Tile<Mul, N> whole;  // its address is never taken, so that it stays in registers
    multiply_block<R>(whole, a, b, 0, words, b_stride);
    tile = whole;
    return;
  }
  Tile<Mul, N> sum{};  // in memory: the registers are full
  for (int64_t k = 0; k < words; k += sum_block) {
    multiply_block<R>(tile, a, b, k, min(k + sum_block, words), b_stride);
    unroll<R>([&](auto r) MI_INLINED { unroll<N>([&](auto n) MI_INLINED { sum.acc[r][n] += tile.acc[r][n]; }); });
  }
  tile = sum;
}

}  // namespace mi_kernels::MI_ISA
