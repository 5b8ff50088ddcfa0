// The backward pass through the steps of a multiplicative RNN. Gradients of the weights are products over all steps,
// of what this pass writes.
#include "cpu/kernels/recurrent_engine.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
struct RecurrentGrads : RecurrentEngine<Mul, S> {
  using Base = RecurrentEngine<Mul, S>;
  using Base::L, Base::load_units, Base::load_wide, Base::rounded, Base::sigmoid, Base::store_operand,
      Base::store_units;
  using typename Base::Acc;
  using typename Base::Chain;
  using typename Base::Coefficients;
  using typename Base::Elem;
  using typename Base::Integration;
  using typename Base::Panel;
  using typename Base::Source;
  using typename Base::V;

  const RecurrentGradsCall& grads;
  const RecurrentPlan& plan;

  RecurrentGrads(const RecurrentGradsCall& c, const RecurrentPlan& p, const Executor& e)
      : Base{c, p, e}, grads(c), plan(p) {}

  void run() const {
    this->pack_weights();
    this->run_chains(
        [&](const Chain& c) {
          if (grads.grad_c) this->load_cell(c, grads.grad_c, c.cell);
        },
        [&](Chain& c, Acc* sums) {
          for (int64_t s = -1; s < grads.steps; ++s) {
            const int64_t t = time_of(s), next = time_of(s + 1);
            step(c, {t, next, c.active(t), c.active(next), s & 1}, sums);
          }
        });
    if (grads.dintegration) sum_chains();
  }

 private:
  // After step t, of which there are gradients of `rows` rows in `copy`, comes step `next` of next_rows rows.
  struct Step {
    int64_t t, next, rows, next_rows, copy;
  };
  // Of one vector of units: the coefficients, and sums of their gradients.
  struct Lanes {
    Coefficients k;
    V sums[4][4];
  };

  // -1 before the first and after the last step.
  int64_t time_of(int64_t s) const {
    if (s < 0 || s >= grads.steps) return -1;
    return grads.reverse ? s : grads.steps - 1 - s;
  }

  static RecurrentOperand gates_operand(int64_t copy) { return copy ? kNextStateOperand : kStateOperand; }
  Source source(const Chain& c, RecurrentProduct product, RecurrentOperand operand, int64_t t = -1) const {
    return {&plan.matrix[product], c.operand[operand], plan.stride[operand], t};
  }

  void step(Chain& c, const Step& s, Acc* sums) const {
    const RecurrentOperand gates = gates_operand(s.copy);
    const auto state = [&](const Panel& p, int64_t r0, int64_t r1) { state_epilogue(c, s, p, r0, r1, sums); };
    const int64_t rows = max(s.rows, s.next_rows);
    const Source of_state = source(c, kOfState, gates);
    if (grads.factored()) {
      this->stage(c, s.rows, s.rows, sums, {source(c, kOfFactors, gates)},
                  [&](const Panel& p, int64_t r0, int64_t r1) { factors(c, s, p, r0, r1, sums); });
      this->stage(c, s.rows, rows, sums, {source(c, kFactors, kFactorsOperand), of_state}, state);
    } else if (grads.dense()) {
      this->stage(c, s.rows, rows, sums, {source(c, kOfReset, gates, max(s.t, 0)), of_state}, state);
    } else {
      if (grads.cell == RecurrentCell::gru)
        this->stage(c, s.rows, s.rows, sums, {source(c, kOfReset, kFactorsOperand)},
                    [&](const Panel& p, int64_t r0, int64_t r1) { reset(c, s, p, r0, r1, sums); });
      this->stage(c, s.rows, rows, sums, {of_state}, state);
    }
    if (grads.projected && s.next_rows > 0)
      this->stage(c, s.next_rows, s.next_rows, sums, {source(c, kOfHidden, kHiddenOperand)},
                  [&](const Panel& p, int64_t r0, int64_t r1) {
                    each_gate(c, s.next, p, r0, r1, sums, [&](const auto& at, const Acc* sum, int64_t, Lanes& lanes) {
                      cell(c, s, at, load<V>(sum), lanes);
                    });
                  });
  }

  // factors_x a: gradients of both factors.
  void factors(const Chain& c, const Step& s, const Panel& p, int64_t r0, int64_t r1, const Acc* sums) const {
    this->each(c, s.t, p, r0, r1, grads.factors, sums, [&](const auto& at, const Acc* sum) {
      const V dm = load<V>(sum);
      const V da = rounded(dm * load_units(grads.factors_x, at.at, at.valid()));
      store_units(grads.dfactors, at.at, at.valid(), dm * load_units(grads.products, at.at, at.valid()));
      store_units(grads.dproducts, at.at, at.valid(), da);
      store_operand(c.operand[kFactorsOperand] + at.r * plan.stride[kFactorsOperand] + at.lane, da, at.valid());
    });
  }

