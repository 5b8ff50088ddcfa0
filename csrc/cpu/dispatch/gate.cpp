// The gated forms on the CPU: the forward pass of the dense interaction, or a product without W, with a gate in the
// epilogue.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/allocate.h"
#include "common/registration.h"
#include "common/tensor_args.h"
#include "common/text.h"
#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/linear_call.h"
#include "cpu/dispatch/overflow.h"
#include "cpu/dispatch/plan.h"
#include "cpu/dispatch/weight_layout.h"
#include "cpu/dispatch/workspace.h"

namespace mi_kernels {
namespace {

// x, z, the weights of the gate and those of the shift. weight_z is what the schema of `diagonal` calls weight.
struct Arguments {
  Tensor x, z;
  Optional weight, weight_z, weight_x, bias, shift_weight, shift_bias;
};

Arguments in_double(const Arguments& a) {
  using mi_kernels::in_double;
  return {in_double(a.x),        in_double(a.z),    in_double(a.weight),       in_double(a.weight_z),
          in_double(a.weight_x), in_double(a.bias), in_double(a.shift_weight), in_double(a.shift_bias)};
}

ForwardPlan forward_plan(const ForwardCall& call, const MulTraits& m, bool shift, bool softmax,
                         const WeightLayout& layout) {
  return plan_gate(call.problem, m, call.weight.data, call.weight_z.data, call.weight_x.data, shift, softmax, layout);
}

ProblemSize check_arguments(const char* op, const Arguments& a, const char* name_z) {
  check_defined(op, "x", a.x);
  STD_TORCH_CHECK(a.x.dim() == 2, op, ": x: expected 2 dimensions, got ", a.x.dim());
  CallShape shape = input_shape(op, a.x, a.z);
  shape.problem.out = shape.problem.width;
  const ProblemSize& p = shape.problem;
  STD_TORCH_CHECK(a.x.is_cpu(), op, ": x: expected a tensor on the CPU");
  check_weights(op, a.x, shape, a.weight, a.weight_z, a.weight_x, name_z);
  if (a.bias.has_value()) check_sizes(op, "bias", *a.bias, a.x, 1, false, {p.out});
  if (a.shift_weight.has_value()) check_sizes(op, "shift_weight", *a.shift_weight, a.x, 1, false, {p.out, p.context});
  if (a.shift_bias.has_value()) check_sizes(op, "shift_bias", *a.shift_bias, a.x, 1, false, {p.out});
  return p;
}

// Whether a gate without W has its outputs in the lanes. softmax needs whole rows, which such a task does not have.
bool gate_outputs_in_lanes(const ProblemSize& p, const MulTraits& m, bool weight, bool weight_z, bool weight_x,
                           bool softmax) {
  const int64_t depth = std::max(weight_z ? p.context : 0, weight_x ? p.width : 0);
  return !weight && depth > 0 && !softmax && outputs_in_lanes(p.rows, p.out, depth, true, m);
}

LinearPlan linear_plan(const ProblemSize& p, const MulTraits& m, bool weight_z, bool weight_x, bool shift_weight) {
  const int64_t z = weight_z ? p.context : 0, x = weight_x ? p.width : 0;
  return plan_linear(1, p.rows, p.out, {z ? z : x, z ? x : 0, shift_weight ? p.context : 0}, true, m);
}

void run_linear(DType dtype, const Arguments& a, const ProblemSize& p, const Tensor& y, const GateParams& gate) {
  const Kernels& kernels = selected_kernels();
  const TensorRef x = tensor_ref(a.x, false), z = tensor_ref(a.z, false);
  LinearCall call{1,
                  p.rows,
                  p.out,
                  {linear_term(z, tensor_ref(a.weight_z, false), p.context),
                   linear_term(x, tensor_ref(a.weight_x, false), p.width)},
                  tensor_ref(a.bias, false),
                  {y.mutable_data_ptr()},
                  gate,
                  linear_term(z, gate.shift_weight, p.context)};
  if (!call.terms[0].depth) std::swap(call.terms[0], call.terms[1]);
  const LinearPlan plan =
      linear_plan(p, kernels.mul_traits(dtype), a.weight_z.has_value(), a.weight_x.has_value(), call.shift.depth > 0);
  const Workspace workspace(a.x, {plan.tasks, plan.operations, plan.worker_bytes, 0});
  kernels.linear(dtype, call, plan, workspace.executor);
}

// y and, with `keep`, the argument of the activation.
std::tuple<Tensor, Tensor> gated(const char* op, const Arguments& a, Activation activation, double offset, bool keep,
                                 const char* name_z = "weight_z") {
  const ProblemSize p = check_arguments(op, a, name_z);
  const DType dtype = dtype_of(a.x.scalar_type(), op, "x");
  Tensor y = on_huge_pages(allocate(a.x, {p.rows, p.out}));
  Tensor pre_activation = on_huge_pages(allocate(a.x, {keep ? p.rows : 0, p.out}));
  if (y.numel() == 0) return {y, pre_activation};
  const Kernels& kernels = selected_kernels();
  const bool softmax = activation == Activation::softmax;
  GateParams gate{true,
                  activation,
                  offset,
                  tensor_ref(a.x, false),
                  tensor_ref(a.shift_weight, false),
                  tensor_ref(a.shift_bias, false),
                  {},
                  nullptr};
  if (keep) gate.pre_activation.data = pre_activation.mutable_data_ptr();
  if (gate_outputs_in_lanes(p, kernels.mul_traits(dtype), a.weight.has_value(), a.weight_z.has_value(),
                            a.weight_x.has_value(), softmax)) {
    run_linear(dtype, a, p, y, gate);
    return {y, pre_activation};
  }
  ForwardCall call{p,
                   tensor_ref(a.x, false),
                   tensor_ref(a.z, false),
                   {},
                   tensor_ref(a.weight_z, false),
                   tensor_ref(a.weight_x, false),
                   tensor_ref(a.bias, false),
                   {y.mutable_data_ptr()}};
  WeightLayout layout;
  if (a.weight.has_value()) {  // there is no shift then
    const PlacedWeight placed = place_weight(p, *a.weight, false);
    call.weight = placed.ref, layout = placed.layout;
    if (layout.exchanged) exchange(call);
  }
  const bool shift = a.shift_weight.has_value() || a.shift_bias.has_value();
  const ForwardPlan plan = forward_plan(call, kernels.mul_traits(dtype), shift, softmax, layout);
  const Workspace workspace(a.x, {plan.tasks, plan.operations, plan.worker_bytes, plan.partial_bytes});
  int not_finite = 0;
  const bool guarded = a.weight.has_value() && may_overflow(dtype);
  const bool separate_softmax = softmax && plan.order == Order::stream;  // no task has whole rows
  if (guarded) gate.not_finite = &not_finite;
  if (!separate_softmax) call.gate = gate;
  kernels.forward(dtype, call, plan, workspace.executor);
  if (separate_softmax) {
    if (guarded && !all_finite(y)) not_finite = 1;
    if (keep)
      std::memcpy(pre_activation.mutable_data_ptr(), y.const_data_ptr(), size_t(y.numel() * storage_bytes(dtype)));
    kernels.softmax_rows(dtype, gate.x, call.y, p.rows, p.out, workspace.executor);
  }
  if (!not_finite) return {y, pre_activation};
  const auto [exact, exact_pre_activation] = gated(op, in_double(a), activation, offset, keep);
  return {torch::stable::to(exact, a.x.scalar_type()), torch::stable::to(exact_pre_activation, a.x.scalar_type())};
}

std::tuple<Tensor, Tensor> diagonal(const Tensor& x, const Tensor& z, const Tensor& weight, const Optional& bias,
                                    const Optional& shift_weight, const Optional& shift_bias, const Optional& weight_x,
                                    Text activation, double offset, bool keep_gate) {
  constexpr const char* op = "diagonal";
  check_defined(op, "weight", weight);
  const Arguments arguments{x, z, {}, weight, weight_x, bias, shift_weight, shift_bias};
  return gated(op, arguments, activation_of(activation, op, true), offset, keep_gate, "weight");
}

std::tuple<Tensor, Tensor> gated_interaction(const Tensor& x, const Tensor& z, const Optional& weight,
                                             const Optional& weight_z, const Optional& weight_x, const Optional& bias,
                                             Text activation, bool keep_gate) {
  constexpr const char* op = "gated_interaction";
  return gated(op, {x, z, weight, weight_z, weight_x, bias, {}, {}}, activation_of(activation, op, true), 0.0,
               keep_gate);
}

// Algorithm and scratch bytes of a gate for sizes [B, Z, X], followed by the strides of weight [O, Z, X] unless it is
// contiguous; `terms` has a bit for each of weight, weight_z, weight_x, any shift and shift_weight.
std::string cpu_gate_plan(std::vector<int64_t> sizes, torch::headeronly::ScalarType type, int64_t terms, bool softmax) {
  constexpr const char* op = "cpu_gate_plan";
  const std::vector<int64_t> strides = take_strides(sizes, 3);
  const ProblemSize given = gate_problem_size(op, sizes, terms);
  const WeightLayout layout = terms & 1 ? weight_layout(given, strides) : WeightLayout{};
  const ProblemSize p = exchanged(given, layout);
  const MulTraits traits = selected_kernels().mul_traits(dtype_of(type, op, "dtype"));
  const bool terms_z = terms & (layout.exchanged ? 4 : 2), terms_x = terms & (layout.exchanged ? 2 : 4);
  const ForwardPlan f = plan_gate(p, traits, terms & 1, terms_z, terms_x, terms & 8, softmax, layout);
  WorkspaceSize size(f.tasks, f.operations, f.worker_bytes, f.partial_bytes);
  if (gate_outputs_in_lanes(p, traits, terms & 1, terms & 2, terms & 4, softmax)) {
    const LinearPlan l = linear_plan(p, traits, terms & 2, terms & 4, terms & 16);
    size = {l.tasks, l.operations, l.worker_bytes, 0};
  }
  const char* order = !(terms & 1)                     ? "linear"
                      : f.order == Order::stream       ? "stream"
                      : f.order == Order::width_inside ? "width_inside"
                                                       : "context_inside";
  return std::string("algorithm=") + order +
         ";scratch=" + std::to_string(has_result(p, "forward", terms) ? size.bytes() : 0);
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CPU, m) {
  m.impl("diagonal", TORCH_BOX(&mi_kernels::diagonal));
  m.impl("gated_interaction", TORCH_BOX(&mi_kernels::gated_interaction));
}

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_gate_plan", TORCH_BOX(&mi_kernels::cpu_gate_plan));
}
