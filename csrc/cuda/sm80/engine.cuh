// The engine for sm_80 and later: sums over k of left(row, k) right(col, k), tile by tile, for operands that bring
// their chunks to shared memory themselves. cp.async keeps kStages - 1 stages under way; products that have to be made
// are read before a stage is computed and stored after it.
//
// Compiled, and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/common/producers.cuh"

namespace mi_kernels::cuda {

// One operand's part of the work of a thread: which chunks it brings, and where they are now.
template <class Gpu, class Operand, int kRows, Major kMajor>
class Loader {
  using T = typename Operand::Element;
  using Layout = TileLayout<int(sizeof(T)), kRows, kMajor>;
  static constexpr int kN = Layout::kPerThread;

 public:
  static constexpr int kBytes = Layout::kBytes;

  MI_DEVICE Loader(const Operand& operand, int64_t row0, int64_t k0, int64_t steps)
      : operand_(operand), row0_(row0), k0_(k0), steps_(steps) {
    rewind();
  }

  // Issues what can go by itself and reads what cannot.
  MI_DEVICE void bring(char* tile) {
    MI_UNROLL for (int q = 0; q < kN; ++q) {
      if constexpr (Operand::kMade)
        raw_[q] = operand_.read(place_[q]);
      else
        operand_.template bring<Gpu>(place_[q], tile + byte(q));
    }
    advance();
  }
  // Stores what was read.
  MI_DEVICE void store(char* tile) {
    if constexpr (Operand::kMade) {
      MI_UNROLL for (int q = 0; q < kN; ++q)
          store_chunk(reinterpret_cast<T*>(tile + byte(q)), Operand::template made<Gpu>(raw_[q]));
    }
  }

 private:
  static MI_DEVICE int byte(int q) {
    const int id = Gpu::thread() + q * kEngineThreads;
    return Layout::chunk_byte(id / Layout::kPerLine, id % Layout::kPerLine);
  }
  MI_DEVICE void rewind() {
    MI_UNROLL for (int q = 0; q < kN; ++q) {
      const int id = Gpu::thread() + q * kEngineThreads;
      const int line = id / Layout::kPerLine, along = id % Layout::kPerLine * Layout::kElements;
      if constexpr (kMajor == Major::depth) {
        const bool second = Operand::kPair && line >= kRows / 2;
        place_[q] = operand_.place(row0_ + line - (second ? kRows / 2 : 0), k0_ + along, second);
      } else {
        place_[q] = operand_.place(k0_ + line, row0_ + along, false);
      }
    }
    step_ = 0;
  }
  MI_DEVICE void advance() {
    if (++step_ == steps_) {
      operand_.next_item();
      return rewind();
    }
    MI_UNROLL for (int q = 0; q < kN; ++q) {
      if constexpr (kMajor == Major::depth)
        operand_.move_along(place_[q], Layout::kDepth);
      else
        operand_.move_line(place_[q], Layout::kDepth);
    }
  }

  Operand operand_;
  int64_t row0_, k0_, steps_, step_;
  typename Operand::Place place_[kN];
  typename Operand::Raw raw_[kN];
};

template <class Acc, class Tile>
struct TileSums {
  Acc value[Tile::kSums] = {};
  MI_DEVICE void clear() { MI_UNROLL for (int s = 0; s < Tile::kSums; ++s) value[s] = 0; }
  MI_DEVICE Acc at(int s) const { return value[s]; }
};

// Matrix instructions on 16-bit elements, sums in float. kTwo: two sums for each output; kHalf: only the first of them.
template <class Gpu, class T_, class Tile_, bool kTwo_ = false>
struct MmaMath {
  using T = T_;
  using Acc = float;
  using Tile = Tile_;
  using Sums = TileSums<Acc, Tile>;
  static constexpr bool kTwo = kTwo_;
  static constexpr int kDepth = kStageBytes / 2;
  static MI_DEVICE const Matrix<T>& operand(const Matrix<T>& m) { return m; }

  template <class L, class R, Major kLeft, Major kRight, bool kHalf>
  static MI_DEVICE void multiply(const char* left, const char* right, Sums& sums) {
    using Left = TileLayout<2, Tile::kRows, kLeft>;
    using Right = TileLayout<2, Tile::kCols, kRight>;
    constexpr int kN = kHalf ? Tile::kN / 2 : Tile::kN;
    const int warp = Gpu::thread() / 32, lane = Gpu::thread() % 32;
    // Of the four matrices that ldmatrix loads, this thread addresses a line of number `matrix`.
    const int matrix = lane / 8, line = lane % 8, low = matrix % 2 * 8, high = matrix / 2 * 8;
    MI_UNROLL for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[Tile::kM][4], b[kN][2];
      MI_UNROLL for (int m = 0; m < Tile::kM; ++m) {
        const int row = Tile::fragment_row(warp, m);
        if constexpr (kLeft == Major::depth)
          Gpu::template load_matrices<false>(a[m], left + Left::byte(row + low + line, k + high));
        else
          Gpu::template load_matrices<true>(a[m], left + Left::byte(row + low, k + high + line));
      }
      MI_UNROLL for (int n = 0; n < kN; n += 2) {
        const int col = Tile::fragment_col(warp, n, kTwo);
        uint32_t r[4];
        if constexpr (kRight == Major::depth)
          Gpu::template load_matrices<false>(r, right + Right::byte(col + high + line, k + low));
        else
          Gpu::template load_matrices<true>(r, right + Right::byte(col + high, k + low + line));
        b[n][0] = r[0];
        b[n][1] = r[1];
        b[n + 1][0] = r[2];
        b[n + 1][1] = r[3];
      }
      MI_UNROLL for (int m = 0; m < Tile::kM; ++m) MI_UNROLL for (int n = 0; n < kN; ++n)
          Gpu::template mma<T>(sums.value + (m * Tile::kN + n) * 4, a[m], b[n]);
    }
  }
};

