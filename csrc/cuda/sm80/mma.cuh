// The arithmetic of a stage for each dtype: matrix instructions on 16-bit elements or tf32, or fused multiply-adds.
#pragma once

#include "cuda/common/operands.cuh"
#include "cuda/sm80/layout.h"

namespace mi_kernels::cuda {

template <class Acc, class Tile>
struct TileAccumulators {
  Acc value[Tile::kAccumulators] = {};
  MI_DEVICE void clear() {
    MI_UNROLL
    for (int s = 0; s < Tile::kAccumulators; ++s) value[s] = 0;
  }
  MI_DEVICE Acc at(int s) const { return value[s]; }
};

// The accumulators of a dual tile that a product is added to: the fragments of columns of each half of the tile.
enum class Sums : int { both, first, second };
template <class Tile>
MI_HOST_DEVICE constexpr int first_fragment(Sums sums) {
  return sums == Sums::second ? Tile::kN / 2 : 0;
}
template <class Tile>
MI_HOST_DEVICE constexpr int end_fragment(Sums sums) {
  return sums == Sums::first ? Tile::kN / 2 : Tile::kN;
}

// Matrix instructions on 16-bit elements, accumulators in float. kDual: two accumulators for each output; kSums: which
// of them a product is added to.
template <class Arch, class T_, class Tile_, bool kDual_ = false>
struct HalfMma {
  using T = T_;
  using Acc = float;
  using Tile = Tile_;
  using Accumulators = TileAccumulators<Acc, Tile>;
  static constexpr bool kDual = kDual_;
  static constexpr int kStageK = kStageBytes / 2;
  static MI_DEVICE const MatrixOperand<T>& operand(const MatrixOperand<T>& m) { return m; }

  template <class A, class B, Major kMajorA, Major kMajorB, Sums kSums>
  static MI_DEVICE void multiply(const char* a_tile, const char* b_tile, Accumulators& acc) {
    using LayoutA = TileLayout<2, Tile::kRows, kMajorA>;
    using LayoutB = TileLayout<2, Tile::kCols, kMajorB>;
    constexpr int kBegin = first_fragment<Tile>(kSums), kEnd = end_fragment<Tile>(kSums);
    const int warp = Arch::thread() / 32, lane = Arch::thread() % 32;
    // ldmatrix loads four matrices; this thread passes the address of a line of number `matrix`.
    const int matrix = lane / 8, line = lane % 8, low = matrix % 2 * 8, high = matrix / 2 * 8;
    MI_UNROLL
    for (int k = 0; k < kStageK; k += 16) {
      uint32_t a[Tile::kM][4], b[Tile::kN][2];
      MI_UNROLL
      for (int m = 0; m < Tile::kM; ++m) {
        const int row = Tile::fragment_row(warp, m);
        if constexpr (kMajorA == Major::k)
          Arch::template load_matrices<false>(a[m], a_tile + LayoutA::byte(row + low + line, k + high));
        else
          Arch::template load_matrices<true>(a[m], a_tile + LayoutA::byte(row + low, k + high + line));
      }
      MI_UNROLL
      for (int n = kBegin; n < kEnd; n += 2) {
        const int col = Tile::fragment_col(warp, n, kDual);
        uint32_t r[4];
        if constexpr (kMajorB == Major::k)
          Arch::template load_matrices<false>(r, b_tile + LayoutB::byte(col + high + line, k + low));
        else
          Arch::template load_matrices<true>(r, b_tile + LayoutB::byte(col + high, k + low + line));
        b[n][0] = r[0];
        b[n][1] = r[1];
        b[n + 1][0] = r[2];
        b[n + 1][1] = r[3];
      }
      MI_UNROLL
      for (int m = 0; m < Tile::kM; ++m) {
        MI_UNROLL
        for (int n = kBegin; n < kEnd; ++n) Arch::template mma<T>(acc.value + (m * Tile::kN + n) * 4, a[m], b[n]);
      }
    }
  }
};

// Matrix instructions on tf32, accumulators in float. T is tf32, whose elements are in shared memory as float32 and are
// rounded when a fragment is loaded, or float16, which is widened on the way to shared memory.
template <class Arch, class T_, class Tile_, bool kDual_ = false>
struct Tf32Mma {
  using T = T_;
  using Acc = float;
  using Tile = Tile_;
  using Accumulators = TileAccumulators<Acc, Tile>;
  static constexpr bool kDual = kDual_;
  static constexpr int kStageK = kStageBytes / 4;
  static MI_DEVICE auto operand(const MatrixOperand<T>& m) {
    if constexpr (std::is_same_v<T, tf32>)
      return m;
    else
      return WidenedMatrix<T>(m);
  }