  // The gradient of the state: of the one that was given, for rows whose first step this was; of the others it goes on
  // through the cell of the next step.
  void state_epilogue(const Chain& c, const Step& s, const Panel& p, int64_t r0, int64_t r1, const Acc* sums) const {
    const auto state = [&](const auto& at, const Acc* sum, auto&& go_on) {
      const int64_t element = c.row(at.r) * grads.state + at.lane;
      V dh{};
      if (at.r < s.rows) {
        dh = load<V>(sum);
        if (grads.cell == RecurrentCell::gru) dh += load<V>(c.extra + at.r * plan.unit_stride + at.lane);
      } else if (grads.grad_h) {
        dh = load_units(grads.grad_h, element, at.valid());
      }
      if (at.r >= s.next_rows) return store_units(grads.dh0, element, at.valid(), dh);
      if (grads.grad) dh += load_units(grads.grad, at.at, at.valid());
      go_on(dh);
    };
    const int64_t t = max(s.next, 0);
    if (!grads.projected)
      return each_gate(c, t, p, r0, r1, sums, [&](const auto& at, const Acc* sum, int64_t, Lanes& lanes) {
        state(at, sum, [&](const V& dh) { cell(c, s, at, dh, lanes); });
      });
    this->each(c, t, p, r0, r1, grads.state, sums, [&](const auto& at, const Acc* sum) {
      state(at, sum, [&](const V& dh) {
        const V value = rounded(dh);
        store_units(grads.dout, at.at, at.valid(), value);
        Elem* operand = c.operand[kHiddenOperand] + at.r * plan.stride[kHiddenOperand] + at.lane;
        store_operand(operand, value, at.valid());
      });
    });
  }

  // `each` for the units of the gates, whose gradients by the coefficients are added up: a few rows in float, and these
  // sums in double.
  template <class F>
  MI_INLINE void each_gate(const Chain& c, int64_t t, const Panel& p, int64_t r0, int64_t r1, const Acc* sums,
                           const F& f) const {
    constexpr int64_t kFewRows = 16;
    const int64_t step = grads.integrated() ? kFewRows : r1 - r0;
    for (int64_t r = r0; r < r1; r += step)
      this->each(
          c, t, p, r, min(r + step, r1), grads.units, sums + (r - r0) * p.vectors * L,
          [&](int64_t lane, int64_t valid) { return Lanes{this->coefficients(lane, valid), {}}; }, f,
          [&](int64_t lane, int64_t valid, const Lanes& lanes) { add_sums(c, lane, valid, lanes); });
  }

  MI_INLINE void cell(const Chain& c, const Step& s, const auto& at, const V& dh, Lanes& lanes) const {
    switch (grads.cell) {
      case RecurrentCell::lstm: return lstm(c, s, at, dh, lanes);
      case RecurrentCell::gru: return update_and_new(c, s, at, dh, lanes);
      default: {
        const V y = load_units(grads.out, at.at, at.valid());
        const bool relu = grads.activation == Activation::relu;
        const V dp = relu ? (y > Acc(0) ? dh : V{}) : dh * this->slope(grads.activation, y);
        return gate(c, 1 - s.copy, at, 0, dp, input(at, 0), lanes);
      }
    }
  }

  int64_t element(const auto& at, int64_t g) const {
    return at.row * grads.gates() * grads.units + g * grads.units + at.lane;
  }

  // What the pre-activation of an integrated gate was made of.
  struct Input {
    V x, q;
  };
  MI_INLINE Input input(const auto& at, int64_t g) const {
    if (!grads.integrated()) return Input{V{}, V{}};
    const int64_t e = element(at, g);
    return {load_units(grads.gates_x, e, at.valid()), load_units(grads.products, e, at.valid())};
  }

  // The gradient dp of a gate's pre-activation, as a result and as an operand of the next products.
  MI_INLINE void gate(const Chain& c, int64_t copy, const auto& at, int64_t g, V dp, const Input& in,
                      Lanes& lanes) const {
    const int64_t e = element(at, g);
    V operand = rounded(dp);
    if (grads.integrated()) {
      const Integration& k = lanes.k.of[g];
      const V by_x = dp * in.x;
      lanes.sums[0][g] += by_x * in.q;
      lanes.sums[1][g] += dp * in.q;
      lanes.sums[2][g] += by_x;
      lanes.sums[3][g] += dp;
      operand = rounded(dp * k.by_state(in.x));
      store_units(grads.dproducts, e, at.valid(), operand);
      dp = dp * k.by_input(in.q);
    }
    store_units(grads.dgates, e, at.valid(), dp);
    const bool is_new = grads.cell == RecurrentCell::gru && g == 2;
    const RecurrentOperand o = is_new ? kFactorsOperand : gates_operand(copy);
    // Gates follow each other without padding.
    Elem* to = c.operand[o] + at.r * plan.stride[o] + (is_new ? 0 : g * grads.units) + at.lane;
    store_lanes<Acc>(to, 1, at.valid(), operand);
  }

