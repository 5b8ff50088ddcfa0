// The operands of the engine: matrices, two matrices that share a tile, and products z x that are made on the way to
// shared memory. (line, along) are coordinates in the order in which an operand lies in memory, along within a line.
#pragma once

#include "mma_layout.h"
#include "numbers.cuh"

namespace mi_kernels::cuda {

template <class T>
struct Matrix {
  const T* data = nullptr;
  int64_t line = 0, along = 0;     // strides
  int64_t lines = 0, length = 0;   // sizes; beyond them there are zeros
  int64_t group = 0, item = 0;     // strides between groups, and between the items of a sequence of products
  bool whole = false;              // every chunk lies together, within `length`, on a multiple of sixteen bytes

  using Element = T;
  static constexpr bool kPair = false, kMade = false;
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
    const T* from = data + p.line * line + p.along * along;
    const bool inside = p.line < lines && p.along < length;
    if (whole) return Gpu::copy_async(to, inside ? from : data, inside);
    Chunk<T> c;
    if (inside) {
      MI_UNROLL for (int e = 0; e < kChunk<T>; ++e)
        if (p.along + e < length) c.element[e] = from[e * along];
    }
    store_chunk(reinterpret_cast<T*>(to), c);
  }
};

// Two matrices of one shape in one tile: the first half of its rows is of `first`, the second of `second`, which may be
// absent (its data is null): zeros.
template <class T>
struct Pair {
  Matrix<T> first, second;

  using Element = T;
  static constexpr bool kPair = true, kMade = false;
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

// z[b, i] x[b, j] with b as the line and (i, j) along it.
template <class T>
struct Products {
  const T *z = nullptr, *x = nullptr;
  int64_t z_line = 0, z_along = 0, x_line = 0, x_along = 0;  // strides
  int64_t lines = 0, context = 0, width = 0;                 // sizes
  int64_t z_group = 0, x_group = 0;
  bool whole = false;  // x lies in chunks, none of which reaches into the next i

  using Element = T;
  static constexpr bool kPair = false, kMade = true;
  struct Place {
    int64_t line, i, j;
  };
  struct Raw {
    Chunk<T> x;
    T z;
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
    Raw raw;
    raw.z = T(0.0f);
    if (p.line >= lines || p.i >= context) return raw;
    if (whole) {
      raw.z = z[p.line * z_line + p.i * z_along];
      raw.x = load_chunk(x + p.line * x_line + p.j);
      return raw;
    }
    raw.z = T(1.0f);
    int64_t i = p.i, j = p.j;
    MI_UNROLL for (int e = 0; e < kChunk<T>; ++e) {
      if (i < context) {
        using Acc = AccOf<T>;
        raw.x.element[e] = T(Acc(z[p.line * z_line + i * z_along]) * Acc(x[p.line * x_line + j * x_along]));
      }
      if (++j == width) {
        j = 0;
        ++i;
      }
    }
    return raw;
  }
  static MI_DEVICE Chunk<T> made(const Raw& raw) {
    Chunk<T> c;
    MI_UNROLL for (int e = 0; e < kChunk<T>; ++e)
      c.element[e] = T(AccOf<T>(raw.z) * AccOf<T>(raw.x.element[e]));
    return c;
  }
};

}  // namespace mi_kernels::cuda
