#include "cpu/dispatch/overflow.h"

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

namespace mi_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sign-free bits of an element as those of a float: they order as the magnitudes do, Inf and NaN last.
constexpr uint32_t kInfinity = 0x7f800000;
inline int32_t magnitude(const float& v) {
  int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits & 0x7fffffff;
}
inline int16_t magnitude(const uint16_t& bf16) { return int16_t(bf16 & 0x7fff); }
inline uint32_t float_bits(int32_t magnitude) { return uint32_t(magnitude); }
inline uint32_t float_bits(int16_t magnitude) { return uint32_t(magnitude) << 16; }

// Signed, and in their own width: the baseline instruction set has a maximum of these.
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

// Of the largest magnitude; any stride and rank.
uint32_t largest_bits(const Tensor& t) {
  if (t.numel() == 0) return 0;
  if (t.scalar_type() == ScalarType::BFloat16) {
    const auto* data = static_cast<const uint16_t*>(t.const_data_ptr());
    return t.is_contiguous() ? largest_bits(data, t.numel(), 1) : largest_bits(t, data, 0);
  }
  const auto* data = static_cast<const float*>(t.const_data_ptr());
  return t.is_contiguous() ? largest_bits(data, t.numel(), 1) : largest_bits(t, data, 0);
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

bool all_finite(const Tensor& t) { return largest_bits(t) < kInfinity; }

bool products_fit(std::initializer_list<Tensor> operands, int64_t terms) {
  double bound = 2.0 * double(std::max<int64_t>(terms, 1));  // twice, for what rounding adds
  for (const Tensor& t : operands) {
    const uint32_t bits = largest_bits(t);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    bound *= std::max(double(largest), 1.0);  // a product of two may overflow though the third is small
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
