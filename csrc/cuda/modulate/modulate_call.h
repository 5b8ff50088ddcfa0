// The calls of modulation, made of tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cuda/host/device_stream.h"
#include "cuda/modulate/modulate.h"

namespace mi_kernels::cuda {

ModulateCall modulate_call(const Tensor& y, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& shift,
                           Activation activation, double offset, DType dtype);
// Over one pattern of kept and reduced dimensions, that of `pattern`; null where not wanted.
ModulateGradsCall modulate_grads_call(const Tensor* dx, const Tensor* dscale, const Tensor* dshift,
                                      const std::vector<int64_t>& pattern, const Tensor& grad, const Tensor& x,
                                      const Tensor& scale, Activation activation, double offset, DType dtype);

// Runs a call of the gradients on the device of `like`.
void run_modulate_grads(const ModulateGradsCall& call, const Tensor& like, DType dtype);

}  // namespace mi_kernels::cuda
