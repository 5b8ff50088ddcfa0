// Modulation on a GPU: checks, axes and launches; the arithmetic is in kernels.cuh.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/modulate_axes.h"
#include "cuda/host/registration.h"
#include "cuda/modulate/modulate_call.h"

namespace mi_kernels::cuda {
namespace {

using Optional = std::optional<Tensor>;

void modulate_into(Tensor& y, const Tensor& x, const Tensor& scale, const Optional& shift, Activation activation,
                   double offset) {
  if (y.numel() == 0) return;
  const DType dtype = dtype_of(x.scalar_type(), "modulate", "x");
  const Place place(x);
  launch_modulate(place, dtype, modulate_call(y, x, scale, shift, activation, offset, dtype));
}

Tensor modulate(const Tensor& x, const Tensor& scale, const Optional& shift, std::string activation, double offset) {
  constexpr const char* op = "modulate";
  check_input(op, x);
  check_operand(op, "scale", scale, x);
  if (shift.has_value()) check_operand(op, "shift", *shift, x);
  Tensor y = torch::stable::empty_like(x);
  modulate_into(y, x, scale, shift, activation_of(activation, op, false), offset);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> modulate_grads(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                  std::vector<int64_t> shift_size, std::string name, double offset,
                                                  bool want_x, bool want_scale, bool want_shift) {
  constexpr const char* op = "modulate_grads";
  const Activation activation = activation_of(name, op, false);
  const Sizes scale_size = check_grads(op, grad, x, scale, want_shift, shift_size);
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  return modulate_grads_in_passes(
      x, scale_size, shift_size, want_x, want_scale, want_shift, [](Tensor made) { return made; },
      [&](Tensor* dx, Tensor* dscale, Tensor* dshift, const Sizes& pattern) {
        run_modulate_grads(modulate_grads_call(dx, dscale, dshift, pattern, grad, x, scale, activation, offset, dtype),
                           x, dtype);
      },
      [&](Tensor& dx) { modulate_into(dx, grad, scale, {}, activation, offset); });
}

}  // namespace

void run_modulate_grads(const ModulateGradsCall& call, const Tensor& like, DType dtype) {
  const Place place(like);
  const ModulateGradsPlan plan = plan_modulate_grads(call, dtype, place.machine());
  const Scratch scratch(like, plan.partial_bytes);
  launch_modulate_grads(place, dtype, call, plan, plan.partial_bytes ? scratch.at<void>() : nullptr);
}

}  // namespace mi_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(MI_OPERATORS, MI_DISPATCH_KEY, m) {
  m.impl("modulate", TORCH_BOX(&mi_kernels::cuda::modulate));
  m.impl("modulate_grads", TORCH_BOX(&mi_kernels::cuda::modulate_grads));
}
