// The steps of a multiplicative RNN, and their tangents: the same products with other epilogues.
#include "cpu/kernels/recurrent_engine.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
struct RecurrentSteps : RecurrentEngine<Mul, S> {
  using Base = RecurrentEngine<Mul, S>;
  using Base::L, Base::load_units, Base::load_wide, Base::rounded, Base::sigmoid, Base::store_operand,
      Base::store_units, Base::store_wide;
  using typename Base::Acc;
  using typename Base::Chain;
  using typename Base::Coefficients;
  using typename Base::Elem;
  using typename Base::Integration;
  using typename Base::Panel;
  using typename Base::V;

  const RecurrentStepsCall& steps;
  const RecurrentPlan& plan;

  RecurrentSteps(const RecurrentStepsCall& c, const RecurrentPlan& p, const Executor& e)
      : Base{c, p, e}, steps(c), plan(p) {}

  void run() const {
    this->pack_weights();
    const void *h0 = steps.tangents ? steps.h0_t : steps.h0, *c0 = steps.tangents ? steps.c0_t : steps.c0;
    this->run_chains(
        [&](const Chain& c) {
          for (const auto o : {kStateOperand, kNextStateOperand})
            this->load_operand(c, h0, steps.state, c.operand[o], plan.stride[o]);
          if (c0) this->load_cell(c, c0, c.cell);
        },
        [&](Chain& c, Acc* sums) {
          for (int64_t s = 0; s < steps.steps; ++s) {
            const int64_t t = steps.reverse ? steps.steps - 1 - s : s;
            step(c, {t, c.active(t), c.active(steps.reverse ? t - 1 : t + 1), s % 2}, sums);
          }
        });
  }

 private:
  // Of the rows of the chain, `rows` make step t and `next` the one after it; the state before it is in `copy`.
  struct Step {
    int64_t t, rows, next, copy;
  };

  // What is multiplied in step s.
  typename Base::Source source(const Chain& c, const Step& s, RecurrentProduct product) const {
    const RecurrentOperand operand = product == kOfHidden    ? kHiddenOperand
                                     : product == kOfFactors ? kFactorsOperand
                                     : s.copy                ? kNextStateOperand
                                                             : kStateOperand;
    return {&plan.matrix[product], c.operand[operand], plan.stride[operand]};
  }

  void step(Chain& c, const Step& s, Acc* sums) const {
    if (steps.factored())
      this->stage(c, s.rows, s.rows, sums, {source(c, s, kFactors)}, [&](const Panel& p, int64_t r0, int64_t r1) {
        this->each(c, s.t, p, r0, r1, steps.factors, sums,
                   [&](const auto& at, const Acc* sum) { factors(c, at, load<V>(sum)); });
      });
    const auto gates = [&](const Panel& p, int64_t r0, int64_t r1) { gate_epilogue(c, s, p, r0, r1, sums); };
    if (steps.cell == RecurrentCell::gru) {
      this->stage(c, s.rows, s.rows, sums, {source(c, s, kOfState)}, gates);
      typename Base::Source reset = source(c, s, kOfReset);
      reset.operand = c.operand[kFactorsOperand];
      reset.stride = plan.stride[kFactorsOperand];
      this->stage(c, s.rows, s.rows, sums, {reset},
                  [&](const Panel& p, int64_t r0, int64_t r1) { new_gate(c, s, p, r0, r1, sums); });
    } else if (steps.factored()) {
      this->stage(c, s.rows, s.rows, sums, {source(c, s, kOfFactors), source(c, s, kOfState)}, gates);
    } else if (steps.dense()) {
      typename Base::Source dense = source(c, s, kOfReset);
      dense.step = s.t;
      this->stage(c, s.rows, s.rows, sums, {dense, source(c, s, kOfState)}, gates);
    } else {
      this->stage(c, s.rows, s.rows, sums, {source(c, s, kOfState)}, gates);
    }
    if (steps.projected)
      this->stage(c, s.rows, s.rows, sums, {source(c, s, kOfHidden)}, [&](const Panel& p, int64_t r0, int64_t r1) {
        this->each(c, s.t, p, r0, r1, steps.state, sums, [&](const auto& at, const Acc* sum) {
          V h = load<V>(sum);
          if (steps.out_t) h += load_units(steps.out_t, at.at, at.valid());
          store_state(c, s, at, h);
        });
      });
  }

