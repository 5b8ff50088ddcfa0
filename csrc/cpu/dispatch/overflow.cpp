#include "cpu/dispatch/overflow.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/integers.h"

namespace mi_kernels {
namespace {

using torch::headeronly::ScalarType;

// The bits of an element without its sign, as those of a float: they are ordered like the magnitudes, with Inf and NaN
// last.
constexpr uint32_t kInfinity = 0x7f800000;
inline int32_t magnitude(const float& v) {
  int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits & 0x7fffffff;
}
inline int16_t magnitude(const uint16_t& bf16) { return int16_t(bf16 & 0x7fff); }
inline uint32_t float_bits(int32_t magnitude) { return uint32_t(magnitude); }
inline uint32_t float_bits(int16_t magnitude) { return uint32_t(magnitude) << 16; }

// On signed integers of the element's own width, for which the baseline instruction set has a vector maximum.
template <class S>
uint32_t largest_bits(const S* data, int64_t count, int64_t stride) {
  decltype(magnitude(*data)) most = 0;
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) most = std::max(most, magnitude(data[i]));
  else
    for (int64_t i = 0; i < count; ++i) most = std::max(most, magnitude(data[i * stride]));
  return float_bits(most);
}

template <class S>
uint32_t largest_bits(const Tensor& t, const S* data, int64_t axis) {
  if (axis + 1 >= t.dim())
    return t.dim() == 0 ? float_bits(magnitude(*data)) : largest_bits(data, t.size(axis), t.stride(axis));
  uint32_t most = 0;
  for (int64_t i = 0; i < t.size(axis); ++i)
    most = std::max(most, largest_bits(t, data + i * t.stride(axis), axis + 1));
  return most;
}

// The same for elements one after the other, which threads share where there are many.
template <class S>
uint32_t largest_bits_of_run(const S* data, int64_t count) {
  constexpr int64_t kChunk = 1 << 16;
  if (count <= 2 * kChunk) return largest_bits(data, count, 1);
  std::atomic<uint32_t> most{0};
  torch::stable::parallel_for(0, ceil_div(count, kChunk), 1, [&](int64_t begin, int64_t end) {
    const uint32_t found = largest_bits(data + begin * kChunk, std::min(count, end * kChunk) - begin * kChunk, 1);
    for (uint32_t known = most; known < found && !most.compare_exchange_weak(known, found);) {
    }
  });
  return most;
}

// The bits of the largest magnitude of a tensor of any strides and rank.
uint32_t largest_bits(const Tensor& t) {
  if (t.numel() == 0) return 0;
  if (t.scalar_type() == ScalarType::BFloat16) {
    const auto* data = static_cast<const uint16_t*>(t.const_data_ptr());
    return t.is_contiguous() ? largest_bits_of_run(data, t.numel()) : largest_bits(t, data, 0);
  }
  const auto* data = static_cast<const float*>(t.const_data_ptr());
  return t.is_contiguous() ? largest_bits_of_run(data, t.numel()) : largest_bits(t, data, 0);
}

template <class S, class Raw>
void replace(Raw* result, const double* exact, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (float_bits(magnitude(result[i])) < kInfinity) continue;
    const S value(static_cast<float>(exact[i]));
    std::memcpy(&result[i], &value, sizeof value);
  }
}

}  // namespace

Tensor in_double(const Tensor& t) {
  using torch::headeronly::ScalarType;
  if (t.dim() == 0 || t.size(0) < 2 || t.stride(0) != 0) return torch::stable::to(t, ScalarType::Double);
  const Tensor one = torch::stable::to(torch::stable::narrow(const_cast<Tensor&>(t), 0, 0, 1), ScalarType::Double);
  std::vector<int64_t> sizes(size_t(t.dim()), -1);
  sizes[0] = t.size(0);
  using torch::stable::detail::from;
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes);
  std::array<StableIValue, 3> stack{from(one), from(shape), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}
bool all_finite(const Tensor& t) { return largest_bits(t) < kInfinity; }

bool products_fit(std::initializer_list<Tensor> operands, int64_t terms) {
  double bound = 2.0 * double(std::max<int64_t>(terms, 1));  // twice, for rounding
  for (const Tensor& t : operands) {
    const uint32_t bits = largest_bits(t);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    bound *= std::max(double(largest), 1.0);  // two factors may overflow although the third is small
  }
  return bound < double(FLT_MAX);  // false for NaN
}

void replace_not_finite(Tensor& result, const Tensor& exact) {
  const auto* values = static_cast<const double*>(exact.const_data_ptr());
  if (result.scalar_type() == ScalarType::BFloat16)
    replace<c10::BFloat16>(static_cast<uint16_t*>(result.mutable_data_ptr()), values, result.numel());
  else
    replace<float>(static_cast<float*>(result.mutable_data_ptr()), values, result.numel());
}

}  // namespace mi_kernels
