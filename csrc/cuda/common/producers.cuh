// The operands of the engine: matrices, two matrices that share a tile, and products z x that are made on the way to
// shared memory. (line, along) are coordinates in the order in which an operand lies in memory, along within a line.
// kMade: an operand is read into registers (Raw) and made of them. kRounded: its tf32 elements are, and need no
// rounding.
#pragma once

#include "cuda/common/numbers.cuh"
#include "cuda/sm80/layout.h"

namespace mi_kernels::cuda {

template <class T>
struct Matrix {
  const T* data = nullptr;
  int64_t line = 0, along = 0;    // strides
  int64_t lines = 0, length = 0;  // sizes; beyond them there are zeros
  int64_t group = 0, item = 0;    // strides between groups, and between the items of a sequence of products
  bool whole = false;             // every chunk lies together, within `length`, on a multiple of sixteen bytes

  using Element = T;
  static constexpr bool kPair = false, kMade = false, kRounded = false;
  struct Place {
    int64_t line, along;
  };
  struct Raw {};
  MI_DEVICE void next_item() { data += item; }
  MI_DEVICE void to_group(int64_t g) { data += g * group; }
  MI_DEVICE Place place(int64_t l, int64_t a, bool) const { return {l, a}; }
  MI_DEVICE void move_along(Place& p, int64_t by) const { p.along += by; }
  MI_DEVICE void move_line(Place& p, int64_t by) const { p.line += by; }

  // Brings the chunk at a place to shared memory.
  template <class Gpu>
  MI_DEVICE void bring(const Place& p, char* to) const {
    if (whole) return Gpu::copy_async(to, inside(p) ? at(p) : data, inside(p));
    store_chunk(reinterpret_cast<T*>(to), gathered<kChunk<T>>(p));
  }

 protected:
  MI_DEVICE bool inside(const Place& p) const { return p.line < lines && p.along < length; }
  MI_DEVICE const T* at(const Place& p) const { return data + p.line * line + p.along * along; }
  template <int kCount>
  MI_DEVICE Chunk<T, kCount> gathered(const Place& p) const {
    Chunk<T, kCount> c;
    if (inside(p)) {
      MI_UNROLL for (int e = 0; e < kCount; ++e) if (p.along + e < length) c.element[e] = at(p)[e * along];
    }
    return c;
  }
};

// A matrix in the tiles of tf32, which hold every float16.
template <class T>
struct Widened : Matrix<T> {
  using Element = tf32;
  static constexpr bool kMade = true, kRounded = true;
  static constexpr int kCount = kChunk<tf32>;
  using Place = typename Matrix<T>::Place;
  using Raw = Chunk<T, kCount>;
  MI_DEVICE explicit Widened(const Matrix<T>& m) : Matrix<T>(m) {}

  MI_DEVICE Raw read(const Place& p) const {
    if (!this->whole) return this->template gathered<kCount>(p);
    return this->inside(p) ? load_chunk<T, kCount>(this->at(p)) : Raw();
  }
  template <class Gpu>
  static MI_DEVICE Chunk<tf32> made(const Raw& raw) {
    Chunk<tf32> c;
    MI_UNROLL for (int e = 0; e < kCount; ++e) c.element[e] = tf32(float(raw.element[e]));
    return c;
  }
};

// Two matrices of one shape in one tile: the first half of its rows is of `first`, the second of `second`, which may be
// absent (its data is null): zeros.
template <class T>
struct Pair {
  Matrix<T> first, second;

