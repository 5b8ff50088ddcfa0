// Products of a few rows with the matrices of a multiplicative RNN, which stay packed over all steps.
#pragma once

#include "cpu/engine/epilogues.h"
#include "cpu/kernels/family.h"
#include "cpu/kernels/recurrent_call.h"

namespace mi_kernels::MI_ISA {

template <class Mul, class S>
struct RecurrentProducts {
  using Word = typename Mul::Word;
  using Elem = typename Mul::Elem;
  using Acc = typename Mul::Acc;
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;
  // Words of one summation block. PyTorch computes narrow products as dot products, whose sums are more exact.
  template <int N>
  static constexpr int64_t kSumWords = N == 1 ? 16 : 64;

  const RecurrentCall& call;
  const RecurrentPlan& plan;
  const Executor& executor;

  Word* words(const RecurrentMatrix& m) const { return reinterpret_cast<Word*>(executor.partials + m.offset); }

  struct Panel {
    int64_t first, vectors;
  };
  // Wide and narrow ones take turns, so that any number of threads has nearly equal shares.
  static Panel panel_of(const RecurrentMatrix& m, int64_t p) {
    const int64_t n = panels(m), first = p * m.vectors / n;
    return {first, (p + 1) * m.vectors / n - first};
  }
  static int64_t panels(const RecurrentMatrix& m) { return PanelSplit{m.vectors}.count(); }
  const Word* panel_words(const RecurrentMatrix& m, const Panel& p, int64_t gate) const {
    return words(m) + (p.first * m.gates + gate * p.vectors) * L * m.words * m.outer;
  }

  // Unit u of gate g multiplies elements view(g * units + u, k), and those of matrix j at j * outer_stride.
  void pack_matrix(const RecurrentMatrix& m, View<S> view, int64_t outer_stride) const {
    if (m.vectors == 0) return;
    run_tasks(executor, panels(m), [&](int64_t task, int64_t) {
      const Panel p = panel_of(m, task);
      const int64_t lanes = p.vectors * L, count = max(min(m.units - p.first * L, lanes), 0);
      for (int64_t g = 0; g < m.gates; ++g) {
        Word* to = words(m) + (p.first * m.gates + g * p.vectors) * L * m.words * m.outer;
        for (int64_t j = 0; j < m.outer; ++j, to += lanes * m.words) {
          if (m.depth == 0) {
            clear(to, lanes * m.words);
            continue;
          }
          const View<S> from = view.at(g * m.units + p.first * L, 0);
          if (m.outer > 1 && outer_stride == 1 && count > 0) {
            pack_outer(from, count, lanes, m, to);
            break;
          }
          pack<Mul>(View<S>{from.data + j * outer_stride, from.mn_stride, from.k_stride}, count, lanes, m.depth, to);
        }
      }
    });
  }
  // The same for matrices whose elements lie beside each other, [outer][words][lanes]: for each k, all of them are
  // transposed together. Words of two elements along K are joined of words along j.
  static void pack_outer(const View<S>& view, int64_t count, int64_t lanes, const RecurrentMatrix& m, Word* out) {
    constexpr int64_t kColumns = 64 * Mul::pair;
    Word columns[Mul::pair][kColumns / Mul::pair * kMaxPanelVectors * L];
    for (int64_t j0 = 0; j0 < m.outer; j0 += kColumns) {
      const int64_t width = min(kColumns, m.outer - j0);
      for (int64_t w = 0; w < m.words; ++w) {
        for (int64_t e = 0; e < Mul::pair; ++e) {
          const int64_t k = w * Mul::pair + e;
          if (k < m.depth)
            pack<Mul>(View<S>{view.data + k * view.k_stride + j0, view.mn_stride, 1}, count, lanes, width, columns[e]);
          else
            clear(columns[e], ceil_div(width, Mul::pair) * lanes);
        }
        for (int64_t j = 0; j < width; ++j) {
          Word* to = out + ((j0 + j) * m.words + w) * lanes;
          const int64_t from = j / Mul::pair * lanes;
          for (int64_t lane = 0; lane < lanes; lane += L) {
            const auto first = load<Vec<Word>>(columns[0] + from + lane);
            if constexpr (Mul::pair == 1) {
              store(to + lane, first);
            } else {
              const auto second = load<Vec<Word>>(columns[1] + from + lane);
              store(to + lane, j % 2 ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16);
            }
          }
        }
      }
    }
  }

