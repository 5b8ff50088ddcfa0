// Products without W, y[b, o] = sum_k in[b, k] M[o, k]: U z + V x, the gradients through them, and the gates made of
// them. The outputs lie in the lanes and rows of the batch are read in place (or copied as they are multiplied, where
// dtype or strides want it), so a finished sum is stored as it is and a gate meets x where that lies; with the batch in
// the lanes both would have to be transposed.
#include "cpu/engine/epilogues.h"
#include "cpu/engine/producers.h"
#include "cpu/engine/vector_activations.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
class Linear {
  using Word = typename Mul::Word;
  using Acc = typename Mul::Acc;
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;

  const LinearCall& call;
  const LinearPlan& plan;
  const Execution& execution;

  struct Block {  // rows and lanes of one task, and its memory
    int64_t group, row0, rows, lane0, width, vectors;
    Word *buffer, *lanes;
  };

 public:
  Linear(const LinearCall& c, const LinearPlan& l, const Execution& e) : call(c), plan(l), execution(e) {}

  void run() {
    run_tasks(execution, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t row_task = t / plan.lane_blocks;
    Block b{};
    b.group = row_task / plan.row_blocks;
    b.row0 = row_task % plan.row_blocks * plan.row_step, b.rows = min(plan.row_step, call.rows - b.row0);
    b.lane0 = t % plan.lane_blocks * plan.vectors * L, b.width = min(plan.vectors * L, call.out - b.lane0);
    b.vectors = ceil_div(b.width, L);
    Arena arena{execution.scratch + worker * plan.worker_bytes};
    b.buffer = arena.take<Word>(kRowBlock * ceil_div(plan.depth, Mul::pair));
    b.lanes = arena.take<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    const Acc* bias = bias_lanes(call.bias, b, arena);
    const Acc* shift_bias = bias_lanes(call.gate.shift_bias, b, arena);
    auto* planes = plan.kept ? arena.take<Acc>(plan.row_step * plan.vectors * L) : nullptr;
    auto* shifts = call.shift.rows.data ? arena.take<Acc>(plan.row_step * plan.vectors * L) : nullptr;

    S* out = static_cast<S*>(call.y.data) + (b.group * call.rows + b.row0) * call.out + b.lane0;

    bool fresh = true;
    if (shifts) add(b, call.shift, call.shift.depth, shifts, fresh);
    fresh = true;
    const LinearTerm& last = call.terms[call.terms[1].rows.data ? 1 : 0];
    if (&last != call.terms) add(b, call.terms[0], call.terms[0].depth, planes, fresh);
    if (call.gate.present) {
      add(b, last, last.depth, planes, fresh);
      for_activation<VectorMath>(call.gate.activation,
                                 [&](auto act) { gate(act, b, planes, shifts, bias, shift_bias, out); });
      return;
    }
    const int64_t before = (last.depth - 1) / plan.depth * plan.depth;
    add(b, last, before, planes, fresh);
    stretch(b, last, before, StoreSums<Mul, S>{out, call.out, b.width, bias, fresh ? nullptr : planes, b.rows});
  }

  // planes += the first `depth` elements of a term's sums, or = where they are fresh.
  void add(const Block& b, const LinearTerm& term, int64_t depth, Acc* planes, bool& fresh) const {
    for (int64_t k0 = 0; k0 < depth; k0 += plan.depth, fresh = false)
      stretch(b, term, k0, AddRows<Mul>{planes, b.rows, fresh});
  }

  template <class Epilogue>
  void stretch(const Block& b, const LinearTerm& term, int64_t k0, const Epilogue& epilogue) const {
    const int64_t depth = min(plan.depth, term.depth - k0);
    const TensorRef &r = term.rows, &m = term.matrix;
    const View<S> matrix{static_cast<const S*>(m.data) + b.group * m.group, m.row, m.col};
    pack_lanes<Mul>(matrix.at(b.lane0, k0), b.width, b.vectors, depth, b.lanes);
    const S* rows = static_cast<const S*>(r.data) + b.group * r.group + b.row0 * r.row;
    contract<Mul>(WeightRows<Mul, S>{rows, r.row * b.rows, r.row, r.col, b.rows}, 0, b.rows, k0, depth, b.lanes,
                  b.vectors, b.buffer, epilogue, call.rows);
  }

  // The lanes' part of a vector that every row gets, in whole vectors.
  const Acc* bias_lanes(const TensorRef& from, const Block& b, Arena& arena) const {
    if (!from.data) return nullptr;
    auto* to = arena.take<Acc>(plan.vectors * L);
    const S* bias = static_cast<const S*>(from.data) + b.group * from.group + b.lane0 * from.row;
    for (int64_t l = 0; l < b.vectors * L; ++l) to[l] = l < b.width ? to_acc(bias[l * from.row]) : Acc{};
    return to;
  }

  template <class Act>
  void gate(Act act, const Block& b, const Acc* planes, const Acc* shifts, const Acc* bias, const Acc* shift_bias,
            S* out) const {
    S* kept =
        call.gate.kept.data ? static_cast<S*>(call.gate.kept.data) + (out - static_cast<S*>(call.y.data)) : nullptr;
    const Acc offset = Acc(call.gate.offset);
    const S* x = static_cast<const S*>(call.x.data) + b.row0 * call.x.row + b.lane0 * call.x.col;
    constexpr int64_t kAhead = 4, kLine = 64 / int64_t(sizeof(S));
    for (int64_t m = 0; m < b.rows; ++m) {
      const S* row = x + m * call.x.row;  // too short for the hardware to run ahead
      for (int64_t lane = 0; m + kAhead < b.rows && call.x.col == 1 && lane < b.width; lane += kLine)
        __builtin_prefetch(row + kAhead * call.x.row + lane);
      for_strips(b.vectors, [&](auto n, int64_t first) {
        for (int v = 0; v < n; ++v) {
          const int64_t at = (first * b.rows + m * n + v) * L, lane = (first + v) * L, valid = b.width - lane;
          V p = load<V>(planes + at);
          if (bias) p += load<V>(bias + lane);
          if (kept) store_lanes<Acc>(kept + m * call.out + lane, 1, valid, p);
          V y = (act.value(p) + offset) * load_lanes<Acc>(row + lane * call.x.col, call.x.col, valid);
          V shift{};
          if (shifts) shift = load<V>(shifts + at);
          if (shift_bias) shift += load<V>(shift_bias + lane);
          y += shift;
          store_lanes<Acc>(out + m * call.out + lane, 1, valid, y);
        }
      });
    }
  }
};

}  // namespace

void linear(DType dtype, const LinearCall& call, const LinearPlan& plan, const Execution& execution) {
  run_family<Linear>(dtype, call, plan, execution);
}

}  // namespace mi_kernels::MI_ISA
