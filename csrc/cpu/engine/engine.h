// The blocked matrix product that every family runs on.
//
// A product has a row operand, broadcast element by element, and a lane operand, held in vectors. Each
// comes from a producer, which packs what lies in memory or generates it on the way; each finished
// register tile goes through an epilogue. A family chooses producers, an epilogue and what lies in the
// lanes: the batch (forward, input gradients with W), the outputs (products without W, whose "features" are rows of
// the batch) or the features of the result (weight gradients).
//
// Packed layouts, in words of Mul::pair elements along K:
//   rows   [tile][K][kRows]              one tile after another
//   lanes  [strip][K][N vectors]         strips of at most kMaxVectors vectors
//   planes [strip][feature][N vectors]   accumulators of a block of lanes, one vector row per feature
#pragma once

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

// A strided view: element (w, k) at data[w * w_stride + k * k_stride], w along rows or lanes.
template <class S>
struct View {
  const S* data;
  int64_t w_stride, k_stride;
  View at(int64_t w, int64_t k) const { return {data + w * w_stride + k * k_stride, w_stride, k_stride}; }
  MI_INLINE const S& operator()(int64_t w, int64_t k) const { return data[w * w_stride + k * k_stride]; }
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

// One word along K from one or two values of accumulation type.
template <class Mul>
MI_INLINE typename Mul::Word make_word(typename Mul::Acc first, typename Mul::Acc second) {
  if constexpr (Mul::pair == 1) {
    return first;
  } else {
    return uint32_t(round_to_bf16(first)) | uint32_t(round_to_bf16(second)) << 16;
  }
}

// N words along the rows or lanes: `first` and, for pairs, `second` are the storage of two neighbours in K.
template <class Mul, int N, class S>
MI_INLINE Vec<typename Mul::Word, N> load_across(const S* first, const S* second) {
  if constexpr (Mul::pair == 1) {
    return __builtin_convertvector(load_acc<N>(first), Vec<typename Mul::Word, N>);
  } else {
    const auto low = __builtin_convertvector(load<Vec<uint16_t, N>>(first), Vec<uint32_t, N>);
    const auto high = __builtin_convertvector(load<Vec<uint16_t, N>>(second), Vec<uint32_t, N>);
    return low | high << 16;
  }
}

// A vector of words that follow each other along K.
template <class Mul, class S>
MI_INLINE Vec<typename Mul::Word> load_along(const S* p) {
  if constexpr (Mul::pair == 1) {
    return __builtin_convertvector(load_acc<Simd<typename Mul::Word>::lanes>(p), Vec<typename Mul::Word>);
  } else {
    return load<Vec<uint32_t>>(p);
  }
}

// `depth` elements, contiguous along K, as they are multiplied; zero up to a whole word.
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
MI_INLINE typename Mul::Word word_at(const View<S>& view, int64_t w, int64_t k, int64_t depth) {
  if constexpr (Mul::pair == 1) {
    return to_acc(view(w, k));
  } else {
    const uint32_t first = view(w, 2 * k).bits;
    return 2 * k + 1 < depth ? first | uint32_t(view(w, 2 * k + 1).bits) << 16 : first;
  }
}

// Packs words [depth / pair][padded] from `width` x `depth` elements; what lies beyond them becomes zero.
template <class Mul, class S>
void pack(View<S> view, int64_t width, int64_t padded, int64_t depth, typename Mul::Word* out) {
  using Word = typename Mul::Word;
  constexpr int L = Simd<Word>::lanes;
  const int64_t words = ceil_div(depth, Mul::pair), whole = depth / Mul::pair;
  int64_t k = 0;
  if (view.k_stride == 1) {
    for (; k + L <= whole; k += L) {
      for (int64_t w = 0; w < padded; w += L) {
        Vec<Word> square[L];
        const int64_t valid = min(width - w, L);
        for (int r = 0; r < L; ++r) square[r] = r < valid ? load_along<Mul>(&view(w + r, k * Mul::pair)) : Vec<Word>{};
        transpose(square);
        if (w + L <= padded) {
          unroll<L>([&](auto r) { store(out + (k + r) * padded + w, square[r]); });
        } else {
          for (int r = 0; r < L; ++r)
            __builtin_memcpy(out + (k + r) * padded + w, &square[r], sizeof(Word) * size_t(padded - w));
        }
      }
    }
  }
  for (; k < words; ++k) {
    Word* row = out + k * padded;
    int64_t w = 0;
    if (view.w_stride == 1 && k < whole) {
      const S* first = &view(0, k * Mul::pair);
      const S* second = Mul::pair == 1 ? first : first + view.k_stride;
      for (; w + L <= width; w += L) store(row + w, load_across<Mul, L>(first + w, second + w));
      for (; w + kRows <= width; w += kRows) store(row + w, load_across<Mul, kRows>(first + w, second + w));
    }
    for (; w < width; ++w) row[w] = word_at<Mul>(view, w, k, depth);
    for (; w < padded; ++w) row[w] = Word{};
  }
}

// How a block of `vectors` lanes vectors is cut into strips of nearly equal width.
struct Strips {
  int64_t vectors;
  int64_t count() const { return ceil_div(vectors, kMaxVectors); }
  int width(int64_t strip) const {
    const int64_t n = count();
    return int(vectors / n + (strip < vectors % n));
  }
};

// Calls f(Index<N>, first vector) for every strip.
template <class F>
MI_INLINE void for_strips(int64_t vectors, F&& f) {
  const Strips strips{vectors};
  int64_t first = 0;
  for (int64_t s = 0; s < strips.count(); ++s) {
    const int n = strips.width(s);
    if (n == 3) f(Index<3>{}, first);
    if (n == 2) f(Index<2>{}, first);
    if (n == 1) f(Index<1>{}, first);
    first += n;
  }
}

// Plane rows [feature][N vectors] of every strip from a matrix whose w runs over the lanes of the block.
template <class Mul, class S>
void pack_lanes(View<S> view, int64_t width, int64_t vectors, int64_t depth, typename Mul::Word* out) {
  constexpr int L = Simd<typename Mul::Word>::lanes;
  const int64_t words = ceil_div(depth, Mul::pair);
  for_strips(vectors, [&](auto n, int64_t first) {
    const int64_t lane = first * L;
    pack<Mul>(view.at(lane, 0), max(min(width - lane, n * L), 0), n * L, depth, out + lane * words);
  });
}

// The reverse of pack_lanes for accumulators: out(lane, feature) = convert(plane) with out[lane * stride + f].
template <class Acc, class S>
void unpack_planes(const Acc* planes, int64_t features, int64_t vectors, int64_t width, S* out, int64_t stride) {
  constexpr int L = Simd<Acc>::lanes;
  for_strips(vectors, [&](auto n, int64_t first) {
    const Acc* plane = planes + first * L * features;
    for (int v = 0; v < n; ++v) {
      const int64_t lane = (first + v) * L, valid = min(width - lane, L);
      int64_t f = 0;
      for (; f + L <= features; f += L) {
        Vec<Acc> square[L];
        unroll<L>([&](auto r) { square[r] = load<Vec<Acc>>(plane + ((f + r) * n + v) * L); });
        transpose(square);
        for (int r = 0; r < valid; ++r) store_acc<L>(out + (lane + r) * stride + f, square[r]);
      }
      for (; f < features; ++f)
        for (int64_t r = 0; r < valid; ++r) from_acc(plane[(f * n + v) * L + r], out[(lane + r) * stride + f]);
    }
  });
}

// Rows whose packed tiles stay in the buffer for one visit of all strips.
inline constexpr int64_t kRowBlock = 128;

// Tiles of rows [begin, end) against one strip. `ahead`: these rows come from memory, and they are too short for
// the hardware to run ahead.
//
// `flatten`: a lambda or an epilogue left out of line would take the tile's address, and its accumulators
// would live in memory.
template <int N, class Mul, class Rows, class Epilogue>
__attribute__((noinline, flatten)) void sweep(const Rows& rows, int64_t begin, int64_t end, bool ahead, int64_t words,
                                              int64_t chain, const typename Mul::Word* strip, int64_t first,
                                              const Epilogue& epilogue) {
  for (int64_t m = begin; m < end; m += kRows) {
    const Rows tile_rows = rows.tile(m - begin, words);
    if (ahead) tile_rows.prefetch_next(words);
    Tile<Mul, N> tile;
    multiply(tile, tile_rows, strip, words, chain);
    epilogue(tile, m, min(end - m, kRows), first);
  }
}

// For every tile of rows [m0, m1) and every strip: epilogue(tile, m, valid rows, first vector).
//
// A row producer has pack_rows(m0, m1, k0, depth, words), which writes the tiles of these rows. One that `copies`
// may also write them one after the other, where they are contiguous along K: that is cheaper by the transposition.
// One that is `direct` may also be read in place, by whole tiles. `all_rows`: of all tasks, where the sums of a row
// must not depend on how many rows its task has.
template <class Mul, class Rows, class Epilogue>
void contract(const Rows& rows, int64_t m0, int64_t m1, int64_t k0, int64_t depth, const typename Mul::Word* lanes,
              int64_t vectors, typename Mul::Word* buffer, const Epilogue& epilogue, int64_t all_rows = 0) {
  using Elem = typename Mul::Elem;
  constexpr int L = Simd<typename Mul::Word>::lanes;
  const int64_t words = ceil_div(depth, Mul::pair);
  const int64_t chain = chain_length<Mul>(words, (all_rows ? all_rows : m1 - m0) < 4 * kRows || vectors == 1);
  const auto visit = [&](const auto& source, int64_t begin, int64_t end, bool in_place) {
    for_strips(vectors, [&](auto n, int64_t first) {
      sweep<n.value, Mul>(source, begin, end, in_place && first == 0, words, chain, lanes + first * L * words, first,
                          epilogue);
    });
  };
  for (int64_t m = m0; m < m1;) {
    const int64_t end = min(m + kRowBlock, m1);
    if constexpr (Rows::direct) {
      if (const int64_t whole = (end - m) / kRows * kRows; whole && rows.in_place_allowed(depth)) {
        visit(rows.in_place(m, k0), m, m + whole, true);
        m += whole;
        continue;
      }
    }
    if constexpr (Rows::copies) {
      if (rows.copy_allowed()) {
        auto* copy = reinterpret_cast<Elem*>(buffer);
        const int64_t stride = words * Mul::pair, missing = ceil_div(end - m, kRows) * kRows - (end - m);
        rows.copy_rows(m, end, k0, depth, copy, stride);
        clear(copy + (end - m) * stride, missing * stride);
        visit(DirectRows<Mul>{copy, stride}, m, end, false);
        m = end;
        continue;
      }
    }
    if constexpr (requires { rows.pack_rows(m, end, k0, depth, buffer); }) {
      rows.pack_rows(m, end, k0, depth, buffer);
      visit(PackedRows<Mul>{buffer}, m, end, false);
    }
    m = end;
  }
}

}  // namespace mi_kernels::MI_ISA
