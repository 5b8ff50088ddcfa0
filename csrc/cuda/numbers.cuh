// Elements as they are stored and the accumulators they become, sixteen bytes at a time.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../dtypes.h"
#include "../host_device.h"

namespace mi_kernels::cuda {

using bf16 = c10::BFloat16;
using f16 = c10::Half;

template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
inline constexpr int kChunk = 16 / int(sizeof(T));  // elements of a chunk of sixteen bytes

struct alignas(16) Bits16 {
  uint32_t word[4];
};

template <class T>
union Chunk {
  Bits16 bits;
  T element[kChunk<T>];
  MI_HOST_DEVICE Chunk() : bits{{0, 0, 0, 0}} {}
};

template <class T>
MI_HOST_DEVICE Chunk<T> load_chunk(const T* p) {
  Chunk<T> c;
  c.bits = *reinterpret_cast<const Bits16*>(p);
  return c;
}
template <class T>
MI_HOST_DEVICE void store_chunk(T* p, const Chunk<T>& c) {
  *reinterpret_cast<Bits16*>(p) = c.bits;
}

// Calls f with a number of the dtype.
template <class F>
void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

}  // namespace mi_kernels::cuda
