// The operands of the sm_80 engine, each of which brings its own 16-byte chunks to shared memory: a matrix, two
// matrices that share a tile, and the products z x, which are generated on the way.
//
// Coordinates are (outer, inner) in the operand's order in memory, inner within a line. kGenerated: the operand is
// prefetched to registers and converted there instead of being copied. kRounded: its tf32 elements are already rounded.
#pragma once

#include "cuda/common/numbers.cuh"

namespace mi_kernels::cuda {

template <class T>
struct MatrixOperand {
  const T* data = nullptr;
  int64_t outer_stride = 0, inner_stride = 0;
  int64_t outer_size = 0, inner_size = 0;        // beyond them the operand reads as zero
  int64_t group_stride = 0, context_stride = 0;  // a stride of the contexts if it is one matrix for each
  bool vectorized = false;                       // every chunk is contiguous, in bounds and 16-byte aligned

  using Element = T;
  static constexpr bool kPair = false, kGenerated = false, kRounded = false;
  struct Coord {
    int64_t outer, inner;
  };
  struct Prefetched {};
  MI_DEVICE void next_context() { data += context_stride; }
  MI_DEVICE void to_group(int64_t g) { data += g * group_stride; }
  MI_DEVICE Coord coord(int64_t outer, int64_t inner, bool) const { return {outer, inner}; }
  MI_DEVICE void move_inner(Coord& c, int64_t by) const { c.inner += by; }
  MI_DEVICE void move_outer(Coord& c, int64_t by) const { c.outer += by; }

  template <class Arch>
  MI_DEVICE void copy_chunk(const Coord& c, char* dest) const {
    if (vectorized) return Arch::copy_async(dest, in_bounds(c) ? at(c) : data, in_bounds(c));
    store_chunk(reinterpret_cast<T*>(dest), gather<kChunk<T>>(c));
  }

 protected:
  MI_DEVICE bool in_bounds(const Coord& c) const { return c.outer < outer_size && c.inner < inner_size; }
  MI_DEVICE const T* at(const Coord& c) const { return data + c.outer * outer_stride + c.inner * inner_stride; }
  template <int kCount>
  MI_DEVICE Chunk<T, kCount> gather(const Coord& c) const {
    Chunk<T, kCount> chunk;
    if (in_bounds(c)) {
      MI_UNROLL
      for (int e = 0; e < kCount; ++e)
        if (c.inner + e < inner_size) chunk.element[e] = at(c)[e * inner_stride];
    }
    return chunk;
  }
};

// A matrix converted to tf32, which represents every float16 exactly.
template <class T>
struct WidenedMatrix : MatrixOperand<T> {
  using Element = tf32;
  static constexpr bool kGenerated = true, kRounded = true;
  static constexpr int kCount = kChunk<tf32>;
  using Coord = typename MatrixOperand<T>::Coord;
  using Prefetched = Chunk<T, kCount>;
  MI_DEVICE explicit WidenedMatrix(const MatrixOperand<T>& m) : MatrixOperand<T>(m) {}

  MI_DEVICE Prefetched prefetch(const Coord& c) const {
    if (!this->vectorized) return this->template gather<kCount>(c);
    return this->in_bounds(c) ? load_chunk<T, kCount>(this->at(c)) : Prefetched();
  }
  template <class Arch>
  static MI_DEVICE Chunk<tf32> generate(const Prefetched& values) {
    Chunk<tf32> c;
    MI_UNROLL
    for (int e = 0; e < kCount; ++e) c.element[e] = tf32(float(values.element[e]));
    return c;
  }
};

// Two matrices of one shape in one tile: the first half of its rows is of `first`, the other half of `second`. `second`
// may be absent (null data) and then reads as zero.
template <class T>
struct MatrixPair {
  MatrixOperand<T> first, second;

