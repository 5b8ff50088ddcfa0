// The dense interaction as pairs of producers and epilogues on the engine, for one instruction set.
//
//   forward       rows W[(o, outer), inner]   lanes x or z of the batch   epilogue sum over outer, times z or x
//   input_grads   rows W[(i, j), o]           lanes g of the batch        epilogue both reductions of T at once
//   weight_grads  rows g z, generated         lanes x, features           epilogue accumulate
//
// U, V and c join the same accumulators, so each primitive is one pass over its weights.
#include "engine.h"
#include "interaction.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class S>
View<S> rows_view(const Operand& t, int64_t group) {  // w along rows of the batch, k along features
  return {static_cast<const S*>(t.data) + group * t.group, t.row, t.col};
}

template <class F>
void run_tasks(const Execution& execution, int64_t tasks, F&& task) {
  execution.run(
      tasks, execution.workers,
      [](void* context, int64_t t, int64_t worker) { (*static_cast<F*>(context))(t, worker); }, &task);
}

// Hands out aligned pieces of a worker's scratch memory, in the order in which the plan counted them.
struct Arena {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
    return piece;
  }
};

template <class Acc>
void clear(Acc* p, int64_t count) {
  if (count > 0) __builtin_memset(p, 0, size_t(count) * sizeof(Acc));
}

// planes[feature m] += tile row m.
template <class Mul>
struct AddRows {
  typename Mul::Acc* planes;
  int64_t features;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<typename Mul::Acc>;
    constexpr int L = Tile<Mul, N>::lanes;
    auto* plane = planes + first * L * features + m * N * L;
    unroll<kRows>([&](auto r) {
      if (r < valid) {
        unroll<N>([&](auto n) {
          auto* p = plane + (r * N + n) * L;
          store(p, load<V>(p) + tile.acc[r][n]);
        });
      }
    });
  }
};

// y[o] += sum over the outer feature of outer[i] * tile row (o, i).
template <class Mul>
struct ReduceOuter {
  typename Mul::Acc* y;
  const typename Mul::Acc* outer;
  int64_t outputs, extent;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<typename Mul::Acc>;
    constexpr int L = Tile<Mul, N>::lanes;
    auto* yp = y + first * L * outputs;
    const auto* op = outer + first * L * extent;
    int64_t o = m / extent, i = m - o * extent;
    if (valid == kRows && i + kRows <= extent) {
      unroll<N>([&](auto n) {
        auto* p = yp + (o * N + n) * L;
        V even = load<V>(p), odd{};
        unroll<kRows>([&](auto r) {
          (r % 2 ? odd : even) += tile.acc[r][n] * load<V>(op + ((i + r) * N + n) * L);
        });
        store(p, even + odd);
      });
      return;
    }
    unroll<kRows>([&](auto r) {
      if (r < valid) {
        unroll<N>([&](auto n) {
          auto* p = yp + (o * N + n) * L;
          store(p, load<V>(p) + tile.acc[r][n] * load<V>(op + (i * N + n) * L));
        });
        if (++i == extent) i = 0, ++o;
      }
    });
  }
};

// dx[j] += z[i] * T(i, j) and dz[i] += x[j] * T(i, j), from one tile of T.
template <class Mul>
struct ReduceBoth {
  using Acc = typename Mul::Acc;
  Acc *dx, *dz;
  const Acc *x, *z;
  int64_t context, width;
  bool want_x, want_z;
  template <int N>
  MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
    using V = Vec<Acc>;
    constexpr int L = Tile<Mul, N>::lanes;
    const int64_t xs = first * L * width, zs = first * L * context;
    int64_t i = m / width, j = m - i * width;
    const bool whole = valid == kRows && j + kRows <= width;
    if (whole && want_x) {
      unroll<N>([&](auto n) {
        const V zi = load<V>(z + zs + (i * N + n) * L);
        unroll<kRows>([&](auto r) {
          auto* p = dx + xs + ((j + r) * N + n) * L;
          store(p, load<V>(p) + zi * tile.acc[r][n]);
        });
      });
    }
    if (whole && want_z) {
      unroll<N>([&](auto n) {
        auto* p = dz + zs + (i * N + n) * L;
        V even = load<V>(p), odd{};
        unroll<kRows>([&](auto r) {
          (r % 2 ? odd : even) += tile.acc[r][n] * load<V>(x + xs + ((j + r) * N + n) * L);
        });
        store(p, even + odd);
      });
    }
    if (whole) return;
    unroll<kRows>([&](auto r) {
      if (r < valid) {
        unroll<N>([&](auto n) {
          const int64_t xn = xs + (j * N + n) * L, zn = zs + (i * N + n) * L;
          if (want_x) store(dx + xn, load<V>(dx + xn) + load<V>(z + zn) * tile.acc[r][n]);
          if (want_z) store(dz + zn, load<V>(dz + zn) + load<V>(x + xn) * tile.acc[r][n]);
        });
        if (++j == width) j = 0, ++i;
      }
    });
  }
};

