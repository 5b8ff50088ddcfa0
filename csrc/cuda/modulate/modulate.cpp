// Modulation on a GPU: checks, plans and launches.
#include "cuda/modulate/modulate.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/integers.h"
#include "common/modulate_axes.h"
#include "common/registration.h"
#include "cuda/host/device_stream.h"

namespace mi_kernels::cuda {
namespace {

using Optional = std::optional<Tensor>;

// Whether an operand can be read in chunks of 16 bytes: contiguous along the inner axis, and every line aligned.
bool inner_vectorized(const void* data, const Axis& inner, int operand, int64_t elements) {
  return data && reinterpret_cast<uintptr_t>(data) % 16 == 0 && inner.stride[operand] == 1 &&
         inner.size % elements == 0;
}
bool outer_vectorized(const Axis* axes, int64_t count, int operand, int64_t elements) {
  return std::all_of(axes, axes + count, [&](const Axis& axis) { return axis.stride[operand] % elements == 0; });
}

ModulateParams modulate_params(const Tensor& y, const Tensor& x, const Tensor& scale, const Optional& shift,
                               const ScaleFunction& function, bool mixes, DType dtype) {
  ModulateParams params{modulate_operands(y, x, scale, shift, function, mixes), 0, 0, {}};
  const int64_t elements = 16 / storage_bytes(dtype);
  params.chunks = ceil_div(params.inner.size, elements);
  params.blocks = ceil_div(params.rows * params.chunks, kModulateThreads);
  const void* data[kOperands] = {params.x, params.scale, params.shift, params.y, nullptr, nullptr};
  for (int o = 0; o < kOperands; ++o)
    params.vectorized[o] = inner_vectorized(data[o], params.inner, o, elements) &&
                           outer_vectorized(params.outer, params.axes, o, elements);
  return params;
}

// The gradients whose sums have the size `sum_size`; null for those that are not wanted. With `other`, of a mixture.
ModulateGradsParams modulate_grads_params(const Tensor* dx, const Tensor* dscale, const Tensor* dshift,
                                          const std::vector<int64_t>& sum_size, const Tensor& grad, const Tensor& x,
                                          const Tensor* other, const Tensor& scale, const ScaleFunction& function,
                                          DType dtype) {
  ModulateGradsParams params{modulate_grads_operands(dx, dscale, dshift, sum_size, grad, x, other, scale, function),
                             {}};
  const int64_t elements = 16 / storage_bytes(dtype);
  const void* of_y = params.other && !params.dx ? params.dshift : params.dx;
  const void* data[kOperands] = {params.x, params.scale, nullptr, of_y, params.grad, params.other};
  for (int o = 0; o < kOperands; ++o)
    params.vectorized[o] = inner_vectorized(data[o], params.inner, o, elements) &&
                           outer_vectorized(params.kept, params.kept_axes, o, elements) &&
                           outer_vectorized(params.reduced, params.reduced_axes, o, elements);
  return params;
}

int64_t floor_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power * 2 <= n) power *= 2;
  return power;
}

void run_modulate(Tensor& y, const Tensor& x, const Tensor& scale, const Optional& shift, const ScaleFunction& function,
                  bool mixes = false) {
  if (y.numel() == 0) return;
  const DType dtype = dtype_of(x.scalar_type(), "modulate", "x");
  const DeviceStream stream(x);
  launch_modulate(stream, dtype, modulate_params(y, x, scale, shift, function, mixes, dtype));
}

void run_modulate_grads(const ModulateGradsParams& params, const Tensor& like, DType dtype) {
  const DeviceStream stream(like);
  const ModulateGradsPlan plan = plan_modulate_grads(params, dtype, stream.device());
  const Scratch scratch(like, plan.partial_bytes);
  launch_modulate_grads(stream, dtype, params, plan, plan.partial_bytes ? scratch.at<void>() : nullptr);
}

Tensor modulate(const Tensor& x, const Tensor& scale, const Optional& shift, std::string activation, double offset,
                double factor) {
  constexpr const char* op = "modulate";
  check_input(op, x);
  check_operand(op, "scale", scale, x);
  if (shift.has_value()) check_operand(op, "shift", *shift, x);
  Tensor y = torch::stable::empty_like(x);
  run_modulate(y, x, scale, shift, {activation_of(activation, op, false), offset, factor});
  return y;
}

