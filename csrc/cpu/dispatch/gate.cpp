// The gated forms on the CPU: the forward pass of the dense interaction, or a product without W, with a gate in its
// epilogue.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/linear_call.h"
#include "cpu/dispatch/overflow.h"
#include "cpu/dispatch/workspace.h"

namespace mi_kernels {
namespace {

// x, z, what makes the gate (W, U, V, c) and what makes the shift (C, d).
struct Arguments {
  Tensor x, z;
  Optional weight, weight_z, weight_x, bias, shift_weight, shift_bias;
};

Arguments in_double(const Arguments& a) {
  using mi_kernels::in_double;
  return {in_double(a.x),        in_double(a.z),    in_double(a.weight),       in_double(a.weight_z),
          in_double(a.weight_x), in_double(a.bias), in_double(a.shift_weight), in_double(a.shift_bias)};
}

ForwardPlan plan_of(const ProblemSize& p, const Machine& m, const Arguments& a, bool softmax) {
  const bool shift = a.shift_weight.has_value() || a.shift_bias.has_value();
  return plan_gate(p, m, a.weight.has_value(), a.weight_z.has_value(), a.weight_x.has_value(), shift, softmax);
}

ProblemSize checked(const char* op, const Arguments& a, const char* name_z) {
  check_defined(op, "x", a.x);
  STD_TORCH_CHECK(a.x.dim() == 2, op, ": x: expected 2 dimensions, got ", a.x.dim());
  CallShape given = input_shape(op, a.x, a.z);
  given.problem.out = given.problem.width;
  const ProblemSize& p = given.problem;
  STD_TORCH_CHECK(a.x.is_cpu(), op, ": x: expected a tensor on the CPU");
  check_weights(op, a.x, given, a.weight, a.weight_z, a.weight_x, name_z);
  if (a.bias.has_value()) check_sizes(op, "bias", *a.bias, a.x, 1, false, {p.out});
  if (a.shift_weight.has_value()) check_sizes(op, "shift_weight", *a.shift_weight, a.x, 1, false, {p.out, p.context});
  if (a.shift_bias.has_value()) check_sizes(op, "shift_bias", *a.shift_bias, a.x, 1, false, {p.out});
  return p;
}

// A gate without W whose outputs lie in the lanes; softmax wants whole rows, which such a task does not have.
bool outputs_in_lanes(const ProblemSize& p, const Machine& m, bool weight, bool weight_z, bool weight_x, bool softmax) {
  const int64_t depth = std::max(weight_z ? p.context : 0, weight_x ? p.width : 0);
  return !weight && depth > 0 && !softmax && outputs_in_lanes(p.rows, p.out, depth, true, m);
}

LinearPlan plan_of(const ProblemSize& p, const Machine& m, bool weight_z, bool weight_x, bool shift_weight) {
  const int64_t z = weight_z ? p.context : 0, x = weight_x ? p.width : 0;
  return plan_linear(1, p.rows, p.out, {z ? z : x, z ? x : 0, shift_weight ? p.context : 0}, true, m);
}

void run_linear(DType dtype, const Arguments& a, const ProblemSize& p, const Tensor& y, const GateSpec& gate) {
  const Kernels& kernels = selected_kernels();
  const TensorRef x = tensor_ref(a.x, false), z = tensor_ref(a.z, false);
  LinearCall call{1,
                  p.rows,
                  p.out,
                  {term(z, tensor_ref(a.weight_z, false), p.context), term(x, tensor_ref(a.weight_x, false), p.width)},
                  tensor_ref(a.bias, false),
                  {y.mutable_data_ptr()},
                  gate,
                  term(z, gate.shift_weight, p.context),
                  x};
  if (!call.terms[0].depth) std::swap(call.terms[0], call.terms[1]);
  const LinearPlan plan =
      plan_of(p, kernels.machine(dtype), a.weight_z.has_value(), a.weight_x.has_value(), call.shift.depth > 0);
  const Workspace workspace(a.x, {plan.tasks, plan.operations, plan.worker_bytes, 0});
  kernels.linear(dtype, call, plan, workspace.execution);
}

// y and, with `keep`, what the activation was taken of.
std::tuple<Tensor, Tensor> gated(const char* op, const Arguments& a, Activation activation, double offset, bool keep,
                                 const char* name_z = "weight_z") {
  const ProblemSize p = checked(op, a, name_z);
  const DType dtype = dtype_of(a.x.scalar_type(), op, "x");
  Tensor y = on_huge_pages(torch::stable::new_empty(a.x, {p.rows, p.out}));
  Tensor kept = on_huge_pages(torch::stable::new_empty(a.x, {keep ? p.rows : 0, p.out}));
  if (y.numel() == 0) return {y, kept};
  const Kernels& kernels = selected_kernels();
  const bool softmax = activation == Activation::softmax;
  GateSpec gate{true, activation, offset, tensor_ref(a.shift_weight, false), tensor_ref(a.shift_bias, false),
                {},   nullptr};
  if (keep) gate.kept.data = kept.mutable_data_ptr();
  if (outputs_in_lanes(p, kernels.machine(dtype), a.weight.has_value(), a.weight_z.has_value(), a.weight_x.has_value(),
                       softmax)) {
    run_linear(dtype, a, p, y, gate);
    return {y, kept};
  }
  const ForwardPlan plan = plan_of(p, kernels.machine(dtype), a, softmax);
  const Workspace workspace(a.x, {plan.tasks, plan.operations, plan.worker_bytes, plan.partial_bytes});
  ForwardCall call{p,
                   tensor_ref(a.x, false),
                   tensor_ref(a.z, false),
                   {},
                   tensor_ref(a.weight_z, false),
                   tensor_ref(a.weight_x, false),
                   tensor_ref(a.bias, false),
                   {y.mutable_data_ptr()}};
  Optional weight;
  if (a.weight.has_value()) {
    weight = with_contiguous_groups(*a.weight, false);
    call.weight = weight_ref(*weight, false);
  }
  int not_finite = 0;
  const bool guarded = a.weight.has_value() && may_overflow(dtype);
  const bool afterwards = softmax && plan.order == Order::stream;  // its tasks have parts of the rows
  if (guarded) gate.not_finite = &not_finite;
  if (!afterwards) call.gate = gate;
  kernels.forward(dtype, call, plan, workspace.execution);
  if (afterwards) {
    if (guarded && !all_finite(y)) not_finite = 1;
    if (keep) std::memcpy(kept.mutable_data_ptr(), y.const_data_ptr(), size_t(y.numel() * storage_bytes(dtype)));
    kernels.softmax_rows(dtype, call.x, call.y, p.rows, p.out, workspace.execution);
  }
  if (!not_finite) return {y, kept};
  const auto [exact, exact_kept] = gated(op, in_double(a), activation, offset, keep);
  return {torch::stable::to(exact, a.x.scalar_type()), torch::stable::to(exact_kept, a.x.scalar_type())};
}

std::tuple<Tensor, Tensor> diagonal(const Tensor& x, const Tensor& z, const Tensor& weight, const Optional& bias,
                                    const Optional& shift_weight, const Optional& shift_bias, const Optional& weight_x,
                                    std::string activation, double offset, bool keep_gate) {
  constexpr const char* op = "diagonal";
  check_defined(op, "weight", weight);
  const Arguments arguments{x, z, {}, weight, weight_x, bias, shift_weight, shift_bias};
  return gated(op, arguments, activation_of(activation, op, true), offset, keep_gate, "weight");
}

std::tuple<Tensor, Tensor> gated_interaction(const Tensor& x, const Tensor& z, const Optional& weight,
                                             const Optional& weight_z, const Optional& weight_x, const Optional& bias,
                                             std::string activation, bool keep_gate) {
  constexpr const char* op = "gated_interaction";
  return gated(op, {x, z, weight, weight_z, weight_x, bias, {}, {}}, activation_of(activation, op, true), 0.0,
               keep_gate);
}

// Scratch bytes and algorithm of a gate for sizes [B, Z, X]; `terms` has a bit for each of (W, U, V, shift, C).
std::string cpu_gate_plan(std::vector<int64_t> sizes, torch::headeronly::ScalarType type, int64_t terms, bool softmax) {
  constexpr const char* op = "cpu_gate_plan";
  const ProblemSize p = gate_problem_size(op, sizes, terms);
  const Machine machine = selected_kernels().machine(dtype_of(type, op, "dtype"));
  const ForwardPlan f = plan_gate(p, machine, terms & 1, terms & 2, terms & 4, terms & 8, softmax);
  Demand demand(f.tasks, f.operations, f.worker_bytes, f.partial_bytes);
  if (outputs_in_lanes(p, machine, terms & 1, terms & 2, terms & 4, softmax)) {
    const LinearPlan l = plan_of(p, machine, terms & 2, terms & 4, terms & 16);
    demand = {l.tasks, l.operations, l.worker_bytes, 0};
  }
  const char* order = !(terms & 1)                     ? "linear"
                      : f.order == Order::stream       ? "stream"
                      : f.order == Order::width_inside ? "width_inside"
                                                       : "context_inside";
  return std::string("algorithm=") + order +
         ";scratch=" + std::to_string(has_result(p, "forward", terms) ? demand.bytes() : 0);
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(mi_kernels, CPU, m) {
  m.impl("diagonal", TORCH_BOX(&mi_kernels::diagonal));
  m.impl("gated_interaction", TORCH_BOX(&mi_kernels::gated_interaction));
}

STABLE_TORCH_LIBRARY_IMPL(mi_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_gate_plan", TORCH_BOX(&mi_kernels::cpu_gate_plan));
}
