// Small calls of the form without W and U, y = V x + c, and its gradients. The views and empty operands that turn them
// into calls of the primitives take longer than the products, so these take tensors as they are.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/allocate.h"
#include "common/registration.h"
#include "common/tensor_args.h"
#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/interaction.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/linear_call.h"
#include "cpu/dispatch/plan.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels {
namespace {

// The sizes of inputs [X] or [B, X], or with groups of weights [G, X], one row each, or [G, B, X]; O is not known yet.
ProblemSize input_sizes(const char* op, const Tensor& x, bool grouped) {
  check_defined(op, "x", x);
  const int64_t lead = grouped ? 1 : 0, last = x.dim() - 1;
  STD_TORCH_CHECK(last == lead || last == lead + 1, op, ": x: expected ", lead + 1, " or ", lead + 2,
                  " dimensions, got ", x.dim());
  STD_TORCH_CHECK(x.is_cpu(), op, ": x: expected a tensor on the CPU");
  return {grouped ? x.size(0) : 1, last > lead ? x.size(lead) : 1, 0, x.size(last), 0};
}

// Rows of inputs or of gradients, as the kernels take them.
TensorRef rows_ref(const Tensor& t, bool grouped) {
  const int64_t last = t.dim() - 1, col = t.stride(last);
  const bool has_rows = last > (grouped ? 1 : 0);
  return {t.const_data_ptr(), grouped ? t.stride(0) : 0, has_rows ? t.stride(last - 1) : t.size(last) * col, col};
}

// [..., features] for the rows of `like`.
Tensor allocate_rows(const Tensor& like, int64_t features) {
  int64_t sizes[3] = {};
  const int64_t last = like.dim() - 1;
  for (int64_t d = 0; d < last; ++d) sizes[d] = like.size(d);
  sizes[last] = features;
  return allocate(like, sizes, last + 1);
}

// [(G,) sizes...], or nothing where it is not wanted.
Tensor allocate_weight(const Tensor& like, bool want, bool grouped, std::initializer_list<int64_t> group_and_sizes) {
  const auto from = group_and_sizes.begin() + !grouped;
  return want ? allocate(like, from, group_and_sizes.end() - from) : allocate(like, {0});
}

void set_data(OutputRef& ref, const Tensor& result) {
  if (result.numel() > 0) ref.data = result.mutable_data_ptr();
}

// Whether each group, or row, has a weight of its own.
bool is_grouped(const char* op, const Tensor& weight) {
  const int64_t dims = weight.dim();
  STD_TORCH_CHECK(dims == 2 || dims == 3, op, ": weight: expected 2 or 3 dimensions, got ", dims);
  return dims == 3;
}

Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias) {
  constexpr const char* op = "cpu_linear";
  check_defined(op, "weight", weight);
  const bool grouped = is_grouped(op, weight);
  ProblemSize p = input_sizes(op, x, grouped);
  p.out = weight.size(weight.dim() - 2);
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  check_sizes(op, "weight", weight, x, p.groups, grouped, {p.out, p.width});
  if (bias.has_value()) check_sizes(op, "bias", *bias, x, p.groups, grouped, {p.out});
  check_products(op, "x", p, false);
  Tensor y = allocate_rows(x, p.out);
  if (p.groups * p.rows * p.out == 0) return y;
  ForwardCall call{p, rows_ref(x, grouped), {}, {}, {}, tensor_ref(weight, grouped), tensor_ref(bias, grouped), {}};
  set_data(call.y, y);
  forward_part(dtype, {&x}, call, {});
  return y;
}