// Matrix instructions on tf32, sums in float. T is float32, whose elements lie in the tiles as they are and are rounded
// where they are read, or float16, which is widened on the way.
template <class Gpu, class T_, class Tile_, bool kTwo_ = false>
struct Tf32Math {
  using T = T_;
  using Acc = float;
  using Tile = Tile_;
  using Sums = TileSums<Acc, Tile>;
  static constexpr bool kTwo = kTwo_;
  static constexpr int kDepth = kStageBytes / 4;
  static MI_DEVICE auto operand(const Matrix<T>& m) {
    if constexpr (std::is_same_v<T, tf32>)
      return m;
    else
      return Widened<T>(m);
  }

  template <class L, class R, Major kLeft, Major kRight, bool kHalf>
  static MI_DEVICE void multiply(const char* left, const char* right, Sums& sums) {
    constexpr int kN = kHalf ? Tile::kN / 2 : Tile::kN;
    const int warp = Gpu::thread() / 32;
    MI_UNROLL for (int k = 0; k < kDepth; k += 8) {
      uint32_t a[Tile::kM][4], b[kN][2];
      MI_UNROLL for (int m = 0; m < Tile::kM; ++m)
          load<L, kLeft, Tile::kRows, 1, 2>(a[m], left, Tile::fragment_row(warp, m), k);
      MI_UNROLL for (int n = 0; n < kN; n += 2) {
        uint32_t r[4];
        load<R, kRight, Tile::kCols, 2, 1>(r, right, Tile::fragment_col(warp, n, kTwo), k);
        b[n][0] = r[0];
        b[n][1] = r[1];
        b[n + 1][0] = r[2];
        b[n + 1][1] = r[3];
      }
      MI_UNROLL for (int m = 0; m < Tile::kM; ++m) MI_UNROLL for (int n = 0; n < kN; ++n)
          Gpu::template mma<tf32>(sums.value + (m * Tile::kN + n) * 4, a[m], b[n]);
    }
  }

 private:
  // Four matrices of 8 rows and 4 places, beginning at (row, k): number q is q / kDown % 2 times 8 rows further down
  // and q / kAlong % 2 times 4 places further along. This thread's element of each is at row lane / 4, place lane % 4.
  template <class Operand, Major kMajor, int kRows, int kDown, int kAlong>
  static MI_DEVICE void load(uint32_t (&r)[4], const char* tile, int row, int k) {
    using Layout = TileLayout<4, kRows, kMajor>;
    const int lane = Gpu::thread() % 32;
    const auto element = [&](int q, int down, int along) {
      return tile + Layout::byte(row + q / kDown % 2 * 8 + down, k + q / kAlong % 2 * 4 + along);
    };
    if constexpr (kMajor == Major::depth) {
      Gpu::template load_matrices<false>(r, element(lane / 8, lane % 8, 0));
    } else {
      const char* const from[4] = {element(0, lane / 4, lane % 4), element(1, lane / 4, lane % 4),
                                   element(2, lane / 4, lane % 4), element(3, lane / 4, lane % 4)};
      Gpu::load_words(r, from);
    }
    if constexpr (!Operand::kRounded) {
      MI_UNROLL for (int q = 0; q < 4; ++q) r[q] = Gpu::to_tf32(r[q]);
    }
  }
};

// Sums of sixteen stages at a time, which are then added to the sums of those.
template <class Acc, class Tile>
struct LayeredSums : TileSums<Acc, Tile> {
  Acc whole[Tile::kSums] = {};
  int stages = 0;
  MI_DEVICE void clear() {
    TileSums<Acc, Tile>::clear();
    MI_UNROLL for (int s = 0; s < Tile::kSums; ++s) whole[s] = 0;
    stages = 0;
  }
  MI_DEVICE Acc at(int s) const { return whole[s] + this->value[s]; }
  MI_DEVICE void added() {
    if (++stages < 16) return;
    MI_UNROLL for (int s = 0; s < Tile::kSums; ++s) whole[s] += this->value[s];
    TileSums<Acc, Tile>::clear();
    stages = 0;
  }
};

