// The operands of a modulation: checks, and the axes that are left when those which follow each other in memory
// have become one.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "axes.h"

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

inline void check_operand(const char* op, const char* name, const Tensor& t, const Tensor& x) {
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

}  // namespace mi_kernels