  // m = factors_x a, or its tangent.
  MI_INLINE void factors(const Chain& c, const auto& at, V a) const {
    const V x = load_units(steps.factors_x, at.at, at.valid());
    V m;
    if (steps.tangents) {
      if (steps.products_t) a += load_units(steps.products_t, at.at, at.valid());
      m = x * a;
      if (steps.factors_t)
        m += load_units(steps.kept_products, at.at, at.valid()) * load_units(steps.factors_t, at.at, at.valid());
    } else {
      if (steps.products) store_units(steps.products, at.at, at.valid(), a);
      m = x * a;
    }
    store_operand(c.operand[kFactorsOperand] + at.r * plan.stride[kFactorsOperand] + at.lane, rounded(m), at.valid());
  }

  // The next state of a row, which is also its last one if the row makes no other step.
  MI_INLINE void store_state(const Chain& c, const Step& s, const auto& at, const V& h) const {
    const V value = rounded(h);
    const RecurrentOperand next = s.copy ? kStateOperand : kNextStateOperand;
    store_operand(c.operand[next] + at.r * plan.stride[next] + at.lane, value, at.valid());
    store_units(steps.out, at.at, at.valid(), value);
    if (at.r >= s.next) store_units(steps.h_n, c.row(at.r) * steps.state + at.lane, at.valid(), value);
  }

  // h of a step: its projection is to come, or it is the state.
  MI_INLINE void store_hidden(const Chain& c, const Step& s, const auto& at, const V& h) const {
    if (!steps.projected) return store_state(c, s, at, h);
    const V value = rounded(h);
    store_operand(c.operand[kHiddenOperand] + at.r * plan.stride[kHiddenOperand] + at.lane, value, at.valid());
    if (steps.hidden) store_units(steps.hidden, at.at, at.valid(), value);
  }

  int64_t element(const auto& at, int64_t g) const {
    return at.row * steps.gates() * steps.units + g * steps.units + at.lane;
  }

  // What the activation of gate g is applied to, of a sum q; its tangent is that of the whole argument.
  MI_INLINE V pre_activation(const auto& at, int64_t g, const Coefficients& k, V q) const {
    const int64_t e = element(at, g);
    if (!steps.integrated()) return q + load_units(steps.tangents ? steps.gates_t : steps.gates_x, e, at.valid());
    const V x = load_units(steps.gates_x, e, at.valid());
    if (steps.tangents) {
      if (steps.products_t) q += load_units(steps.products_t, e, at.valid());
      return q * k.of[g].by_state(x) + load_units(steps.gates_t, e, at.valid());
    }
    if (steps.products) store_units(steps.products, e, at.valid(), q);
    return k.of[g](q, x);
  }

  // The pre-activation of the forward pass, of what it has kept.
  MI_INLINE V kept_pre_activation(const auto& at, int64_t g, const Coefficients& k) const {
    const int64_t e = element(at, g);
    return k.of[g](load_units(steps.kept_products, e, at.valid()), load_units(steps.gates_x, e, at.valid()));
  }

  void gate_epilogue(const Chain& c, const Step& s, const Panel& p, int64_t r0, int64_t r1, const Acc* sums) const {
    const auto start = [&](int64_t lane, int64_t valid) { return this->coefficients(lane, valid); };
    const auto finish = [](int64_t, int64_t, const Coefficients&) {};
    const auto gates = [&](const auto& f) { this->each(c, s.t, p, r0, r1, steps.units, sums, start, f, finish); };
    switch (steps.cell) {
      case RecurrentCell::lstm:
        return gates([&](const auto& at, const Acc* sum, int64_t stride, const Coefficients& k) {
          lstm(c, s, at, sum, stride, k);
        });
      case RecurrentCell::gru:
        return gates([&](const auto& at, const Acc* sum, int64_t stride, const Coefficients& k) {
          reset_and_update(c, s, at, sum, stride, k);
        });
      default:
        return gates([&](const auto& at, const Acc* sum, int64_t, const Coefficients& k) { plain(c, s, at, sum, k); });
    }
  }

  MI_INLINE void plain(const Chain& c, const Step& s, const auto& at, const Acc* sum, const Coefficients& k) const {
    const V p = pre_activation(at, 0, k, load<V>(sum));
    V h{};
    if (steps.tangents)
      h = p * this->slope(steps.activation, load_units(steps.kept_out, at.at, at.valid()));
    else
      for_activation<VectorMath>(steps.activation, [&](auto act) { h = act.value(p); });
    store_hidden(c, s, at, h);
  }

