// The calls of modulation, made of tensors: where sixteen bytes can move at once.
#include "cuda/modulate/modulate_call.h"

#include <algorithm>

#include "common/integers.h"
#include "common/modulate_axes.h"

namespace mi_kernels::cuda {
namespace {

// Whether every chunk along the inner axis lies together, and begins on a multiple of sixteen bytes where lines do.
bool whole_line(const void* data, const Axis& inner, int operand, int64_t elements) {
  return data && reinterpret_cast<uintptr_t>(data) % 16 == 0 && inner.stride[operand] == 1 &&
         inner.size % elements == 0;
}
bool whole_lines(const Axis* axes, int64_t count, int operand, int64_t elements) {
  return std::all_of(axes, axes + count, [&](const Axis& axis) { return axis.stride[operand] % elements == 0; });
}

}  // namespace

ModulateCall modulate_call(const Tensor& y, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& shift,
                           Activation activation, double offset, DType dtype) {
  ModulateCall call{modulate_operands(y, x, scale, shift, activation, offset), 0, 0, {}};
  const int64_t elements = 16 / storage_bytes(dtype);
  call.chunks = ceil_div(call.inner.size, elements);
  call.blocks = ceil_div(call.rows * call.chunks, kModulateThreads);
  const void* data[kOperands] = {call.x, call.scale, call.shift, call.y, nullptr};
  for (int o = 0; o < kOperands; ++o)
    call.whole[o] = whole_line(data[o], call.inner, o, elements) && whole_lines(call.outer, call.axes, o, elements);
  return call;
}

ModulateGradsCall modulate_grads_call(const Tensor* dx, const Tensor* dscale, const Tensor* dshift,
                                      const std::vector<int64_t>& pattern, const Tensor& grad, const Tensor& x,
                                      const Tensor& scale, Activation activation, double offset, DType dtype) {
  ModulateGradsCall call{modulate_grads_operands(dx, dscale, dshift, pattern, grad, x, scale, activation, offset), {}};
  const int64_t elements = 16 / storage_bytes(dtype);
  const void* data[kOperands] = {call.x, call.scale, nullptr, call.dx, call.grad};
  for (int o = 0; o < kOperands; ++o)
    call.whole[o] = whole_line(data[o], call.inner, o, elements) &&
                    whole_lines(call.kept, call.kept_axes, o, elements) &&
                    whole_lines(call.reduced, call.reduced_axes, o, elements);
  return call;
}

}  // namespace mi_kernels::cuda
