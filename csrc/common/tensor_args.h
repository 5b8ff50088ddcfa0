// The arguments of a call: checked sizes, addresses and strides.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/checks.h"
#include "common/problem_size.h"
#include "common/tensor_ref.h"

namespace mi_kernels {

using Optional = std::optional<Tensor>;

// A weight that all groups share has a stride of 0 between groups.
inline TensorRef tensor_ref(const Tensor& t, bool grouped) {
  const int64_t lead = grouped ? 1 : 0;
  TensorRef ref;
  ref.data = t.const_data_ptr();
  ref.group = grouped ? t.stride(0) : 0;
  ref.row = t.stride(lead);
  ref.col = t.dim() > lead + 1 ? t.stride(lead + 1) : 0;
  return ref;
}

inline TensorRef tensor_ref(const Optional& t, bool grouped) {
  return t.has_value() ? tensor_ref(*t, grouped) : TensorRef{};
}

// The sizes of a call, and whether its tensors have a leading dimension of groups.
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

// `name_z`: the name of weight_z in the schema of the operation.
inline void check_weights(const char* op, const Tensor& x, const CallShape& shape, const Optional& weight,
                          const Optional& weight_z, const Optional& weight_x, const char* name_z = "weight_z") {
  const ProblemSize& p = shape.problem;
  check_products(op, "x", p, weight.has_value());
  if (weight.has_value()) check_sizes(op, "weight", *weight, x, p.groups, shape.grouped, {p.out, p.context, p.width});
  if (weight_z.has_value()) check_sizes(op, name_z, *weight_z, x, p.groups, shape.grouped, {p.out, p.context});
  if (weight_x.has_value()) check_sizes(op, "weight_x", *weight_x, x, p.groups, shape.grouped, {p.out, p.width});
}

// Checks the arguments of a forward pass; O is taken from the first weight there is.
inline CallShape forward_shape(const char* op, const Tensor& x, const Tensor& z, const Optional& weight,
                               const Optional& weight_z, const Optional& weight_x, const Optional& bias) {
  CallShape shape = input_shape(op, x, z);
  const int64_t lead = shape.grouped ? 1 : 0;
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
  shape.problem.out = first->size(lead);
  check_weights(op, x, shape, weight, weight_z, weight_x);
  if (bias.has_value()) check_sizes(op, "bias", *bias, x, shape.problem.groups, shape.grouped, {shape.problem.out});
  return shape;
}

// The same for gradients, with O taken from grad.
inline CallShape grads_shape(const char* op, const Tensor& grad, const Tensor& x, const Tensor& z) {
  CallShape shape = input_shape(op, x, z);
  check_defined(op, "grad", grad);
  shape.problem.out = grad.dim() == x.dim() ? grad.size(grad.dim() - 1) : 0;
  check_sizes(op, "grad", grad, x, shape.problem.groups, shape.grouped, {shape.problem.rows, shape.problem.out});
  return shape;
}

}  // namespace mi_kernels