// Rows (o, outer) of W; in place where they follow each other in memory.
template <class Mul, class S>
struct WeightRows {
  static constexpr bool direct = kSameElement<Mul, S>;
  const S* data;
  int64_t out_stride, outer_stride, inner_stride, extent;
  View<S> row(int64_t m, int64_t k) const {
    const int64_t o = m / extent, i = m - o * extent;
    return {data + o * out_stride + i * outer_stride + k * inner_stride, outer_stride, inner_stride};
  }
  bool in_place_allowed() const { return inner_stride == 1 && outer_stride * extent == out_stride; }
  MI_INLINE DirectRows<Mul> in_place(int64_t m, int64_t k) const
    requires direct
  {
    return {data + m * outer_stride + k, outer_stride};
  }
  void pack_tile(int64_t m, int64_t valid, int64_t k0, int64_t depth, typename Mul::Word* out) const {
    const int64_t words = ceil_div(depth, Mul::pair);
    if (m / extent == (m + valid - 1) / extent) {
      pack<Mul>(row(m, k0), valid, kRows, depth, out);
      return;
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const View<S> one = r < valid ? row(m + r, k0) : View<S>{};
      for (int64_t k = 0; k < words; ++k)
        out[k * kRows + r] = r < valid ? word_at<Mul>(one, 0, k, depth) : typename Mul::Word{};
    }
  }
};

template <class Mul, class S>
class Forward {
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  using Plain = typename AccMul<Mul>::type;
  static constexpr int L = Simd<Acc>::lanes;

  const ForwardCall& call;
  const ForwardPlan& plan;
  const Execution& execution;
  const Problem& p = call.problem;
  const bool width_inside = plan.order == Order::width_inside;
  const int64_t inner = width_inside ? p.width : p.context;
  const int64_t outer = width_inside ? p.context : p.width;
  const Operand &inner_operand = width_inside ? call.x : call.z, &outer_operand = width_inside ? call.z : call.x;
  const Operand &inner_matrix = width_inside ? call.weight_x : call.weight_z;
  const Operand &outer_matrix = width_inside ? call.weight_z : call.weight_x;

 public:
  Forward(const ForwardCall& c, const ForwardPlan& f, const Execution& e) : call(c), plan(f), execution(e) {}

