// Normalisation with modulation on the CPU: registration, checks, axes, plan and threads; the arithmetic is in
// kernels/norm*.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/modulate_axes.h"
#include "common/norm_arguments.h"
#include "common/registration.h"
#include "common/tensor_args.h"
#include "common/text.h"
#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/plan.h"
#include "cpu/dispatch/workspace.h"
#include "cpu/kernels/norm_call.h"

namespace mi_kernels {
namespace {

// The tensors of a call, by NormOperand; of results only the sizes matter.
using Operands = const Tensor* [kNormOut];

// Splits the leading dimensions into those on which a context varies and the others.
void set_axes(NormOperands& call, const Tensor& x, int64_t dim, const Operands& operands, const Tensor* context) {
  std::vector<int64_t> position(size_t(dim), 1);
  for (int64_t d = dim - 2; d >= 0; --d) position[size_t(d)] = position[size_t(d + 1)] * x.size(d + 1);
  call.units = call.rows = 1;
  bool last_kept = false;
  for (int64_t d = 0; d < dim; ++d) {
    if (x.size(d) == 1) continue;
    NormAxis axis{x.size(d), {}};
    for (int o = 0; o < kNormOut; ++o)
      if (operands[o] && operands[o]->size(d) != 1) axis.stride[o] = operands[o]->stride(d);
    axis.stride[kNormOut] = position[size_t(d)];
    const bool kept = context && context->size(d) != 1;
    (kept ? call.units : call.rows) *= axis.size;
    int64_t& count = kept ? call.kept_axes : call.reduced_axes;
    NormAxis* axes = kept ? call.kept : call.reduced;
    bool merges = count > 0 && kept == last_kept;
    for (int o = 0; merges && o < kNormOperands; ++o) merges = axes[count - 1].stride[o] == axis.stride[o] * axis.size;
    if (merges) {
      axis.size *= axes[count - 1].size;
      --count;
    }
    STD_TORCH_CHECK(count < kMaxAxes, "norm_modulate: x: expected at most ", kMaxAxes,
                    " leading dimensions that do not follow each other in memory");
    axes[count++] = axis;
    last_kept = kept;
  }
}

ChannelRef channels_of(const Optional& t, int64_t dim) {
  return t.has_value() ? ChannelRef{t->const_data_ptr(), t->stride(dim)} : ChannelRef{};
}

// What both calls have in common, but for x and h.
void set_operands(NormOperands& call, const NormArguments& a, bool channels_last, const Operands& operands) {
  call.channels = a.x.size(a.dim);
  call.groups = a.groups;
  call.spatial = 1;
  for (int64_t d = a.dim + 1; d < a.x.dim(); ++d) call.spatial *= a.x.size(d);
  call.channels_last = channels_last;
  call.center = a.center;
  call.function = a.function;
  const Tensor* context = a.gate.has_value()    ? &*a.gate
                          : a.scale.has_value() ? &*a.scale
                          : a.shift.has_value() ? &*a.shift
                                                : nullptr;
  set_axes(call, a.x, a.dim, operands, context);
  call.gate = channels_of(a.gate, a.dim);
  call.scale = channels_of(a.scale, a.dim);
  call.shift = channels_of(a.shift, a.dim);
  call.weight = channels_of(a.weight, a.dim);
  call.bias = channels_of(a.bias, a.dim);
  // Positions alone may not be enough tasks for maps. Pixels with fewer channels than a few vectors would be read in
  // pieces of cache lines.
  constexpr int64_t kFewestChannels = 64;
  int64_t blocks = 1;
  if (call.spatial > 1) {
    blocks = min(ceil_div(kTasks, call.units * call.rows), call.groups);
    if (call.channels_last) blocks = max(min(blocks, call.channels / kFewestChannels), 1);
  }
  call.block_groups = ceil_div(call.groups, blocks);
  call.blocks = ceil_div(call.groups, call.block_groups);
}

int64_t scratch_of(int64_t arrays, int64_t count, int64_t bytes) { return arrays * scratch_bytes(count * bytes); }

const Tensor* pointer(const Optional& t) { return t.has_value() ? &*t : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_modulate(const Tensor& x, const Optional& h, const Optional& gate,
                                                         const Optional& scale, const Optional& shift,
                                                         const Optional& weight, const Optional& bias, int64_t dim,
                                                         int64_t groups, bool center, double eps, Text activation,
                                                         double offset) {
  constexpr const char* op = "norm_modulate";
  NormArguments a{
      x, h, gate, scale, shift, weight, bias, dim, groups, center, {activation_of(activation, op, false), offset}};
  check_norm(op, a);
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  const bool channels_last = has_channels_last(x, dim);
  const auto result = [&](bool wanted) {
    return wanted ? on_huge_pages(allocate_in_layout(x, dim, channels_last)) : allocate(x, {0});
  };
  Tensor y = result(true), x_new = result(h.has_value());
  Tensor mean = allocate_statistic(x, dim, groups, center), rstd = allocate_statistic(x, dim, groups, true);
  if (x.numel() == 0) {
    for (Tensor* t : {&mean, &rstd}) torch::stable::fill_(*t, __builtin_nan(""));
    return {y, x_new, mean, rstd};
  }
  a.x = in_layout(x, dim, channels_last);
  if (h) a.h = in_layout(*h, dim, channels_last);
  NormCall call{};
  set_operands(call, a, channels_last,
               {&a.x, pointer(a.h), nullptr, nullptr, pointer(gate), pointer(scale), pointer(shift)});
  call.eps = eps;
  call.x = a.x.const_data_ptr();
  call.h = h ? a.h->const_data_ptr() : nullptr;
  call.y = y.mutable_data_ptr();
  call.x_new = h ? x_new.mutable_data_ptr() : nullptr;
  call.mean = center ? mean.mutable_data_ptr() : nullptr;
  call.rstd = rstd.mutable_data_ptr();
  const int64_t positions = call.units * call.rows, channels = call.block_channels();
  const int64_t elements = channels * call.spatial;
  call.row_step = max(min(kModulateTask / max(elements, 1), ceil_div(positions, kTasks)), 1);
  call.tasks = ceil_div(positions, call.row_step) * call.blocks;
  call.worker_bytes = scratch_of(7, channels, accumulator_bytes(dtype)) + scratch_of(2, channels, 8) +
                      scratch_of(3, call.block_groups, 8);
  WorkspaceSize size(call.tasks, x.numel(), call.worker_bytes, 0);
  if (x.numel() > kModulateTask) size.workers = max(min(torch::stable::get_num_threads(), call.tasks), 1);
  const Workspace workspace(x, size);
  selected_kernels().norm(dtype, call, workspace.executor);
  return {y, x_new, mean, rstd};
}

void plan_grads(NormGradsCall& call, DType dtype) {
  const int64_t row = call.block_channels() * call.spatial;
  call.splits = 1;
  call.row_step = call.rows;
  if (call.units * call.blocks < kTasks && call.rows > 1) {
    const int64_t fewest = max(16 / call.spatial, 1);  // rows of a part
    call.splits = max(
        min(min(kTasks / (call.units * call.blocks), call.rows / fewest), call.units * call.rows * row / kModulateTask),
        1);
    call.row_step = ceil_div(call.rows, call.splits);
    call.splits = ceil_div(call.rows, call.row_step);
  }
  call.unit_step = max(ceil_div(call.units, 2 * kTasks), kModulateTask / 4 / max(call.rows * row, 1));
  call.unit_step = max(min(call.unit_step, call.units), 1);
  const int64_t parts = call.splits > 1 ? call.units * call.splits : ceil_div(call.units, call.unit_step);
  call.tasks = parts * call.blocks;
  const int64_t channels = max(call.block_channels(), kNormSumChannels);
  call.worker_bytes = scratch_of(15, channels, accumulator_bytes(dtype)) + scratch_of(7, channels, 8);
  call.partial_bytes = parts * call.partial_sums() * call.channels * 8;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_modulate_grads(
    const Tensor& grad, const Tensor& x, const Optional& grad_x, const Optional& h, const Optional& gate,
    const Optional& scale, const Optional& shift, const Optional& weight, const Optional& bias, const Optional& mean,
    const Tensor& rstd, int64_t dim, int64_t groups, bool center, Text activation, double offset, bool want_x,
    bool want_h, bool want_gate, bool want_scale, bool want_shift, bool want_weight, bool want_bias) {
  constexpr const char* op = "norm_modulate_grads";
  NormArguments a{
      x, h, gate, scale, shift, weight, bias, dim, groups, center, {activation_of(activation, op, false), offset}};
  check_norm(op, a);
  check_norm_grads(op, a, grad, grad_x, mean, rstd, want_h, want_gate, want_scale, want_shift, want_weight, want_bias);
  STD_TORCH_CHECK(!want_gate || h.has_value(), op, ": h: expected a tensor, as want_gate is set, got None");
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  const auto wanted = [&](bool want, const Optional& t) { return allocate(x, want ? sizes_of(*t) : Sizes{0}); };
  const bool channels_last = has_channels_last(x, dim);
  const auto like_x = [&](bool want) {
    return want ? on_huge_pages(allocate_in_layout(x, dim, channels_last)) : allocate(x, {0});
  };
  Tensor dx = like_x(want_x), dh = like_x(want_h);
  Tensor dgate = wanted(want_gate, gate), dscale = wanted(want_scale, scale), dshift = wanted(want_shift, shift);
  Tensor dweight = wanted(want_weight, weight), dbias = wanted(want_bias, bias);
  if (x.numel() == 0) {  // empty sums
    for (Tensor* t : {&dgate, &dscale, &dshift, &dweight, &dbias})
      if (t->numel() > 0) torch::stable::zero_(*t);
    return {dx, dh, dgate, dscale, dshift, dweight, dbias};
  }
  a.x = in_layout(x, dim, channels_last);
  const Tensor g = in_layout(grad, dim, channels_last);
  const Tensor deviations = in_layout(rstd, 0, false), means = center ? in_layout(*mean, 0, false) : deviations;
  Optional g_x, h_in;
  if (grad_x) g_x = in_layout(*grad_x, dim, channels_last);
  if (want_gate) h_in = in_layout(*h, dim, channels_last);
  NormGradsCall call{};
  set_operands(call, a, channels_last,
               {&a.x, pointer(h_in), &g, pointer(g_x), pointer(gate), pointer(scale), pointer(shift)});
  const auto data = [](const Optional& t) { return t ? t->const_data_ptr() : nullptr; };
  const auto result = [](bool want, Tensor& t) { return want ? t.mutable_data_ptr() : nullptr; };
  call.x = a.x.const_data_ptr();
  call.h = data(h_in);
  call.grad = g.const_data_ptr();
  call.grad_x = data(g_x);
  call.mean = center ? means.const_data_ptr() : nullptr;
  call.rstd = deviations.const_data_ptr();
  call.dx = result(want_x, dx);
  call.dh = result(want_h, dh);
  call.dgate = result(want_gate, dgate);
  call.dscale = result(want_scale, dscale);
  call.dshift = result(want_shift, dshift);
  call.dweight = result(want_weight, dweight);
  call.dbias = result(want_bias, dbias);
  plan_grads(call, dtype);
  WorkspaceSize size(call.tasks, x.numel(), call.worker_bytes, call.partial_bytes);
  if (x.numel() > kModulateTask) size.workers = max(min(torch::stable::get_num_threads(), call.tasks), 1);
  const Workspace workspace(x, size);
  selected_kernels().norm_grads(dtype, call, workspace.executor);
  return {dx, dh, dgate, dscale, dshift, dweight, dbias};
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CPU, m) {
  m.impl("norm_modulate", TORCH_BOX(&mi_kernels::norm_modulate));
  m.impl("norm_modulate_grads", TORCH_BOX(&mi_kernels::norm_modulate_grads));
}