Tensor mix(const Tensor& a, const Tensor& b, const Tensor& gate, std::string activation) {
  check_mixture("mix", a, b, gate);
  Tensor y = torch::stable::empty_like(a);
  run_modulate(y, a, gate, b, {activation_of(activation, "mix", false)}, true);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> modulate_grads(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                  std::vector<int64_t> shift_size, std::string name, double offset,
                                                  bool want_x, bool want_scale, bool want_shift, double factor) {
  constexpr const char* op = "modulate_grads";
  const ScaleFunction function{activation_of(name, op, false), offset, factor};
  const Sizes scale_size = check_grads(op, grad, x, scale, want_shift, shift_size);
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  return modulate_grads_in_passes(
      x, scale_size, shift_size, want_x, want_scale, want_shift, [](Tensor result) { return result; },
      [&](Tensor* dx, Tensor* dscale, Tensor* dshift, const Sizes& sum_size) {
        run_modulate_grads(
            modulate_grads_params(dx, dscale, dshift, sum_size, grad, x, nullptr, scale, function, dtype), x, dtype);
      },
      [&](Tensor& dx) { run_modulate(dx, grad, scale, {}, function); });
}

std::tuple<Tensor, Tensor, Tensor> mix_grads(const Tensor& grad, const Tensor& a, const Tensor& b, const Tensor& gate,
                                             std::string activation, bool want_a, bool want_b, bool want_gate) {
  constexpr const char* op = "mix_grads";
  const ScaleFunction function{activation_of(activation, op, false)};
  check_mixture(op, a, b, gate);
  check_operand(op, "grad", grad, a, "a");
  check_same_size(op, "grad", grad, a);
  const Sizes gate_size = sizes_of(gate);
  const DType dtype = dtype_of(a.scalar_type(), op, "a");
  return mix_grads_in_a_pass(
      a, gate_size, want_a, want_b, want_gate, [](Tensor result) { return result; },
      [&](Tensor* da, Tensor* db, Tensor* dgate) {
        run_modulate_grads(modulate_grads_params(da, dgate, db, gate_size, grad, a, &b, gate, function, dtype), a,
                           dtype);
      });
}

}  // namespace

ModulateGradsPlan plan_modulate_grads(const ModulateGradsParams& params, DType dtype, const DeviceProperties& device) {
  const int64_t elements = 16 / storage_bytes(dtype);
  ModulateGradsPlan p{};
  int64_t kept = 1, reduced = 1;
  for (int64_t a = 0; a < params.kept_axes; ++a) kept *= params.kept[a].size;
  for (int64_t a = 0; a < params.reduced_axes; ++a) reduced *= params.reduced[a].size;
  p.chunks = ceil_div(params.inner.size, elements);
  p.units = params.inner_kept ? kept * p.chunks : kept;
  p.terms = params.inner_kept ? reduced : reduced * p.chunks;
  // One thread for each term, but if neighbouring units are neighbours in memory at least 32 of those in a block, which
  // read 512 contiguous bytes.
  const int64_t group_threads =
      floor_power_of_two(std::clamp<int64_t>(p.terms, 1, params.inner_kept ? kModulateThreads / 32 : kModulateThreads));
  p.units_per_block = kModulateThreads / group_threads;
  if (params.inner_kept)  // if there are fewer units than that, more threads for each
    while (p.units_per_block > 1 && p.units_per_block / 2 >= p.units && kModulateThreads / p.units_per_block < p.terms)
      p.units_per_block /= 2;
  p.blocks = ceil_div(p.units, p.units_per_block);
  // Four blocks on each multiprocessor keep it busy; a split is worth its second kernel from 8 terms per thread on.
  const int64_t wanted = ceil_div(4 * device.sm_count, p.blocks);
  const int64_t most = p.terms / (8 * (kModulateThreads / p.units_per_block));
  p.split_size = ceil_div(p.terms, std::max<int64_t>(std::min({wanted, most, int64_t(65535)}), 1));
  p.splits = std::max<int64_t>(ceil_div(p.terms, std::max<int64_t>(p.split_size, 1)), 1);
  if (p.splits > 1 && (params.dscale || (params.dshift && !params.other)))
    p.partial_bytes = p.splits * p.units * 2 * elements * accumulator_bytes(dtype);
  return p;
}

void sum_to_size(const Tensor& grad, const std::vector<int64_t>& size, Tensor& result, DType dtype) {
  run_modulate_grads(
      modulate_grads_params(nullptr, nullptr, &result, size, grad, grad, nullptr, grad, {Activation::identity}, dtype),
      grad, dtype);
}

}  // namespace mi_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, MI_DISPATCH_KEY, m) {
  m.impl("modulate", TORCH_BOX(&mi_kernels::cuda::modulate));
  m.impl("modulate_grads", TORCH_BOX(&mi_kernels::cuda::modulate_grads));
  m.impl("mix", TORCH_BOX(&mi_kernels::cuda::mix));
  m.impl("mix_grads", TORCH_BOX(&mi_kernels::cuda::mix_grads));
}
