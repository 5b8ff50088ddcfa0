// The parameters of the kernels, made of strided tensors.
#pragma once

#include "common/tensor_args.h"
#include "cuda/common/launchers.h"
#include "cuda/host/device_stream.h"
#include "cuda/host/operands.h"
#include "cuda/host/plan.h"

namespace mi_kernels::cuda {

template <class T>
constexpr DType dtype_v = std::is_same_v<T, double>  ? DType::f64
                          : std::is_same_v<T, float> ? DType::f32
                          : std::is_same_v<T, tf32>  ? DType::tf32
                          : std::is_same_v<T, bf16>  ? DType::bf16
                                                     : DType::f16;

// Absent, with null data, if `t` is.
template <class T>
MatrixOperand<T> matrix_operand(const TensorRef& t, int64_t outer_size, int64_t inner_size) {
  MatrixOperand<T> m;
  if (!t.data) return m;
  m.data = static_cast<const T*>(t.data);
  m.outer_stride = t.row;
  m.inner_stride = t.col;
  m.outer_size = outer_size;
  m.inner_size = inner_size;
  m.group_stride = t.group;
  m.vectorized = can_vectorize(t.data, dtype_v<T>, t.col, inner_size, outer_size > 1 ? t.row : 0, t.group, 0);
  return m;
}

// W as one matrix of all features or one for each context, [out][features] or, if `n_major`, [features][out].
template <class T>
MatrixOperand<T> weight_matrix(const WeightRef& w, int64_t out, int64_t features, bool n_major) {
  if (n_major) return matrix_operand<T>({w.data, w.group, w.width, w.out}, features, out);
  return matrix_operand<T>({w.data, w.group, w.out, w.width}, out, features);
}
template <class T>
MatrixOperand<T> weight_per_context(const WeightRef& w, const ProblemSize& p, bool n_major) {
  MatrixOperand<T> m = weight_matrix<T>(w, p.out, p.width, n_major);
  m.context_stride = w.context;
  m.vectorized = m.vectorized && can_vectorize(w.data, dtype_v<T>, 1, 0, 0, 0, p.context > 1 ? w.context : 0);
  return m;
}

template <class T>
OuterProducts<T> outer_products(const TensorRef& z, const TensorRef& x, const ProblemSize& p) {
  OuterProducts<T> zx;
  zx.z = static_cast<const T*>(z.data);
  zx.x = static_cast<const T*>(x.data);
  zx.z_row = z.row;
  zx.z_col = z.col;
  zx.x_row = x.row;
  zx.x_col = x.col;
  zx.rows = p.rows;
  zx.context = p.context;
  zx.width = p.width;
  zx.z_group = z.group;
  zx.x_group = x.group;
  zx.vectorized = can_vectorize(x.data, dtype_v<T>, x.col, p.width, p.rows > 1 ? x.row : 0, x.group, 0);
  return zx;
}

template <class T>
Epilogue<T> epilogue_to(void* y, int64_t groups, int64_t rows, int64_t cols) {
  Epilogue<T> e;
  e.y = static_cast<T*>(y);
  e.groups = groups;
  e.rows = rows;
  e.cols = cols;
  return e;
}

template <class T>
int64_t partial_bytes(const Epilogue<T>& e, int64_t splits) {
  return splits * e.groups * e.rows * e.cols * int64_t(sizeof(AccOf<T>));
}

// Calls launch(stream, params) and, if the reduction is split, adds the partial sums.
template <class T, class Params, class Launch>
void launch_and_reduce(const DeviceStream& stream, const Tensor& like, Params params, Launch&& launch) {
  const int64_t splits = params.grid.splits;
  if (splits == 1) return launch(stream, params);
  const Scratch scratch(like, partial_bytes(params.epilogue, splits));
  params.epilogue.partials = scratch.at<AccOf<T>>();
  launch(stream, params);
  launch_reduce<T>(stream, params.epilogue, splits);
}

// On the small-batch kernel if the plan chose it.
template <class T>
void launch_planned_forward(const DeviceStream& stream, const ForwardParams<T>& params) {
  if constexpr (!std::is_same_v<T, tf32>)
    if (params.small_batch) return launch_small_batch_forward(stream, params);
  launch_forward(stream, params);
}

// `a.weight` is as the plan wants it: repack_weight() has been called.
template <class T>
ForwardParams<T> forward_params(const DenseOperands& a, const ForwardPlan& plan, const TensorRef& bias,
                                const Epilogue<T>& epilogue) {
  ForwardParams<T> params{};
  const ProblemSize& p = a.problem;
  params.small_batch = plan.small_batch;
  params.grid = plan.grid;
  params.per_context = plan.per_context;
  params.n_major = plan.n_major;
  if (a.has_weight()) {
    params.k = plan.per_context ? p.width : p.context * p.width;
    params.zx = outer_products<T>(a.z, a.x, p);
    params.weight = plan.per_context ? weight_per_context<T>(a.weight, p, plan.n_major)
                                     : weight_matrix<T>(a.weight, p.out, p.context * p.width, plan.n_major);
  }
  params.linear_a[0] = matrix_operand<T>(a.z, p.rows, p.context);
  params.linear_a[1] = matrix_operand<T>(a.x, p.rows, p.width);
  params.linear_b[0] = matrix_operand<T>(a.weight_z, p.out, p.context);
  params.linear_b[1] = matrix_operand<T>(a.weight_x, p.out, p.width);
  params.linear_k[0] = a.weight_z.data ? p.context : 0;
  params.linear_k[1] = a.weight_x.data ? p.width : 0;
  params.vectorized = params.k == 0 || (params.zx.vectorized && params.weight.vectorized);
  for (int q = 0; q < 2; ++q)
    params.vectorized = params.vectorized &&
                        (params.linear_k[q] == 0 || (params.linear_a[q].vectorized && params.linear_b[q].vectorized));
  params.epilogue = epilogue;
  params.epilogue.bias = static_cast<const T*>(bias.data);
  params.epilogue.bias_group = bias.group;
  params.epilogue.bias_col = bias.row;  // the only dimension within a group
  return params;
}

}  // namespace mi_kernels::cuda