  MI_INLINE void lstm(const Chain& c, const Step& s, const auto& at, const V& dh, Lanes& lanes) const {
    V gates[4];
    Input in[4];
    unroll<4>([&](auto g) MI_INLINED {
      in[g] = input(at, g);
      if (!grads.integrated()) {
        gates[g] = load_units(grads.gates_in, element(at, g), at.valid());
      } else {
        const V p = lanes.k.of[g](in[g].q, in[g].x);
        gates[g] = g == 2 ? tanh(p) : sigmoid(p);
      }
    });
    const auto [i, f, g, o] = gates;
    Acc* carried = c.cell + at.r * plan.unit_stride + at.lane;
    const V y = tanh(load_wide(grads.cells, at.at, at.valid()));
    const V dc = load<V>(carried) + dh * o * (Acc(1) - y * y), dc_before = dc * f;
    const V dp[4] = {dc * g * i * (Acc(1) - i), dc * this->cell_before(c, s.next, at, grads.cells) * f * (Acc(1) - f),
                     dc * i * (Acc(1) - g * g), dh * y * o * (Acc(1) - o)};
    unroll<4>([&](auto n) MI_INLINED { gate(c, 1 - s.copy, at, n, dp[n], in[n], lanes); });
    store(carried, dc_before);
    if (this->is_first(c, s.next, at.r))
      store_units(grads.dc0, c.row(at.r) * grads.units + at.lane, at.valid(), dc_before);
  }

  // z and n of a gru; what reaches the state beside the products is in c.extra.
  MI_INLINE void update_and_new(const Chain& c, const Step& s, const auto& at, const V& dh, Lanes& lanes) const {
    const Input update = input(at, 1), next = input(at, 2);
    const V z = sigmoid(lanes.k.of[1](update.q, update.x)), n = tanh(lanes.k.of[2](next.q, next.x));
    const V h = this->state_before(c, s.next, at, grads.out);
    gate(c, 1 - s.copy, at, 1, dh * (h - n) * z * (Acc(1) - z), update, lanes);
    gate(c, 1 - s.copy, at, 2, dh * (Acc(1) - z) * (Acc(1) - n * n), next, lanes);
    store(c.extra + at.r * plan.unit_stride + at.lane, dh * z);
  }

  // r of a gru, of the gradient of r h.
  void reset(const Chain& c, const Step& s, const Panel& p, int64_t r0, int64_t r1, const Acc* sums) const {
    each_gate(c, s.t, p, r0, r1, sums, [&](const auto& at, const Acc* sum, int64_t, Lanes& lanes) {
      const Input in = input(at, 0);
      const V d = load<V>(sum), r = sigmoid(lanes.k.of[0](in.q, in.x));
      const V h = this->state_before(c, s.t, at, grads.out);
      gate(c, s.copy, at, 0, d * h * r * (Acc(1) - r), in, lanes);
      Acc* direct = c.extra + at.r * plan.unit_stride + at.lane;
      store(direct, load<V>(direct) + d * r);
    });
  }

  void add_sums(const Chain& c, int64_t lane, int64_t valid, const Lanes& lanes) const {
    if (!grads.dintegration) return;
    const int64_t features = grads.gates() * grads.units;
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t g = 0; g < grads.gates(); ++g) {
        double* to = c.sums + i * features + g * grads.units + lane;
        for (int64_t l = 0; l < valid; ++l) to[l] += double(lanes.sums[i][g][l]);
      }
  }

  void sum_chains() const {
    const int64_t count = 4 * grads.gates() * grads.units;
    for (int64_t e = 0; e < count; ++e) {
      double sum = 0;
      for (int64_t chain = 0; chain < plan.chains; ++chain) sum += this->chain_of(chain, 0).sums[e];
      from_acc(Acc(sum), static_cast<S*>(grads.dintegration)[e]);
    }
  }
};

}  // namespace

void recurrent_grads(DType dtype, const RecurrentGradsCall& call, const RecurrentPlan& plan, const Executor& executor) {
  run_family<RecurrentGrads>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
