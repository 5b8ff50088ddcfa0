// Products without W, y[b, o] = sum_k in[b, k] M[o, k]: U z + V x, the gradients through them, gates without W, and the
// product of two such forms. The
// outputs are in the lanes, and rows of the batch, which are A, are read in place (or copied, if dtype or strides
// require it). So neither x nor y has to be transposed, as they would be with the batch in the lanes.
#include "cpu/engine/epilogues.h"
#include "cpu/engine/producers.h"
#include "cpu/kernels/dual_epilogue.h"

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
  const Executor& executor;

  struct Block {  // rows and lanes of one task, and its scratch memory
    int64_t group, row0, rows, lane0, lane_count, vectors;
    Word *packed_a, *packed_b;
  };

 public:
  Linear(const LinearCall& c, const LinearPlan& l, const Executor& e) : call(c), plan(l), executor(e) {}

  void run() {
    run_tasks(executor, plan.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
  }

 private:
  void task(int64_t t, int64_t worker) const {
    const int64_t row_task = t / plan.lane_blocks;
    Block b{};
    b.group = row_task / plan.row_blocks;
    b.row0 = row_task % plan.row_blocks * plan.row_step, b.rows = min(plan.row_step, call.rows - b.row0);
    b.lane0 = t % plan.lane_blocks * plan.vectors * L, b.lane_count = min(plan.vectors * L, call.out - b.lane0);
    b.vectors = ceil_div(b.lane_count, L);
    ScratchAllocator scratch{executor.scratch + worker * plan.worker_bytes};
    b.packed_a = scratch.allocate<Word>(kBlockM * ceil_div(plan.depth, Mul::pair));
    b.packed_b = scratch.allocate<Word>(ceil_div(plan.depth, Mul::pair) * plan.vectors * L);
    auto* panels = plan.buffered ? scratch.allocate<Acc>(plan.row_step * plan.vectors * L) : nullptr;
    if (call.dual.ranks) return multiply_forms(b, scratch, panels);
    const Acc* bias = bias_lanes(call.bias, b, scratch);
    const Acc* shift_bias = bias_lanes(call.gate.shift_bias, b, scratch);
    auto* shift_panels = call.shift.rows.data ? scratch.allocate<Acc>(plan.row_step * plan.vectors * L) : nullptr;

    S* out = static_cast<S*>(call.y.data) + (b.group * call.rows + b.row0) * call.out + b.lane0;

    bool overwrite = true;
    if (shift_panels) accumulate(b, call.shift, call.shift.depth, shift_panels, overwrite);
    overwrite = true;
    const LinearTerm& last = call.terms[call.terms[1].rows.data ? 1 : 0];
    if (&last != call.terms) accumulate(b, call.terms[0], call.terms[0].depth, panels, overwrite);
    if (call.gate.present) {
      accumulate(b, last, last.depth, panels, overwrite);
      for_activation<VectorMath>(call.gate.activation,
                                 [&](auto act) { apply_gate(act, b, panels, shift_panels, bias, shift_bias, out); });
      return;
    }
    const int64_t last_block = (last.depth - 1) / plan.depth * plan.depth;
    accumulate(b, last, last_block, panels, overwrite);
    const TensorRef& addend = call.addend;
    const S* added = addend.data
                         ? static_cast<const S*>(addend.data) + b.group * addend.group + b.row0 * addend.row + b.lane0
                         : nullptr;
    multiply_k_block(b, last, last_block,
                     StoreOutputs<Mul, S>{out, call.out, b.lane_count, bias, overwrite ? nullptr : panels, b.rows,
                                          added, addend.row});
  }

  // y = f(p) h(q), p being terms[0] and q the shift, one rank after the other.
  void multiply_forms(Block b, ScratchAllocator scratch, Acc* panels_p) const {
    const DualEpilogue& dual = call.dual;
    const int64_t size = plan.row_step * plan.vectors * L, lane0 = b.lane0;
    const int64_t last = (call.shift.depth - 1) / plan.depth * plan.depth;
    Acc* panels_q = last > 0 ? scratch.allocate<Acc>(size) : nullptr;
    Acc* panels_y = dual.ranks > 1 ? scratch.allocate<Acc>(size) : nullptr;
    Acc *bias_p = scratch.allocate<Acc>(plan.vectors * L), *bias_q = scratch.allocate<Acc>(plan.vectors * L);
    S* out = static_cast<S*>(call.y.data) + b.row0 * call.out + lane0;
    for (int64_t r = 0; r < dual.ranks; ++r) {
      b.lane0 = r * call.out + lane0;
      const auto kept = [&](const OutputRef& to) {
        return to.data ? static_cast<S*>(to.data) + b.row0 * dual.ranks * call.out + b.lane0 : nullptr;
      };
      bool overwrite = true;
      accumulate(b, call.terms[0], call.terms[0].depth, panels_p, overwrite);
      overwrite = true;
      accumulate(b, call.shift, last, panels_q, overwrite);
      multiply_k_block(b, call.shift, last,
                       StoreDual<Mul, S>{dual, r, b.rows, call.out, b.lane_count, panels_p, panels_q, panels_y,
                                         fill_bias(call.bias, b, bias_p), fill_bias(call.gate.shift_bias, b, bias_q),
                                         out, kept(dual.p), kept(dual.q)});
    }
  }

  // panels += the first `depth` elements of a term's sums; with `overwrite`, panels = these.
  void accumulate(const Block& b, const LinearTerm& term, int64_t depth, Acc* panels, bool& overwrite) const {
    for (int64_t k0 = 0; k0 < depth; k0 += plan.depth, overwrite = false)
      multiply_k_block(b, term, k0, Accumulate<Mul>{panels, b.rows, overwrite});
  }

  template <class Epilogue>
  void multiply_k_block(const Block& b, const LinearTerm& term, int64_t k0, const Epilogue& epilogue) const {
    const int64_t depth = min(plan.depth, term.depth - k0);
    const TensorRef &r = term.rows, &m = term.matrix;
    const View<S> matrix{static_cast<const S*>(m.data) + b.group * m.group, m.row, m.col};
    const auto block = read_or_pack_b<Mul>(matrix.at(b.lane0, k0), b.lane_count, b.vectors, depth, b.rows, b.packed_b);
    const S* rows = static_cast<const S*>(r.data) + b.group * r.group + b.row0 * r.row;
    gemm<Mul>(WeightProducer<Mul, S>{rows, r.row * b.rows, r.row, r.col, b.rows}, 0, b.rows, k0, depth, block,
              b.vectors, b.packed_a, epilogue, call.rows);
  }

  // The lanes of a bias, padded to whole vectors; null if there is none.
  const Acc* bias_lanes(const TensorRef& src, const Block& b, ScratchAllocator& scratch) const {
    return src.data ? fill_bias(src, b, scratch.allocate<Acc>(plan.vectors * L)) : nullptr;
  }

  const Acc* fill_bias(const TensorRef& src, const Block& b, Acc* dest) const {
    if (!src.data) return nullptr;
    const S* bias = static_cast<const S*>(src.data) + b.group * src.group + b.lane0 * src.row;
    for (int64_t l = 0; l < b.vectors * L; ++l) dest[l] = l < b.lane_count ? to_acc(bias[l * src.row]) : Acc{};
    return dest;
  }

  template <class Act>
  void apply_gate(Act act, const Block& b, const Acc* panels, const Acc* shift_panels, const Acc* bias,
                  const Acc* shift_bias, S* out) const {
    S* pre_activation = call.gate.pre_activation.data
                            ? static_cast<S*>(call.gate.pre_activation.data) + (out - static_cast<S*>(call.y.data))
                            : nullptr;
    const Acc offset = Acc(call.gate.offset);
    const TensorRef& gate_x = call.gate.x;
    const S* x = static_cast<const S*>(gate_x.data) + b.row0 * gate_x.row + b.lane0 * gate_x.col;
    constexpr int64_t kAhead = 4, kLine = 64 / int64_t(sizeof(S));
    for (int64_t m = 0; m < b.rows; ++m) {
      const S* row = x + m * gate_x.row;  // too short for the hardware prefetcher
      for (int64_t lane = 0; m + kAhead < b.rows && gate_x.col == 1 && lane < b.lane_count; lane += kLine)
        __builtin_prefetch(row + kAhead * gate_x.row + lane);
      for_panels(b.vectors, [&](auto n, int64_t first) {
        for (int v = 0; v < n; ++v) {
          const int64_t at = (first * b.rows + m * n + v) * L, lane = (first + v) * L, valid = b.lane_count - lane;
          V p = load<V>(panels + at);
          if (bias) p += load<V>(bias + lane);
          if (pre_activation) store_lanes<Acc>(pre_activation + m * call.out + lane, 1, valid, p);
          V y = (act.value(p) + offset) * load_lanes<Acc>(row + lane * gate_x.col, gate_x.col, valid);
          V shift{};
          if (shift_panels) shift = load<V>(shift_panels + at);
          if (shift_bias) shift += load<V>(shift_bias + lane);
          y += shift;
          store_lanes<Acc>(out + m * call.out + lane, 1, valid, y);
        }
      });
    }
  }
};

}  // namespace

void linear(DType dtype, const LinearCall& call, const LinearPlan& plan, const Executor& executor) {
  run_family<Linear>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