// Fused multiply-adds in the dtype itself, for exact checks. Sums are taken of a stage, of stages, and in float of
// those again: one chain over all of k would round more than PyTorch's blocked sums.
template <class Gpu, class T_, class Tile_ = FmaTile, bool kTwo_ = false>
struct FmaMath {
  using T = T_;
  using Acc = T_;
  using Tile = Tile_;
  static constexpr bool kLayered = sizeof(T) == 4;
  using Sums = std::conditional_t<kLayered, LayeredSums<Acc, Tile>, TileSums<Acc, Tile>>;
  static constexpr bool kTwo = kTwo_;
  static constexpr int kDepth = kStageBytes / int(sizeof(T));
  static MI_DEVICE const Matrix<T>& operand(const Matrix<T>& m) { return m; }

  template <class L, class R, Major kLeft, Major kRight, bool kHalf>
  static MI_DEVICE void multiply(const char* left, const char* right, Sums& sums) {
    using Left = TileLayout<int(sizeof(T)), Tile::kRows, kLeft>;
    using Right = TileLayout<int(sizeof(T)), Tile::kCols, kRight>;
    constexpr int kN = kHalf ? Tile::kN / 2 : Tile::kN;
    const int thread = Gpu::thread();
    T part[Tile::kM * kN] = {};
    MI_UNROLL for (int k = 0; k < kDepth; ++k) {
      T a[Tile::kM], b[kN];
      MI_UNROLL for (int m = 0; m < Tile::kM; ++m) a[m] =
          *reinterpret_cast<const T*>(left + Left::byte(Tile::row(thread, m * Tile::kN), k));
      MI_UNROLL for (int n = 0; n < kN; ++n) b[n] =
          *reinterpret_cast<const T*>(right + Right::byte(Tile::col(thread, n, kTwo), k));
      MI_UNROLL for (int m = 0; m < Tile::kM; ++m) MI_UNROLL for (int n = 0; n < kN; ++n) part[m * kN + n] +=
          a[m] * b[n];
    }
    MI_UNROLL for (int m = 0; m < Tile::kM; ++m) MI_UNROLL for (int n = 0; n < kN; ++n) sums.value[m * Tile::kN + n] +=
        part[m * kN + n];
    if constexpr (kLayered) sums.added();
  }
};

template <class Math>
constexpr int stage_bytes() {
  return (Math::Tile::kRows + Math::Tile::kCols) * kStageBytes;
}
// A row of the tile of sums in shared memory; the padding spreads rows over the banks.
template <class Math>
constexpr int sums_pitch() {
  return Math::Tile::kCols + 16 / int(sizeof(typename Math::Acc));
}
template <class Math>
constexpr int engine_shared_bytes() {
  constexpr int stages = kStages * stage_bytes<Math>();
  constexpr int sums = Math::Tile::kRows * sums_pitch<Math>() * int(sizeof(typename Math::Acc));
  return stages > sums ? stages : sums;
}

// The one loop of the engine: `items` products of `steps` stages each, one after the other without a pause;
// consume(item) sees the sums of each and clears them if it wants to.
template <class Gpu, class Math, Major kLeft, Major kRight, bool kHalf = false, class L, class R, class Consume>
MI_DEVICE void accumulate(const L& left, const R& right, int64_t row0, int64_t col0, int64_t k0, int64_t steps,
                          int64_t items, typename Math::Sums& sums, Consume&& consume) {
  if (steps <= 0 || items <= 0) return;
  Loader<Gpu, L, Math::Tile::kRows, kLeft> from_left(left, row0, k0, steps);
  Loader<Gpu, R, Math::Tile::kCols, kRight> from_right(right, col0, k0, steps);
  char* const shared = Gpu::shared();
  const auto left_tile = [&](int64_t step) { return shared + step % kStages * stage_bytes<Math>(); };
  const auto right_tile = [&](int64_t step) { return left_tile(step) + from_left.kBytes; };
  const int64_t total = steps * items;
  Gpu::sync_block();  // whoever used the shared memory before has done so
  MI_NO_UNROLL for (int64_t step = 0; step < kStages - 1; ++step) {
    if (step < total) {
      from_left.bring(left_tile(step));
      from_right.bring(right_tile(step));
      from_left.store(left_tile(step));
      from_right.store(right_tile(step));
    }
    Gpu::commit();
  }
  int64_t in_item = 0, item = 0;
  MI_NO_UNROLL for (int64_t step = 0; step < total; ++step) {
    Gpu::template wait<kStages - 2>();
    Gpu::sync_block();
    const int64_t next = step + kStages - 1;
    if (next < total) {
      from_left.bring(left_tile(next));
      from_right.bring(right_tile(next));
    }
    Gpu::commit();
    Math::template multiply<L, R, kLeft, kRight, kHalf>(left_tile(step), right_tile(step), sums);
    if (next < total) {
      from_left.store(left_tile(next));
      from_right.store(right_tile(next));
    }
    if (++in_item == steps) {
      consume(item++);
      in_item = 0;
    }
  }
  Gpu::template wait<0>();
}

}  // namespace mi_kernels::cuda
