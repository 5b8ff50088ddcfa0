// Kernel parameters of every form of the interaction.
#pragma once

#include "cuda/common/epilogue.cuh"
#include "cuda/common/grid.h"
#include "cuda/common/operands.cuh"

namespace mi_kernels::cuda {

// y = z^T W x + U z + V x + bias, then the gate if there is one.
template <class T>
struct ForwardParams {
  bool small_batch, vectorized;  // the small-batch kernel, which reads 16 bytes at a time or single elements
  Grid grid;
  bool per_context;  // x W_i for one context i after another, scaled by z_i; otherwise z x is the A operand
  bool n_major;      // W is contiguous along the outputs, its inner dimension
  OuterProducts<T> zx;
  MatrixOperand<T> weight;
  int64_t k;                                  // context * width, or width if per_context; 0 without W
  MatrixOperand<T> linear_a[2], linear_b[2];  // z with U, x with V
  int64_t linear_k[2];
  Epilogue<T> epilogue;
};

// Gate and shift of z as two products in one tile, then the product of x that belongs to the gate.
template <class T>
struct DiagonalParams {
  Grid grid;
  MatrixOperand<T> a[2];
  MatrixPair<T> b[2];
  int64_t k[2];
  Epilogue<T> epilogue;
};

// p = x A^T and q = z C^T in one tile, of one rank after another: the groups of the weights are ranks. If `shared`, z
// is x, and b[0] has both weights.
template <class T>
struct DualLinearParams {
  Grid grid;
  bool shared;
  MatrixOperand<T> a[2];
  MatrixPair<T> b[2];
  int64_t k[2];
  DualLinearEpilogue<T> epilogue;
};

// g^T (z x), or g^T times z or x alone.
template <class T>
struct WeightGradsParams {
  Grid grid;
  MatrixOperand<T> grad;
  bool generated;  // the B operand is zx, otherwise features
  OuterProducts<T> zx;
  MatrixOperand<T> features;
  int64_t k;
  Epilogue<T> epilogue;
};

// g M for a matrix [out][features].
template <class T>
struct LinearParams {
  Grid grid;
  MatrixOperand<T> grad, matrix;
  int64_t k;
  Epilogue<T> epilogue;
};

// T_i = g W_i tile by tile, from which dx = sum_i z_i T_i and dz_i = sum_j x_j T_ij.
template <class T>
struct InputGradsParams {
  bool vectorized;          // of the small-batch kernel, as are `splits`
  bool n_major;             // W is contiguous along the outputs, its inner dimension
  InputGradsSplits splits;  // the other kernel splits the contexts alone
  Grid grid;
  MatrixOperand<T> grad, weight;
  int64_t k, rows, context, width;
  const T *x, *z;
  int64_t x_group, x_row, x_col, z_group, z_row, z_col;  // strides
  // Partial sums [split][groups][rows][width] and [output split][width tile][groups][rows][context]; null if not
  // wanted.
  AccOf<T>*dx, *dz;
};

}  // namespace mi_kernels::cuda
