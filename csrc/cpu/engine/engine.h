// The blocked matrix product that every kernel is built on: C[m, n] = sum_k A[m, k] B[n, k].
//
// Elements of the A operand are broadcast; those of the B operand fill the lanes of vectors, so that n is a lane.
// A comes from a producer, which packs it from memory or generates it; B is packed by pack_b(). Each finished register
// tile is handed to an epilogue. A kernel chooses a producer, an epilogue and what the lanes are: the batch (forward,
// input gradients with W), the outputs (products without W, where m is a row of the batch) or the features of the
// result (weight gradients).
//
// Packed layouts, in words of Mul::pair elements along K; a panel is up to kMaxPanelVectors vectors wide:
//   A             [tile][K][kTileM]              one tile after another
//   B             [panel][K][N vectors]
//   accumulators  [panel][feature][N vectors]    a block of lanes, one row of vectors for each feature
#pragma once

#include "cpu/engine/blocking.h"
#include "cpu/engine/microkernel.h"

namespace mi_kernels::MI_ISA {

template <class Mul>
struct AccMul;
template <>
struct AccMul<MulF64> {
  using type = MulF64;
};
template <>
struct AccMul<MulF32> {
  using type = MulF32;
};
#if defined(__AVX512BF16__)
template <>
struct AccMul<MulBF16> {
  using type = MulF32;
};
#endif

// A strided view of A or B: element (mn, k) at data[mn * mn_stride + k * k_stride]; mn is m or n.
template <class S>
struct View {
  const S* data;
  int64_t mn_stride, k_stride;
  View at(int64_t mn, int64_t k) const { return {data + mn * mn_stride + k * k_stride, mn_stride, k_stride}; }
  MI_INLINE const S& operator()(int64_t mn, int64_t k) const { return data[mn * mn_stride + k * k_stride]; }
};

template <class Mul, class S>
inline constexpr bool kSameElement = false;
template <class S>
inline constexpr bool kSameElement<MulF64, S> = __is_same(S, double);
template <class S>
inline constexpr bool kSameElement<MulF32, S> = __is_same(S, float);
#if defined(__AVX512BF16__)
template <class S>
inline constexpr bool kSameElement<MulBF16, S> = __is_same(S, BFloat16);
#endif

template <class T>
void clear(T* p, int64_t count) {
  if (count > 0) __builtin_memset(p, 0, size_t(count) * sizeof(T));
}

// N words along m or n: `first` and, for pairs, `second` point to the elements of two neighbours along K.
template <class Mul, int N, class S>
MI_INLINE Vec<typename Mul::Word, N> load_words_mn(const S* first, const S* second) {
  if constexpr (Mul::pair == 1) {
    return __builtin_convertvector(load_acc<N>(first), Vec<typename Mul::Word, N>);
  } else {
    const auto low = __builtin_convertvector(load<Vec<uint16_t, N>>(first), Vec<uint32_t, N>);
    const auto high = __builtin_convertvector(load<Vec<uint16_t, N>>(second), Vec<uint32_t, N>);
    return low | high << 16;
  }
}

// A vector of consecutive words along K.
template <class Mul, class S>
MI_INLINE Vec<typename Mul::Word> load_words_k(const S* p) {
  if constexpr (Mul::pair == 1) {
    return __builtin_convertvector(load_acc<Simd<typename Mul::Word>::lanes>(p), Vec<typename Mul::Word>);
  } else {
    return load<Vec<uint32_t>>(p);
  }
}

// The first `count` elements of such a vector, the others being zero, even if they are NaN in memory.
template <class Mul, class S>
MI_INLINE Vec<typename Mul::Word> first_words_k(const S* p, int64_t count) {
  if constexpr (Mul::pair == 1) {
    return first_lanes(load_words_k<Mul>(p), count);
  } else {
    constexpr int E = Simd<typename Mul::Word>::lanes * Mul::pair;
    return bit_cast<Vec<typename Mul::Word>>(first_lanes(load<Vec<int16_t, E>>(p), count));
  }
}

// Converts `depth` elements, contiguous along K, to the type in which they are multiplied; zero-pads to a whole word.
template <class Mul, class S>
void copy_row(const S* in, int64_t depth, typename Mul::Elem* out) {
  int64_t k = 0;
  if constexpr (kSameElement<Mul, S>) {
    __builtin_memcpy(out, in, size_t(depth) * sizeof(S));
    k = depth;
  } else {
    constexpr int L = Simd<typename Mul::Acc>::lanes;
    for (; k + L <= depth; k += L)
      store(out + k, __builtin_convertvector(load_acc<L>(in + k), Vec<typename Mul::Elem, L>));
    for (; k < depth; ++k) out[k] = to_acc(in[k]);
  }
  if (k % Mul::pair != 0) out[k] = {};
}

template <class Mul, class S>
MI_INLINE typename Mul::Word word_at(const View<S>& view, int64_t mn, int64_t k, int64_t depth) {
  if constexpr (Mul::pair == 1) {
    return to_acc(view(mn, k));
  } else {
    const uint32_t first = view(mn, 2 * k).bits;
    return 2 * k + 1 < depth ? first | uint32_t(view(mn, 2 * k + 1).bits) << 16 : first;
  }
}

// Packs `count` x `depth` elements into words [depth / pair][padded]; the padding is zero.
template <class Mul, class S>
void pack(View<S> view, int64_t count, int64_t padded, int64_t depth, typename Mul::Word* out) {
  using Word = typename Mul::Word;
  constexpr int L = Simd<Word>::lanes;
  const int64_t words = ceil_div(depth, Mul::pair), whole = depth / Mul::pair;
  int64_t k = 0;
  if (view.k_stride == 1) {
    for (; k + L <= whole; k += L) {
      for (int64_t mn = 0; mn < padded; mn += L) {
        Vec<Word> square[L];
        const int64_t valid = min(count - mn, L);
        unroll<L>([&](auto r) MI_INLINED {
          square[r] = r < valid ? load_words_k<Mul>(&view(mn + r, k * Mul::pair)) : Vec<Word>{};
        });
        transpose(square);
        if (mn + L <= padded) {
          unroll<L>([&](auto r) MI_INLINED { store(out + (k + r) * padded + mn, square[r]); });
        } else {
          for (int r = 0; r < L; ++r)
            __builtin_memcpy(out + (k + r) * padded + mn, &square[r], sizeof(Word) * size_t(padded - mn));
        }
      }
    }
  }
  for (; k < words; ++k) {
    Word* row = out + k * padded;
    int64_t mn = 0;
    if (view.mn_stride == 1 && k < whole) {
      const S* first = &view(0, k * Mul::pair);
      const S* second = Mul::pair == 1 ? first : first + view.k_stride;
      for (; mn + L <= count; mn += L) store(row + mn, load_words_mn<Mul, L>(first + mn, second + mn));
      for (; mn + kTileM <= count; mn += kTileM) store(row + mn, load_words_mn<Mul, kTileM>(first + mn, second + mn));
    }
    for (; mn < count; ++mn) row[mn] = word_at<Mul>(view, mn, k, depth);
    for (; mn < padded; ++mn) row[mn] = Word{};
  }
}

// How a block of vectors is divided into panels of nearly equal width.
struct PanelSplit {
  int64_t vectors;
  int64_t count() const { return ceil_div(vectors, kMaxPanelVectors); }
  int vectors_in(int64_t panel) const {
    const int64_t n = count();
    return int(vectors / n + (panel < vectors % n));
  }
};

// Calls f(Index<N>, first vector) for each panel of N vectors.
template <class F>
MI_INLINE void for_panels(int64_t vectors, F&& f) {
  const PanelSplit panels{vectors};
  int64_t first = 0;
  for (int64_t s = 0; s < panels.count(); ++s) {
    const int n = panels.vectors_in(s);
    if (n == 3) f(Index<3>{}, first);
    if (n == 2) f(Index<2>{}, first);
    if (n == 1) f(Index<1>{}, first);
    first += n;
  }
}

// Packs a block of B: [K][N vectors] for each panel.
template <class Mul, class S>
void pack_b(View<S> view, int64_t count, int64_t vectors, int64_t depth, typename Mul::Word* out) {
  constexpr int L = Simd<typename Mul::Word>::lanes;
  const int64_t words = ceil_div(depth, Mul::pair);
  for_panels(vectors, [&](auto n, int64_t first) {
    const int64_t lane = first * L;
    pack<Mul>(view.at(lane, 0), max(min(count - lane, n * L), 0), n * L, depth, out + lane * words);
  });
}

// A packed block of B, but for the panels whose lanes are all among the first `lanes` of a matrix: these are read in
// place, with the words of one k `stride` behind those of the one before.
template <class Mul>
struct BlockOfB {
  using Word = typename Mul::Word;
  const Word* packed;
  const Word* matrix = nullptr;
  int64_t stride = 0, lanes = 0;