  void run() {
    run_tasks(execution, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    if (plan.outer_splits > 1) add_partials();
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t split = t % plan.outer_splits, block = t / plan.outer_splits;
    const int64_t o0 = block % plan.out_blocks * plan.out_step, lane_task = block / plan.out_blocks;
    const int64_t lane0 = lane_task % plan.lane_blocks * plan.vectors * L, group = lane_task / plan.lane_blocks;
    const int64_t outputs = min(plan.out_step, p.out - o0), width = min(plan.vectors * L, p.rows - lane0);
    const int64_t vectors = ceil_div(width, L);

    Arena arena{execution.scratch + worker * plan.worker_bytes};
    auto* rows = arena.take<Word>(kRowBlock * ceil_div(plan.depth, Mul::pair));
    auto* lanes = arena.take<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* y = arena.take<Acc>(plan.out_step * plan.vectors * L);
    auto* factors = arena.take<Acc>(plan.outer_step * plan.vectors * L);

    start(y, group, o0, outputs, vectors, split == 0);
    const AddRows<Mul> add{y, outputs};
    const auto inner_view = rows_view<S>(inner_operand, group), outer_view = rows_view<S>(outer_operand, group);
    const int64_t i0 = split * plan.outer_step, extent = min(plan.outer_step, outer - i0);
    if (call.weight.data && extent > 0)
      pack_lanes<Plain>(outer_view.at(lane0, i0), width, vectors, extent, factors);
    for (int64_t k0 = 0; k0 < inner; k0 += plan.depth) {
      const int64_t depth = min(plan.depth, inner - k0);
      pack_lanes<Mul>(inner_view.at(lane0, k0), width, vectors, depth, lanes);
      if (call.weight.data) product(group, o0, outputs, i0, extent, k0, depth, lanes, vectors, rows, y, factors);
      if (inner_matrix.data && split == 0)
        contract<Mul>(matrix(inner_matrix, group, o0), 0, outputs, k0, depth, lanes, vectors, rows, add);
    }
    if (outer_matrix.data && split == 0) {
      for (int64_t k0 = 0; k0 < outer; k0 += plan.depth) {
        const int64_t depth = min(plan.depth, outer - k0);
        pack_lanes<Mul>(outer_view.at(lane0, k0), width, vectors, depth, lanes);
        contract<Mul>(matrix(outer_matrix, group, o0), 0, outputs, k0, depth, lanes, vectors, rows, add);
      }
    }
    const int64_t offset = (group * p.rows + lane0) * p.out + o0;
    if (plan.outer_splits > 1) {
      auto* partial = reinterpret_cast<Acc*>(execution.partials) + split * p.groups * p.rows * p.out;
      unpack_planes(y, outputs, vectors, width, partial + offset, p.out);
    } else {
      unpack_planes(y, outputs, vectors, width, static_cast<S*>(call.y.data) + offset, p.out);
    }
  }

  void start(Acc* y, int64_t group, int64_t o0, int64_t outputs, int64_t vectors, bool with_bias) const {
    clear(y, outputs * vectors * L);
    if (!with_bias || !call.bias.data) return;
    const S* bias = static_cast<const S*>(call.bias.data) + group * call.bias.group;
    for_strips(vectors, [&](auto n, int64_t first) {
      Acc* plane = y + first * L * outputs;
      for (int64_t o = 0; o < outputs; ++o)
        for (int l = 0; l < n * L; ++l) plane[o * n * L + l] = to_acc(bias[(o0 + o) * call.bias.row]);
    });
  }

  MatrixRows<Mul, S> matrix(const Operand& m, int64_t group, int64_t o0) const {
    return {{static_cast<const S*>(m.data) + group * m.group + o0 * m.row, m.row, m.col}};
  }

  void product(int64_t group, int64_t o0, int64_t outputs, int64_t i0, int64_t extent, int64_t k0, int64_t depth,
               const Word* lanes, int64_t vectors, Word* rows, Acc* y, const Acc* factors) const {
    const int64_t outer_stride = width_inside ? p.width : 1, inner_stride = width_inside ? 1 : p.width;
    const S* data = static_cast<const S*>(call.weight.data) + group * call.weight.group +
                    o0 * p.context * p.width + i0 * outer_stride;
    const WeightRows<Mul, S> all{data, p.context * p.width, outer_stride, inner_stride, extent};
    const ReduceOuter<Mul> reduce{y, factors, outputs, extent};
    contract<Mul>(all, 0, outputs * extent, k0, depth, lanes, vectors, rows, reduce);
  }

  void add_partials() const {
    const Acc* partials = reinterpret_cast<const Acc*>(execution.partials);
    sum_splits<S>(execution, partials, plan.outer_splits, p.groups * p.rows * p.out, static_cast<S*>(call.y.data));
  }

 public:
  // out[e] = sum over splits of partials[split][e], in the order of the splits.
  template <class Out>
  static void sum_splits(const Execution& execution, const Acc* partials, int64_t splits, int64_t count, Out* out) {
    constexpr int64_t kChunk = 4096;
    run_tasks(execution, ceil_div(count, kChunk), [=](int64_t chunk, int64_t) {
      for (int64_t e = chunk * kChunk; e < min(count, (chunk + 1) * kChunk); ++e) {
        Acc sum = partials[e];
        for (int64_t s = 1; s < splits; ++s) sum += partials[s * count + e];
        from_acc(sum, out[e]);
      }
    });
  }
};

template <class Mul, class S>
class InputGrads {
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  using Plain = typename AccMul<Mul>::type;
  static constexpr int L = Simd<Acc>::lanes;

