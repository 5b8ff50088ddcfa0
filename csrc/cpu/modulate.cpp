// Modulation on the CPU: checks, axes, plan and threads; the arithmetic is in modulate*_isa.cpp.
#include "modulate.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "pages.h"
#include "operands.h"
#include "workspace.h"

namespace mi_kernels {
namespace {

using plan::ceil_div;
using plan::max;
using plan::min;

using Sizes = std::vector<int64_t>;

Sizes strides_of(const Tensor& t) {
  Sizes strides;
  for (int64_t d = 0; d < t.dim(); ++d) strides.push_back(t.size(d) == 1 ? 0 : t.stride(d));
  return strides;
}

Sizes contiguous_strides(const Sizes& sizes) {
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
std::vector<KindAxis> merged_axes(const Tensor& x, const Sizes& layout, const std::vector<Sizes>& strides,
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

void check_operand(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.is_cpu(), op, ": ", name, ": expected dtype and device of x");
  STD_TORCH_CHECK(t.dim() == x.dim(), op, ": ", name, ": expected ", x.dim(), " dimensions, got ", t.dim());
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(t.size(d) == x.size(d) || t.size(d) == 1, op, ": ", name, ": expected size ", x.size(d),
                    " or 1 in dimension ", d, ", got ", t.size(d));
}

// y = (act(scale) + offset) * x + shift into a tensor of the same shape.
void modulate_into(Tensor& y, const Tensor& x, const Tensor& scale, const Optional& shift, Activation activation,
                   double offset) {
  if (y.numel() == 0) return;
  const DType dtype = dtype_of(x.scalar_type(), "modulate", "x");
  const Sizes layout = strides_of(y);
  const std::vector<Sizes> strides = {strides_of(x), strides_of(scale), shift.has_value() ? strides_of(*shift) : Sizes{},
                                      layout, {}};
  const auto axes = merged_axes(x, layout, strides, std::vector<bool>(size_t(x.dim()), true));
  ModulateCall call{};
  call.axes = int64_t(axes.size()) - 1;
  call.rows = 1;
  for (int64_t a = 0; a < call.axes; ++a) {
    call.outer[a] = axes[size_t(a)];
    call.rows *= axes[size_t(a)].size;
  }
  call.inner = axes.back();
  call.x = x.const_data_ptr();
  call.scale = scale.const_data_ptr();
  call.shift = shift.has_value() ? shift->const_data_ptr() : nullptr;
  call.y = y.mutable_data_ptr();
  call.activation = activation;
  call.offset = offset;
  call.chunks = ceil_div(call.inner.size, kModulateChunk);
  call.row_step = max(min(kModulateTask / min(call.inner.size, kModulateChunk), call.rows), 1);
  call.tasks = ceil_div(call.rows, call.row_step) * call.chunks;
  const int64_t threads = y.numel() <= kModulateTask ? 1 : torch::stable::get_num_threads();
  selected_kernels().modulate(dtype, call, {min(threads, call.tasks), nullptr, nullptr, run});
}

Tensor modulate(const Tensor& x, const Tensor& scale, const Optional& shift, std::string activation, double offset) {
  constexpr const char* op = "modulate";
  check_operand(op, "scale", scale, x);
  if (shift.has_value()) check_operand(op, "shift", *shift, x);
  Tensor y = on_huge_pages(torch::stable::empty_like(x));
  modulate_into(y, x, scale, shift, activation_of(activation, op, false), offset);
  return y;
}

ModulateGradsPlan plan_grads(const ModulateGradsCall& call, DType dtype) {
  ModulateGradsPlan p{};
  p.groups = p.rows = 1;
  for (int64_t a = 0; a < call.kept_axes; ++a) p.groups *= call.kept[a].size;
  for (int64_t a = 0; a < call.reduced_axes; ++a) p.rows *= call.reduced[a].size;
  const int64_t pieces = ceil_div(call.inner.size, kModulateChunk), width = min(call.inner.size, kModulateChunk);
  p.chunks = call.inner_kept ? pieces : 1;
  if (!call.inner_kept) p.rows *= pieces;
  p.units = p.groups * p.chunks;
  p.operations = p.units * p.rows * width;
  const int64_t unit_elements = p.rows * width;
  p.splits = 1;
  if (p.units < plan::kTasks)
    p.splits = max(min(min(plan::kTasks / p.units, p.rows / 16), p.operations / kModulateTask), 1);
  p.row_step = max(ceil_div(p.rows, p.splits), 1);
  p.splits = max(ceil_div(p.rows, p.row_step), 1);
  p.unit_step = p.splits > 1 ? 1 : max(min(kModulateTask / 4 / max(unit_elements, 1), p.units), 1);
  p.tasks = p.splits > 1 ? p.units * p.splits : ceil_div(p.units, p.unit_step);
  p.worker_bytes = kModulateChunk * (3 * accumulator_bytes(dtype) + 2 * 8 + 2 * storage_bytes(dtype));
  if (p.splits > 1) p.partial_bytes = p.units * p.splits * 2 * (call.inner_kept ? width : 1) * 8;
  return p;
}

// Results over one pattern of kept and reduced dimensions, that of `pattern`; null where not wanted.
void grads_into(Tensor* dx, Tensor* dscale, Tensor* dshift, const Sizes& pattern, const Tensor& grad, const Tensor& x,
                const Tensor& scale, Activation activation, double offset) {
  const DType dtype = dtype_of(x.scalar_type(), "modulate_grads", "x");
  std::vector<bool> kept;
  for (int64_t d = 0; d < x.dim(); ++d) kept.push_back(pattern[size_t(d)] == x.size(d));
  const Sizes layout = dx ? strides_of(*dx) : strides_of(grad);
  const std::vector<Sizes> strides = {strides_of(x), dx || dscale ? strides_of(scale) : Sizes{},
                                      contiguous_strides(pattern), dx ? layout : Sizes{}, strides_of(grad)};
  ModulateGradsCall call{};
  const auto axes = merged_axes(x, layout, strides, kept);
  for (size_t a = 0; a + 1 < axes.size(); ++a)
    (axes[a].kept ? call.kept[call.kept_axes++] : call.reduced[call.reduced_axes++]) = axes[a];
  call.inner = axes.back();
  call.inner_kept = axes.back().kept;
  call.grad = grad.const_data_ptr();
  call.x = x.const_data_ptr();
  call.scale = scale.const_data_ptr();
  call.dx = dx ? dx->mutable_data_ptr() : nullptr;
  call.dscale = dscale ? dscale->mutable_data_ptr() : nullptr;
  call.dshift = dshift ? dshift->mutable_data_ptr() : nullptr;
  call.activation = activation;
  call.offset = offset;
  const ModulateGradsPlan p = plan_grads(call, dtype);
  Demand demand(p.tasks, p.operations, p.worker_bytes, p.partial_bytes);
  if (p.operations > kModulateTask) demand.workers = max(min(torch::stable::get_num_threads(), p.tasks), 1);
  const Workspace workspace(x, demand);
  selected_kernels().modulate_grads(dtype, call, p, workspace.execution);
}

std::tuple<Tensor, Tensor, Tensor> modulate_grads(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                  std::vector<int64_t> shift_size, std::string name, double offset,
                                                  bool want_x, bool want_scale, bool want_shift) {
  constexpr const char* op = "modulate_grads";
  check_operand(op, "scale", scale, x);
  check_operand(op, "grad", grad, x);
  const Activation activation = activation_of(name, op, false);
  Sizes scale_size;
  for (int64_t d = 0; d < x.dim(); ++d) {
    scale_size.push_back(scale.size(d));
    STD_TORCH_CHECK(grad.size(d) == x.size(d), op, ": grad: expected size ", x.size(d), " in dimension ", d);
    STD_TORCH_CHECK(!want_shift || (int64_t(shift_size.size()) == x.dim() &&
                                    (shift_size[size_t(d)] == x.size(d) || shift_size[size_t(d)] == 1)),
                    op, ": shift_size: expected sizes of x or 1");
  }
  Tensor dx = want_x ? on_huge_pages(torch::stable::empty_like(x)) : torch::stable::new_empty(x, {0});
  Tensor dscale = on_huge_pages(torch::stable::new_empty(x, want_scale ? scale_size : Sizes{0}));
  Tensor dshift = on_huge_pages(torch::stable::new_empty(x, want_shift ? shift_size : Sizes{0}));
  if (x.numel() == 0) {  // sums over nothing
    if (dscale.numel() > 0) torch::stable::zero_(dscale);
    if (dshift.numel() > 0) torch::stable::zero_(dshift);
    return {dx, dscale, dshift};
  }
  const bool together = want_shift && shift_size == scale_size;
  if (want_scale || (want_x && together))
    grads_into(want_x ? &dx : nullptr, want_scale ? &dscale : nullptr, together ? &dshift : nullptr, scale_size, grad, x,
               scale, activation, offset);
  else if (want_x)
    modulate_into(dx, grad, scale, {}, activation, offset);
  if (want_shift && !(together && (want_scale || want_x)))
    grads_into(nullptr, nullptr, &dshift, shift_size, grad, x, scale, activation, offset);
  return {dx, dscale, dshift};
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(mi_kernels, CPU, m) {
  m.impl("modulate", TORCH_BOX(&mi_kernels::modulate));
  m.impl("modulate_grads", TORCH_BOX(&mi_kernels::modulate_grads));
}