  bool in_place(int64_t first, int n) const { return (first + n) * Simd<Word>::lanes <= lanes; }
  // A panel of n vectors whose sums have `words` words, and the words between one k of it and the next.
  const Word* panel(int64_t first, int n, int64_t words) const {
    const int64_t lane = first * Simd<Word>::lanes;
    return in_place(first, n) ? matrix + lane : packed + lane * words;
  }
  int64_t step(int64_t first, int n) const { return in_place(first, n) ? stride : n * Simd<Word>::lanes; }
};

// Rows of A up to which reading B in place, in short runs, costs less than packing it.
inline constexpr int64_t kMostRowsInPlace = 256;

// Packs what cannot be read in place for `rows` of A: whole panels of a matrix with contiguous lanes can be, in the
// type in which they are multiplied.
template <class Mul, class S>
BlockOfB<Mul> read_or_pack_b(View<S> view, int64_t count, int64_t vectors, int64_t depth, int64_t rows,
                             typename Mul::Word* out) {
  constexpr int L = Simd<typename Mul::Word>::lanes;
  BlockOfB<Mul> b{out};
  if constexpr (Mul::pair == 1 && kSameElement<Mul, S>)
    if (rows <= kMostRowsInPlace && view.mn_stride == 1) b = {out, view.data, view.k_stride, count};
  for_panels(vectors, [&](auto n, int64_t first) {
    const int64_t lane = first * L;
    if (!b.in_place(first, n))
      pack_b<Mul>(view.at(lane, 0), count - lane, n, depth, out + lane * ceil_div(depth, Mul::pair));
  });
  return b;
}

// Sets one lane of a packed block of B to the number 1.
template <class Mul, class S>
void fill_with_ones(int64_t lane, int64_t vectors, int64_t depth, typename Mul::Word* out) {
  constexpr int L = Simd<typename Mul::Word>::lanes;
  const int64_t words = ceil_div(depth, Mul::pair);
  S one;
  from_acc(typename Mul::Acc(1), one);
  for_panels(vectors, [&](auto n, int64_t first) {
    const int64_t at = lane - first * L, width = n * L;
    if (at < 0 || at >= width) return;
    for (int64_t k = 0; k < words; ++k)
      out[first * L * words + k * width + at] = word_at<Mul>(View<S>{&one, 0, 0}, 0, k, depth);
  });
}

// The inverse for accumulators: stores feature f of each lane at out[lane * stride + f].
template <class Acc, class S>
void unpack_panels(const Acc* panels, int64_t features, int64_t vectors, int64_t count, S* out, int64_t stride) {
  constexpr int L = Simd<Acc>::lanes;
  for_panels(vectors, [&](auto n, int64_t first) {
    const Acc* panel = panels + first * L * features;
    for (int v = 0; v < n; ++v) {
      const int64_t lane = (first + v) * L, valid = min(count - lane, L);
      int64_t f = 0;
      for (; f + L <= features; f += L) {
        Vec<Acc> square[L];
        unroll<L>([&](auto r) MI_INLINED { square[r] = load<Vec<Acc>>(panel + ((f + r) * n + v) * L); });
        transpose(square);
        unroll<L>([&](auto r) MI_INLINED {
          if (r < valid) store_acc<L>(out + (lane + r) * stride + f, square[r]);
        });
      }
      for (; f < features; ++f)
        for (int64_t r = 0; r < valid; ++r) from_acc(panel[(f * n + v) * L + r], out[(lane + r) * stride + f]);
    }
  });
}

// A packed for the tile by a producer that can prefetch the rows of the next block, so that memory is read while this
// one is multiplied.
template <class Mul, class Producer>
struct PackedAhead {
  PackedA<Mul> packed;
  const Producer* producer;
  int64_t m, end, k, depth;
  MI_INLINE typename Mul::Word at(int64_t step, int r) const { return packed.at(step, r); }
  MI_INLINE PackedAhead tile(int64_t offset, int64_t words) const {
    return {packed.tile(offset, words), producer, m + offset, end, k, depth};
  }
  MI_INLINE void prefetch_next(int64_t) const {
    if (m + kBlockM < end) producer->prefetch_tile(m + kBlockM, k, depth);
  }
};

// The last rows [m, end) of A, half a tile at most, with one panel of B: a few rows would cost as much as a whole tile.
template <int N, class Mul, class A, class Epilogue, class... Stride>
__attribute__((noinline, flatten)) void gemm_half_tile(const A& tile_a, int64_t m, int64_t end, int64_t words,
                                                       int64_t sum_block, const typename Mul::Word* panel,
                                                       int64_t first, const Epilogue& epilogue, Stride... stride) {
  Tile<Mul, N> tile;
  multiply<kTileM / 2>(tile, tile_a, panel, words, sum_block, stride...);
  epilogue(tile, m, end - m, first);
}

// All tiles of rows [begin, end) of A with one panel of B. `prefetch`: A is read from memory, in rows too short for the
// hardware prefetcher. `stride`: of B, unless it is packed.
//
// `flatten`: a lambda or an epilogue that is not inlined would take the address of the tile, whose accumulators would
// then be in memory rather than in registers. Half tiles have a function of their own for the same reason.
template <int N, class Mul, class A, class Epilogue, class... Stride>
__attribute__((noinline, flatten)) void gemm_panel(const A& a, int64_t begin, int64_t end, bool prefetch, int64_t words,
                                                   int64_t sum_block, const typename Mul::Word* panel, int64_t first,
                                                   const Epilogue& epilogue, Stride... stride) {
  for (int64_t m = begin; m < end; m += kTileM) {
    const A tile_a = a.tile(m - begin, words);
    if constexpr (requires { Epilogue::half_tiles; })
      if (end - m <= kTileM / 2)
        return gemm_half_tile<N, Mul>(tile_a, m, end, words, sum_block, panel, first, epilogue, stride...);
    if (prefetch) tile_a.prefetch_next(words);
    Tile<Mul, N> tile;
    multiply(tile, tile_a, panel, words, sum_block, stride...);
    epilogue(tile, m, min(end - m, kTileM), first);
  }
}

// Multiplies rows [m0, m1) of A by a block of B, a BlockOfB or, if all of it is packed, its words, and calls
// epilogue(tile, m, valid rows, first vector) for each tile of each panel.
//
// A producer has pack_rows(m0, m1, k0, depth, words), which writes the packed tiles of these rows; if it has
// prefetch_tile(m, k0, depth) too, that is called for the rows of a tile to come. With `copies`, it
// may also write the rows one after the other, where they are contiguous along K, which saves the transposition. With
// `direct`, it may also be read in place, a whole tile at a time. `all_rows` is the number of rows of all tasks: the
// summation order of a row must not depend on how many rows its task has.
template <class Mul, class Producer, class B, class Epilogue>
void gemm(const Producer& producer, int64_t m0, int64_t m1, int64_t k0, int64_t depth, const B& b, int64_t vectors,
          typename Mul::Word* buffer, const Epilogue& epilogue, int64_t all_rows = 0) {
  using Elem = typename Mul::Elem;
  constexpr int L = Simd<typename Mul::Word>::lanes;
  const int64_t words = ceil_div(depth, Mul::pair);
  const int64_t sum_block = sum_block_length<Mul>(words, (all_rows ? all_rows : m1 - m0) < 4 * kTileM || vectors == 1);
  const auto multiply_rows = [&](const auto& a, int64_t begin, int64_t end, bool in_place) {
    for_panels(vectors, [&](auto n, int64_t first) {
      const bool prefetch = in_place && first == 0;
      if constexpr (requires { b.panel(first, n, words); })
        gemm_panel<n.value, Mul>(a, begin, end, prefetch, words, sum_block, b.panel(first, n, words), first, epilogue,
                                 b.step(first, n));
      else
        gemm_panel<n.value, Mul>(a, begin, end, prefetch, words, sum_block, b + first * L * words, first, epilogue);
    });
  };
  for (int64_t m = m0; m < m1;) {
    const int64_t end = min(m + kBlockM, m1);
    if constexpr (Producer::direct) {
      if (const int64_t whole = (end - m) / kTileM * kTileM; whole && producer.in_place_allowed(depth)) {
        multiply_rows(producer.in_place(m, k0), m, m + whole, true);
        m += whole;
        continue;
      }
    }
    if constexpr (Producer::copies) {
      if (producer.copy_allowed()) {
        auto* copy = reinterpret_cast<Elem*>(buffer);
        const int64_t stride = words * Mul::pair, missing = ceil_div(end - m, kTileM) * kTileM - (end - m);
        producer.copy_rows(m, end, k0, depth, copy, stride);
        clear(copy + (end - m) * stride, missing * stride);
        multiply_rows(DirectA<Mul>{copy, stride}, m, end, false);
        m = end;
        continue;
      }
    }
    if constexpr (requires { producer.pack_rows(m, end, k0, depth, buffer); }) {
      producer.pack_rows(m, end, k0, depth, buffer);
      if constexpr (requires { producer.prefetch_tile(m, k0, depth); })
        multiply_rows(PackedAhead<Mul, Producer>{{buffer}, &producer, m, m1, k0, depth}, m, end, true);
      else
        multiply_rows(PackedA<Mul>{buffer}, m, end, false);
    }
    m = end;
  }
}

}  // namespace mi_kernels::MI_ISA
