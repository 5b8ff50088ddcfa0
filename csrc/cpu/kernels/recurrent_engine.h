// What the passes over the steps of a multiplicative RNN have in common: rows and memory of a chain, threads that meet
// after each product, and what follows the products.
#pragma once

#include <sched.h>

#include "cpu/engine/vector_activations.h"
#include "cpu/kernels/recurrent_products.h"

namespace mi_kernels::MI_ISA {

// The threads of a chain. A thread runs the items of a phase that nobody has claimed, its own share first, and then
// waits for those that others are running: so all goes on even if only one thread comes.
struct Team {
  int64_t *claimed, *done;  // [items] and one, zero at first
  int64_t member, members, phase = 0, target = 0;

  template <class F>
  void run(int64_t items, F&& item) {
    if (members == 1) {
      for (int64_t i = 0; i < items; ++i) item(i);
      return;
    }
    ++phase;
    target += items;
    const int64_t start = member * items / members;
    for (int64_t k = 0; k < items; ++k) {
      const int64_t i = start + k < items ? start + k : start + k - items;
      int64_t last = __atomic_load_n(claimed + i, __ATOMIC_RELAXED);
      if (last >= phase ||
          !__atomic_compare_exchange_n(claimed + i, &last, phase, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        continue;
      item(i);
      __atomic_fetch_add(done, 1, __ATOMIC_RELEASE);
    }
    for (int64_t spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < target; ++spins) {
      constexpr int64_t kSpins = 1 << 12;  // a few microseconds: then the others may wait for this core
      if (spins > kSpins) sched_yield();
#if defined(__x86_64__)
      else
        __builtin_ia32_pause();
#endif
    }
  }
};

template <class Mul, class S>
struct RecurrentEngine : RecurrentProducts<Mul, S> {
  using Base = RecurrentProducts<Mul, S>;
  using Base::L, Base::call, Base::executor, Base::plan;
  using typename Base::Acc;
  using typename Base::Elem;
  using typename Base::Panel;
  using typename Base::Scale;
  using typename Base::V;

  char* chain_memory(int64_t chain) const { return executor.partials + plan.shared_bytes + chain * plan.chain_bytes; }

  static MI_INLINE V load_units(const void* data, int64_t at, int64_t valid) {
    return load_lanes<Acc>(static_cast<const S*>(data) + at, 1, valid);
  }
  static MI_INLINE void store_units(void* data, int64_t at, int64_t valid, const V& value) {
    store_lanes<Acc>(static_cast<S*>(data) + at, 1, valid, value);
  }
  static MI_INLINE V load_wide(const void* data, int64_t at, int64_t valid) {
    return load_lanes<Acc>(static_cast<const Acc*>(data) + at, 1, valid);
  }
  static MI_INLINE void store_wide(void* data, int64_t at, int64_t valid, const V& value) {
    store_lanes<Acc>(static_cast<Acc*>(data) + at, 1, valid, value);
  }
  // As a tensor has it: operands are the same numbers as results.
  static MI_INLINE V rounded(const V& value) {
    if constexpr (__is_same(S, Acc)) {
      return value;
    } else {
      S stored[L];
      store_acc<L>(stored, value);
      return load_acc<L>(stored);
    }
  }
  // Lanes behind the last unit are zero, as the padding of an operand has to be.
  static MI_INLINE void store_operand(Elem* to, const V& value, int64_t valid) {
    if (valid < L)
      store_acc<L>(to, first_lanes(value, valid));
    else
      store_acc<L>(to, value);
  }

  // The coefficients of an integrated gate.
  struct Integration {
    V alpha, beta_h, beta_x, bias;
    MI_INLINE V operator()(const V& q, const V& x) const { return q * (alpha * x + beta_h) + (beta_x * x + bias); }
    MI_INLINE V by_state(const V& x) const { return alpha * x + beta_h; }
    MI_INLINE V by_input(const V& q) const { return alpha * q + beta_x; }
  };
  // Those of all gates, for one vector of units.
  struct Coefficients {
    Integration of[4];
  };
  Coefficients coefficients(int64_t lane, int64_t valid) const {
    Coefficients found{};
    const int64_t gates = call.gates(), n = gates * call.units;
    for (int64_t g = 0; g < gates && call.integrated(); ++g) {
      const auto row = [&](int64_t i) { return load_units(call.integration, i * n + g * call.units + lane, valid); };
      found.of[g] = {row(0), row(1), row(2), row(3)};
    }
    return found;
  }

  static MI_INLINE V sigmoid(const V& p) { return elementwise::Sigmoid<VectorMath>::value(p); }
  // f' of y = f(p).
  static MI_INLINE V slope(Activation activation, const V& y) {
    switch (activation) {
      case Activation::tanh: return Acc(1) - y * y;
      case Activation::sigmoid: return y * (Acc(1) - y);
      case Activation::relu: return y > Acc(0) ? V{} + Acc(1) : V{};
      default: return V{} + Acc(1);
    }
  }

  // The rows of a chain and its memory.
  struct Chain {
    int64_t row0, rows;
    const RecurrentCall* call;
    Elem* operand[kRecurrentOperands];
    Acc *cell, *extra;
    double* sums;
    Team team;
    int64_t row(int64_t r) const { return call->row_of ? call->row_of[row0 + r] : row0 + r; }
    // How many of the rows make a step; none before the first one and after the last.
    int64_t active(int64_t t) const {
      if (t < 0 || t >= call->steps) return 0;
      return call->active ? max(min(call->active[t] - row0, rows), 0) : rows;
    }
  };
  Chain chain_of(int64_t chain, int64_t member) const {
    char* memory = chain_memory(chain);
    Chain c{chain * plan.chain_rows, 0, &call, {}, nullptr, nullptr, nullptr, {}};
    c.rows = min(plan.chain_rows, call.rows - c.row0);
    for (int o = 0; o < kRecurrentOperands; ++o)
      c.operand[o] = reinterpret_cast<Elem*>(memory + plan.operand_offset[o]);
    c.cell = reinterpret_cast<Acc*>(memory + plan.cell_offset);
    c.extra = reinterpret_cast<Acc*>(memory + plan.extra_offset);
    c.sums = reinterpret_cast<double*>(memory + plan.sums_offset);
    auto* team = reinterpret_cast<int64_t*>(memory + plan.team_offset);
    c.team = {team + 8, team, member, plan.members};
    return c;
  }
  Scale scale_of(const Chain& c, int64_t t, int64_t r0) const {
    return {static_cast<const S*>(call.factors_x) + t * call.rows * call.factors, call.row_of, c.row0 + r0,
            call.factors};
  }

  // A product: its matrix and its left operand; that of a dense form has the features of x of a step as well.
  struct Source {
    const RecurrentMatrix* matrix;
    const Elem* operand;
    int64_t stride, step = -1;
  };

  // Products with the units of the first one's matrix, for the first `product_rows` rows, and then epilogue(panel,
  // first row, end) for the first `rows`. `sums` has the sums of plan.chain_rows rows.
  template <int N, class Epilogue>
  void stage(Chain& c, int64_t product_rows, int64_t rows, Acc* sums, const Source (&sources)[N],
             const Epilogue& epilogue) const {
    const RecurrentMatrix& units = *sources[0].matrix;
    c.team.run(this->panels(units), [&](int64_t item) {
      const Panel p = this->panel_of(units, item);
      const int64_t gate_stride = plan.chain_rows * p.vectors * L;
      for (int64_t r0 = 0; r0 < rows; r0 += plan.chain_rows) {
        const int64_t end = min(r0 + plan.chain_rows, rows), count = min(end, product_rows) - r0;
        bool add = false;
        for (const Source& from : sources) {
          if (from.matrix->vectors == 0 || count <= 0) continue;
          const Scale scale = from.step < 0 ? Scale{} : scale_of(c, from.step, r0);
          this->product(*from.matrix, p, from.operand + r0 * from.stride, from.stride, count, scale, sums, gate_stride,
                        add);
          add = true;
        }
        epilogue(p, r0, end);
      }
    });
  }

  // A vector of units of row r of a chain: `row` is that of the tensors of all steps, `at` its place in those with as
  // many features as units. Most are whole.
  template <bool kWhole>
  struct PlaceOf {
    int64_t r, row, at, lane, rest;
    MI_INLINE int64_t valid() const { return kWhole ? L : rest; }
  };

  // f(place, first sum, gate stride, state) for each row of each vector of units, with a state of each vector, which
  // is start(lane, valid), and finish(lane, valid, state) after all rows.
  template <class Start, class F, class Finish>
  MI_INLINE void each(const Chain& c, int64_t t, const Panel& p, int64_t r0, int64_t r1, int64_t features,
                      const Acc* sums, Start&& start, F&& f, Finish&& finish) const {
    const int64_t gate_stride = plan.chain_rows * p.vectors * L;
    for (int64_t v = 0; v < p.vectors; ++v) {
      const int64_t lane = (p.first + v) * L, valid = min(features - lane, L);
      auto state = start(lane, valid);
      const auto all = [&](auto whole) {
        for (int64_t r = r0; r < r1; ++r) {
          const int64_t row = t * call.rows + c.row(r);
          const PlaceOf<whole.value != 0> place{r, row, row * features + lane, lane, valid};
          f(place, sums + ((r - r0) * p.vectors + v) * L, gate_stride, state);
        }
      };
      if (valid == L)
        all(Index<1>{});
      else
        all(Index<0>{});
      finish(lane, valid, state);
    }
  }
  template <class F>
  MI_INLINE void each(const Chain& c, int64_t t, const Panel& p, int64_t r0, int64_t r1, int64_t features,
                      const Acc* sums, F&& f) const {
    each(
        c, t, p, r0, r1, features, sums, [](int64_t, int64_t) { return 0; },
        [&](const auto& at, const Acc* sum, int64_t, int) { f(at, sum); }, [](int64_t, int64_t, int) {});
  }

  // What the forward pass has kept of the step before t; of the first step of a row, the state that was given.
  MI_INLINE bool is_first(const Chain& c, int64_t t, int64_t r) const {
    return r >= c.active(call.reverse ? t + 1 : t - 1);
  }
  int64_t step_back() const { return (call.reverse ? call.rows : -call.rows) * call.units; }
  template <class Place>
  MI_INLINE V cell_before(const Chain& c, int64_t t, const Place& at, const void* cells) const {
    if (is_first(c, t, at.r)) return load_units(call.c0, c.row(at.r) * call.units + at.lane, at.valid());
    return load_wide(cells, at.at + step_back(), at.valid());
  }
  template <class Place>
  MI_INLINE V state_before(const Chain& c, int64_t t, const Place& at, const void* out) const {
    if (is_first(c, t, at.r)) return load_units(call.h0, c.row(at.r) * call.units + at.lane, at.valid());
    return load_units(out, at.at + step_back(), at.valid());
  }

  // Runs body(chain, sums) for all members of all chains, after prepare(chain), which one of them does.
  template <class Prepare, class Body>
  void run_chains(const Prepare& prepare, const Body& body) const {
    run_tasks(executor, plan.chains, [&](int64_t chain, int64_t) {
      clear(chain_memory(chain), plan.chain_bytes);
      prepare(chain_of(chain, 0));
    });
    run_tasks(executor, plan.chains * plan.members, [&](int64_t task, int64_t worker) {
      Chain c = chain_of(task / plan.members, task % plan.members);
      body(c, reinterpret_cast<Acc*>(executor.scratch + worker * plan.worker_bytes));
    });
  }

  // The rows of a state as an operand, or as accumulators.
  void load_operand(const Chain& c, const void* state, int64_t features, Elem* operand, int64_t stride) const {
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t u = 0; u < features; u += L) {
        const int64_t valid = min(features - u, L);
        store_operand(operand + r * stride + u, load_units(state, c.row(r) * features + u, valid), valid);
      }
  }
  void load_cell(const Chain& c, const void* state, Acc* to) const {
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t u = 0; u < call.units; u += L)
        store(to + r * plan.unit_stride + u, load_units(state, c.row(r) * call.units + u, min(call.units - u, L)));
  }
};

}  // namespace mi_kernels::MI_ISA