// x V^T + addend for an addend whose rows are contiguous, in one pass.
Tensor linear_add(const Tensor& x, const Tensor& weight, const Tensor& addend) {
  constexpr const char* op = "cpu_linear_add";
  check_defined(op, "weight", weight);
  check_defined(op, "addend", addend);
  const bool grouped = is_grouped(op, weight);
  ProblemSize p = input_sizes(op, x, grouped);
  STD_TORCH_CHECK(x.dim() == (grouped ? 3 : 2), op, ": x: expected ", grouped ? 3 : 2, " dimensions, got ", x.dim());
  p.out = weight.size(weight.dim() - 2);
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  check_sizes(op, "weight", weight, x, p.groups, grouped, {p.out, p.width});
  check_sizes(op, "addend", addend, x, p.groups, grouped, {p.rows, p.out});
  STD_TORCH_CHECK(p.width > 0, op, ": x: expected at least one feature, got none");
  STD_TORCH_CHECK(p.out <= 1 || addend.stride(addend.dim() - 1) == 1, op, ": addend: expected contiguous rows");
  check_products(op, "x", p, false);
  Tensor y = on_huge_pages(allocate_rows(x, p.out));
  if (y.numel() == 0) return y;
  LinearCall call{p.groups, p.rows,
                  p.out,    {linear_term(rows_ref(x, grouped), tensor_ref(weight, grouped), p.width), {}},
                  {},       {y.mutable_data_ptr()}};
  call.addend = rows_ref(addend, grouped);
  const Kernels& kernels = selected_kernels();
  const LinearPlan plan = plan_linear(p.groups, p.rows, p.out, {p.width, 0, 0}, false, kernels.mul_traits(dtype));
  const Workspace workspace(x, {plan.tasks, plan.operations, plan.worker_bytes, 0});
  kernels.linear(dtype, call, plan, workspace.executor);
  return y;
}

// dx, dV and dc; the weight is needed for dx alone. With `one`, x has one more feature, which is 1: dV has a column for
// it.
std::tuple<Tensor, Tensor, Tensor> linear_grads(const Tensor& grad, const Tensor& x, const Optional& weight,
                                                bool want_x, bool want_weight, bool want_bias, bool one) {
  constexpr const char* op = "cpu_linear_grads";
  check_defined(op, "grad", grad);
  check_defined(op, "x", x);
  const bool grouped = weight.has_value() ? is_grouped(op, *weight) : x.dim() == 3;
  ProblemSize p = input_sizes(op, x, grouped);
  STD_TORCH_CHECK(grad.dim() == x.dim(), op, ": grad: expected ", x.dim(), " dimensions, got ", grad.dim());
  p.out = grad.size(grad.dim() - 1);
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  switch (x.dim()) {
    case 1: check_sizes(op, "grad", grad, x, 1, false, {p.out}); break;
    case 2: check_sizes(op, "grad", grad, x, 1, false, {x.size(0), p.out}); break;
    default: check_sizes(op, "grad", grad, x, p.groups, true, {p.rows, p.out});
  }
  STD_TORCH_CHECK(weight.has_value() || !want_x, op, ": weight: expected a tensor, as want_x is true, got None");
  if (weight.has_value()) check_sizes(op, "weight", *weight, x, p.groups, grouped, {p.out, p.width});
  check_products(op, "x", p, false);
  Tensor dx = want_x ? allocate_rows(x, p.width) : allocate(x, {0});
  Tensor dweight = allocate_weight(x, want_weight, grouped, {p.groups, p.out, p.width + one});
  Tensor dbias = allocate_weight(x, want_bias, grouped, {p.groups, p.out});
  const TensorRef grad_rows = rows_ref(grad, grouped), x_rows = rows_ref(x, grouped);
  if (dx.numel() > 0) {
    InputGradsCall call{p, grad_rows, x_rows, {}, {}, {}, tensor_ref(weight, grouped), {}, {}};
    set_data(call.dx, dx);
    input_grads_part(dtype, {&x}, call, {});
  }
  WeightGradsCall call{p, grad_rows, x_rows, {}, {}, {}, {}, {}};
  set_data(call.weight_x, dweight);
  set_data(call.bias, dbias);
  call.one = one;
  weight_grads_part(dtype, {&x}, call);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CPU, m) {
  m.impl("cpu_linear", TORCH_BOX(&mi_kernels::linear));
  m.impl("cpu_linear_add", TORCH_BOX(&mi_kernels::linear_add));
  m.impl("cpu_linear_grads", TORCH_BOX(&mi_kernels::linear_grads));
}
