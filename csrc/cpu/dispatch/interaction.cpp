// The dense interaction on the CPU: registration, checks, plan, memory and threads; the arithmetic is in kernels/.
#include "cpu/dispatch/interaction.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/allocate.h"
#include "common/registration.h"
#include "common/tensor_args.h"
#include "common/text.h"
#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/linear_call.h"
#include "cpu/dispatch/materialised.h"
#include "cpu/dispatch/overflow.h"
#include "cpu/dispatch/plan.h"
#include "cpu/dispatch/weight_layout.h"
#include "cpu/dispatch/workspace.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels {
namespace {

using torch::headeronly::ScalarType;

TensorRef packed_weight_ref(const char* op, const Tensor& packed_weight, const ProblemSize& p, const ForwardPlan& plan,
                            DType element, int64_t pair) {
  const bool width_inside = plan.order == Order::width_inside;
  const int64_t inner = width_inside ? p.width : p.context, outer = width_inside ? p.context : p.width;
  STD_TORCH_CHECK(packed_weight.is_cpu() && packed_weight.is_contiguous() && packed_weight.dim() == 3 &&
                      packed_weight.size(0) == (plan.outputs_first ? p.out : outer) &&
                      packed_weight.size(1) == (plan.outputs_first ? outer : p.out) &&
                      packed_weight.size(2) == round_up(inner, pair) &&
                      dtype_of(packed_weight.scalar_type(), op, "packed_weight") == element,
                  op, ": packed_weight: expected what mi.pack makes of weight on this instruction set");
  TensorRef o;
  o.data = packed_weight.const_data_ptr();
  o.row = packed_weight.size(2);
  return o;
}

Tensor empty_like(const Tensor& like, const CallShape& shape, std::initializer_list<int64_t> sizes) {
  int64_t all[4] = {shape.problem.groups};
  const int64_t lead = shape.grouped ? 1 : 0;
  std::copy(sizes.begin(), sizes.end(), all + lead);
  return on_huge_pages(allocate(like, all, lead + int64_t(sizes.size())));
}

Tensor nothing(const Tensor& like) { return allocate(like, {0}); }

TensorRef transposed(const TensorRef& o) { return {o.data, o.group, o.col, o.row}; }

WorkspaceSize workspace_size(const LinearPlan& plan) { return {plan.tasks, plan.operations, plan.worker_bytes, 0}; }

// The plan of a product without W that has its outputs in the lanes or streams its matrix; none if its rows should be
// in the lanes, as in the forward pass with W.
std::optional<LinearPlan> linear_plan(int64_t groups, int64_t rows, int64_t out, int64_t first, int64_t second,
                                      Major major, const MulTraits& traits) {
  if (first + second == 0 || groups == 0 || rows == 0 || out == 0) return {};
  if (linear_streams(rows, out, first + second, major, traits))
    return plan_linear_stream(groups, rows, out, {first, second}, major == Major::n, traits);
  const int64_t longest = std::max(first, second);
  const bool short_sums = major == Major::k && short_sums_in_output_lanes(groups, rows, out, longest, traits);
  if (!short_sums && !outputs_in_lanes(rows, out, longest, major != Major::n, traits)) return {};
  return plan_linear(groups, rows, out, {first ? first : second, first ? second : 0, 0}, false, traits);
}

Major major_of(bool k_major, bool n_major) { return k_major ? Major::k : n_major ? Major::n : Major::neither; }

// Returns whether the product was computed.
bool try_linear(DType dtype, const WorkspaceSource& memory, LinearCall call) {
  bool k_major = true, n_major = true;
  for (const LinearTerm& t : call.terms)
    k_major &= !t.depth || t.matrix.col == 1, n_major &= !t.depth || t.matrix.row == 1;
  const Kernels& kernels = selected_kernels();
  const auto plan = linear_plan(call.groups, call.rows, call.out, call.terms[0].depth, call.terms[1].depth,
                                major_of(k_major, n_major), kernels.mul_traits(dtype));
  if (!plan) return false;
  if (!call.terms[0].rows.data) std::swap(call.terms[0], call.terms[1]);
  memory.run(workspace_size(*plan), [&](const Executor& executor) {
    (plan->stream ? kernels.linear_stream : kernels.linear)(dtype, call, *plan, executor);
  });
  return true;
}

void run_forward(DType dtype, const WorkspaceSource& memory, ForwardCall call, const WeightLayout& layout,
                 const Optional& packed_weight) {
  if (layout.exchanged) exchange(call);
  const ProblemSize& p = call.problem;
  const Kernels& kernels = selected_kernels();
  const bool weight = call.weight.data, weight_z = call.weight_z.data, weight_x = call.weight_x.data;
  const ForwardPlan plan = plan_forward(p, kernels.mul_traits(dtype), weight, weight_z, weight_x, layout);
  if (packed_weight.has_value() && plan.order != Order::stream && !plan.output_lanes)
    call.packed_weight = packed_weight_ref("interaction_packed", *packed_weight, p, plan, kernels.element(dtype),
                                           kernels.mul_traits(dtype).pair);
  memory.run({plan.tasks, plan.operations, plan.worker_bytes, plan.partial_bytes},
             [&](const Executor& executor) { kernels.forward(dtype, call, plan, executor); });
}

bool try_linear(DType dtype, const WorkspaceSource& memory, const ForwardCall& call) {
  const ProblemSize& p = call.problem;
  return try_linear(dtype, memory,
                    {p.groups,
                     p.rows,
                     p.out,
                     {linear_term(call.z, call.weight_z, p.context), linear_term(call.x, call.weight_x, p.width)},
                     call.bias,
                     call.y});
}

// `packed_weight`: W in the layout of mi.pack, if there is one; only plans with the batch in the lanes read it.
Tensor forward(const Tensor& x, const Tensor& z, const Optional& weight, const Optional& packed_weight,
               const Optional& weight_z, const Optional& weight_x, const Optional& bias) {
  constexpr const char* op = "interaction";
  const CallShape shape = forward_shape(op, x, z, weight, weight_z, weight_x, bias);
  const ProblemSize& p = shape.problem;
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  Tensor y = empty_like(x, shape, {p.rows, p.out});
  if (p.groups * p.rows * p.out == 0) return y;

  ForwardCall call{p,
                   tensor_ref(x, shape.grouped),
                   tensor_ref(z, shape.grouped),
                   {},
                   tensor_ref(weight_z, shape.grouped),
                   tensor_ref(weight_x, shape.grouped),
                   tensor_ref(bias, shape.grouped),
                   {y.mutable_data_ptr()}};
  if (weight.has_value() || !try_linear(dtype, {&x}, call)) {
    PlacedWeight placed;
    if (weight.has_value()) placed = place_weight(p, *weight, shape.grouped);
    call.weight = placed.ref;
    if (weight.has_value() && materialises_forward(dtype, exchanged(p, placed.layout), placed)) {
      if (placed.layout.exchanged) exchange(call);
      materialised_forward(dtype, &x, call);
    } else {
      run_forward(dtype, {&x}, call, placed.layout, packed_weight);
    }
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

Tensor packed_forward(const Tensor& x, const Tensor& z, const Tensor& weight, const Tensor& packed_weight,
                      const Optional& weight_z, const Optional& weight_x, const Optional& bias) {
  constexpr const char* op = "interaction_packed";
  check_defined(op, "x", x);
  check_defined(op, "weight", weight);
  check_defined(op, "packed_weight", packed_weight);
  STD_TORCH_CHECK(x.dim() == 2, op, ": x: expected 2 dimensions, got ", x.dim());
  return forward(x, z, weight, packed_weight, weight_z, weight_x, bias);
}

void run_input_grads(DType dtype, const WorkspaceSource& memory, InputGradsCall call, const WeightLayout& layout) {
  if (layout.exchanged) exchange(call);
  const Kernels& kernels = selected_kernels();
  const InputGradsPlan plan =
      plan_input_grads(call.problem, kernels.mul_traits(dtype), call.weight.data, call.dx.data, call.dz.data, layout);
  memory.run({plan.tasks, plan.operations, plan.worker_bytes, plan.partial_bytes},
             [&](const Executor& executor) { kernels.input_grads(dtype, call, plan, executor); });
}

// The gradient through weight_z or weight_x alone, if that is computed with its features in the lanes; `result` is then
// cleared, as nothing is left to be done for it.
void try_linear_grad(DType dtype, const WorkspaceSource& memory, const InputGradsCall& call, const TensorRef& matrix,
                     int64_t features, OutputRef& result) {
  const ProblemSize& p = call.problem;
  const LinearTerm product = linear_term(call.grad, transposed(matrix), p.out);
  if (result.data && try_linear(dtype, memory, {p.groups, p.rows, features, {product, {}}, {}, result})) result = {};
}

void run_linear_grads(DType dtype, const WorkspaceSource& memory, InputGradsCall call) {
  try_linear_grad(dtype, memory, call, call.weight_x, call.problem.width, call.dx);
  try_linear_grad(dtype, memory, call, call.weight_z, call.problem.context, call.dz);
  if (call.dx.data || call.dz.data) run_input_grads(dtype, memory, call, {});
}

std::tuple<Tensor, Tensor> input_grads(const Tensor& grad, const Tensor& x, const Tensor& z, const Optional& weight,
                                       const Optional& weight_z, const Optional& weight_x, bool want_x, bool want_z) {
  constexpr const char* op = "interaction_input_grads";
  const CallShape shape = grads_shape(op, grad, x, z);
  const ProblemSize& p = shape.problem;
  check_weights(op, x, shape, weight, weight_z, weight_x);
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  Tensor dx = want_x ? empty_like(x, shape, {p.rows, p.width}) : nothing(x);
  Tensor dz = want_z ? empty_like(z, shape, {p.rows, p.context}) : nothing(z);
  const int64_t wanted = (want_x ? p.width : 0) + (want_z ? p.context : 0);
  if (p.groups * p.rows * wanted == 0) return {dx, dz};

  InputGradsCall call{
      p,  tensor_ref(grad, shape.grouped),     tensor_ref(x, shape.grouped),        tensor_ref(z, shape.grouped),
      {}, tensor_ref(weight_z, shape.grouped), tensor_ref(weight_x, shape.grouped), {},
      {}};
  if (want_x && dx.numel() > 0) call.dx.data = dx.mutable_data_ptr();
  if (want_z && dz.numel() > 0) call.dz.data = dz.mutable_data_ptr();
  if (weight.has_value()) {
    const PlacedWeight placed = place_weight(p, *weight, shape.grouped);
    call.weight = placed.ref;
    if (materialises_input_grads(dtype, exchanged(p, placed.layout), placed)) {
      if (placed.layout.exchanged) exchange(call);
      materialised_input_grads(dtype, &x, call);
    } else {
      run_input_grads(dtype, {&x}, call, placed.layout);
    }
  } else {
    run_linear_grads(dtype, {&x}, call);
  }
  if (weight.has_value() && may_overflow(dtype) && !(all_finite(dx) && all_finite(dz))) {
    const auto [exact_x, exact_z] = input_grads(in_double(grad), in_double(x), in_double(z), in_double(weight),
                                                in_double(weight_z), in_double(weight_x), want_x, want_z);
    replace_not_finite(dx, exact_x);
    replace_not_finite(dz, exact_z);
  }
  return {dx, dz};
}

WorkspaceSize workspace_size(const WeightGradsPlan& plan, const bool (&want)[4]) {
  int64_t tasks = 0, operations = 0;
  const RegionPlan* regions[4] = {&plan.weight, &plan.weight_z, &plan.weight_x, &plan.bias};
  for (int t = 0; t < 4; ++t) {
    if (!want[t]) continue;
    tasks = std::max(tasks, regions[t]->tasks);
    operations += regions[t]->operations;
  }
  return {tasks, operations, plan.worker_bytes, plan.partial_bytes};
}

void run_weight_grads(DType dtype, const WorkspaceSource& memory, const WeightGradsCall& call) {
  const bool want[4] = {bool(call.weight.data), bool(call.weight_z.data), bool(call.weight_x.data),
                        bool(call.bias.data)};
  if (!want[0] && !want[1] && !want[2] && !want[3]) return;
  const Kernels& kernels = selected_kernels();
  const WeightGradsPlan plan =
      plan_weight_grads(call.problem, kernels.mul_traits(dtype), kernels.sum_traits(dtype), want, call.one);
  memory.run(workspace_size(plan, want),
             [&](const Executor& executor) { kernels.weight_grads(dtype, call, plan, executor); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weight_grads(const Tensor& grad, const Tensor& x, const Tensor& z,
                                                        bool want_weight, bool want_weight_z, bool want_weight_x,
                                                        bool want_bias) {
  constexpr const char* op = "interaction_weight_grads";
  const CallShape shape = grads_shape(op, grad, x, z);
  const ProblemSize& p = shape.problem;
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  check_products(op, "x", p, want_weight);
  Tensor results[4] = {want_weight ? empty_like(x, shape, {p.out, p.context, p.width}) : nothing(x),
                       want_weight_z ? empty_like(x, shape, {p.out, p.context}) : nothing(x),
                       want_weight_x ? empty_like(x, shape, {p.out, p.width}) : nothing(x),
                       want_bias ? empty_like(x, shape, {p.out}) : nothing(x)};
  WeightGradsCall call{
      p, tensor_ref(grad, shape.grouped), tensor_ref(x, shape.grouped), tensor_ref(z, shape.grouped), {}, {}, {}, {}};
  OutputRef* slots[4] = {&call.weight, &call.weight_z, &call.weight_x, &call.bias};
  for (int t = 0; t < 4; ++t)
    if (results[t].numel() > 0) slots[t]->data = results[t].mutable_data_ptr();
  if (call.weight.data && materialises_weight_grads(dtype, p))
    materialised_weight_grads(dtype, &x, call);
  else
    run_weight_grads(dtype, {&x}, call);
  if (may_overflow(dtype) && call.weight.data) {
    // Inspects whichever has fewer elements: the gradient or its inputs.
    const bool finite = results[0].numel() < grad.numel() + x.numel() + z.numel() ? all_finite(results[0])
                                                                                  : products_fit({grad, x, z}, p.rows);
    if (!finite) {
      const auto exact = weight_grads(in_double(grad), in_double(x), in_double(z), true, false, false, false);
      replace_not_finite(results[0], std::get<0>(exact));
    }
  }
  return {results[0], results[1], results[2], results[3]};
}

// Operands of a call that is only measured: addresses stand for presence, and of matrices the strides count.
TensorRef present(int64_t row, int64_t col) {
  static const char nothing = 0;
  return {&nothing, 0, row, col};
}

// U or V of a plan query, whose major axis is known.
TensorRef matrix_of_query(bool wanted, bool k_major, bool n_major, int64_t features, int64_t out) {
  if (!wanted || features == 0) return {};
  return k_major ? present(features, 1) : n_major ? present(1, out) : present(2 * features, 2);
}

std::string cpu_isa() { return describe_isa(); }

// The terms of a plan query with x and z exchanged.
int64_t exchanged_terms(int64_t terms) {
  const auto moved = [&](int64_t bits, int shift) {
    return (terms & bits) << shift | (terms & bits << shift) >> shift;
  };
  return (terms & 9) | moved(2, 1) | moved(16, 1) | moved(64 | 128, 2);
}

// The plan of a primitive as "name=value;..." for sizes [G, B, Z, X, O], followed by the strides of weight [O, Z, X]
// unless it is contiguous. `terms` has a bit for each of weight,
// weight_z, weight_x and bias; for the input gradients, 16 for dx and 32 for dz. 64 and 128 say that weight_z is
// contiguous along the context and along the outputs; 256 and 512 say the same of weight_x along the width and along
// the outputs.
std::string cpu_interaction_plan(Text primitive, std::vector<int64_t> sizes, ScalarType type, int64_t terms) {
  constexpr const char* op = "cpu_interaction_plan";
  const std::vector<int64_t> strides = take_strides(sizes, 5);
  const ProblemSize given = interaction_problem_size(op, sizes, terms, 10);
  const bool placed_weight = terms & 1 && primitive != "weight_grads";
  const PlacedWeight placed = placed_weight ? weight_for_query(given, strides) : PlacedWeight{};
  const WeightLayout& layout = placed.layout;
  const ProblemSize p = exchanged(given, layout);
  if (layout.exchanged) terms = exchanged_terms(terms);
  const DType dtype = dtype_of(type, op, "dtype");
  const MulTraits traits = selected_kernels().mul_traits(dtype);
  const bool want[4] = {bool(terms & 1), bool(terms & 2), bool(terms & 4), bool(terms & 8)};
  const auto text = [&](const char* algorithm, int64_t scratch) {
    return std::string("algorithm=") + algorithm +
           ";scratch=" + std::to_string(has_result(p, primitive, terms) ? scratch : 0);
  };
  // Scratch of a product without W with sums of `first` and `second` elements, or 0 if linear_plan() has none for it.
  const auto linear = [&](int64_t out, int64_t first, int64_t second, Major major) -> int64_t {
    const auto plan = want[0] ? std::nullopt : linear_plan(p.groups, p.rows, out, first, second, major, traits);
    return plan ? workspace_size(*plan).bytes() : 0;
  };
  const bool k_major_z = terms & 64, n_major_z = terms & 128, k_major_x = terms & 256, n_major_x = terms & 512;
  const TensorRef weight_z = matrix_of_query(want[1], k_major_z, n_major_z, p.context, p.out),
                  weight_x = matrix_of_query(want[2], k_major_x, n_major_x, p.width, p.out);
  WeightRef weight = placed.ref;
  if (layout.exchanged) std::swap(weight.context, weight.width);
  if (primitive == "forward") {
    const ForwardPlan f = plan_forward(p, traits, want[0], want[1], want[2], layout);
    const char* order = f.order == Order::stream         ? "stream"
                        : f.order == Order::width_inside ? "width_inside"
                                                         : "context_inside";
    const WorkspaceSize size(f.tasks, f.operations, f.worker_bytes, f.partial_bytes);
    const int64_t direct =
        linear(p.out, want[1] * p.context, want[2] * p.width,
               major_of((!want[1] || !p.context || k_major_z) && (!want[2] || !p.width || k_major_x),
                        (!want[1] || !p.context || n_major_z) && (!want[2] || !p.width || n_major_x)));
    static constexpr const char* kElements[] = {"float64", "float32", "bfloat16", "float16"};
    const bool materialised = want[0] && materialises_forward(dtype, p, placed);
    WorkspaceNeeds needs;
    if (materialised) {
      const TensorRef rows = present(0, 1), bias = want[3] ? rows : TensorRef{};
      materialised_forward(dtype, nullptr, {p, rows, rows, weight, weight_z, weight_x, bias, {}}, &needs);
    }
    return text(materialised ? "materialised"
                : want[0]    ? order
                             : "linear",
                materialised ? needs.bytes
                : direct     ? direct
                             : size.bytes()) +
           ";order=" + order + ";element=" + kElements[int(selected_kernels().element(dtype))] +
           ";pair=" + std::to_string(traits.pair) + ";exchanged=" + std::to_string(layout.exchanged) +
           ";outputs_first=" + std::to_string(f.outputs_first) + ";lanes=" + (f.output_lanes ? "outputs" : "rows");
  }
  if (primitive == "input_grads") {
    if (want[0] && materialises_input_grads(dtype, p, placed)) {
      WorkspaceNeeds needs;
      const TensorRef rows = present(0, 1);
      static char result;
      const OutputRef dx{terms & 16 ? &result : nullptr}, dz{terms & 32 ? &result : nullptr};
      materialised_input_grads(dtype, nullptr, {p, rows, rows, rows, weight, weight_z, weight_x, dx, dz}, &needs);
      return text("materialised", needs.bytes);
    }
    const int64_t direct_x = terms & 16 && want[2] ? linear(p.width, p.out, 0, major_of(n_major_x, k_major_x)) : 0;
    const int64_t direct_z = terms & 32 && want[1] ? linear(p.context, p.out, 0, major_of(n_major_z, k_major_z)) : 0;
    const bool rest_x = terms & 16 && !direct_x, rest_z = terms & 32 && !direct_z;
    const InputGradsPlan d = plan_input_grads(p, traits, want[0], rest_x, rest_z, layout);
    const char* form = d.form == InputForm::stream ? "stream" : d.form == InputForm::split ? "split" : "fused";
    const WorkspaceSize size(d.tasks, d.operations, d.worker_bytes, d.partial_bytes);
    return text(want[0] ? form : "linear", std::max({direct_x, direct_z, rest_x || rest_z ? size.bytes() : 0}));
  }
  STD_TORCH_CHECK(primitive == "weight_grads", op, ": primitive: expected forward, input_grads or weight_grads, got '",
                  primitive, "'");
  // Only results that have elements are computed.
  const bool has[4] = {p.context > 0 && p.width > 0, p.context > 0, p.width > 0, true};
  bool computed[4], any = false;
  for (int t = 0; t < 4; ++t) any |= computed[t] = want[t] && has[t] && p.groups > 0 && p.out > 0;
  if (computed[0] && materialises_weight_grads(dtype, p)) {
    WorkspaceNeeds needs;
    const TensorRef rows = present(0, 1);
    static char result;
    OutputRef results[4] = {};
    for (int t = 0; t < 4; ++t)
      if (computed[t]) results[t].data = &result;
    materialised_weight_grads(dtype, nullptr, {p, rows, rows, rows, results[0], results[1], results[2], results[3]},
                              &needs);
    return text("materialised", needs.bytes);
  }
  const WeightGradsPlan w = plan_weight_grads(p, traits, selected_kernels().sum_traits(dtype), computed);
  const char* algorithm = !want[0] ? "linear" : w.outer ? "outer" : w.context_lanes ? "context_lanes" : "width_lanes";
  return text(algorithm, any ? workspace_size(w, computed).bytes() : 0);
}

}  // namespace

void forward_part(DType dtype, const WorkspaceSource& memory, const ForwardCall& call, const WeightLayout& layout) {
  if (call.weight.data || !try_linear(dtype, memory, call)) run_forward(dtype, memory, call, layout, {});
}

void input_grads_part(DType dtype, const WorkspaceSource& memory, const InputGradsCall& call,
                      const WeightLayout& layout) {
  call.weight.data ? run_input_grads(dtype, memory, call, layout) : run_linear_grads(dtype, memory, call);
}

void weight_grads_part(DType dtype, const WorkspaceSource& memory, const WeightGradsCall& call) {
  run_weight_grads(dtype, memory, call);
}

}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CPU, m) {
  m.impl("interaction", TORCH_BOX(&mi_kernels::unpacked_forward));
  m.impl("interaction_packed", TORCH_BOX(&mi_kernels::packed_forward));
  m.impl("interaction_input_grads", TORCH_BOX(&mi_kernels::input_grads));
  m.impl("interaction_weight_grads", TORCH_BOX(&mi_kernels::weight_grads));
}

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&mi_kernels::cpu_isa));
  m.impl("cpu_interaction_plan", TORCH_BOX(&mi_kernels::cpu_interaction_plan));
}