  const InputGradsCall& call;
  const InputGradsPlan& plan;
  const Execution& execution;
  const Problem& p = call.problem;
  const bool want_x = call.dx.data != nullptr, want_z = call.dz.data != nullptr;

  struct Range {
    int64_t begin, size;
  };

 public:
  InputGrads(const InputGradsCall& c, const InputGradsPlan& d, const Execution& e)
      : call(c), plan(d), execution(e) {}

  void run() {
    run_tasks(execution, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    auto* partials = reinterpret_cast<Acc*>(execution.partials);
    const int64_t rows = p.groups * p.rows;
    if (want_x && plan.context_splits > 1)
      Forward<Mul, S>::sum_splits(execution, partials, plan.context_splits, rows * p.width,
                                  static_cast<S*>(call.dx.data));
    if (want_z && plan.width_splits > 1)
      Forward<Mul, S>::sum_splits(execution, z_partials(), plan.width_splits, rows * p.context,
                                  static_cast<S*>(call.dz.data));
  }

 private:
  Acc* z_partials() const {
    auto* partials = reinterpret_cast<Acc*>(execution.partials);
    return partials + (want_x && plan.context_splits > 1 ? plan.context_splits * p.groups * p.rows * p.width : 0);
  }

  void task(int64_t t, int64_t worker) const {
    const int64_t width_split = t % plan.width_splits, rest = t / plan.width_splits;
    const int64_t context_split = rest % plan.context_splits, lane_task = rest / plan.context_splits;
    const int64_t lane0 = lane_task % plan.lane_blocks * plan.vectors * L, group = lane_task / plan.lane_blocks;
    const int64_t lane_count = min(plan.vectors * L, p.rows - lane0), vectors = ceil_div(lane_count, L);
    const Range context{context_split * plan.context_step,
                        min(plan.context_step, p.context - context_split * plan.context_step)};
    const Range width{width_split * plan.width_step, min(plan.width_step, p.width - width_split * plan.width_step)};

    Arena arena{execution.scratch + worker * plan.worker_bytes};
    auto* rows = arena.take<Word>(kRowBlock * ceil_div(plan.depth, Mul::pair));
    auto* lanes = arena.take<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* z = arena.take<Acc>(plan.context_step * plan.vectors * L);
    auto* dz = arena.take<Acc>(plan.context_step * plan.vectors * L);
    auto* x = arena.take<Acc>(plan.width_step * plan.vectors * L);
    auto* dx = arena.take<Acc>(plan.width_step * plan.vectors * L);
    clear(dz, context.size * vectors * L);
    clear(dx, width.size * vectors * L);
    if (call.weight.data && want_x)
      pack_lanes<Plain>(rows_view<S>(call.z, group).at(lane0, context.begin), lane_count, vectors, context.size, z);
    if (call.weight.data && want_z)
      pack_lanes<Plain>(rows_view<S>(call.x, group).at(lane0, width.begin), lane_count, vectors, width.size, x);

    const ReduceBoth<Mul> both{dx, dz, x, z, context.size, width.size, want_x, want_z};
    for (int64_t o0 = 0; o0 < p.out; o0 += plan.depth) {
      const int64_t depth = min(plan.depth, p.out - o0);
      pack_lanes<Mul>(rows_view<S>(call.grad, group).at(lane0, o0), lane_count, vectors, depth, lanes);
      if (call.weight.data) product(group, context, width, o0, depth, lanes, vectors, rows, both);
      if (want_x && call.weight_x.data && context_split == 0)
        contract<Mul>(columns(call.weight_x, group, o0, width.begin), 0, width.size, 0, depth, lanes, vectors, rows,
                      AddRows<Mul>{dx, width.size});
      if (want_z && call.weight_z.data && width_split == 0)
        contract<Mul>(columns(call.weight_z, group, o0, context.begin), 0, context.size, 0, depth, lanes, vectors,
                      rows, AddRows<Mul>{dz, context.size});
    }
    const int64_t row0 = group * p.rows + lane0, batch = p.groups * p.rows;
    auto* x_partials = reinterpret_cast<Acc*>(execution.partials) + context_split * batch * p.width;
    if (want_x)
      write(dx, width, p.width, vectors, lane_count, row0, call.dx.data, plan.context_splits, x_partials);
    if (want_z)
      write(dz, context, p.context, vectors, lane_count, row0, call.dz.data, plan.width_splits,
            z_partials() + width_split * batch * p.context);
  }

  void product(int64_t group, Range context, Range width, int64_t o0, int64_t depth, const Word* lanes,
               int64_t vectors, Word* buffer, const ReduceBoth<Mul>& both) const {
    // Row (i, j) along o: neighbours in j are neighbours in memory, so packing copies whole vectors.
    const S* data = static_cast<const S*>(call.weight.data) + group * call.weight.group +
                    o0 * p.context * p.width + context.begin * p.width + width.begin;
    const View<S> view{data, 1, p.context * p.width};
    if (width.size == p.width) {
      contract<Mul>(MatrixRows<Mul, S>{view}, 0, context.size * width.size, 0, depth, lanes, vectors, buffer,
                    both);
      return;
    }
    for (int64_t i = 0; i < context.size; ++i) {
      const MatrixRows<Mul, S> one{view.at(i * p.width, 0)};
      contract<Mul>(one, 0, width.size, 0, depth, lanes, vectors, buffer, ShiftedEpilogue{both, i * width.size});
    }
  }

  struct ShiftedEpilogue {
    const ReduceBoth<Mul>& both;
    int64_t shift;
    template <int N>
    MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
      both(tile, m + shift, valid, first);
    }
  };