  template <class A, class B, Major kMajorA, Major kMajorB, Sums kSums>
  static MI_DEVICE void multiply(const char* a_tile, const char* b_tile, Accumulators& acc) {
    constexpr int kBegin = first_fragment<Tile>(kSums), kEnd = end_fragment<Tile>(kSums);
    const int warp = Arch::thread() / 32;
    MI_UNROLL
    for (int k = 0; k < kStageK; k += 8) {
      uint32_t a[Tile::kM][4], b[Tile::kN][2];
      MI_UNROLL
      for (int m = 0; m < Tile::kM; ++m)
        load<A, kMajorA, Tile::kRows, 1, 2>(a[m], a_tile, Tile::fragment_row(warp, m), k);
      MI_UNROLL
      for (int n = kBegin; n < kEnd; n += 2) {
        uint32_t r[4];
        load<B, kMajorB, Tile::kCols, 2, 1>(r, b_tile, Tile::fragment_col(warp, n, kDual), k);
        b[n][0] = r[0];
        b[n][1] = r[1];
        b[n + 1][0] = r[2];
        b[n + 1][1] = r[3];
      }
      MI_UNROLL
      for (int m = 0; m < Tile::kM; ++m) {
        MI_UNROLL
        for (int n = kBegin; n < kEnd; ++n) Arch::template mma<tf32>(acc.value + (m * Tile::kN + n) * 4, a[m], b[n]);
      }
    }
  }

 private:
  // Four matrices of 8 rows by 4 elements of K from (row, k) on: number q is 8 rows further if q / kRowStep is odd and
  // 4 elements further if q / kKStep is odd. This thread gets the element at row lane / 4 and element lane % 4 of each.
  template <class Operand, Major kMajor, int kRows, int kRowStep, int kKStep>
  static MI_DEVICE void load(uint32_t (&r)[4], const char* tile, int row, int k) {
    using Layout = TileLayout<4, kRows, kMajor>;
    const int lane = Arch::thread() % 32;
    const auto element = [&](int q, int rows, int ks) {
      return tile + Layout::byte(row + q / kRowStep % 2 * 8 + rows, k + q / kKStep % 2 * 4 + ks);
    };
    if constexpr (kMajor == Major::k) {
      Arch::template load_matrices<false>(r, element(lane / 8, lane % 8, 0));
    } else {
      const char* const src[4] = {element(0, lane / 4, lane % 4), element(1, lane / 4, lane % 4),
                                  element(2, lane / 4, lane % 4), element(3, lane / 4, lane % 4)};
      Arch::load_words(r, src);
    }
    if constexpr (!Operand::kRounded) {
      MI_UNROLL
      for (int q = 0; q < 4; ++q) r[q] = Arch::to_tf32(r[q]);
    }
  }
};

// Accumulators of a summation block of sixteen stages, which are then added to the totals.
template <class Acc, class Tile>
struct BlockedAccumulators : TileAccumulators<Acc, Tile> {
  Acc total[Tile::kAccumulators] = {};
  int stages = 0;
  MI_DEVICE void clear() {
    TileAccumulators<Acc, Tile>::clear();
    MI_UNROLL
    for (int s = 0; s < Tile::kAccumulators; ++s) total[s] = 0;
    stages = 0;
  }
  MI_DEVICE Acc at(int s) const { return total[s] + this->value[s]; }
  MI_DEVICE void stage_done() {
    if (++stages < 16) return;
    MI_UNROLL
    for (int s = 0; s < Tile::kAccumulators; ++s) total[s] += this->value[s];
    TileAccumulators<Acc, Tile>::clear();
    stages = 0;
  }
};

// Fused multiply-adds in the dtype itself. Each stage is summed on its own, and in float stages are summed in blocks:
// one sequential sum over all of K would round more than PyTorch's blocked sums do.
template <class Arch, class T_, class Tile_ = SimtTile, bool kDual_ = false>
struct SimtMma {
  using T = T_;
  using Acc = T_;
  using Tile = Tile_;
  static constexpr bool kBlocked = sizeof(T) == 4;
  using Accumulators = std::conditional_t<kBlocked, BlockedAccumulators<Acc, Tile>, TileAccumulators<Acc, Tile>>;
  static constexpr bool kDual = kDual_;
  static constexpr int kStageK = kStageBytes / int(sizeof(T));
  static MI_DEVICE const MatrixOperand<T>& operand(const MatrixOperand<T>& m) { return m; }

