// Element types, their accumulators, and chunks of 16 bytes, the most that one instruction loads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"
#include "common/host_device.h"

namespace mi_kernels::cuda {

using bf16 = c10::BFloat16;
using f16 = c10::Half;

// A float32 whose products may be rounded to tf32. It keeps all its bits until a matrix instruction reads it.
struct tf32 {
  float value;
  tf32() = default;
  MI_HOST_DEVICE explicit tf32(float v) : value(v) {}
  MI_HOST_DEVICE operator float() const { return value; }
};

template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
inline constexpr int kChunk = 16 / int(sizeof(T));  // elements of a chunk

template <int kBytes>
struct alignas(kBytes) Bits {
  uint32_t word[kBytes / 4];
};

template <class T, int kCount = kChunk<T>>
union Chunk {
  using All = Bits<kCount* int(sizeof(T))>;
  All bits;
  T element[kCount];
  MI_HOST_DEVICE Chunk() : bits{} {}
};

template <class T, int kCount = kChunk<T>>
MI_HOST_DEVICE Chunk<T, kCount> load_chunk(const T* p) {
  Chunk<T, kCount> c;
  c.bits = *reinterpret_cast<const typename Chunk<T, kCount>::All*>(p);
  return c;
}
template <class T>
MI_HOST_DEVICE void store_chunk(T* p, const Chunk<T>& c) {
  *reinterpret_cast<typename Chunk<T>::All*>(p) = c.bits;
}

// Calls f with a value of the type that stores the dtype.
template <class F>
void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32:
    case DType::tf32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}
// The same, with tf32 as a type of its own: what kernels compute in.
template <class F>
void for_arithmetic(DType dtype, F&& f) {
  dtype == DType::tf32 ? f(tf32{}) : for_dtype(dtype, f);
}

}  // namespace mi_kernels::cuda