  MatrixRows<Mul, S> columns(const Operand& m, int64_t group, int64_t o0, int64_t column) const {
    return {{static_cast<const S*>(m.data) + group * m.group + o0 * m.row + column * m.col, m.col, m.row}};
  }

  void write(const Acc* planes, Range range, int64_t features, int64_t vectors, int64_t lane_count, int64_t row0,
             void* out, int64_t splits, Acc* partial) const {
    const int64_t offset = row0 * features + range.begin;
    if (splits > 1)
      unpack_planes(planes, range.size, vectors, lane_count, partial + offset, features);
    else
      unpack_planes(planes, range.size, vectors, lane_count, static_cast<S*>(out) + offset, features);
  }
};

// Rows (o, f) = g[b, o] * factor[b, f] along the batch, made a tile at a time.
template <class Mul, class S>
struct ProductRows {
  static constexpr bool direct = false;
  View<S> grad, factor;  // w along features, k along the batch
  int64_t extent;

  MI_INLINE typename Mul::Acc value(int64_t o, int64_t f, int64_t k) const {
    return to_acc(grad(o, k)) * to_acc(factor(f, k));
  }
  void pack_tile(int64_t m, int64_t valid, int64_t k0, int64_t depth, typename Mul::Word* out) const {
    const int64_t words = ceil_div(depth, Mul::pair);
    const int64_t o = m / extent, f = m - o * extent;
    const bool whole = valid == kRows && f + kRows <= extent && factor.w_stride == 1;
    for (int64_t k = 0; k < words; ++k) {
      const int64_t b = k0 + k * Mul::pair;
      const bool both = Mul::pair == 2 && k * Mul::pair + 1 < depth;
      if (whole) {
        const typename Mul::Acc g = to_acc(grad(o, b)), h = both ? to_acc(grad(o, b + 1)) : 0;
        const S *first = &factor(f, b), *second = both ? &factor(f, b + 1) : first;
        for (int r = 0; r < kRows; ++r)
          out[k * kRows + r] = make_word<Mul>(g * to_acc(first[r]), both ? h * to_acc(second[r]) : 0);
        continue;
      }
      int64_t ro = o, rf = f;
      for (int64_t r = 0; r < kRows; ++r) {
        typename Mul::Word word{};
        if (r < valid) word = make_word<Mul>(value(ro, rf, b), both ? value(ro, rf, b + 1) : 0);
        out[k * kRows + r] = word;
        if (++rf == extent) rf = 0, ++ro;
      }
    }
  }
};

// A single row of ones: its product with lanes is the sum over the batch.
template <class Mul>
struct OneRow {
  static constexpr bool direct = false;
  void pack_tile(int64_t, int64_t, int64_t, int64_t depth, typename Mul::Word* out) const {
    const int64_t words = ceil_div(depth, Mul::pair);
    for (int64_t k = 0; k < words; ++k) {
      for (int r = 0; r < kRows; ++r) out[k * kRows + r] = typename Mul::Word{};
      out[k * kRows] = make_word<Mul>(1, k * Mul::pair + 1 < depth ? 1 : 0);
    }
  }
};

template <class Mul, class S>
class WeightGrads {
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  static constexpr int L = Simd<Acc>::lanes;

