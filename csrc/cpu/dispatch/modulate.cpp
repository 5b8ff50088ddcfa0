// Modulation on the CPU: registration, checks, axes, plan and threads; the arithmetic is in kernels/modulate*.cpp.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "common/modulate_axes.h"
#include "common/registration.h"
#include "common/tensor_args.h"
#include "common/text.h"
#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/plan.h"
#include "cpu/dispatch/workspace.h"
#include "cpu/kernels/modulate_call.h"

namespace mi_kernels {
namespace {

// Rows of a task are a multiple of this, so that short ones which are walked as one begin with a whole vector.
constexpr int64_t kRowStep = 64;
constexpr int64_t kLanes = 16;  // at most, of any instruction set

// y = F(scale) * x + shift, or a mixture of x and shift; y has the shape of x.
void modulate_into(Tensor& y, const Tensor& x, const Tensor& scale, const Optional& shift,
                   const ScaleFunction& function, bool mixes = false) {
  if (y.numel() == 0) return;
  const DType dtype = dtype_of(x.scalar_type(), "modulate", "x");
  ModulateCall call{modulate_operands(y, x, scale, shift, function, mixes), 0, 0, 0};
  call.chunks = ceil_div(call.inner.size, kModulateChunk);
  call.row_step = max(kModulateTask / min(call.inner.size, kModulateChunk) / kRowStep * kRowStep, kRowStep);
  call.tasks = ceil_div(call.rows, call.row_step) * call.chunks;
  const auto& stride = call.inner.stride;
  if (call.rows == 1 && stride[kX] == 1 && stride[kY] == 1 && stride[kScale] == 1 &&
      (!call.shift || stride[kShift] == 1))
    call.chunks = 0, call.tasks = ceil_div(call.inner.size, kModulateTask);
  const int64_t threads = y.numel() <= kModulateTask ? 1 : torch::stable::get_num_threads();
  selected_kernels().modulate(dtype, call, {min(threads, call.tasks), nullptr, nullptr, run_on_threads});
}

Tensor modulate(const Tensor& x, const Tensor& scale, const Optional& shift, Text activation, double offset,
                double factor) {
  constexpr const char* op = "modulate";
  check_input(op, x);
  check_operand(op, "scale", scale, x);
  if (shift.has_value()) check_operand(op, "shift", *shift, x);
  Tensor y = on_huge_pages(allocate_like(x));
  modulate_into(y, x, scale, shift, {activation_of(activation, op, false), offset, factor});
  return y;
}

Tensor mix(const Tensor& a, const Tensor& b, const Tensor& gate, Text activation) {
  check_mixture("mix", a, b, gate);
  Tensor y = on_huge_pages(allocate_like(a));
  modulate_into(y, a, gate, b, {activation_of(activation, "mix", false)}, true);
  return y;
}

// Runs that are summed to one element each, with a piece of the last kept axis for many of them.
bool has_short_runs(const ModulateGradsCall& call) {
  if (call.inner_kept || call.kept_axes == 0 || call.inner.size > kShortRun) return false;
  const auto follows = [&](const void* data, int operand) { return !data || call.inner.stride[operand] == 1; };
  if (!follows(call.grad, kGrad) || !follows(call.dscale, kX) || !follows(call.other, kOther)) return false;
  // Otherwise the runs of one sum are closer to each other than those of the next.
  return call.reduced_axes == 0 ||
         call.kept[call.kept_axes - 1].stride[kGrad] < call.reduced[call.reduced_axes - 1].stride[kGrad];
}

// Short runs with the same scales that follow each other and may be computed as one; if possible, whole vectors.
int64_t repeats_of(const ModulateGradsCall& call) {
  const int64_t n = call.inner.size;
  if (!call.inner_kept || call.reduced_axes == 0 || n > kShortRun || n % kLanes == 0) return 1;
  const Axis& last = call.reduced[call.reduced_axes - 1];
  const auto follows = [&](const void* data, int operand) {
    return !data || (call.inner.stride[operand] == 1 && last.stride[operand] == n);
  };
  if (!follows(call.grad, kGrad) || !follows(call.dscale, kX) || !follows(call.other, kOther) ||
      !follows(call.dx, kY) || !(call.other == nullptr || follows(call.dshift, kY)))
    return 1;
  const int64_t aligned = kLanes / std::gcd(n, kLanes);
  const int64_t most = max(kModulateChunk / (n * aligned), 1) * aligned;
  return min(min(most, kModulateChunk / n), last.size);
}

ModulateGradsPlan plan_grads(const ModulateGradsCall& call, DType dtype) {
  constexpr int64_t kUnit = kModulateTask / 4;  // elements of a unit, or of the units of a task
  ModulateGradsPlan p{};
  int64_t kept_positions = 1;
  p.rows = 1;
  for (int64_t a = 0; a < call.kept_axes; ++a) kept_positions *= call.kept[a].size;
  for (int64_t a = 0; a < call.reduced_axes; ++a) p.rows *= call.reduced[a].size;
  const int64_t inner_chunks = ceil_div(call.inner.size, kModulateChunk),
                chunk_size = min(call.inner.size, kModulateChunk);
  p.chunks = call.inner_kept ? inner_chunks : 1;
  if (!call.inner_kept) p.rows *= inner_chunks;
  p.units = kept_positions * p.chunks;
  p.operations = p.units * p.rows * chunk_size;
  p.repeats = repeats_of(call);
  int64_t unit_elements = p.rows * chunk_size;
  if (has_short_runs(call)) {
    const int64_t size = call.kept[call.kept_axes - 1].size;
    const int64_t most = min(max(kUnit / chunk_size / kRowStep, 1) * kRowStep, kModulateChunk);
    p.runs = ceil_div(ceil_div(size, ceil_div(size, most)), kLanes) * kLanes;
    p.chunks = ceil_div(size, p.runs);
    p.units = kept_positions / size * p.chunks;
    unit_elements *= min(p.runs, size);
  }
  p.splits = 1;
  if (p.units < kTasks)
    p.splits = max(min(min(kTasks / p.units, p.rows / (p.runs > 0 ? 4 : 16)), p.operations / kModulateTask), 1);
  p.row_step = max(ceil_div(p.rows, p.splits), 1);
  p.splits = max(ceil_div(p.rows, p.row_step), 1);
  p.unit_step = p.splits > 1 ? 1 : max(min(kUnit / max(unit_elements, 1), p.units), 1);
  p.tasks = p.splits > 1 ? p.units * p.splits : ceil_div(p.units, p.unit_step);
  p.worker_bytes = kModulateChunk * (3 * accumulator_bytes(dtype) + 2 * 8 + 3 * storage_bytes(dtype));
  const int64_t sums = p.runs > 0 ? p.runs : call.inner_kept ? chunk_size : 1;
  if (p.splits > 1) p.partial_bytes = p.units * p.splits * 2 * sums * 8;
  return p;
}

// The gradients whose sums have the size `sum_size`; null for those that are not wanted. With `other`, of a mixture.
void grads_into(Tensor* dx, Tensor* dscale, Tensor* dshift, const Sizes& sum_size, const Tensor& grad, const Tensor& x,
                const Tensor* other, const Tensor& scale, const ScaleFunction& function) {
  const DType dtype = dtype_of(x.scalar_type(), "modulate_grads", "x");
  const ModulateGradsCall call = modulate_grads_operands(dx, dscale, dshift, sum_size, grad, x, other, scale, function);
  const ModulateGradsPlan p = plan_grads(call, dtype);
  WorkspaceSize size(p.tasks, p.operations, p.worker_bytes, p.partial_bytes);
  if (p.operations > kModulateTask) size.workers = max(min(torch::stable::get_num_threads(), p.tasks), 1);
  const Workspace workspace(x, size);
  selected_kernels().modulate_grads(dtype, call, p, workspace.executor);
}

std::tuple<Tensor, Tensor, Tensor> modulate_grads(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                  std::vector<int64_t> shift_size, Text name, double offset,
                                                  bool want_x, bool want_scale, bool want_shift, double factor) {
  constexpr const char* op = "modulate_grads";
  const ScaleFunction function{activation_of(name, op, false), offset, factor};
  const Sizes scale_size = check_grads(op, grad, x, scale, want_shift, shift_size);
  return modulate_grads_in_passes(
      x, scale_size, shift_size, want_x, want_scale, want_shift, on_huge_pages,
      [&](Tensor* dx, Tensor* dscale, Tensor* dshift, const Sizes& sum_size) {
        grads_into(dx, dscale, dshift, sum_size, grad, x, nullptr, scale, function);
      },
      [&](Tensor& dx) { modulate_into(dx, grad, scale, {}, function); });
}

std::tuple<Tensor, Tensor, Tensor> mix_grads(const Tensor& grad, const Tensor& a, const Tensor& b, const Tensor& gate,
                                             Text activation, bool want_a, bool want_b, bool want_gate) {
  constexpr const char* op = "mix_grads";
  const ScaleFunction function{activation_of(activation, op, false)};
  check_mixture(op, a, b, gate);
  check_operand(op, "grad", grad, a, "a");
  check_same_size(op, "grad", grad, a);
  const Sizes gate_size = sizes_of(gate);
  return mix_grads_in_a_pass(a, gate_size, want_a, want_b, want_gate, on_huge_pages,
                             [&](Tensor* da, Tensor* db, Tensor* dgate) {
                               grads_into(da, dgate, db, gate_size, grad, a, &b, gate, function);
                             });
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CPU, m) {
  m.impl("modulate", TORCH_BOX(&mi_kernels::modulate));
  m.impl("modulate_grads", TORCH_BOX(&mi_kernels::modulate_grads));
  m.impl("mix", TORCH_BOX(&mi_kernels::mix));
  m.impl("mix_grads", TORCH_BOX(&mi_kernels::mix_grads));
}
