// All pairs of two sequences, y[b, l, m, o] = [x1[b, l] | 1]^T W_o [x2[b, m] | 1]: a layer W_o x2 is generated for each
// position of the second sequence and applied to the first one. Samples are taken a few at a time, so that their layers
// are still in the cache when they are applied.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/allocate.h"
#include "common/registration.h"
#include "common/tensor_args.h"
#include "cpu/dispatch/interaction.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels {
namespace {

constexpr const char* kOp = "cpu_biaffine";

// Bytes of the layers of the samples that are taken at a time. But W is packed for each of these blocks: they have at
// least kFewestRows layers, and as many as there are features in a sum (see outputs_in_lanes).
constexpr int64_t kLayerBytes = 2 << 20, kFewestRows = 256;

struct Sizes {
  int64_t samples, length1, length2, width, context, out;
  int64_t columns;        // of a layer: the width, and one more for a feature 1 of input1
  int64_t element_bytes;  // of the dtype

  bool one() const { return columns > width; }
  int64_t layer() const { return out * columns; }
  int64_t pairs() const { return length2 * out; }
  int64_t layer_bytes() const { return length2 * layer() * element_bytes; }  // of a sample
  int64_t step() const {  // samples of a block, evened out over the blocks
    const int64_t fewest = ceil_div(std::max(kFewestRows, context), std::max<int64_t>(length2, 1));
    const int64_t most = std::max(kLayerBytes / std::max<int64_t>(layer_bytes(), 1), fewest);
    return std::max<int64_t>(ceil_div(samples, std::max<int64_t>(samples / most, 1)), 1);
  }
};

Sizes checked(const Tensor& input1, const Tensor& input2, const Tensor& weight, const Optional& offset,
              const Optional& bias, bool layers_as_rows) {
  const std::pair<const char*, const Tensor*> all[] = {{"input1", &input1}, {"input2", &input2}, {"weight", &weight}};
  for (const auto& [name, tensor] : all) {
    check_defined(kOp, name, *tensor);
    STD_TORCH_CHECK(tensor->dim() == 3, kOp, ": ", name, ": expected 3 dimensions, got ", tensor->dim());
  }
  STD_TORCH_CHECK(input1.is_cpu(), kOp, ": input1: expected a tensor on the CPU");
  const Sizes s{input1.size(0), input1.size(1), input2.size(1), input1.size(2),
                input2.size(2), weight.size(0), weight.size(1), int64_t(input1.element_size())};
  STD_TORCH_CHECK(s.columns == s.width || s.columns == s.width + 1, kOp, ": weight: expected size ", s.width, " or ",
                  s.width + 1, " of dimension 1, got ", s.columns);
  check_sizes(kOp, "input2", input2, input1, s.samples, true, {s.length2, s.context});
  check_sizes(kOp, "weight", weight, input1, 1, false, {s.out, s.columns, s.context});
  if (offset.has_value()) check_sizes(kOp, "offset", *offset, input1, 1, false, {s.out, s.columns});
  if (bias.has_value()) check_sizes(kOp, "bias", *bias, input1, 1, false, {layers_as_rows ? s.length1 : s.pairs()});
  const auto is_one_axis = [&](const Tensor& t) {
    return s.out <= 1 || s.columns <= 1 || t.stride(0) == s.columns * t.stride(1);
  };
  STD_TORCH_CHECK(is_one_axis(weight), kOp, ": weight: expected one matrix [O * I1, I2] in memory");
  STD_TORCH_CHECK(!offset.has_value() || is_one_axis(*offset), kOp, ": offset: expected one vector in memory");
  STD_TORCH_CHECK(!layers_as_rows || (s.out == 1 && !s.one()), kOp,
                  ": layers_as_rows: expected false, as a layer has several outputs or a column for a feature 1");
  STD_TORCH_CHECK(!bias.has_value() || bias->is_contiguous(), kOp, ": bias: expected a contiguous tensor");
  STD_TORCH_CHECK(!s.one() || !bias.has_value(), kOp, ": bias: expected None, as the layers have a column for it");
  check_products(kOp, "input1", {s.samples, s.length2, 0, s.context, s.layer()}, false);
  check_products(kOp, "input1", {s.samples, s.length1, 0, s.width, s.pairs()}, false);
  return s;
}

// Sequences [B, L, F] from a sample on.
TensorRef from_sample(const Tensor& t, int64_t sample) {
  TensorRef ref = tensor_ref(t, true);
  ref.data = static_cast<const char*>(ref.data) + sample * ref.group * int64_t(t.element_size());
  return ref;
}

// The axis of outputs and columns of weight or offset, which is one axis in memory.
int64_t stride_of_layer(const Tensor& t) { return t.size(1) == 1 ? t.stride(0) : t.stride(1); }

// The layers of `count` samples, as one product where input2 is one matrix in memory.
void generate(DType dtype, const Sizes& s, const Tensor& input2, const Tensor& weight, const Optional& offset,
              int64_t sample, int64_t count, void* layers) {
  const bool flat = count == 1 || input2.stride(0) == s.length2 * input2.stride(1);
  ForwardCall call{};
  call.problem = {flat ? 1 : count, flat ? count * s.length2 : s.length2, 0, s.context, s.layer()};
  call.x = from_sample(input2, sample);
  call.weight_x = {weight.const_data_ptr(), 0, stride_of_layer(weight), weight.stride(2)};
  if (offset.has_value()) call.bias = {offset->const_data_ptr(), 0, stride_of_layer(*offset), 0};
  call.y.data = layers;
  forward_part(dtype, {&input2}, call, {});
}

// y [L2, L1] of `count` samples with one output.
void apply_rows(DType dtype, const Sizes& s, const Tensor& input1, const void* layers, const Optional& bias,
                int64_t sample, int64_t count, void* y) {
  ForwardCall call{};
  call.problem = {count, s.length2, 0, s.width, s.length1};
  call.x = {layers, s.length2 * s.layer(), s.columns, 1};
  call.weight_x = from_sample(input1, sample);
  if (bias.has_value()) call.bias = {bias->const_data_ptr(), 0, 1, 0};
  call.y.data = y;
  forward_part(dtype, {&input1}, call, {});
}

// y of `count` samples; the outputs of a sample are groups of a product of its own if y has them first.
void apply(DType dtype, const Sizes& s, const Tensor& input1, const char* layers, const Optional& bias,
           bool outputs_first, int64_t sample, int64_t count, char* y) {
  if (outputs_first && s.out > 1 && count > 1) {
    for (int64_t c = 0; c < count; ++c)
      apply(dtype, s, input1, layers + c * s.layer_bytes(), bias, true, sample + c, 1,
            y + c * s.length1 * s.pairs() * s.element_bytes);
    return;
  }
  const bool grouped = outputs_first && s.out > 1;
  ForwardCall call{};
  call.problem = {grouped ? s.out : count, s.length1, 0, s.width, grouped ? s.length2 : s.pairs()};
  call.x = from_sample(input1, sample);
  if (grouped) call.x.group = 0;
  call.weight_x = {layers, grouped ? s.columns : s.length2 * s.layer(), grouped ? s.layer() : s.columns, 1};
  call.bias = call.weight_x;
  call.bias.col = 0;
  call.bias.data = s.one() ? layers + s.width * s.element_bytes : nullptr;
  if (bias.has_value()) call.bias = {bias->const_data_ptr(), grouped ? 1 : 0, grouped ? s.out : 1, 0};
  call.y.data = y;
  forward_part(dtype, {&input1}, call, {});
}

// y [B, L1, L2, O], or [B, O, L1, L2], and the layers [B, L2, O, I1 (+ 1)] if they are to be kept. `weight` [O, I1 (+
// 1), I2] is one matrix in memory; a last row of it is for a feature 1 of input1, `offset` [O, I1 (+ 1)] for one of
// input2. `bias` [L2 O] is for layers without a column for it. With `layers_as_rows`, y is [B, L2, L1, 1] or [B, 1, L2,
// L1] and bias [L1].
std::tuple<Tensor, Tensor> biaffine(const Tensor& input1, const Tensor& input2, const Tensor& weight,
                                    const Optional& offset, const Optional& bias, bool channels_first,
                                    bool layers_as_rows, bool keep) {
  const Sizes s = checked(input1, input2, weight, offset, bias, layers_as_rows);
  const DType dtype = dtype_of(input1.scalar_type(), kOp, "input1");
  const int64_t step = s.step();
  const int64_t rows = layers_as_rows ? s.length2 : s.length1, lanes = layers_as_rows ? s.length1 : s.length2;
  Tensor y = channels_first ? allocate(input1, {s.samples, s.out, rows, lanes})
                            : allocate(input1, {s.samples, rows, lanes, s.out});
  Tensor layers = allocate(input1, {keep ? s.samples : step, s.length2, s.out, s.columns});
  for (int64_t b = 0; b < s.samples; b += step) {
    const int64_t count = std::min(step, s.samples - b);
    char* of_block = static_cast<char*>(layers.mutable_data_ptr()) + (keep ? b * s.layer_bytes() : 0);
    char* y_of_block = static_cast<char*>(y.mutable_data_ptr()) + b * s.length1 * s.pairs() * s.element_bytes;
    if (s.length2 * s.layer() > 0) generate(dtype, s, input2, weight, offset, b, count, of_block);
    if (s.length1 * s.pairs() == 0) continue;
    if (layers_as_rows)
      apply_rows(dtype, s, input1, of_block, bias, b, count, y_of_block);
    else
      apply(dtype, s, input1, of_block, bias, channels_first, b, count, y_of_block);
  }
  return {y, keep ? layers : allocate(input1, {0})};
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CPU, m) { m.impl("cpu_biaffine", TORCH_BOX(&mi_kernels::biaffine)); }
