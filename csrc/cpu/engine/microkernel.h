// The register tile: kRows x (N vectors) of accumulators, fed by a broadcast operand (rows) and a vector
// operand (lanes), both walked along K. It knows nothing of where the operands came from.
#pragma once

#include "cpu/engine/simd.h"

namespace mi_kernels::MI_ISA {

// Accumulators kRows * kMaxVectors, plus kMaxVectors lanes and one broadcast, fit the register file:
// 24 + 4 of 32 (AVX-512, NEON), 12 + 4 of 16 (AVX2, SSE).
inline constexpr int kMaxVectors = 3;
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRows = 8;
#else
inline constexpr int kRows = 4;
#endif

// How one dtype is multiplied. Operands are packed in words of `pair` elements that follow each other
// along K; `Acc` is the type of the accumulators. About `chain` words are added up one by one, no more: the rounding
// error of such a sum grows with the root of its length, and PyTorch's own matrix products in float keep
// several sums side by side.
inline constexpr int64_t kUnbounded = 0;

struct MulF64 {
  using Elem = double;
  using Word = double;
  using Acc = double;
  static constexpr int pair = 1;
  static constexpr int64_t chain = kUnbounded;  // far below the error rule's 1e-12
  static MI_INLINE void fma(Vec<double>& acc, double a, const Vec<double>& b) { acc += a * b; }
  static MI_INLINE void fma(Vec<double>& acc, const Vec<double>& a, const Vec<double>& b) { acc += a * b; }
};

struct MulF32 {
  using Elem = float;
  using Word = float;
  using Acc = float;
  static constexpr int pair = 1;
  static constexpr int64_t chain = 64;
  static MI_INLINE void fma(Vec<float>& acc, float a, const Vec<float>& b) { acc += a * b; }
  static MI_INLINE void fma(Vec<float>& acc, const Vec<float>& a, const Vec<float>& b) { acc += a * b; }
};

#if defined(__AVX512BF16__)
// Pairs of bf16 products summed in float by one instruction. Instruction sets without it convert bf16
// to float while packing and use MulF32: that is its portable twin.
struct MulBF16 {
  using Elem = BFloat16;
  using Word = uint32_t;
  using Acc = float;
  static constexpr int pair = 2;
  static constexpr int64_t chain = kUnbounded;  // the rounding of the operands outweighs it
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
  Vec<typename Mul::Acc> acc[kRows][N];
};

// Rows packed for the tile: word (k, r) at k * kRows + r, one tile after another.
template <class Mul>
struct PackedRows {
  const typename Mul::Word* words;
  MI_INLINE typename Mul::Word at(int64_t k, int r) const { return words[k * kRows + r]; }
  MI_INLINE PackedRows tile(int64_t m, int64_t depth) const { return {words + m * depth}; }
  MI_INLINE void prefetch_next(int64_t) const {}
};

// Rows that are contiguous along K: in W itself, or copied.
template <class Mul>
struct DirectRows {
  const typename Mul::Elem* rows;
  int64_t stride;
  MI_INLINE typename Mul::Word at(int64_t k, int r) const {
    return load<typename Mul::Word>(rows + r * stride + k * Mul::pair);
  }
  MI_INLINE DirectRows tile(int64_t m, int64_t) const { return {rows + m * stride, stride}; }
  // Asks for the tile of rows that follows this one.
  MI_INLINE void prefetch_next(int64_t words) const {
    constexpr int64_t line = 64 / int64_t(sizeof(typename Mul::Word));
    for (int r = 0; r < kRows; ++r)
      for (int64_t k = 0; k < words; k += line) __builtin_prefetch(rows + (kRows + r) * stride + k * Mul::pair, 0, 2);
  }
};

// tile[r][n] = sum of rows(k, r) * lanes(k, n) over k from `begin` to `end`, one after the other.
template <class Mul, int N, class Rows>
MI_INLINE void multiply_chain(Tile<Mul, N>& tile, const Rows& rows, const typename Mul::Word* lanes, int64_t begin,
                              int64_t end) {
  constexpr int width = Simd<typename Mul::Word>::lanes;
  unroll<kRows>([&](auto r) { unroll<N>([&](auto n) { tile.acc[r][n] = Vec<typename Mul::Acc>{}; }); });
  for (int64_t k = begin; k < end; ++k) {
    Vec<typename Mul::Word> b[N];
    unroll<N>([&](auto n) { b[n] = load<Vec<typename Mul::Word>>(lanes + (k * N + n) * width); });
    unroll<kRows>([&](auto r) {
      const auto a = rows.at(k, r);
      unroll<N>([&](auto n) { Mul::fma(tile.acc[r][n], a, b[n]); });
    });
  }
}

// Chains of nearly equal length, the narrow ones half as long, or a quarter where one would be the whole sum: what
// PyTorch sums there as dot products is the more exact for it.
template <class Mul>
int64_t chain_length(int64_t words, bool narrow) {
  if constexpr (Mul::chain == kUnbounded) {
    return words;
  } else {
    const int64_t length = !narrow ? Mul::chain : words < Mul::chain ? Mul::chain / 4 : Mul::chain / 2;
    return ceil_div(words, max((words + length / 2) / length, 1));
  }
}

// tile[r][n] = sum_k rows(k, r) * lanes(k, n), by chains of `step` words.
template <class Mul, int N, class Rows>
MI_INLINE void multiply(Tile<Mul, N>& tile, const Rows& rows, const typename Mul::Word* lanes, int64_t words,
                        int64_t step) {
  if (Mul::chain == kUnbounded || step >= words) return multiply_chain(tile, rows, lanes, 0, words);
  Tile<Mul, N> sum{};  // in memory: the registers are full
  for (int64_t k = 0; k < words; k += step) {
    multiply_chain(tile, rows, lanes, k, min(k + step, words));
    unroll<kRows>([&](auto r) { unroll<N>([&](auto n) { sum.acc[r][n] += tile.acc[r][n]; }); });
  }
  tile = sum;
}

}  // namespace mi_kernels::MI_ISA