  template <class A, class B, Major kMajorA, Major kMajorB, Sums kSums>
  static MI_DEVICE void multiply(const char* a_tile, const char* b_tile, Accumulators& acc) {
    using LayoutA = TileLayout<int(sizeof(T)), Tile::kRows, kMajorA>;
    using LayoutB = TileLayout<int(sizeof(T)), Tile::kCols, kMajorB>;
    constexpr int kBegin = first_fragment<Tile>(kSums), kEnd = end_fragment<Tile>(kSums);
    const int thread = Arch::thread();
    T stage_sum[Tile::kM * Tile::kN] = {};
    MI_UNROLL
    for (int k = 0; k < kStageK; ++k) {
      T a[Tile::kM], b[Tile::kN];
      MI_UNROLL
      for (int m = 0; m < Tile::kM; ++m)
        a[m] = *reinterpret_cast<const T*>(a_tile + LayoutA::byte(Tile::row(thread, m * Tile::kN), k));
      MI_UNROLL
      for (int n = kBegin; n < kEnd; ++n)
        b[n] = *reinterpret_cast<const T*>(b_tile + LayoutB::byte(Tile::col(thread, n, kDual), k));
      MI_UNROLL
      for (int m = 0; m < Tile::kM; ++m) {
        MI_UNROLL
        for (int n = kBegin; n < kEnd; ++n) stage_sum[m * Tile::kN + n] += a[m] * b[n];
      }
    }
    MI_UNROLL
    for (int m = 0; m < Tile::kM; ++m) {
      MI_UNROLL
      for (int n = kBegin; n < kEnd; ++n) acc.value[m * Tile::kN + n] += stage_sum[m * Tile::kN + n];
    }
    if constexpr (kBlocked) acc.stage_done();
  }
};

// The arithmetic of a dtype for products of matrices, for products with z x, and for dx and dz.
template <class Arch, class T, class Tile, bool kDual = false>
using MmaFor = std::conditional_t<
    sizeof(T) == 2, HalfMma<Arch, T, Tile, kDual>,
    std::conditional_t<std::is_same_v<T, tf32>, Tf32Mma<Arch, T, Tile, kDual>, SimtMma<Arch, T, SimtTile, kDual>>>;
template <class Arch, class T, bool kDual = false>
using MatrixMma = MmaFor<Arch, T, MmaTile<128, 128, 2>, kDual>;
template <class Arch, class T>
using GeneratedMma =
    std::conditional_t<OuterProducts<T>::kWidens, Tf32Mma<Arch, T, MmaTile<128, 128, 2>>, MatrixMma<Arch, T>>;
template <class Arch, class T>
using InputGradsMma = MmaFor<Arch, T, MmaTile<128, 64, 4>>;

// A forward pass per context, which only float16 has, multiplies matrices alone.
template <class Arch, class T, bool kPerContext>
using ForwardMma = std::conditional_t<kPerContext, MatrixMma<Arch, T>, GeneratedMma<Arch, T>>;
template <class Arch, class T, bool kGenerated>
using WeightGradsMma = std::conditional_t<kGenerated, GeneratedMma<Arch, T>, MatrixMma<Arch, T>>;

}  // namespace mi_kernels::cuda
