// Tensors as the kernels take them: checked sizes, strided operands.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/checks.h"
#include "common/problem_size.h"
#include "common/tensor_ref.h"

namespace mi_kernels {

using Optional = std::optional<Tensor>;

// The three dimensions of an operand; a shared weight has no groups and a stride of 0 between them.
inline TensorRef tensor_ref(const Tensor& t, bool grouped) {
  const int64_t lead = grouped ? 1 : 0;
  TensorRef o;
  o.data = t.const_data_ptr();
  o.group = grouped ? t.stride(0) : 0;
  o.row = t.stride(lead);
  o.col = t.dim() > lead + 1 ? t.stride(lead + 1) : 0;
  return o;
}

inline TensorRef tensor_ref(const Optional& t, bool grouped) {
  return t.has_value() ? tensor_ref(*t, grouped) : TensorRef{};
}

// W with its last three dimensions contiguous: itself where it is so, else a copy (of one group where it is
// the same for all groups).
inline Tensor with_contiguous_groups(const Tensor& weight, bool grouped) {
  const int64_t d = grouped ? 1 : 0;
  int64_t expected = 1;
  bool contiguous = true;
  for (int64_t axis = d + 2; axis >= d; --axis) {
    contiguous = contiguous && (weight.size(axis) == 1 || weight.stride(axis) == expected);
    expected *= weight.size(axis);
  }
  if (contiguous) return weight;
  if (grouped && weight.size(0) > 1 && weight.stride(0) == 0)
    return torch::stable::contiguous(torch::stable::narrow(const_cast<Tensor&>(weight), 0, 0, 1));
  return torch::stable::contiguous(weight);
}

inline TensorRef weight_ref(const Tensor& weight, bool grouped) {
  TensorRef o;
  o.data = weight.const_data_ptr();
  o.group = grouped && weight.size(0) > 1 ? weight.stride(0) : 0;
  return o;
}

struct CallShape {
  bool grouped;
  ProblemSize problem;
};

inline CallShape input_shape(const char* op, const Tensor& x, const Tensor& z) {
  check_defined(op, "x", x);
  check_defined(op, "z", z);
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, op, ": x: expected 2 or 3 dimensions, got ", x.dim());
  const bool grouped = x.dim() == 3;
  const int64_t lead = grouped ? 1 : 0, groups = grouped ? x.size(0) : 1;
  ProblemSize p{groups, x.size(lead), 0, x.size(lead + 1), 0};
  p.context = z.dim() == x.dim() ? z.size(lead + 1) : 0;
  check_sizes(op, "z", z, x, groups, grouped, {p.rows, p.context});
  return {grouped, p};
}

// `name_z`: what the operation calls U.
inline void check_weights(const char* op, const Tensor& x, const CallShape& a, const Optional& weight,
                          const Optional& weight_z, const Optional& weight_x, const char* name_z = "weight_z") {
  const ProblemSize& p = a.problem;
  check_products(op, "x", p, weight.has_value());
  if (weight.has_value()) check_sizes(op, "weight", *weight, x, p.groups, a.grouped, {p.out, p.context, p.width});
  if (weight_z.has_value()) check_sizes(op, name_z, *weight_z, x, p.groups, a.grouped, {p.out, p.context});
  if (weight_x.has_value()) check_sizes(op, "weight_x", *weight_x, x, p.groups, a.grouped, {p.out, p.width});
}

// Checks the arguments of a forward pass; O is read from whichever weight there is.
inline CallShape forward_shape(const char* op, const Tensor& x, const Tensor& z, const Optional& weight,
                               const Optional& weight_z, const Optional& weight_x, const Optional& bias) {
  CallShape a = input_shape(op, x, z);
  const int64_t lead = a.grouped ? 1 : 0;
  const Optional* const weights[] = {&weight, &weight_z, &weight_x, &bias};
  constexpr const char* kNames[] = {"weight", "weight_z", "weight_x", "bias"};
  constexpr int64_t kDimensions[] = {3, 2, 2, 1};
  int t = 0;
  while (t < 4 && !weights[t]->has_value()) ++t;
  STD_TORCH_CHECK(t < 4, op, ": weight: expected at least one of weight, weight_z, weight_x and bias, got none");
  const Optional& first = *weights[t];
  check_defined(op, kNames[t], *first);
  STD_TORCH_CHECK(first->dim() == lead + kDimensions[t], op, ": ", kNames[t], ": expected ", lead + kDimensions[t],
                  " dimensions, got ", first->dim());
  a.problem.out = first->size(lead);
  check_weights(op, x, a, weight, weight_z, weight_x);
  if (bias.has_value()) check_sizes(op, "bias", *bias, x, a.problem.groups, a.grouped, {a.problem.out});
  return a;
}

// The same of gradients, where O is that of grad.
inline CallShape grads_shape(const char* op, const Tensor& grad, const Tensor& x, const Tensor& z) {
  CallShape a = input_shape(op, x, z);
  check_defined(op, "grad", grad);
  a.problem.out = grad.dim() == x.dim() ? grad.size(grad.dim() - 1) : 0;
  check_sizes(op, "grad", grad, x, a.problem.groups, a.grouped, {a.problem.rows, a.problem.out});
  return a;
}

}  // namespace mi_kernels