  void pack_weights() const {
    for (const RecurrentMatrix& m : plan.matrix) {
      const auto* data = static_cast<const S*>(m.weight.data);
      if (!m.in_place) pack_matrix(m, View<S>{data, m.weight.row, m.weight.col}, m.weight.group);
    }
  }

  // The features of x by which the matrices of a dense form are multiplied; absent if x is null.
  struct Scale {
    const S* x = nullptr;  // of one step
    const int64_t* row_of = nullptr;
    int64_t first = 0, features = 0;
    MI_INLINE Acc operator()(int64_t r, int64_t j) const {
      const int64_t row = row_of ? row_of[first + r] : first + r;
      return to_acc(x[row * features + j]);
    }
  };

  // out[r][vectors], of R rows of the operand and a panel.
  template <int R, int N, bool kScaled>
  static MI_INLINE void row_tile(const Elem* a, int64_t stride, const Word* b, int64_t words, int64_t block,
                                 int64_t outer, const Scale& scale, int64_t r0, Acc* out, bool add) {
    for (int64_t j = 0; j < outer; ++j, b += words * N * L) {
      V factor[R] = {};
      if constexpr (kScaled) unroll<R>([&](auto r) MI_INLINED { factor[r] += scale(r0 + r, j); });
      for (int64_t k = 0; k < words; k += block) {
        const int64_t end = min(k + block, words);
        V acc[R][N];
        unroll<R>([&](auto r) MI_INLINED { unroll<N>([&](auto n) MI_INLINED { acc[r][n] = V{}; }); });
        for (int64_t w = k; w < end; ++w) {
          Vec<Word> lanes[N];
          unroll<N>([&](auto n) MI_INLINED { lanes[n] = load<Vec<Word>>(b + w * N * L + n * L); });
          unroll<R>([&](auto r) MI_INLINED {
            const auto word = load<Word>(a + r * stride + w * Mul::pair);
            unroll<N>([&](auto n) MI_INLINED { Mul::fma(acc[r][n], word, lanes[n]); });
          });
        }
        unroll<R>([&](auto r) MI_INLINED {
          unroll<N>([&](auto n) MI_INLINED {
            Acc* p = out + (r * N + n) * L;
            const V value = kScaled ? acc[r][n] * factor[r] : acc[r][n];
            store(p, add ? load<V>(p) + value : value);
          });
        });
        add = true;
      }
    }
  }

  template <int N, bool kScaled>
  static __attribute__((noinline)) void panel_product(const Elem* a, int64_t stride, int64_t rows, const Word* b,
                                                      int64_t words, int64_t outer, const Scale& scale, Acc* out,
                                                      bool add) {
    const int64_t block = ceil_div(words, max((words + kSumWords<N> / 2) / kSumWords<N>, 1));
    int64_t r = 0;
    for (; r + kTileM <= rows; r += kTileM)
      row_tile<kTileM, N, kScaled>(a + r * stride, stride, b, words, block, outer, scale, r, out + r * N * L, add);
    if constexpr (kTileM > 4)
      for (; r + 4 <= rows; r += 4)
        row_tile<4, N, kScaled>(a + r * stride, stride, b, words, block, outer, scale, r, out + r * N * L, add);
    for (; r + 2 <= rows; r += 2)
      row_tile<2, N, kScaled>(a + r * stride, stride, b, words, block, outer, scale, r, out + r * N * L, add);
    for (; r < rows; ++r)
      row_tile<1, N, kScaled>(a + r * stride, stride, b, words, block, outer, scale, r, out + r * N * L, add);
  }

