// The product of two linear forms on the CPU, y = f(x A^T + a) h(z C^T + c) summed over ranks: one pass where outputs
// are in the lanes; else both forms, a block of rows at a time unless they are kept, and then their product.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/allocate.h"
#include "common/registration.h"
#include "common/tensor_args.h"
#include "common/text.h"
#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/interaction.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/linear_call.h"
#include "cpu/dispatch/plan.h"
#include "cpu/dispatch/workspace.h"

namespace mi_kernels {
namespace {

// Elements of both forms that are held at a time: they stay in the cache. But the weights are packed for each block of
// rows.
constexpr int64_t kBlockElements = 1 << 19, kFewestBlockRows = 256;

// The length of a sum beyond which one pass does not take more rows to pay off: as fast at 256 rows of 512 and of 1024
// features, 0.8 to 0.94 as fast at 128 (float32 and bfloat16).
constexpr int64_t kLongestSum = 320;

struct Sizes {
  int64_t rows, out, ranks, width, context;
  int64_t features() const { return out * ranks; }
  int64_t block_rows() const {  // evened out over the blocks
    const int64_t most = std::max(kBlockElements / std::max<int64_t>(2 * features(), 1), kFewestBlockRows);
    return std::max<int64_t>(ceil_div(rows, std::max<int64_t>(ceil_div(rows, most), 1)), 1);
  }
};

// x, z, which may be x, and the weights of both forms.
struct Arguments {
  const Tensor &x, &z, &weight_x, &weight_z;
  const Optional &bias_x, &bias_z;
};

Sizes checked(const Arguments& a, int64_t ranks) {
  constexpr const char* op = "dual_linear";
  const std::pair<const char*, const Tensor*> all[] = {
      {"x", &a.x}, {"z", &a.z}, {"weight_x", &a.weight_x}, {"weight_z", &a.weight_z}};
  for (const auto& [name, tensor] : all) {
    check_defined(op, name, *tensor);
    STD_TORCH_CHECK(tensor->dim() == 2, op, ": ", name, ": expected 2 dimensions, got ", tensor->dim());
  }
  STD_TORCH_CHECK(a.x.is_cpu(), op, ": x: expected a tensor on the CPU");
  STD_TORCH_CHECK(ranks > 0, op, ": ranks: expected at least 1, got ", ranks);
  const int64_t features = a.weight_x.size(0);
  STD_TORCH_CHECK(features % ranks == 0, op, ": weight_x: expected a multiple of ranks=", ranks, " rows, got ",
                  features);
  const Sizes s{a.x.size(0), features / ranks, ranks, a.x.size(1), a.z.size(1)};
  check_sizes(op, "z", a.z, a.x, 1, false, {s.rows, s.context});
  check_sizes(op, "weight_x", a.weight_x, a.x, 1, false, {features, s.width});
  check_sizes(op, "weight_z", a.weight_z, a.x, 1, false, {features, s.context});
  if (a.bias_x.has_value()) check_sizes(op, "bias_x", *a.bias_x, a.x, 1, false, {features});
  if (a.bias_z.has_value()) check_sizes(op, "bias_z", *a.bias_z, a.x, 1, false, {features});
  check_products(op, "x", {1, s.rows, s.context, s.width, features}, false);
  return s;
}

bool is_one_pass(const Sizes& s, bool k_major, const MulTraits& m) {
  const int64_t shorter = std::min(s.width, s.context), longer = std::max(s.width, s.context);
  return shorter > 0 && outputs_in_lanes(s.rows, s.out, std::min(longer, kLongestSum), k_major, m);
}

WorkspaceSize workspace_size(const LinearPlan& plan) { return {plan.tasks, plan.operations, plan.worker_bytes, 0}; }

LinearPlan linear_plan(const Sizes& s, const MulTraits& m) {
  return plan_dual_linear(s.rows, s.out, s.ranks, {s.width, s.context}, m);
}

bool are_k_major(const Arguments& a) { return a.weight_x.stride(1) == 1 || a.weight_z.stride(1) == 1; }

TensorRef from_row(TensorRef rows, int64_t row, int64_t element_bytes) {
  rows.data = static_cast<const char*>(rows.data) + row * rows.row * element_bytes;
  return rows;
}

// One form of `count` rows.
void form(DType dtype, const Tensor& x, const Tensor& weight, const Optional& bias, int64_t row, int64_t count,
          void* result) {
  const TensorRef rows = from_row(tensor_ref(x, false), row, int64_t(x.element_size()));
  ForwardCall call{{1, count, 0, x.size(1), weight.size(0)},
                   rows,
                   {},
                   {},
                   {},
                   tensor_ref(weight, false),
                   tensor_ref(bias, false),
                   {result}};
  forward_part(dtype, {&x}, call, {});
}

void run_dual(DType dtype, const Tensor& like, const DualCall& call) {
  const int64_t elements = call.rows * call.out * call.dual.ranks;
  // An activation and its derivative are some ten operations.
  const Workspace workspace(like, {ceil_div(elements, kModulateTask), 16 * elements, 0, 0});
  selected_kernels().dual(dtype, call, workspace.executor);
}

std::tuple<Tensor, Tensor, Tensor> dual_linear(const Tensor& x, const Optional& given_z, const Tensor& weight_x,
                                               const Tensor& weight_z, const Optional& bias_x, const Optional& bias_z,
                                               Text activation_x, Text activation_z, int64_t ranks, bool keep) {
  constexpr const char* op = "dual_linear";
  const Arguments a{x, given_z.has_value() ? *given_z : x, weight_x, weight_z, bias_x, bias_z};
  const Sizes s = checked(a, ranks);
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  DualEpilogue dual{ranks, activation_of(activation_x, op, false, "activation_x"),
                    activation_of(activation_z, op, false, "activation_z")};
  Tensor y = on_huge_pages(allocate(x, {s.rows, s.out}));
  const auto kept = [&] { return on_huge_pages(allocate(x, {keep ? s.rows : 0, s.features()})); };
  Tensor p = kept(), q = kept();
  if (y.numel() == 0) return {y, p, q};
  const MulTraits traits = selected_kernels().mul_traits(dtype);
  if (is_one_pass(s, are_k_major(a), traits)) {
    if (keep) dual.p.data = p.mutable_data_ptr(), dual.q.data = q.mutable_data_ptr();
    const LinearPlan plan = linear_plan(s, traits);
    LinearCall call{1,
                    s.rows,
                    s.out,
                    {linear_term(tensor_ref(x, false), tensor_ref(weight_x, false), s.width), {}},
                    tensor_ref(bias_x, false),
                    {y.mutable_data_ptr()}};
    call.gate.shift_bias = tensor_ref(bias_z, false);
    call.shift = linear_term(tensor_ref(a.z, false), tensor_ref(weight_z, false), s.context);
    call.dual = dual;
    const Workspace workspace(x, workspace_size(plan));
    selected_kernels().linear(dtype, call, plan, workspace.executor);
    return {y, p, q};
  }
  const int64_t step = keep ? s.rows : s.block_rows(), element = int64_t(x.element_size());
  Tensor both = allocate(x, {keep ? 0 : 2, step, s.features()});
  for (int64_t row = 0; row < s.rows; row += step) {
    const int64_t count = std::min(step, s.rows - row);
    char* block = static_cast<char*>(both.mutable_data_ptr());
    dual.p.data = keep ? p.mutable_data_ptr() : block;
    dual.q.data = keep ? q.mutable_data_ptr() : block + step * s.features() * element;
    form(dtype, x, weight_x, bias_x, row, count, dual.p.data);
    form(dtype, a.z, weight_z, bias_z, row, count, dual.q.data);
    char* result = static_cast<char*>(y.mutable_data_ptr()) + row * s.out * element;
    run_dual(dtype, x, {count, s.out, dual, {}, {result}});
  }
  return {y, p, q};
}

Tensor dual_linear_grads(const Tensor& grad, const Tensor& p, const Tensor& q, Text activation_x, Text activation_z,
                         int64_t ranks) {
  constexpr const char* op = "dual_linear_grads";
  check_defined(op, "grad", grad);
  STD_TORCH_CHECK(grad.dim() == 2, op, ": grad: expected 2 dimensions, got ", grad.dim());
  STD_TORCH_CHECK(grad.is_cpu(), op, ": grad: expected a tensor on the CPU");
  STD_TORCH_CHECK(ranks > 0, op, ": ranks: expected at least 1, got ", ranks);
  const int64_t rows = grad.size(0), out = grad.size(1), features = out * ranks;
  check_sizes(op, "p", p, grad, 1, false, {rows, features});
  check_sizes(op, "q", q, grad, 1, false, {rows, features});
  const DType dtype = dtype_of(grad.scalar_type(), op, "grad");
  DualEpilogue dual{ranks, activation_of(activation_x, op, false, "activation_x"),
                    activation_of(activation_z, op, false, "activation_z")};
  Tensor result = on_huge_pages(allocate(grad, {rows, 2 * features}));
  if (result.numel() == 0) return result;
  const Tensor in_rows[] = {torch::stable::contiguous(p), torch::stable::contiguous(q)};
  dual.p.data = const_cast<void*>(in_rows[0].const_data_ptr());
  dual.q.data = const_cast<void*>(in_rows[1].const_data_ptr());
  run_dual(dtype, grad, {rows, out, dual, tensor_ref(grad, false), {result.mutable_data_ptr()}});
  return result;
}

// Algorithm and scratch bytes for sizes [B, X, Z, O, ranks].
std::string cpu_dual_linear_plan(std::vector<int64_t> sizes, torch::headeronly::ScalarType type, bool k_major,
                                 bool keep) {
  constexpr const char* op = "cpu_dual_linear_plan";
  STD_TORCH_CHECK(sizes.size() == 5, op, ": sizes: expected [B, X, Z, O, ranks], got ", sizes.size(), " numbers");
  for (const int64_t size : sizes) STD_TORCH_CHECK(size >= 0, op, ": sizes: expected no negative number, got ", size);
  STD_TORCH_CHECK(sizes[4] > 0, op, ": sizes: expected at least 1 rank, got ", sizes[4]);
  const Sizes s{sizes[0], sizes[3], sizes[4], sizes[1], sizes[2]};
  const DType dtype = dtype_of(type, op, "dtype");
  const MulTraits traits = selected_kernels().mul_traits(dtype);
  const bool one_pass = is_one_pass(s, k_major, traits);
  int64_t scratch = 0;
  if (s.rows * s.out > 0)
    scratch = one_pass ? workspace_size(linear_plan(s, traits)).bytes()
              : keep   ? 0
                       : 2 * s.block_rows() * s.features() * storage_bytes(dtype);
  return std::string("algorithm=") + (one_pass ? "one_pass" : "blocks") + ";scratch=" + std::to_string(scratch);
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CPU, m) {
  m.impl("dual_linear", TORCH_BOX(&mi_kernels::dual_linear));
  m.impl("dual_linear_grads", TORCH_BOX(&mi_kernels::dual_linear_grads));
}

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_dual_linear_plan", TORCH_BOX(&mi_kernels::cpu_dual_linear_plan));
}