  using Element = T;
  static constexpr bool kPair = true, kGenerated = false, kRounded = false;
  struct Coord {
    typename MatrixOperand<T>::Coord at;
    bool is_second;
  };
  struct Prefetched {};
  MI_DEVICE void next_context() {}
  MI_DEVICE void to_group(int64_t g) {
    first.to_group(g);
    second.to_group(g);
  }
  MI_DEVICE Coord coord(int64_t outer, int64_t inner, bool is_second) const { return {{outer, inner}, is_second}; }
  MI_DEVICE void move_inner(Coord& c, int64_t by) const { c.at.inner += by; }
  MI_DEVICE void move_outer(Coord& c, int64_t by) const { c.at.outer += by; }
  template <class Arch>
  MI_DEVICE void copy_chunk(const Coord& c, char* dest) const {
    c.is_second ? second.template copy_chunk<Arch>(c.at, dest) : first.template copy_chunk<Arch>(c.at, dest);
  }
};

// The matrix z[b, i] x[b, j] with b as its outer and (i, j) as its inner dimension. Products of float16 are generated
// as tf32, which has the same precision and a range that holds them.
template <class T>
struct OuterProducts {
  const T *z = nullptr, *x = nullptr;
  int64_t z_row = 0, z_col = 0, x_row = 0, x_col = 0;  // strides
  int64_t rows = 0, context = 0, width = 0;
  int64_t z_group = 0, x_group = 0;  // strides
  bool vectorized = false;           // x can be read in chunks, none of which crosses to the next i

  static constexpr bool kWidens = std::is_same_v<T, f16>;
  using Element = std::conditional_t<kWidens, tf32, T>;
  static constexpr bool kPair = false, kGenerated = true, kRounded = std::is_same_v<Element, tf32>;
  static constexpr int kCount = kChunk<Element>;
  struct Coord {
    int64_t outer, i, j;
  };
  struct Prefetched {
    Chunk<T, kCount> x;
    T z[kWidens ? kCount : 1];  // a single one serves the chunk: without `vectorized` x is multiplied already
  };
  MI_DEVICE void next_context() {}
  MI_DEVICE void to_group(int64_t g) {
    z += g * z_group;
    x += g * x_group;
  }
  MI_DEVICE Coord coord(int64_t outer, int64_t inner, bool) const {
    const int64_t i = inner / width;
    return {outer, i, inner - i * width};
  }
  MI_DEVICE void move_inner(Coord& c, int64_t by) const {
    if (by >= width) {
      const int64_t contexts = int(by) / int(width);  // 32-bit division: `by` is small, and width is no larger
      c.i += contexts;
      by -= contexts * width;
    }
    c.j += by;
    if (c.j >= width) {
      c.j -= width;
      ++c.i;
    }
  }
  MI_DEVICE void move_outer(Coord& c, int64_t by) const { c.outer += by; }

  // The engine prefetches first, computes a stage, and generates the products after it.
  MI_DEVICE Prefetched prefetch(const Coord& c) const {
    using Acc = AccOf<T>;
    Prefetched values;
    const auto fill = [&](T value) {
      MI_UNROLL
      for (T& factor : values.z) factor = value;
    };
    fill(T(0.0f));
    if (c.outer >= rows || c.i >= context) return values;
    if (vectorized) {
      fill(z[c.outer * z_row + c.i * z_col]);
      values.x = load_chunk<T, kCount>(x + c.outer * x_row + c.j);
      return values;
    }
    if constexpr (!kWidens) fill(T(1.0f));
    int64_t i = c.i, j = c.j;
    MI_UNROLL
    for (int e = 0; e < kCount; ++e) {
      if (i < context) {
        const T z_i = z[c.outer * z_row + i * z_col], x_j = x[c.outer * x_row + j * x_col];
        if constexpr (kWidens) {
          values.z[e] = z_i;
          values.x.element[e] = x_j;
        } else {
          values.x.element[e] = T(Acc(z_i) * Acc(x_j));
        }
      }
      if (++j == width) {
        j = 0;
        ++i;
      }
    }
    return values;
  }
  template <class Arch>
  static MI_DEVICE Chunk<Element> generate(const Prefetched& values) {
    Chunk<Element> c;
    MI_UNROLL
    for (int e = 0; e < kCount; ++e) {
      c.element[e] = Element(AccOf<T>(values.z[kWidens ? e : 0]) * AccOf<T>(values.x.element[e]));
      if constexpr (kRounded) c.bits.word[e] = Arch::to_tf32(c.bits.word[e]);
    }
    return c;
  }
};

}  // namespace mi_kernels::cuda
