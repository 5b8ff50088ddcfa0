// The operands of a modulation, from tensors: checks, merged axes, and the passes over memory that the gradients take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/allocate.h"
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

inline Sizes sizes_of(const Tensor& t) {
  Sizes sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
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

struct ReductionAxis : Axis {
  bool kept;
};

// The axes of x in the memory order of the strides `layout`, the innermost last; neighbouring axes that are contiguous
// for every operand are merged. `kept` says for each dimension whether it is kept or summed over.
inline std::vector<ReductionAxis> merged_axes(const Tensor& x, const Sizes& layout, const std::vector<Sizes>& strides,
                                              const std::vector<bool>& kept) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return layout[a] > layout[b]; });
  std::vector<ReductionAxis> axes;
  for (const int64_t d : order) {
    ReductionAxis axis{};
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

inline void check_input(const char* op, const Tensor& x, const char* name = "x") {
  check_defined(op, name, x);
  dtype_of(x.scalar_type(), op, name);
  STD_TORCH_CHECK(in_range({x.numel()}), op, ": ", name, ": expected at most 2^53 elements, got ", x.numel());
}

inline void check_same_size(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(t.size(d) == x.size(d), op, ": ", name, ": expected size ", x.size(d), " in dimension ", d);
}

inline void check_operand(const char* op, const char* name, const Tensor& t, const Tensor& x, const char* first = "x") {
  check_defined(op, name, t);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.is_cpu() == x.is_cpu() && t.is_cuda() == x.is_cuda() &&
                      t.get_device_index() == x.get_device_index(),
                  op, ": ", name, ": expected dtype and device of ", first);
  STD_TORCH_CHECK(t.dim() == x.dim(), op, ": ", name, ": expected ", x.dim(), " dimensions, got ", t.dim());
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(t.size(d) == x.size(d) || t.size(d) == 1, op, ": ", name, ": expected size ", x.size(d),
                    " or 1 in dimension ", d, ", got ", t.size(d));
}

// Checks the arguments of modulate_grads and returns the size of scale.
inline Sizes check_grads(const char* op, const Tensor& grad, const Tensor& x, const Tensor& scale, bool want_shift,
                         const Sizes& shift_size) {
  check_input(op, x);
  check_operand(op, "scale", scale, x);
  check_operand(op, "grad", grad, x);
  Sizes scale_size;
  check_same_size(op, "grad", grad, x);
  for (int64_t d = 0; d < x.dim(); ++d) {
    scale_size.push_back(scale.size(d));
    STD_TORCH_CHECK(!want_shift || (int64_t(shift_size.size()) == x.dim() &&
                                    (shift_size[size_t(d)] == x.size(d) || shift_size[size_t(d)] == 1)),
                    op, ": shift_size: expected sizes of x or 1");
  }
  return scale_size;
}

// Checks the arguments of a mixture of a and b.
inline void check_mixture(const char* op, const Tensor& a, const Tensor& b, const Tensor& gate) {
  check_input(op, a, "a");
  check_operand(op, "b", b, a, "a");
  check_same_size(op, "b", b, a);
  check_operand(op, "gate", gate, a, "a");
}

inline ModulateOperands modulate_operands(const Tensor& y, const Tensor& x, const Tensor& scale,
                                          const std::optional<Tensor>& shift, const ScaleFunction& function,
                                          bool mixes) {
  const Sizes layout = strides_of(y);
  const std::vector<Sizes> strides = {
      strides_of(x), strides_of(scale), shift.has_value() ? strides_of(*shift) : Sizes{}, layout, {}, {}};
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
  m.function = function;
  m.mixes = mixes;
  return m;
}