  // The sums of R rows and 4 units of a matrix that is contiguous along the depth.
  template <int R>
  static MI_INLINE void dot_tile(const Elem* a, int64_t stride, const Elem* b, int64_t unit_stride, int64_t valid,
                                 int64_t depth, Acc* out, int64_t out_stride, bool add) {
    constexpr int64_t step = L * Mul::pair;
    const Elem* unit[4];
    for (int64_t u = 0; u < 4; ++u) unit[u] = b + min(u, valid - 1) * unit_stride;
    V acc[R][4];
    unroll<R>([&](auto r) MI_INLINED { unroll<4>([&](auto u) MI_INLINED { acc[r][u] = V{}; }); });
    const auto multiply_add = [&](int64_t k, auto&& words_of) {
      Vec<Word> left[R];
      unroll<R>([&](auto r) MI_INLINED { left[r] = load<Vec<Word>>(a + r * stride + k); });
      unroll<4>([&](auto u) MI_INLINED {
        const Vec<Word> right = words_of(unit[u] + k);
        unroll<R>([&](auto r) MI_INLINED { Mul::fma(acc[r][u], left[r], right); });
      });
    };
    int64_t k = 0;
    for (; k + step <= depth; k += step) multiply_add(k, [](const Elem* p) { return load<Vec<Word>>(p); });
    if (k < depth)
      multiply_add(k, [&](const Elem* p) {
        Elem rest[step] = {};
        __builtin_memcpy(rest, p, size_t(depth - k) * sizeof(Elem));
        return load<Vec<Word>>(rest);
      });
    for (int r = 0; r < R; ++r)
      for (int64_t u = 0; u < valid; ++u) {
        Acc& sum = out[r * out_stride + u];
        sum = (add ? sum : Acc{}) + sum_lanes(acc[r][u]);
      }
  }

  static void dot_product(const Elem* a, int64_t stride, int64_t rows, const Elem* b, int64_t unit_stride,
                          int64_t units, int64_t lanes, int64_t depth, Acc* out, bool add) {
    for (int64_t u = 0; u < units; u += 4, b += 4 * unit_stride) {
      const int64_t valid = min(units - u, 4);
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4)
        dot_tile<4>(a + r * stride, stride, b, unit_stride, valid, depth, out + r * lanes + u, lanes, add);
      for (; r < rows; ++r)
        dot_tile<1>(a + r * stride, stride, b, unit_stride, valid, depth, out + r * lanes + u, lanes, add);
    }
    for (int64_t r = 0; r < rows && !add; ++r)  // lanes behind the last unit
      clear(out + r * lanes + max(units, 0), lanes - max(units, 0));
  }

  // sums[gate][rows][vectors of the panel] = or += the product of rows of the operand.
  void product(const RecurrentMatrix& m, const Panel& p, const Elem* a, int64_t stride, int64_t rows,
               const Scale& scale, Acc* sums, int64_t gate_stride, bool add) const {
    if (m.outer == 0) {
      for (int64_t g = 0; g < m.gates && !add; ++g) clear(sums + g * gate_stride, rows * p.vectors * L);
      return;
    }
    for (int64_t g = 0; g < m.gates; ++g) {
      Acc* out = sums + g * gate_stride;
      if constexpr (kSameElement<Mul, S>)
        if (m.in_place) {
          const int64_t lane = p.first * L, lanes = p.vectors * L;
          const auto* b = static_cast<const Elem*>(m.weight.data) + (g * m.units + lane) * m.weight.row;
          dot_product(a, stride, rows, b, m.weight.row, min(m.units - lane, lanes), lanes, m.depth, out, add);
          continue;
        }
      const Word* b = panel_words(m, p, g);
      unroll<kMaxPanelVectors>([&](auto n) MI_INLINED {
        constexpr int N = n + 1;
        if (p.vectors != N) return;
        if (scale.x)
          panel_product<N, true>(a, stride, rows, b, m.words, m.outer, scale, out, add);
        else
          panel_product<N, false>(a, stride, rows, b, m.words, m.outer, scale, out, add);
      });
    }
  }
};

}  // namespace mi_kernels::MI_ISA