  using Element = T;
  static constexpr bool kPair = true, kMade = false, kRounded = false;
  struct Place {
    typename Matrix<T>::Place at;
    bool is_second;
  };
  struct Raw {};
  MI_DEVICE void next_item() {}
  MI_DEVICE void to_group(int64_t g) {
    first.to_group(g);
    second.to_group(g);
  }
  MI_DEVICE Place place(int64_t l, int64_t a, bool is_second) const { return {{l, a}, is_second}; }
  MI_DEVICE void move_along(Place& p, int64_t by) const { p.at.along += by; }
  MI_DEVICE void move_line(Place& p, int64_t by) const { p.at.line += by; }
  template <class Gpu>
  MI_DEVICE void bring(const Place& p, char* to) const {
    p.is_second ? second.template bring<Gpu>(p.at, to) : first.template bring<Gpu>(p.at, to);
  }
};

// z[b, i] x[b, j] with b as the line and (i, j) along it. Of float16 they are tf32: its range is too small for them,
// and as precise.
template <class T>
struct Products {
  const T *z = nullptr, *x = nullptr;
  int64_t z_line = 0, z_along = 0, x_line = 0, x_along = 0;  // strides
  int64_t lines = 0, context = 0, width = 0;                 // sizes
  int64_t z_group = 0, x_group = 0;
  bool whole = false;  // x lies in chunks, none of which reaches into the next i

  static constexpr bool kWidens = std::is_same_v<T, f16>;
  using Element = std::conditional_t<kWidens, tf32, T>;
  static constexpr bool kPair = false, kMade = true, kRounded = std::is_same_v<Element, tf32>;
  static constexpr int kCount = kChunk<Element>;
  struct Place {
    int64_t line, i, j;
  };
  struct Raw {
    Chunk<T, kCount> x;
    T z[kWidens ? kCount : 1];  // one for all, where x may be a product already
  };
  MI_DEVICE void next_item() {}
  MI_DEVICE void to_group(int64_t g) {
    z += g * z_group;
    x += g * x_group;
  }
  MI_DEVICE Place place(int64_t l, int64_t a, bool) const {
    const int64_t i = a / width;
    return {l, i, a - i * width};
  }
  MI_DEVICE void move_along(Place& p, int64_t by) const {
    if (by >= width) {
      const int64_t whole_rows = int(by) / int(width);  // width <= by, which is small
      p.i += whole_rows;
      by -= whole_rows * width;
    }
    p.j += by;
    if (p.j >= width) {
      p.j -= width;
      ++p.i;
    }
  }
  MI_DEVICE void move_line(Place& p, int64_t by) const { p.line += by; }

  // In two steps, between which the engine computes: the reads, then the products.
  MI_DEVICE Raw read(const Place& p) const {
    using Acc = AccOf<T>;
    Raw raw;
    const auto fill = [&](T value) { MI_UNROLL for (T& factor : raw.z) factor = value; };
    fill(T(0.0f));
    if (p.line >= lines || p.i >= context) return raw;
    if (whole) {
      fill(z[p.line * z_line + p.i * z_along]);
      raw.x = load_chunk<T, kCount>(x + p.line * x_line + p.j);
      return raw;
    }
    if constexpr (!kWidens) fill(T(1.0f));
    int64_t i = p.i, j = p.j;
    MI_UNROLL for (int e = 0; e < kCount; ++e) {
      if (i < context) {
        const T z_i = z[p.line * z_line + i * z_along], x_j = x[p.line * x_line + j * x_along];
        if constexpr (kWidens) {
          raw.z[e] = z_i;
          raw.x.element[e] = x_j;
        } else {
          raw.x.element[e] = T(Acc(z_i) * Acc(x_j));
        }
      }
      if (++j == width) {
        j = 0;
        ++i;
      }
    }
    return raw;
  }
  template <class Gpu>
  static MI_DEVICE Chunk<Element> made(const Raw& raw) {
    Chunk<Element> c;
    MI_UNROLL for (int e = 0; e < kCount; ++e) {
      c.element[e] = Element(AccOf<T>(raw.z[kWidens ? e : 0]) * AccOf<T>(raw.x.element[e]));
      if constexpr (kRounded) c.bits.word[e] = Gpu::to_tf32(c.bits.word[e]);
    }
    return c;
  }
};

}  // namespace mi_kernels::cuda