  MI_INLINE void lstm(const Chain& c, const Step& s, const auto& at, const Acc* sum, int64_t gate_stride,
                      const Coefficients& k) const {
    V p[4], gate[4];
    unroll<4>([&](auto g) MI_INLINED { p[g] = pre_activation(at, g, k, load<V>(sum + g * gate_stride)); });
    Acc* cell = c.cell + at.r * plan.unit_stride + at.lane;
    V h, state;
    if (steps.tangents) {
      unroll<4>([&](auto g) MI_INLINED {
        if (!steps.integrated()) {
          gate[g] = load_units(steps.kept_gates, element(at, g), at.valid());
        } else {
          const V before = kept_pre_activation(at, g, k);
          gate[g] = g == 2 ? tanh(before) : sigmoid(before);
        }
      });
      const auto [i, f, g, o] = gate;
      const V y = tanh(load_wide(steps.kept_cells, at.at, at.valid()));
      state = p[1] * f * (Acc(1) - f) * this->cell_before(c, s.t, at, steps.kept_cells) + f * load<V>(cell) +
              p[0] * i * (Acc(1) - i) * g + i * p[2] * (Acc(1) - g * g);
      h = p[3] * o * (Acc(1) - o) * y + o * (Acc(1) - y * y) * state;
    } else {
      unroll<4>([&](auto g) MI_INLINED { gate[g] = g == 2 ? tanh(p[g]) : sigmoid(p[g]); });
      if (steps.gates_kept)
        unroll<4>([&](auto g) MI_INLINED { store_units(steps.gates_kept, element(at, g), at.valid(), gate[g]); });
      state = gate[1] * load<V>(cell) + gate[0] * gate[2];
      if (steps.cells) store_wide(steps.cells, at.at, at.valid(), state);
      h = gate[3] * tanh(state);
    }
    store(cell, state);
    if (at.r >= s.next) store_units(steps.c_n, c.row(at.r) * steps.units + at.lane, at.valid(), state);
    store_hidden(c, s, at, h);
  }

  MI_INLINE V state_of(const Chain& c, const Step& s, const auto& at) const {
    const RecurrentOperand o = s.copy ? kNextStateOperand : kStateOperand;
    return load_acc<L>(c.operand[o] + at.r * plan.stride[o] + at.lane);
  }

  // r and z of a gru: r h is the operand of the second product, and z waits for it. Their tangents likewise, with
  // those of h in the operand of the state.
  MI_INLINE void reset_and_update(const Chain& c, const Step& s, const auto& at, const Acc* sum, int64_t gate_stride,
                                  const Coefficients& k) const {
    V p[2], gate[2];
    unroll<2>([&](auto g) MI_INLINED { p[g] = pre_activation(at, g, k, load<V>(sum + g * gate_stride)); });
    const V h = state_of(c, s, at);
    V reset, update;
    if (steps.tangents) {
      unroll<2>([&](auto g) MI_INLINED { gate[g] = sigmoid(kept_pre_activation(at, g, k)); });
      unroll<2>([&](auto g) MI_INLINED { p[g] *= gate[g] * (Acc(1) - gate[g]); });
      reset = p[0] * this->state_before(c, s.t, at, steps.kept_out) + gate[0] * h;
      update = p[1];
    } else {
      reset = sigmoid(p[0]) * h;
      update = sigmoid(p[1]);
    }
    Elem* operand = c.operand[kFactorsOperand] + at.r * plan.stride[kFactorsOperand] + at.lane;
    store_operand(operand, rounded(reset), at.valid());
    store(c.extra + at.r * plan.unit_stride + at.lane, update);
  }

  void new_gate(const Chain& c, const Step& s, const Panel& panel, int64_t r0, int64_t r1, const Acc* sums) const {
    const auto next = [&](const auto& at, const Acc* sum, int64_t, const Coefficients& k) {
      const V p = pre_activation(at, 2, k, load<V>(sum));
      const V h = state_of(c, s, at), update = load<V>(c.extra + at.r * plan.unit_stride + at.lane);
      if (!steps.tangents) {
        const V n = tanh(p);
        return store_hidden(c, s, at, n + update * (h - n));
      }
      const V z = sigmoid(kept_pre_activation(at, 1, k)), n = tanh(kept_pre_activation(at, 2, k));
      const V n_t = p * (Acc(1) - n * n), before = this->state_before(c, s.t, at, steps.kept_out);
      store_hidden(c, s, at, n_t + update * (before - n) + z * (h - n_t));
    };
    this->each(
        c, s.t, panel, r0, r1, steps.units, sums,
        [&](int64_t lane, int64_t valid) { return this->coefficients(lane, valid); }, next,
        [](int64_t, int64_t, const Coefficients&) {});
  }
};

}  // namespace

void recurrent(DType dtype, const RecurrentStepsCall& call, const RecurrentPlan& plan, const Executor& executor) {
  run_family<RecurrentSteps>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