  const WeightGradsCall& call;
  const WeightGradsPlan& plan;
  const Execution& execution;
  const Problem& p = call.problem;

  // Where a result lies: row m = (o, f) and lane l at o * out + f * feature + l * lane.
  struct Layout {
    int64_t extent, out, feature, lane;
  };

 public:
  WeightGrads(const WeightGradsCall& c, const WeightGradsPlan& w, const Execution& e)
      : call(c), plan(w), execution(e) {}

  void run() {
    const bool swap = plan.context_lanes;
    const int64_t zx = p.context * p.width;
    if (call.weight.data) {
      const Operand &factor = swap ? call.x : call.z, &lanes = swap ? call.z : call.x;
      const int64_t extent = swap ? p.width : p.context;
      const Layout layout{extent, zx, swap ? 1 : p.width, swap ? p.width : 1};
      region(plan.weight, p.out * extent, lanes, swap ? p.context : p.width, call.weight, p.out * zx, layout,
             [&](int64_t g) { return ProductRows<Mul, S>{along_batch(call.grad, g), along_batch(factor, g), extent}; });
    }
    if (call.weight_z.data)
      region(plan.weight_z, p.out, call.z, p.context, call.weight_z, p.out * p.context, {1, p.context, 0, 1},
             [&](int64_t g) { return MatrixRows<Mul, S>{along_batch(call.grad, g)}; });
    if (call.weight_x.data)
      region(plan.weight_x, p.out, call.x, p.width, call.weight_x, p.out * p.width, {1, p.width, 0, 1},
             [&](int64_t g) { return MatrixRows<Mul, S>{along_batch(call.grad, g)}; });
    if (call.bias.data)
      region(plan.bias, 1, call.grad, p.out, call.bias, p.out, {1, 0, 0, 1}, [](int64_t) { return OneRow<Mul>{}; });
  }

 private:
  static View<S> along_batch(const Operand& t, int64_t group) {
    return {static_cast<const S*>(t.data) + group * t.group, t.col, t.row};
  }

