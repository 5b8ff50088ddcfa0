// What must hold before the kernels of multiplicative RNNs may access memory.
#pragma once

#include <string>

#include "common/activation_kind.h"
#include "common/allocate.h"
#include "common/tensor_args.h"
#include "cpu/kernels/recurrent_call.h"

namespace mi_kernels {

struct __attribute__((visibility("hidden"))) RecurrentArguments {
  const Tensor& gates_x;
  const Optional& factors_x;
  const Tensor& h0;
  const Optional &c0, &weight_hh, &weight_hm, &weight_mh, &weight, &weight_hr, &integration, &lengths;
};

// In the accumulation dtype; nothing if it is not wanted.
inline Tensor allocate_wide(const Tensor& like, bool wanted, const std::vector<int64_t>& sizes) {
  const bool wide = like.scalar_type() == torch::headeronly::ScalarType::Double;
  int32_t type = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const std::vector<int64_t> own = wanted ? sizes : std::vector<int64_t>{0};
  return allocate(like, own.data(), int64_t(own.size()), &type);
}

inline void set_kind(const char* op, const std::string& kind, bool factors, RecurrentCall& call) {
  using enum RecurrentStructure;
  struct Kind {
    const char* name;
    RecurrentStructure structure;
    RecurrentCell cell;
  };
  static constexpr Kind kKinds[] = {
      {"mlstm", factored, RecurrentCell::lstm},     {"mrnn", factored, RecurrentCell::plain},
      {"mi_rnn", integrated, RecurrentCell::plain}, {"mi_lstm", integrated, RecurrentCell::lstm},
      {"mi_gru", integrated, RecurrentCell::gru},   {"second_order", dense, RecurrentCell::plain}};
  for (const Kind& known : kKinds)
    if (kind == known.name) {
      call.structure = known.structure == dense && factors ? factored : known.structure;
      call.cell = known.cell;
      return;
    }
  STD_TORCH_CHECK(false, op, ": kind: unknown: '", kind, "'");
}

inline void check_presence(const char* op, const char* name, const Optional& t, bool expected,
                           const std::string& kind) {
  STD_TORCH_CHECK(t.has_value() == expected, op, ": ", name, ": expected ", expected ? "a tensor" : "None", " for ",
                  kind);
}

// Checks the arguments of all passes, and sets the form and the sizes of the call.
inline DType check_recurrent(const char* op, const RecurrentArguments& a, const std::string& kind,
                             const std::string& activation, bool reverse, RecurrentCall& call) {
  check_defined(op, "gates_x", a.gates_x);
  const DType dtype = dtype_of(a.gates_x.scalar_type(), op, "gates_x");
  STD_TORCH_CHECK(a.gates_x.is_cpu(), op, ": gates_x: expected a tensor on the CPU");
  STD_TORCH_CHECK(a.gates_x.dim() == 3, op, ": gates_x: expected 3 dimensions, got ", a.gates_x.dim());
  set_kind(op, kind, a.weight_hm.has_value(), call);
  call.activation = activation_of(activation, op, false);
  const bool plain = call.cell == RecurrentCell::plain, lstm = call.cell == RecurrentCell::lstm;
  const bool known = call.activation == Activation::tanh || (plain && call.activation <= Activation::relu);
  STD_TORCH_CHECK(known, op, ": activation: expected ", plain ? "tanh, relu, sigmoid or identity" : "tanh", " for ",
                  kind, ", got '", activation, "'");
  call.reverse = reverse;
  call.steps = a.gates_x.size(0);
  call.rows = a.gates_x.size(1);
  const int64_t features = a.gates_x.size(2), gates = call.gates();
  STD_TORCH_CHECK(features % gates == 0, op, ": gates_x: expected a multiple of ", gates, " features, got ", features);
  call.units = features / gates;
  check_presence(op, "c0", a.c0, lstm, kind);
  check_presence(op, "integration", a.integration, call.integrated(), kind);
  check_presence(op, "weight", a.weight, call.dense(), kind);
  check_presence(op, "weight_hm", a.weight_hm, call.factored(), kind);
  check_presence(op, "weight_mh", a.weight_mh, call.factored(), kind);
  check_presence(op, "factors_x", a.factors_x, !call.integrated(), kind);
  if (call.integrated()) check_presence(op, "weight_hh", a.weight_hh, true, kind);
  if (!lstm) check_presence(op, "weight_hr", a.weight_hr, false, kind);
  call.has_state_product = a.weight_hh.has_value();
  call.projected = a.weight_hr.has_value();
  call.state = call.units;
  if (call.projected) {
    check_defined(op, "weight_hr", *a.weight_hr);
    STD_TORCH_CHECK(a.weight_hr->dim() == 2, op, ": weight_hr: expected 2 dimensions, got ", a.weight_hr->dim());
    call.state = a.weight_hr->size(0);
  }
  call.factors = 0;
  if (a.factors_x.has_value()) {
    check_defined(op, "factors_x", *a.factors_x);
    STD_TORCH_CHECK(a.factors_x->dim() == 3, op, ": factors_x: expected 3 dimensions, got ", a.factors_x->dim());
    call.factors = a.factors_x->size(2);
  }
  const auto check = [&](const char* name, const Optional& t, std::initializer_list<int64_t> sizes) {
    if (t.has_value()) check_sizes(op, name, *t, a.gates_x, 1, false, sizes);
  };
  check_sizes(op, "h0", a.h0, a.gates_x, 1, false, {call.rows, call.state});
  check("factors_x", a.factors_x, {call.steps, call.rows, call.factors});
  check("c0", a.c0, {call.rows, call.units});
  check("weight_hh", a.weight_hh, {features, call.state});
  check("weight_hm", a.weight_hm, {features, call.factors});
  check("weight_mh", a.weight_mh, {call.factors, call.state});
  check("weight", a.weight, {call.units, call.state, call.factors});
  check("weight_hr", a.weight_hr, {call.state, call.units});
  check("integration", a.integration, {4, features});
  if (a.lengths.has_value()) {
    const Tensor& lengths = *a.lengths;
    check_defined(op, "lengths", lengths);
    STD_TORCH_CHECK(lengths.scalar_type() == torch::headeronly::ScalarType::Long, op, ": lengths: expected int64");
    STD_TORCH_CHECK(lengths.is_cpu(), op, ": lengths: expected a tensor on the CPU");
    STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == call.rows, op, ": lengths: expected one for each of ",
                    call.rows, " rows");
  }
  STD_TORCH_CHECK(in_range({call.steps, call.rows, features, std::max(call.state, call.factors)}) &&
                      in_range({call.units, call.state, std::max<int64_t>(call.factors, 1)}),
                  op, ": gates_x: expected sizes whose product is at most 2^53");
  return dtype;
}

