// The operands of a modulation: checks, the axes that are left when those which follow each other in memory have become
// one, and the passes of the gradients.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/modulate_operands.h"

namespace mi_kernels {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline Sizes strides_of(const Tensor& t) {
  Sizes strides;
  for (int64_t d = 0; d < t.dim(); ++d) strides.push_back(t.size(d) == 1 ? 0 : t.stride(d));
  return strides;
}

inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t next = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = sizes[d] == 1 ? 0 : next;
    next *= sizes[d];
  }
  return strides;
}

struct KindAxis : Axis {
  bool kept;
};

// The axes of x in the order in which `layout` lies in memory, the innermost last; axes that every operand walks
// as one are one. `kept` says, for each dimension, on which side of a sum it is.
inline std::vector<KindAxis> merged_axes(const Tensor& x, const Sizes& layout, const std::vector<Sizes>& strides,
                                         const std::vector<bool>& kept) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return layout[a] > layout[b]; });
  std::vector<KindAxis> axes;
  for (const int64_t d : order) {
    KindAxis axis{};
    axis.size = x.size(d);
    axis.kept = kept[d];
    for (int o = 0; o < kOperands; ++o) axis.stride[o] = strides[o].empty() ? 0 : strides[o][d];
    bool merges = !axes.empty() && axes.back().kept == axis.kept;
    for (int o = 0; merges && o < kOperands; ++o) merges = axes.back().stride[o] == axis.stride[o] * axis.size;
    if (merges) {
      axis.size *= axes.back().size;
      axes.pop_back();
    }
    axes.push_back(axis);
  }
  if (axes.empty()) axes.push_back({{1, {}}, true});
  STD_TORCH_CHECK(int64_t(axes.size()) <= kMaxAxes, "modulate: x: expected at most ", kMaxAxes,
                  " dimensions that do not follow each other in memory, got ", axes.size());
  return axes;
}

inline void check_input(const char* op, const Tensor& x) {
  check_defined(op, "x", x);
  dtype_of(x.scalar_type(), op, "x");
  STD_TORCH_CHECK(in_range({x.numel()}), op, ": x: expected at most 2^53 elements, got ", x.numel());
}

inline void check_operand(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_defined(op, name, t);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.is_cpu() == x.is_cpu() && t.is_cuda() == x.is_cuda() &&
                      t.get_device_index() == x.get_device_index(),
                  op, ": ", name, ": expected dtype and device of x");
  STD_TORCH_CHECK(t.dim() == x.dim(), op, ": ", name, ": expected ", x.dim(), " dimensions, got ", t.dim());
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(t.size(d) == x.size(d) || t.size(d) == 1, op, ": ", name, ": expected size ", x.size(d),
                    " or 1 in dimension ", d, ", got ", t.size(d));
}

// Checks the arguments of modulate_grads; returns the size of scale.
inline Sizes check_grads(const char* op, const Tensor& grad, const Tensor& x, const Tensor& scale, bool want_shift,
                         const Sizes& shift_size) {
  check_input(op, x);
  check_operand(op, "scale", scale, x);
  check_operand(op, "grad", grad, x);
  Sizes scale_size;
  for (int64_t d = 0; d < x.dim(); ++d) {
    scale_size.push_back(scale.size(d));
    STD_TORCH_CHECK(grad.size(d) == x.size(d), op, ": grad: expected size ", x.size(d), " in dimension ", d);
    STD_TORCH_CHECK(!want_shift || (int64_t(shift_size.size()) == x.dim() &&
                                    (shift_size[size_t(d)] == x.size(d) || shift_size[size_t(d)] == 1)),
                    op, ": shift_size: expected sizes of x or 1");
  }
  return scale_size;
}

