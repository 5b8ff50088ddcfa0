// Modulation on the CPU: checks, axes, plan and threads; the arithmetic is in modulate*_isa.cpp.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "common/modulate_axes.h"
#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/linear_call.h"
#include "cpu/dispatch/workspace.h"
#include "cpu/kernels/modulate_call.h"

namespace mi_kernels {
namespace {

// y = (act(scale) + offset) * x + shift into a tensor of the same shape.
void modulate_into(Tensor& y, const Tensor& x, const Tensor& scale, const Optional& shift, Activation activation,
                   double offset) {
  if (y.numel() == 0) return;
  const DType dtype = dtype_of(x.scalar_type(), "modulate", "x");
  ModulateCall call{modulate_operands(y, x, scale, shift, activation, offset), 0, 0, 0};
  call.chunks = ceil_div(call.inner.size, kModulateChunk);
  call.row_step = max(min(kModulateTask / min(call.inner.size, kModulateChunk), call.rows), 1);
  call.tasks = ceil_div(call.rows, call.row_step) * call.chunks;
  const int64_t threads = y.numel() <= kModulateTask ? 1 : torch::stable::get_num_threads();
  selected_kernels().modulate(dtype, call, {min(threads, call.tasks), nullptr, nullptr, run});
}

Tensor modulate(const Tensor& x, const Tensor& scale, const Optional& shift, std::string activation, double offset) {
  constexpr const char* op = "modulate";
  check_input(op, x);
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
  const ModulateGradsCall call =
      modulate_grads_operands(dx, dscale, dshift, pattern, grad, x, scale, activation, offset);
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
  const Activation activation = activation_of(name, op, false);
  const Sizes scale_size = check_grads(op, grad, x, scale, want_shift, shift_size);
  return modulate_grads_in_passes(
      x, scale_size, shift_size, want_x, want_scale, want_shift, on_huge_pages,
      [&](Tensor* dx, Tensor* dscale, Tensor* dshift, const Sizes& pattern) {
        grads_into(dx, dscale, dshift, pattern, grad, x, scale, activation, offset);
      },
      [&](Tensor& dx) { modulate_into(dx, grad, scale, {}, activation, offset); });
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(mi_kernels, CPU, m) {
  m.impl("modulate", TORCH_BOX(&mi_kernels::modulate));
  m.impl("modulate_grads", TORCH_BOX(&mi_kernels::modulate_grads));
}
