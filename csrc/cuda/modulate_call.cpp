// The calls of modulation, made of tensors: which axes there are, and where sixteen bytes can move at once.
#include "modulate_call.h"

#include <algorithm>

#include "../modulate_axes.h"

namespace mi_kernels::cuda {
namespace {

// Whether every chunk of an operand lies together and on a multiple of sixteen bytes.
bool whole_chunks(const void* data, int operand, const std::vector<KindAxis>& axes, int64_t item) {
  const int64_t elements = 16 / item;
  if (reinterpret_cast<uintptr_t>(data) % 16 || axes.back().stride[operand] != 1 || axes.back().size % elements) return false;
  return std::all_of(axes.begin(), axes.end() - 1,
                     [&](const KindAxis& axis) { return axis.stride[operand] % elements == 0; });
}

}  // namespace

ModulateCall modulate_call(const Tensor& y, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& shift,
                           Activation activation, double offset, DType dtype) {
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
  const int64_t item = storage_bytes(dtype), elements = 16 / item;
  call.chunks = (call.inner.size + elements - 1) / elements;
  call.blocks = (call.rows * call.chunks + kModulateThreads - 1) / kModulateThreads;
  const void* data[kOperands] = {call.x, call.scale, call.shift, call.y, nullptr};
  for (int o = 0; o < kOperands; ++o) call.whole[o] = data[o] && whole_chunks(data[o], o, axes, item);
  return call;
}

ModulateGradsCall modulate_grads_call(const Tensor* dx, const Tensor* dscale, const Tensor* dshift,
                                      const std::vector<int64_t>& pattern, const Tensor& grad, const Tensor& x,
                                      const Tensor& scale, Activation activation, double offset, DType dtype) {
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
  call.scale = dx || dscale ? scale.const_data_ptr() : nullptr;
  call.dx = dx ? dx->mutable_data_ptr() : nullptr;
  call.dscale = dscale ? dscale->mutable_data_ptr() : nullptr;
  call.dshift = dshift ? dshift->mutable_data_ptr() : nullptr;
  call.activation = activation;
  call.offset = offset;
  const void* data[kOperands] = {call.x, call.scale, nullptr, call.dx, call.grad};
  for (int o = 0; o < kOperands; ++o) call.whole[o] = data[o] && whole_chunks(data[o], o, axes, storage_bytes(dtype));
  return call;
}

}  // namespace mi_kernels::cuda