// What the forward pass has kept.
inline void check_kept(const char* op, const RecurrentCall& call, const Tensor& gates_x, const Tensor& out,
                       const Optional& gates, const Optional& products, const Optional& cells) {
  const int64_t steps = call.steps, rows = call.rows, features = call.gates() * call.units;
  const bool lstm = call.cell == RecurrentCell::lstm;
  check_sizes(op, "out", out, gates_x, 1, false, {steps, rows, call.state});
  const auto check = [&](const char* name, const Optional& t, bool expected, int64_t width) {
    STD_TORCH_CHECK(t.has_value() == expected, op, ": ", name, ": expected ", expected ? "a tensor" : "None");
    if (expected) check_sizes(op, name, *t, gates_x, 1, false, {steps, rows, width});
  };
  check("gates", gates, lstm && call.factored(), features);
  check("products", products, !call.dense(), call.factored() ? call.factors : features);
  STD_TORCH_CHECK(cells.has_value() == lstm, op, ": cells: expected ", lstm ? "a tensor" : "None");
  if (lstm) check_sizes(op, "cells", *cells, allocate_wide(gates_x, false, {}), 1, false, {steps, rows, call.units});
}

inline void check_tangents(const char* op, const RecurrentCall& call, const Tensor& gates_x, const Tensor& gates_t,
                           const Optional& factors_t, const Optional& products_t, const Optional& out_t,
                           const Tensor& h0_t, const Optional& c0_t) {
  const int64_t steps = call.steps, rows = call.rows, features = call.gates() * call.units;
  check_sizes(op, "gates_t", gates_t, gates_x, 1, false, {steps, rows, features});
  check_sizes(op, "h0_t", h0_t, gates_x, 1, false, {rows, call.state});
  const auto check = [&](const char* name, const Optional& t, bool allowed, int64_t width) {
    if (!t.has_value()) return;
    STD_TORCH_CHECK(allowed, op, ": ", name, ": expected None");
    check_sizes(op, name, *t, gates_x, 1, false, {steps, rows, width});
  };
  check("factors_t", factors_t, call.factored(), call.factors);
  check("products_t", products_t, !call.dense(), call.factored() ? call.factors : features);
  check("out_t", out_t, call.projected, call.state);
  const bool lstm = call.cell == RecurrentCell::lstm;
  STD_TORCH_CHECK(c0_t.has_value() == lstm, op, ": c0_t: expected ", lstm ? "a tensor" : "None");
  if (lstm) check_sizes(op, "c0_t", *c0_t, gates_x, 1, false, {rows, call.units});
}

inline void check_cotangents(const char* op, const RecurrentCall& call, const Tensor& gates_x, const Optional& grad,
                             const Optional& grad_h, const Optional& grad_c) {
  const auto check = [&](const char* name, const Optional& t, std::initializer_list<int64_t> sizes) {
    if (t.has_value()) check_sizes(op, name, *t, gates_x, 1, false, sizes);
  };
  check("grad", grad, {call.steps, call.rows, call.state});
  check("grad_h", grad_h, {call.rows, call.state});
  if (grad_c.has_value())
    STD_TORCH_CHECK(call.cell == RecurrentCell::lstm, op, ": grad_c: expected None without a cell state");
  check("grad_c", grad_c, {call.rows, call.units});
}

}  // namespace mi_kernels
