// The arguments of normalisation with modulation: checks, and the layout of results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "common/allocate.h"
#include "common/modulate_axes.h"
#include "common/tensor_args.h"

namespace mi_kernels {

struct __attribute__((visibility("hidden"))) NormArguments {
  Tensor x;
  Optional h, gate, scale, shift, weight, bias;
  int64_t dim, groups;
  bool center;
  ScaleFunction function;
};

// Checks what both operations have in common.
inline void check_norm(const char* op, const NormArguments& a) {
  const Tensor& x = a.x;
  check_input(op, x);
  const std::pair<const char*, const Optional&> others[] = {
      {"h", a.h}, {"gate", a.gate}, {"scale", a.scale}, {"shift", a.shift}, {"weight", a.weight}, {"bias", a.bias}};
  for (const auto& [name, t] : others)
    if (t) check_operand(op, name, *t, x);
  STD_TORCH_CHECK(0 <= a.dim && a.dim < x.dim(), op, ": dim: expected a dimension of x from 0 to ", x.dim() - 1,
                  ", got ", a.dim);
  const int64_t channels = x.size(a.dim);
  STD_TORCH_CHECK(a.groups >= 1 && channels % a.groups == 0, op,
                  ": groups: expected a positive divisor of C=", channels, ", got ", a.groups);
  if (a.h) check_same_size(op, "h", *a.h, x);
  STD_TORCH_CHECK(a.h || !a.gate, op, ": h: expected a tensor beside gate, got None");
  const Tensor* first = nullptr;
  const auto check_channels = [&](const char* name, const Optional& t, bool context) {
    if (!t) return;
    for (int64_t d = 0; d < x.dim(); ++d) {
      const bool leading = context && d < a.dim;
      const int64_t size = d == a.dim ? channels : !leading ? 1 : first ? first->size(d) : t->size(d);
      const char* whose = d == a.dim ? " (the channels)" : leading ? " (that of the other contexts)" : "";
      STD_TORCH_CHECK(t->size(d) == size, op, ": ", name, ": expected size ", size, whose, " in dimension ", d,
                      ", got ", t->size(d));
    }
    if (context && !first) first = &*t;
  };
  check_channels("gate", a.gate, true);
  check_channels("scale", a.scale, true);
  check_channels("shift", a.shift, true);
  check_channels("weight", a.weight, false);
  check_channels("bias", a.bias, false);
}

inline void check_norm_grads(const char* op, const NormArguments& a, const Tensor& grad, const Optional& grad_x,
                             const Optional& mean, const Tensor& rstd, bool want_h, bool want_gate, bool want_scale,
                             bool want_shift, bool want_weight, bool want_bias) {
  const auto check_like = [&](const char* name, const Tensor& t) {
    check_operand(op, name, t, a.x);
    check_same_size(op, name, t, a.x);
  };
  check_like("grad", grad);
  if (grad_x) check_like("grad_x", *grad_x);
  const auto check_statistic = [&](const char* name, const Tensor& t) {
    check_defined(op, name, t);
    const bool wide = dtype_of(a.x.scalar_type(), op, "x") == DType::f64;
    STD_TORCH_CHECK(dtype_of(t.scalar_type(), op, name) == (wide ? DType::f64 : DType::f32), op, ": ", name,
                    ": expected ", wide ? "float64" : "float32", ", the accumulation dtype of x");
    STD_TORCH_CHECK(
        t.is_cpu() == a.x.is_cpu() && t.is_cuda() == a.x.is_cuda() && t.get_device_index() == a.x.get_device_index(),
        op, ": ", name, ": expected the device of x");
    STD_TORCH_CHECK(t.dim() == a.dim + 1, op, ": ", name, ": expected ", a.dim + 1, " dimensions, got ", t.dim());
    for (int64_t d = 0; d <= a.dim; ++d)
      STD_TORCH_CHECK(t.size(d) == (d < a.dim ? a.x.size(d) : a.groups), op, ": ", name, ": expected size ",
                      d < a.dim ? a.x.size(d) : a.groups, " in dimension ", d, ", got ", t.size(d));
  };
  STD_TORCH_CHECK(!a.center || mean, op, ": mean: expected a tensor where the mean is subtracted, got None");
  if (mean) check_statistic("mean", *mean);
  check_statistic("rstd", rstd);
  const std::pair<const char*, bool> missing[] = {{"gate", (want_h || want_gate) && !a.gate},
                                                  {"scale", want_scale && !a.scale},
                                                  {"shift", want_shift && !a.shift},
                                                  {"weight", want_weight && !a.weight},
                                                  {"bias", want_bias && !a.bias}};
  for (const auto& [name, is_missing] : missing)
    STD_TORCH_CHECK(!is_missing, op, ": ", name,
                    ": expected a tensor, as a gradient that needs it is wanted, got None");
}

// Whether the dimensions from `dim` on follow each other in memory, the channels at `dim` first or last.
inline bool follow_each_other(const Tensor& t, int64_t dim, bool channels_last) {
  int64_t expected = 1;
  const auto next = [&](int64_t d) {
    const bool follows = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return follows;
  };
  if (channels_last && !next(dim)) return false;
  for (int64_t d = t.dim() - 1; d > dim; --d)
    if (!next(d)) return false;
  return channels_last || next(dim);
}

inline bool has_channels_last(const Tensor& x, int64_t dim) {
  return !follow_each_other(x, dim, false) && follow_each_other(x, dim, true);
}

// A new tensor of the size of x: contiguous, or with the channels last.
inline Tensor allocate_in_layout(const Tensor& x, int64_t dim, bool channels_last) {
  Sizes sizes = sizes_of(x);
  if (!channels_last) return allocate(x, sizes);
  sizes.erase(sizes.begin() + dim);
  sizes.push_back(x.size(dim));
  Tensor result = allocate(x, sizes);
  for (int64_t d = x.dim() - 1; d > dim; --d) result = torch::stable::transpose(result, d - 1, d);
  return result;
}

// The tensor, or a copy whose dimensions from `dim` on follow each other.
inline Tensor in_layout(const Tensor& t, int64_t dim, bool channels_last) {
  if (follow_each_other(t, dim, channels_last)) return t;
  Tensor copy = allocate_in_layout(t, dim, channels_last);
  torch::stable::copy_(copy, t);
  return copy;
}

// [*x.shape[:dim], groups] in the accumulation dtype; nothing if it is not wanted.
inline Tensor allocate_statistic(const Tensor& x, int64_t dim, int64_t groups, bool wanted) {
  Sizes sizes{0};
  if (wanted) {
    sizes = sizes_of(x);
    sizes.resize(size_t(dim));
    sizes.push_back(groups);
  }
  const bool wide = x.scalar_type() == torch::headeronly::ScalarType::Double;
  int32_t type = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  return allocate(x, sizes.data(), int64_t(sizes.size()), &type);
}

}  // namespace mi_kernels
