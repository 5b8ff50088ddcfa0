// The backward pass through the steps of a multiplicative RNN. Gradients of the weights are products over all steps,
// of what this pass writes.
#include "cpu/kernels/recurrent_engine.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class Mul, class S>
struct RecurrentGrads : RecurrentEngine<Mul, S> {
  using Base = RecurrentEngine<Mul, S>;
  using typename Base::Acc;
  using typename Base::Chain;
  using typename Base::Elem;
  using typename Base::Integration;
  using typename Base::Panel;
  using typename Base::Place;
  using typename Base::Source;
  using typename Base::V;
  using Base::L, Base::load_units, Base::load_wide, Base::rounded, Base::sigmoid, Base::store_operand,
      Base::store_units;

  const RecurrentGradsCall& grads;
  const RecurrentPlan& plan;

  RecurrentGrads(const RecurrentGradsCall& c, const RecurrentPlan& p, const Executor& e)
      : Base{c, p, e}, grads(c), plan(p) {}

  void run() const {
    pack();
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
  // Gradients of the coefficients of one vector of units.
  struct Sums {
    V of[4][4];
  };

  // -1 before the first and after the last step.
  int64_t time_of(int64_t s) const {
    if (s < 0 || s >= grads.steps) return -1;
    return grads.reverse ? s : grads.steps - 1 - s;
  }

  void pack() const {
    const RecurrentMatrix* matrix = plan.matrix;
    const auto pack = [&](RecurrentProduct product, const TensorRef& weight) {
      if (weight.data) this->pack_matrix(matrix[product], weight, true);
    };
    pack(kOfState, grads.weight_hh);
    pack(kFactors, grads.weight_mh);
    pack(kOfFactors, grads.weight_hm);
    pack(kOfHidden, grads.weight_hr);
    if (grads.cell == RecurrentCell::gru)
      this->pack_matrix(matrix[kOfReset], grads.weight_hh, true, 2 * grads.units);
    if (grads.dense()) {
      const WeightRef& w = grads.weight;
      this->pack_matrix(matrix[kOfReset], View<S>{static_cast<const S*>(w.data), w.context, w.out}, w.width);
    }
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
    if (grads.weight_hr.data && s.next_rows > 0)
      this->stage(c, s.next_rows, s.next_rows, sums, {source(c, kOfHidden, kHiddenOperand)},
                  [&](const Panel& p, int64_t r0, int64_t r1) {
                    Sums found{};
                    this->each(
                        c, s.next, p, r0, r1, grads.units, sums,
                        [&](const Place& at, const Acc* sum, int64_t) { cell(c, s, at, load<V>(sum), found); },
                        [&](int64_t lane, int64_t valid) { add_sums(c, lane, valid, found); });
                  });
  }

  // factors_x a: gradients of both factors.
  void factors(const Chain& c, const Step& s, const Panel& p, int64_t r0, int64_t r1, const Acc* sums) const {
    this->each(c, s.t, p, r0, r1, grads.factors, sums, [&](const Place& at, const Acc* sum, int64_t) {
      const V dm = load<V>(sum);
      const V da = rounded(dm * load_units(grads.factors_x, at.at, at.valid));
      store_units(grads.dfactors, at.at, at.valid, dm * load_units(grads.products, at.at, at.valid));
      store_units(grads.dproducts, at.at, at.valid, da);
      store_operand(c.operand[kFactorsOperand] + at.r * plan.stride[kFactorsOperand] + at.lane, da, at.valid);
    });
  }

  // The gradient of the state: of the one that was given, for rows whose first step this was; of the others it goes on
  // through the cell of the next step.
  void state_epilogue(const Chain& c, const Step& s, const Panel& p, int64_t r0, int64_t r1, const Acc* sums) const {
    Sums found{};
    this->each(
        c, max(s.next, 0), p, r0, r1, grads.state, sums,
        [&](const Place& at, const Acc* sum, int64_t) {
          const int64_t state = c.row(at.r) * grads.state + at.lane;
          V dh{};
          if (at.r < s.rows) {
            dh = load<V>(sum);
            if (grads.cell == RecurrentCell::gru) dh += load<V>(c.extra + at.r * plan.unit_stride + at.lane);
          } else if (grads.grad_h) {
            dh = load_units(grads.grad_h, state, at.valid);
          }
          if (at.r >= s.next_rows) return store_units(grads.dh0, state, at.valid, dh);
          if (grads.grad) dh += load_units(grads.grad, at.at, at.valid);
          if (!grads.weight_hr.data) return cell(c, s, at, dh, found);
          dh = rounded(dh);
          store_units(grads.dout, at.at, at.valid, dh);
          store_operand(c.operand[kHiddenOperand] + at.r * plan.stride[kHiddenOperand] + at.lane, dh, at.valid);
        },
        [&](int64_t lane, int64_t valid) {
          if (!grads.weight_hr.data) add_sums(c, lane, valid, found);
        });
  }

  void cell(const Chain& c, const Step& s, const Place& at, const V& dh, Sums& found) const {
    switch (grads.cell) {
      case RecurrentCell::lstm: return lstm(c, s, at, dh, found);
      case RecurrentCell::gru: return update_and_new(c, s, at, dh, found);
      default: {
        const V y = load_units(grads.out, at.at, at.valid);
        const V dp = grads.activation == Activation::relu ? (y > Acc(0) ? dh : V{}) : dh * this->slope(grads.activation, y);
        return gate(c, 1 - s.copy, at, 0, dp, found);
      }
    }
  }

  int64_t element(const Place& at, int64_t g) const {
    return at.row * grads.gates() * grads.units + g * grads.units + at.lane;
  }
  MI_INLINE Integration integration_of(int64_t g, const Place& at) const {
    return this->integration(g * grads.units + at.lane, at.valid);
  }
  MI_INLINE V pre_activation(const Place& at, int64_t g) const {
    const int64_t e = element(at, g);
    return integration_of(g, at)(load_units(grads.products, e, at.valid), load_units(grads.gates_x, e, at.valid));
  }

  // The gradient dp of a gate's pre-activation, as a result and as an operand of the next products.
  MI_INLINE void gate(const Chain& c, int64_t copy, const Place& at, int64_t g, V dp, Sums& found) const {
    const int64_t e = element(at, g);
    V operand = rounded(dp);
    if (grads.integrated()) {
      const Integration integrate = integration_of(g, at);
      const V x = load_units(grads.gates_x, e, at.valid), q = load_units(grads.products, e, at.valid);
      const V terms[4] = {dp * x * q, dp * q, dp * x, dp};
      unroll<4>([&](auto i) { found.of[i][g] += terms[i]; });
      operand = rounded(dp * integrate.by_state(x));
      store_units(grads.dproducts, e, at.valid, operand);
      dp = dp * integrate.by_input(q);
    }
    store_units(grads.dgates, e, at.valid, dp);
    const bool is_new = grads.cell == RecurrentCell::gru && g == 2;
    const RecurrentOperand o = is_new ? kFactorsOperand : gates_operand(copy);
    // Gates follow each other without padding.
    Elem* to = c.operand[o] + at.r * plan.stride[o] + (is_new ? 0 : g * grads.units) + at.lane;
    store_lanes<Acc>(to, 1, at.valid, operand);
  }

  MI_INLINE void lstm(const Chain& c, const Step& s, const Place& at, const V& dh, Sums& found) const {
    V gates[4];
    unroll<4>([&](auto g) {
      if (!grads.integrated()) {
        gates[g] = load_units(grads.gates_in, element(at, g), at.valid);
      } else {
        const V p = pre_activation(at, g);
        gates[g] = g == 2 ? tanh(p) : sigmoid(p);
      }
    });
    const auto [i, f, g, o] = gates;
    Acc* carried = c.cell + at.r * plan.unit_stride + at.lane;
    const V y = tanh(load_wide(grads.cells, at.at, at.valid));
    const V dc = load<V>(carried) + dh * o * (Acc(1) - y * y);
    const V dp[4] = {dc * g * i * (Acc(1) - i), dc * this->cell_before(c, s.next, at, grads.cells) * f * (Acc(1) - f),
                     dc * i * (Acc(1) - g * g), dh * y * o * (Acc(1) - o)};
    unroll<4>([&](auto k) { gate(c, 1 - s.copy, at, k, dp[k], found); });
    store(carried, dc * f);
    if (this->is_first(c, s.next, at.r)) store_units(grads.dc0, c.row(at.r) * grads.units + at.lane, at.valid, dc * f);
  }

  // z and n of a gru; what reaches the state beside the products is in c.extra.
  MI_INLINE void update_and_new(const Chain& c, const Step& s, const Place& at, const V& dh, Sums& found) const {
    const V z = sigmoid(pre_activation(at, 1)), n = tanh(pre_activation(at, 2));
    const V h = this->state_before(c, s.next, at, grads.out);
    gate(c, 1 - s.copy, at, 1, dh * (h - n) * z * (Acc(1) - z), found);
    gate(c, 1 - s.copy, at, 2, dh * (Acc(1) - z) * (Acc(1) - n * n), found);
    store(c.extra + at.r * plan.unit_stride + at.lane, dh * z);
  }

  // r of a gru, of the gradient of r h.
  void reset(const Chain& c, const Step& s, const Panel& p, int64_t r0, int64_t r1, const Acc* sums) const {
    Sums found{};
    this->each(
        c, s.t, p, r0, r1, grads.units, sums,
        [&](const Place& at, const Acc* sum, int64_t) {
          const V d = load<V>(sum), r = sigmoid(pre_activation(at, 0));
          const V h = this->state_before(c, s.t, at, grads.out);
          gate(c, s.copy, at, 0, d * h * r * (Acc(1) - r), found);
          Acc* direct = c.extra + at.r * plan.unit_stride + at.lane;
          store(direct, load<V>(direct) + d * r);
        },
        [&](int64_t lane, int64_t valid) { add_sums(c, lane, valid, found); });
  }

  // Sums over a block of rows are added up in double.
  void add_sums(const Chain& c, int64_t lane, int64_t valid, Sums& found) const {
    if (!grads.dintegration) return;
    const int64_t features = grads.gates() * grads.units;
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t g = 0; g < grads.gates(); ++g)
        for (int64_t l = 0; l < valid; ++l)
          c.sums[i * features + g * grads.units + lane + l] += double(found.of[i][g][l]);
    found = {};
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

void recurrent_grads(DType dtype, const RecurrentGradsCall& call, const RecurrentPlan& plan,
                     const Executor& executor) {
  run_family<RecurrentGrads>(dtype, call, plan, executor);
}

}  // namespace mi_kernels::MI_ISA
