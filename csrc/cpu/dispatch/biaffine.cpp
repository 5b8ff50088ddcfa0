// All pairs of two sequences, y[b, l, m, o] = [x1[b, l] | 1]^T W_o [x2[b, m] | 1]: a layer W' x2 of each position of
// the second sequence is generated and applied to the first one. Samples are taken a few at a time, so that their
// layers are still in the cache when they are applied.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/allocate.h"
#include "common/tensor_args.h"
#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/interaction.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels {
namespace {

// Layers of the samples that are taken at a time; fewer than kFewestRows of them would pack W too often.
constexpr int64_t kLayerBytes = 4 << 20, kFewestRows = 256;

const void* at(const void* data, int64_t elements, int64_t element_bytes) {
  return static_cast<const char*>(data) + elements * element_bytes;
}

// Sequences [B, L, F] as rows of one matrix where they are one in memory, else with samples as groups.
bool is_one_matrix(const Tensor& t) { return t.size(0) == 1 || t.stride(0) == t.size(1) * t.stride(1); }

// y [B, L1, L2, O], and the layers [B, L2, O, I1 (+ 1)] if they are to be kept. `weight` [O, I1 (+ 1), I2] is one
// matrix [O (I1 + 1), I2] in memory; a last row of it, for a feature 1 of input1, and `offset` [O, I1 (+ 1)], for one
// of input2, are optional, and so is `bias` [L2 O].
std::tuple<Tensor, Tensor> biaffine(const Tensor& input1, const Tensor& input2, const Tensor& weight,
                                    const Optional& offset, const Optional& bias, bool keep) {
  constexpr const char* op = "cpu_biaffine";
  check_defined(op, "input1", input1);
  check_defined(op, "input2", input2);
  check_defined(op, "weight", weight);
  STD_TORCH_CHECK(input1.dim() == 3, op, ": input1: expected 3 dimensions, got ", input1.dim());
  STD_TORCH_CHECK(input2.dim() == 3, op, ": input2: expected 3 dimensions, got ", input2.dim());
  STD_TORCH_CHECK(weight.dim() == 3, op, ": weight: expected 3 dimensions, got ", weight.dim());
  STD_TORCH_CHECK(input1.is_cpu(), op, ": input1: expected a tensor on the CPU");
  const int64_t samples = input1.size(0), length1 = input1.size(1), length2 = input2.size(1), width = input1.size(2),
                context = input2.size(2), out = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK(columns == width || columns == width + 1, op, ": weight: expected size ", width, " or ", width + 1,
                  " of dimension 1, got ", columns);
  const bool one = columns > width;
  const int64_t layer = out * columns, pairs = length2 * out;
  const DType dtype = dtype_of(input1.scalar_type(), op, "input1");
  check_sizes(op, "input2", input2, input1, samples, true, {length2, context});
  check_sizes(op, "weight", weight, input1, 1, false, {out, columns, context});
  if (offset.has_value()) check_sizes(op, "offset", *offset, input1, 1, false, {out, columns});
  if (bias.has_value()) check_sizes(op, "bias", *bias, input1, 1, false, {pairs});
  STD_TORCH_CHECK(out <= 1 || columns == 0 || weight.stride(0) == columns * weight.stride(1), op,
                  ": weight: expected one matrix [O * I1, I2] in memory");
  STD_TORCH_CHECK(!offset.has_value() || out <= 1 || offset->stride(0) == columns * offset->stride(1), op,
                  ": offset: expected one vector [O * I1] in memory");
  STD_TORCH_CHECK(!one || !bias.has_value(), op,
                  ": bias: expected None, as weight has a row for a feature 1 of input1");
  check_products(op, "input1", {samples, length2, 0, context, layer}, false);
  check_products(op, "input1", {samples, length1, 0, width, pairs}, false);

  const int64_t bytes = int64_t(input1.element_size()), sample_bytes = std::max<int64_t>(length2 * layer * bytes, 1);
  const int64_t most =
      std::max(kLayerBytes / sample_bytes, (kFewestRows + length2 - 1) / std::max<int64_t>(length2, 1));
  const int64_t step = std::min(std::max<int64_t>(most, 1), samples);
  Tensor y = on_huge_pages(allocate(input1, {samples, length1, length2, out}));
  Tensor layers = on_huge_pages(allocate(input1, {keep ? samples : step, length2, out, columns}));
  if (y.numel() == 0 && !keep) return {y, layers};

  const bool flat = is_one_matrix(input2);
  const TensorRef rows1 = tensor_ref(input1, true), rows2 = tensor_ref(input2, true);
  TensorRef matrix{weight.const_data_ptr(), 0, weight.stride(1), weight.stride(2)};
  if (columns == 1) matrix.row = weight.stride(0);
  TensorRef shift;
  if (offset.has_value())
    shift = {offset->const_data_ptr(), 0, columns == 1 ? offset->stride(0) : offset->stride(1), 0};
  const WorkspaceSource memory{&input1};
  for (int64_t b = 0; b < samples; b += step) {
    const int64_t count = std::min(step, samples - b);
    char* generated = static_cast<char*>(layers.mutable_data_ptr()) + (keep ? b * sample_bytes : 0);
    if (length2 * layer > 0) {
      ForwardCall call{{flat ? 1 : count, flat ? count * length2 : length2, 0, context, layer},
                       {at(rows2.data, b * rows2.group, bytes), rows2.group, rows2.row, rows2.col},
                       {},
                       {},
                       {},
                       matrix,
                       shift,
                       {generated}};
      forward_part(dtype, memory, call, {});
    }
    if (length1 * pairs == 0) continue;
    const TensorRef applied{generated, length2 * layer, columns, 1};
    TensorRef lanes = one ? TensorRef{at(generated, width, bytes), length2 * layer, columns, 0} : TensorRef{};
    if (bias.has_value()) lanes = tensor_ref(bias, false);
    ForwardCall call{{count, length1, 0, width, pairs},
                     {at(rows1.data, b * rows1.group, bytes), rows1.group, rows1.row, rows1.col},
                     {},
                     {},
                     {},
                     applied,
                     lanes,
                     {static_cast<char*>(y.mutable_data_ptr()) + b * length1 * pairs * bytes}};
    forward_part(dtype, memory, call, {});
  }
  return {y, keep ? layers : allocate(input1, {0})};
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(mi_kernels, CPU, m) { m.impl("cpu_biaffine", TORCH_BOX(&mi_kernels::biaffine)); }