// The gradients whose sums have the size `sum_size`; null for those that are not wanted. With `other`, of a mixture.
inline ModulateGradsOperands modulate_grads_operands(const Tensor* dx, const Tensor* dscale, const Tensor* dshift,
                                                     const Sizes& sum_size, const Tensor& grad, const Tensor& x,
                                                     const Tensor* other, const Tensor& scale,
                                                     const ScaleFunction& function) {
  const Tensor* like_x = dx ? dx : other ? dshift : nullptr;  // a result of the size of x
  std::vector<bool> kept;
  for (int64_t d = 0; d < x.dim(); ++d) kept.push_back(sum_size[size_t(d)] == x.size(d));
  const Sizes layout = strides_of(like_x ? *like_x : grad);
  const bool reads_scale = like_x || dscale;
  const std::vector<Sizes> strides = {strides_of(x),
                                      reads_scale ? strides_of(scale) : Sizes{},
                                      contiguous_strides(sum_size),
                                      like_x ? layout : Sizes{},
                                      strides_of(grad),
                                      other ? strides_of(*other) : Sizes{}};
  const auto axes = merged_axes(x, layout, strides, kept);
  ModulateGradsOperands m{};
  for (size_t a = 0; a + 1 < axes.size(); ++a)
    (axes[a].kept ? m.kept[m.kept_axes++] : m.reduced[m.reduced_axes++]) = axes[a];
  m.inner = axes.back();
  m.inner_kept = axes.back().kept;
  m.grad = grad.const_data_ptr();
  m.x = x.const_data_ptr();
  m.scale = reads_scale ? scale.const_data_ptr() : nullptr;
  m.other = other ? other->const_data_ptr() : nullptr;
  m.dx = dx ? dx->mutable_data_ptr() : nullptr;
  m.dscale = dscale ? dscale->mutable_data_ptr() : nullptr;
  m.dshift = dshift ? dshift->mutable_data_ptr() : nullptr;
  m.function = function;
  return m;
}

// The gradients, in one pass for each size of a sum: pass(dx, dscale, dshift, sum_size), with null for those that are
// not wanted, or pass_x(dx) for dx = F(scale) g alone. prepare(tensor) is applied to each new result.
template <class Prepare, class Pass, class PassX>
std::tuple<Tensor, Tensor, Tensor> modulate_grads_in_passes(const Tensor& x, const Sizes& scale_size,
                                                            const Sizes& shift_size, bool want_x, bool want_scale,
                                                            bool want_shift, Prepare&& prepare, Pass&& pass,
                                                            PassX&& pass_x) {
  Tensor dx = prepare(want_x ? allocate_like(x) : allocate(x, {0}));
  Tensor dscale = prepare(allocate(x, want_scale ? scale_size : Sizes{0}));
  Tensor dshift = prepare(allocate(x, want_shift ? shift_size : Sizes{0}));
  if (x.numel() == 0) {  // empty sums
    if (dscale.numel() > 0) torch::stable::zero_(dscale);
    if (dshift.numel() > 0) torch::stable::zero_(dshift);
    return {dx, dscale, dshift};
  }
  const bool fused = want_shift && shift_size == scale_size;
  if (want_scale || (want_x && fused))
    pass(want_x ? &dx : nullptr, want_scale ? &dscale : nullptr, fused ? &dshift : nullptr, scale_size);
  else if (want_x)
    pass_x(dx);
  if (want_shift && !(fused && (want_scale || want_x))) pass(nullptr, nullptr, &dshift, shift_size);
  return {dx, dscale, dshift};
}

// The gradients of a mixture, in one pass(da, db, dgate), with null for those that are not wanted.
template <class Prepare, class Pass>
std::tuple<Tensor, Tensor, Tensor> mix_grads_in_a_pass(const Tensor& a, const Sizes& gate_size, bool want_a,
                                                       bool want_b, bool want_gate, Prepare&& prepare, Pass&& pass) {
  Tensor da = prepare(want_a ? allocate_like(a) : allocate(a, {0}));
  Tensor db = prepare(want_b ? allocate_like(a) : allocate(a, {0}));
  Tensor dgate = prepare(allocate(a, want_gate ? gate_size : Sizes{0}));
  if (a.numel() == 0) {  // empty sums
    if (dgate.numel() > 0) torch::stable::zero_(dgate);
  } else if (want_a || want_b || want_gate) {
    pass(want_a ? &da : nullptr, want_b ? &db : nullptr, want_gate ? &dgate : nullptr);
  }
  return {da, db, dgate};
}

}  // namespace mi_kernels