inline ModulateOperands modulate_operands(const Tensor& y, const Tensor& x, const Tensor& scale,
                                          const std::optional<Tensor>& shift, Activation activation, double offset) {
  const Sizes layout = strides_of(y);
  const std::vector<Sizes> strides = {
      strides_of(x), strides_of(scale), shift.has_value() ? strides_of(*shift) : Sizes{}, layout, {}};
  const auto axes = merged_axes(x, layout, strides, std::vector<bool>(size_t(x.dim()), true));
  ModulateOperands m{};
  m.axes = int64_t(axes.size()) - 1;
  m.rows = 1;
  for (int64_t a = 0; a < m.axes; ++a) {
    m.outer[a] = axes[size_t(a)];
    m.rows *= axes[size_t(a)].size;
  }
  m.inner = axes.back();
  m.x = x.const_data_ptr();
  m.scale = scale.const_data_ptr();
  m.shift = shift.has_value() ? shift->const_data_ptr() : nullptr;
  m.y = y.mutable_data_ptr();
  m.activation = activation;
  m.offset = offset;
  return m;
}

// Over one pattern of kept and reduced dimensions, that of `pattern`; null where not wanted.
inline ModulateGradsOperands modulate_grads_operands(const Tensor* dx, const Tensor* dscale, const Tensor* dshift,
                                                     const Sizes& pattern, const Tensor& grad, const Tensor& x,
                                                     const Tensor& scale, Activation activation, double offset) {
  std::vector<bool> kept;
  for (int64_t d = 0; d < x.dim(); ++d) kept.push_back(pattern[size_t(d)] == x.size(d));
  const Sizes layout = dx ? strides_of(*dx) : strides_of(grad);
  const std::vector<Sizes> strides = {strides_of(x), dx || dscale ? strides_of(scale) : Sizes{},
                                      contiguous_strides(pattern), dx ? layout : Sizes{}, strides_of(grad)};
  const auto axes = merged_axes(x, layout, strides, kept);
  ModulateGradsOperands m{};
  for (size_t a = 0; a + 1 < axes.size(); ++a)
    (axes[a].kept ? m.kept[m.kept_axes++] : m.reduced[m.reduced_axes++]) = axes[a];
  m.inner = axes.back();
  m.inner_kept = axes.back().kept;
  m.grad = grad.const_data_ptr();
  m.x = x.const_data_ptr();
  m.scale = dx || dscale ? scale.const_data_ptr() : nullptr;
  m.dx = dx ? dx->mutable_data_ptr() : nullptr;
  m.dscale = dscale ? dscale->mutable_data_ptr() : nullptr;
  m.dshift = dshift ? dshift->mutable_data_ptr() : nullptr;
  m.activation = activation;
  m.offset = offset;
  return m;
}

// The gradients in as few passes as there are patterns: pass(dx, dscale, dshift, pattern), null where not wanted, and
// alone(dx) for dx = (act(scale) + offset) g. make(tensor) is what a new result goes through first.
template <class Make, class Pass, class Alone>
std::tuple<Tensor, Tensor, Tensor> modulate_grads_in_passes(const Tensor& x, const Sizes& scale_size,
                                                            const Sizes& shift_size, bool want_x, bool want_scale,
                                                            bool want_shift, Make&& make, Pass&& pass, Alone&& alone) {
  Tensor dx = make(want_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0}));
  Tensor dscale = make(torch::stable::new_empty(x, want_scale ? scale_size : Sizes{0}));
  Tensor dshift = make(torch::stable::new_empty(x, want_shift ? shift_size : Sizes{0}));
  if (x.numel() == 0) {  // sums over nothing
    if (dscale.numel() > 0) torch::stable::zero_(dscale);
    if (dshift.numel() > 0) torch::stable::zero_(dshift);
    return {dx, dscale, dshift};
  }
  const bool together = want_shift && shift_size == scale_size;
  if (want_scale || (want_x && together))
    pass(want_x ? &dx : nullptr, want_scale ? &dscale : nullptr, together ? &dshift : nullptr, scale_size);
  else if (want_x)
    alone(dx);
  if (want_shift && !(together && (want_scale || want_x))) pass(nullptr, nullptr, &dshift, shift_size);
  return {dx, dscale, dshift};
}

}  // namespace mi_kernels
