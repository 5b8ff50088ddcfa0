// The dense interaction on the CPU: checks, plan, memory and threads; the arithmetic is in *_isa.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/linear_call.h"
#include "cpu/dispatch/overflow.h"
#include "cpu/dispatch/workspace.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels {
namespace {

using torch::headeronly::ScalarType;

TensorRef packed_operand(const char* op, const Tensor& words, const ProblemSize& p, const ForwardPlan& plan,
                         DType element, int64_t pair) {
  const bool width_inside = plan.order == Order::width_inside;
  const int64_t inner = width_inside ? p.width : p.context, outer = width_inside ? p.context : p.width;
  STD_TORCH_CHECK(words.is_cpu() && words.is_contiguous() && words.dim() == 3 && words.size(0) == p.out &&
                      words.size(1) == outer && words.size(2) == round_up(inner, pair) &&
                      dtype_of(words.scalar_type(), op, "words") == element,
                  op, ": words: expected what mi.pack makes of weight on this instruction set");
  TensorRef o;
  o.data = words.const_data_ptr();
  o.row = words.size(2);
  return o;
}

Tensor empty_like(const Tensor& like, const CallShape& a, std::vector<int64_t> sizes) {
  if (a.grouped) sizes.insert(sizes.begin(), a.problem.groups);
  return on_huge_pages(torch::stable::new_empty(like, sizes));
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

TensorRef transposed(const TensorRef& o) { return {o.data, o.group, o.col, o.row}; }

Demand demand_of(const LinearPlan& plan) { return {plan.tasks, plan.operations, plan.worker_bytes, 0}; }

// The plan of a product without W whose outputs lie in the lanes or whose matrix is streamed, or nothing if it is to be
// made with its rows in the lanes.
std::optional<LinearPlan> plan_of_linear(int64_t groups, int64_t rows, int64_t out, int64_t first, int64_t second,
                                         Lie lie, const Machine& machine) {
  if (first + second == 0 || groups == 0 || rows == 0 || out == 0) return {};
  if (linear_streams(rows, out, first + second, lie, machine))
    return plan_linear_stream(groups, rows, out, {first, second}, lie == Lie::across, machine);
  if (!outputs_in_lanes(rows, out, std::max(first, second), lie != Lie::across, machine)) return {};
  return plan_linear(groups, rows, out, {first ? first : second, first ? second : 0, 0}, false, machine);
}

Lie lie(bool along, bool across) { return along ? Lie::along : across ? Lie::across : Lie::neither; }

// Whether the product was made.
bool run_linear(DType dtype, const Tensor& like, LinearCall call) {
  bool along = true, across = true;
  for (const LinearTerm& t : call.terms)
    along &= !t.depth || t.matrix.col == 1, across &= !t.depth || t.matrix.row == 1;
  const Kernels& kernels = selected_kernels();
  const auto plan = plan_of_linear(call.groups, call.rows, call.out, call.terms[0].depth, call.terms[1].depth,
                                   lie(along, across), kernels.machine(dtype));
  if (!plan) return false;
  if (!call.terms[0].rows.data) std::swap(call.terms[0], call.terms[1]);
  const Workspace workspace(like, demand_of(*plan));
  (plan->stream ? kernels.linear_stream : kernels.linear)(dtype, call, *plan, workspace.execution);
  return true;
}

void run_forward(DType dtype, const Tensor& like, ForwardCall call, const Optional& words) {
  const ProblemSize& p = call.problem;
  const Kernels& kernels = selected_kernels();
  const bool weight = call.weight.data, weight_z = call.weight_z.data, weight_x = call.weight_x.data;
  const ForwardPlan plan = plan_forward(p, kernels.machine(dtype), weight, weight_z, weight_x);
  const Workspace workspace(like, {plan.tasks, plan.operations, plan.worker_bytes, plan.partial_bytes});
  if (words.has_value() && plan.order != Order::stream)
    call.words =
        packed_operand("interaction_packed", *words, p, plan, kernels.element(dtype), kernels.machine(dtype).pair);
  kernels.forward(dtype, call, plan, workspace.execution);
}

// `words`: W as packed_weight() in Python lays it out, where it is packed; the stream reads W itself.
Tensor forward(const Tensor& x, const Tensor& z, const Optional& weight, const Optional& words,
               const Optional& weight_z, const Optional& weight_x, const Optional& bias) {
  constexpr const char* op = "interaction";
  const CallShape a = forward_shape(op, x, z, weight, weight_z, weight_x, bias);
  const ProblemSize& p = a.problem;
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  Tensor y = empty_like(x, a, {p.rows, p.out});
  if (p.groups * p.rows * p.out == 0) return y;

  ForwardCall call{p,
                   tensor_ref(x, a.grouped),
                   tensor_ref(z, a.grouped),
                   {},
                   tensor_ref(weight_z, a.grouped),
                   tensor_ref(weight_x, a.grouped),
                   tensor_ref(bias, a.grouped),
                   {y.mutable_data_ptr()}};
  const LinearCall without_weight{
      p.groups,  p.rows, p.out, {term(call.z, call.weight_z, p.context), term(call.x, call.weight_x, p.width)},
      call.bias, call.y};
  if (weight.has_value() || !run_linear(dtype, x, without_weight)) {
    Optional kept;
    if (weight.has_value()) {
      kept = with_contiguous_groups(*weight, a.grouped);
      call.weight = weight_ref(*kept, a.grouped);
    }
    run_forward(dtype, x, call, words);
  }
  if (weight.has_value() && may_overflow(dtype) && !all_finite(y))
    replace_not_finite(y, forward(in_double(x), in_double(z), in_double(weight), {}, in_double(weight_z),
                                  in_double(weight_x), in_double(bias)));
  return y;
}

Tensor unpacked_forward(const Tensor& x, const Tensor& z, const Optional& weight, const Optional& weight_z,
                        const Optional& weight_x, const Optional& bias) {
  return forward(x, z, weight, {}, weight_z, weight_x, bias);
}

Tensor packed_forward(const Tensor& x, const Tensor& z, const Tensor& weight, const Tensor& words,
                      const Optional& weight_z, const Optional& weight_x, const Optional& bias) {
  constexpr const char* op = "interaction_packed";
  check_defined(op, "x", x);
  check_defined(op, "weight", weight);
  check_defined(op, "words", words);
  STD_TORCH_CHECK(x.dim() == 2, op, ": x: expected 2 dimensions, got ", x.dim());
  return forward(x, z, weight, words, weight_z, weight_x, bias);
}

void run_input_grads(DType dtype, const Tensor& like, const InputGradsCall& call) {
  const Kernels& kernels = selected_kernels();
  const InputGradsPlan plan =
      plan_input_grads(call.problem, kernels.machine(dtype), call.weight.data, call.dx.data, call.dz.data);
  const Workspace workspace(like, {plan.tasks, plan.operations, plan.worker_bytes, plan.partial_bytes});
  kernels.input_grads(dtype, call, plan, workspace.execution);
}

// g U or g V where that is how its features should lie, and nothing is left to be done for that gradient.
void take_linear(DType dtype, const Tensor& like, const InputGradsCall& call, const TensorRef& matrix, int64_t features,
                 Result& result) {
  const ProblemSize& p = call.problem;
  const LinearTerm product = term(call.grad, transposed(matrix), p.out);
  if (result.data && run_linear(dtype, like, {p.groups, p.rows, features, {product, {}}, {}, result})) result = {};
}

std::tuple<Tensor, Tensor> input_grads(const Tensor& grad, const Tensor& x, const Tensor& z, const Optional& weight,
                                       const Optional& weight_z, const Optional& weight_x, bool want_x, bool want_z) {
  constexpr const char* op = "interaction_input_grads";
  const CallShape a = grads_shape(op, grad, x, z);
  const ProblemSize& p = a.problem;
  check_weights(op, x, a, weight, weight_z, weight_x);
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  Tensor dx = want_x ? empty_like(x, a, {p.rows, p.width}) : nothing(x);
  Tensor dz = want_z ? empty_like(z, a, {p.rows, p.context}) : nothing(z);
  const int64_t wanted = (want_x ? p.width : 0) + (want_z ? p.context : 0);
  if (p.groups * p.rows * wanted == 0) return {dx, dz};

  InputGradsCall call{p,  tensor_ref(grad, a.grouped),     tensor_ref(x, a.grouped),        tensor_ref(z, a.grouped),
                      {}, tensor_ref(weight_z, a.grouped), tensor_ref(weight_x, a.grouped), {},
                      {}};
  if (want_x && dx.numel() > 0) call.dx.data = dx.mutable_data_ptr();
  if (want_z && dz.numel() > 0) call.dz.data = dz.mutable_data_ptr();
  if (weight.has_value()) {
    const Tensor kept = with_contiguous_groups(*weight, a.grouped);
    call.weight = weight_ref(kept, a.grouped);
    run_input_grads(dtype, x, call);
  } else {
    take_linear(dtype, x, call, call.weight_x, p.width, call.dx);
    take_linear(dtype, x, call, call.weight_z, p.context, call.dz);
    if (call.dx.data || call.dz.data) run_input_grads(dtype, x, call);
  }
  if (weight.has_value() && may_overflow(dtype) && !(all_finite(dx) && all_finite(dz))) {
    const auto [exact_x, exact_z] = input_grads(in_double(grad), in_double(x), in_double(z), in_double(weight),
                                                in_double(weight_z), in_double(weight_x), want_x, want_z);
    replace_not_finite(dx, exact_x);
    replace_not_finite(dz, exact_z);
  }
  return {dx, dz};
}

Demand demand_of(const WeightGradsPlan& plan, const bool (&want)[4]) {
  int64_t tasks = 0, operations = 0;
  const RegionPlan* regions[4] = {&plan.weight, &plan.weight_z, &plan.weight_x, &plan.bias};
  for (int t = 0; t < 4; ++t) {
    if (!want[t]) continue;
    tasks = std::max(tasks, regions[t]->tasks);
    operations += regions[t]->operations;
  }
  return {tasks, operations, plan.worker_bytes, plan.partial_bytes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weight_grads(const Tensor& grad, const Tensor& x, const Tensor& z,
                                                        bool want_weight, bool want_weight_z, bool want_weight_x,
                                                        bool want_bias) {
  constexpr const char* op = "interaction_weight_grads";
  const CallShape a = grads_shape(op, grad, x, z);
  const ProblemSize& p = a.problem;
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  check_products(op, "x", p, want_weight);
  Tensor results[4] = {want_weight ? empty_like(x, a, {p.out, p.context, p.width}) : nothing(x),
                       want_weight_z ? empty_like(x, a, {p.out, p.context}) : nothing(x),
                       want_weight_x ? empty_like(x, a, {p.out, p.width}) : nothing(x),
                       want_bias ? empty_like(x, a, {p.out}) : nothing(x)};
  bool want[4];
  WeightGradsCall call{p, tensor_ref(grad, a.grouped), tensor_ref(x, a.grouped), tensor_ref(z, a.grouped), {}, {}, {},
                       {}};
  Result* slots[4] = {&call.weight, &call.weight_z, &call.weight_x, &call.bias};
  for (int t = 0; t < 4; ++t) {
    want[t] = results[t].numel() > 0;
    if (want[t]) slots[t]->data = results[t].mutable_data_ptr();
  }
  const Kernels& kernels = selected_kernels();
  const Machine machine = kernels.machine(dtype);
  const WeightGradsPlan plan = plan_weight_grads(p, machine, kernels.sums_machine(dtype), want);
  const Demand demand = demand_of(plan, want);
  if (want[0] || want[1] || want[2] || want[3]) {
    const Workspace workspace(x, demand);
    kernels.weight_grads(dtype, call, plan, workspace.execution);
  }
  if (may_overflow(dtype) && want[0]) {
    // Whichever is less to look through: the gradient or what it is made of.
    const bool finite = results[0].numel() < grad.numel() + x.numel() + z.numel() ? all_finite(results[0])
                                                                                  : products_fit({grad, x, z}, p.rows);
    if (!finite) {
      const auto exact = weight_grads(in_double(grad), in_double(x), in_double(z), true, false, false, false);
      replace_not_finite(results[0], std::get<0>(exact));
    }
  }
  return {results[0], results[1], results[2], results[3]};
}

std::string cpu_isa() { return describe_isa(); }

// The plan of a primitive as "name=value;..." for sizes [G, B, Z, X, O]; `terms` has a bit for each of
// (W, U, V, c) and, for the input gradients, 16 for dx and 32 for dz. 64 and 128 say that U is contiguous along the
// context and along the outputs, 256 and 512 the same of V.
std::string cpu_interaction_plan(std::string primitive, std::vector<int64_t> sizes, ScalarType type, int64_t terms) {
  constexpr const char* op = "cpu_interaction_plan";
  const ProblemSize p = interaction_problem_size(op, sizes, terms, 10);
  const DType dtype = dtype_of(type, op, "dtype");
  const Machine machine = selected_kernels().machine(dtype);
  const bool want[4] = {bool(terms & 1), bool(terms & 2), bool(terms & 4), bool(terms & 8)};
  const auto text = [&](const char* algorithm, int64_t scratch) {
    return std::string("algorithm=") + algorithm +
           ";scratch=" + std::to_string(has_result(p, primitive, terms) ? scratch : 0);
  };
  // Scratch of a product without W that takes so many elements to so many outputs, or 0 if it is not made that way.
  const auto linear = [&](int64_t out, int64_t first, int64_t second, Lie how) -> int64_t {
    const auto plan = want[0] ? std::nullopt : plan_of_linear(p.groups, p.rows, out, first, second, how, machine);
    return plan ? demand_of(*plan).bytes() : 0;
  };
  const bool along_z = terms & 64, across_z = terms & 128, along_x = terms & 256, across_x = terms & 512;
  if (primitive == "forward") {
    const ForwardPlan f = plan_forward(p, machine, want[0], want[1], want[2]);
    const char* order = f.order == Order::stream         ? "stream"
                        : f.order == Order::width_inside ? "width_inside"
                                                         : "context_inside";
    const Demand demand(f.tasks, f.operations, f.worker_bytes, f.partial_bytes);
    const int64_t direct = linear(p.out, want[1] * p.context, want[2] * p.width,
                                  lie((!want[1] || !p.context || along_z) && (!want[2] || !p.width || along_x),
                                      (!want[1] || !p.context || across_z) && (!want[2] || !p.width || across_x)));
    static constexpr const char* kElements[] = {"float64", "float32", "bfloat16", "float16"};
    return text(want[0] ? order : "linear", direct ? direct : demand.bytes()) +
           ";element=" + kElements[int(selected_kernels().element(dtype))] + ";pair=" + std::to_string(machine.pair);
  }
  if (primitive == "input_grads") {
    const int64_t direct_x = terms & 16 && want[2] ? linear(p.width, p.out, 0, lie(across_x, along_x)) : 0;
    const int64_t direct_z = terms & 32 && want[1] ? linear(p.context, p.out, 0, lie(across_z, along_z)) : 0;
    const bool rest_x = terms & 16 && !direct_x, rest_z = terms & 32 && !direct_z;
    const InputGradsPlan d = plan_input_grads(p, machine, want[0], rest_x, rest_z);
    const char* form = d.form == InputForm::stream ? "stream" : d.form == InputForm::separate ? "separate" : "together";
    const Demand demand(d.tasks, d.operations, d.worker_bytes, d.partial_bytes);
    return text(want[0] ? form : "linear", std::max({direct_x, direct_z, rest_x || rest_z ? demand.bytes() : 0}));
  }
  STD_TORCH_CHECK(primitive == "weight_grads", op, ": primitive: expected forward, input_grads or weight_grads, got '",
                  primitive, "'");
  // Only results that have elements are made.
  const bool has[4] = {p.context > 0 && p.width > 0, p.context > 0, p.width > 0, true};
  bool made[4], any = false;
  for (int t = 0; t < 4; ++t) any |= made[t] = want[t] && has[t] && p.groups > 0 && p.out > 0;
  const WeightGradsPlan w = plan_weight_grads(p, machine, selected_kernels().sums_machine(dtype), made);
  const char* algorithm = !want[0] ? "linear" : w.context_lanes ? "context_lanes" : "width_lanes";
  return text(algorithm, any ? demand_of(w, made).bytes() : 0);
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(mi_kernels, CPU, m) {
  m.impl("interaction", TORCH_BOX(&mi_kernels::unpacked_forward));
  m.impl("interaction_packed", TORCH_BOX(&mi_kernels::packed_forward));
  m.impl("interaction_input_grads", TORCH_BOX(&mi_kernels::input_grads));
  m.impl("interaction_weight_grads", TORCH_BOX(&mi_kernels::weight_grads));
}

STABLE_TORCH_LIBRARY_IMPL(mi_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&mi_kernels::cpu_isa));
  m.impl("cpu_interaction_plan", TORCH_BOX(&mi_kernels::cpu_interaction_plan));
}