  // result[m, l] = sum_b rows(m, b) * lanes(l, b), cut into regions that are accumulated in scratch.
  template <class MakeRows>
  void region(const RegionPlan& r, int64_t rows, const Operand& lanes, int64_t lane_count, const Result& result,
              int64_t group_size, Layout layout, const MakeRows& make_rows) const {
    run_tasks(execution, r.tasks, [&](int64_t t, int64_t worker) {
      const int64_t split = t % r.batch_splits, block = t / r.batch_splits;
      const int64_t l0 = block % r.lane_blocks * r.vectors * L, row_task = block / r.lane_blocks;
      const int64_t m0 = row_task % r.row_blocks * r.row_step, group = row_task / r.row_blocks;
      const int64_t m1 = min(m0 + r.row_step, rows), width = min(r.vectors * L, lane_count - l0);
      const int64_t vectors = ceil_div(width, L);
      Arena arena{execution.scratch + worker * plan.worker_bytes};
      auto* row_buffer = arena.take<Word>(kRowBlock * ceil_div(r.depth, Mul::pair));
      auto* lane_buffer = arena.take<Word>(ceil_div(r.depth, Mul::pair) * r.vectors * L);
      auto* planes = arena.take<Acc>(r.row_step * r.vectors * L);
      clear(planes, (m1 - m0) * vectors * L);
      const auto view = along_batch(lanes, group);
      const auto producer = make_rows(group);
      const Shifted shifted{{planes, m1 - m0}, m0};
      const int64_t batch_end = min((split + 1) * r.batch_step, p.rows);
      for (int64_t b = split * r.batch_step; b < batch_end; b += r.depth) {
        const int64_t depth = min(r.depth, batch_end - b);
        pack_lanes<Mul>(view.at(l0, b), width, vectors, depth, lane_buffer);
        contract<Mul>(producer, m0, m1, b, depth, lane_buffer, vectors, row_buffer, shifted);
      }
      if (r.batch_splits > 1) {
        auto* partial = reinterpret_cast<Acc*>(execution.partials) + (split * p.groups + group) * group_size;
        write(planes, m0, m1, l0, vectors, width, partial, layout);
      } else {
        write(planes, m0, m1, l0, vectors, width, static_cast<S*>(result.data) + group * group_size, layout);
      }
    });
    if (r.batch_splits > 1)
      Forward<Mul, S>::sum_splits(execution, reinterpret_cast<const Acc*>(execution.partials), r.batch_splits,
                                  p.groups * group_size, static_cast<S*>(result.data));
  }

  struct Shifted {
    AddRows<Mul> add;
    int64_t shift;
    template <int N>
    MI_INLINE void operator()(const Tile<Mul, N>& tile, int64_t m, int64_t valid, int64_t first) const {
      add(tile, m - shift, valid, first);
    }
  };

  template <class Out>
  static void write(const Acc* planes, int64_t m0, int64_t m1, int64_t l0, int64_t vectors, int64_t width, Out* out,
                    Layout layout) {
    for_strips(vectors, [&](auto n, int64_t first) {
      const Acc* strip = planes + first * L * (m1 - m0);
      for (int64_t m = m0; m < m1; ++m) {
        const int64_t o = m / layout.extent, f = m - o * layout.extent;
        for (int v = 0; v < n; ++v) {
          const int64_t lane = (first + v) * L, valid = min(width - lane, L);
          const Acc* plane = strip + ((m - m0) * n + v) * L;
          Out* to = out + o * layout.out + f * layout.feature + (l0 + lane) * layout.lane;
          if (valid == L && layout.lane == 1) {
            store_acc(to, load<Vec<Acc>>(plane));
          } else {
            for (int64_t l = 0; l < valid; ++l) from_acc(plane[l], to[l * layout.lane]);
          }
        }
      }
    });
  }
};

// How storage S is multiplied on this instruction set.
template <class S>
struct MulOf {
  using type = MulF32;
};
template <>
struct MulOf<double> {
  using type = MulF64;
};
#if defined(__AVX512BF16__)
template <>
struct MulOf<BFloat16> {
  using type = MulBF16;
};
#endif

template <class F>
void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
  }
}

template <template <class, class> class Family, class Call, class Plan>
void run_family(DType dtype, const Call& call, const Plan& plan, const Execution& execution) {
  for_dtype(dtype, [&](auto s) { Family<typename MulOf<decltype(s)>::type, decltype(s)>(call, plan, execution).run(); });
}

Machine machine(DType dtype) {
  Machine m{};
  for_dtype(dtype, [&](auto s) {
    using Mul = typename MulOf<decltype(s)>::type;
    m = {Simd<typename Mul::Acc>::lanes, Mul::pair, sizeof(typename Mul::Word), sizeof(typename Mul::Acc)};
  });
  return m;
}

}  // namespace

const Kernels kernels = {machine, run_family<Forward>, run_family<InputGrads>, run_family<WeightGrads>};

}  // namespace mi_kernels::MI_ISA
