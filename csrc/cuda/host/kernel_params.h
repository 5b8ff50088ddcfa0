// The operands and outputs of the mma engine, made of strided operands.
#pragma once

#include "common/tensor_args.h"
#include "cuda/common/kernels.h"
#include "cuda/host/device_stream.h"

namespace mi_kernels::cuda {

template <class T>
constexpr DType dtype_v = std::is_same_v<T, double>  ? DType::f64
                          : std::is_same_v<T, float> ? DType::f32
                          : std::is_same_v<T, tf32>  ? DType::tf32
                          : std::is_same_v<T, bf16>  ? DType::bf16
                                                     : DType::f16;

// lines x length, along a line contiguous or not; absent where it has no data.
template <class T>
Matrix<T> matrix(const TensorRef& o, int64_t lines, int64_t length) {
  Matrix<T> m;
  if (!o.data) return m;
  m.data = static_cast<const T*>(o.data);
  m.line = o.row;
  m.along = o.col;
  m.lines = lines;
  m.length = length;
  m.group = o.group;
  m.whole = whole_chunks(o.data, dtype_v<T>, o.col, length, lines > 1 ? o.row : 0, o.group, 0);
  return m;
}

// W of contiguous groups as [O][Z * X], or as Z items [O][X].
template <class T>
Matrix<T> weight_matrix(const TensorRef& weight, const ProblemSize& p) {
  const int64_t length = p.context * p.width;
  return matrix<T>({weight.data, weight.group, length, 1}, p.out, length);
}
template <class T>
Matrix<T> weight_items(const TensorRef& weight, const ProblemSize& p) {
  Matrix<T> m = matrix<T>({weight.data, weight.group, p.context * p.width, 1}, p.out, p.width);
  m.item = p.width;
  m.whole = m.whole && whole_chunks(weight.data, dtype_v<T>, 1, p.width, 0, 0, m.item);
  return m;
}

template <class T>
Products<T> products(const TensorRef& z, const TensorRef& x, const ProblemSize& p) {
  Products<T> q;
  q.z = static_cast<const T*>(z.data);
  q.x = static_cast<const T*>(x.data);
  q.z_line = z.row;
  q.z_along = z.col;
  q.x_line = x.row;
  q.x_along = x.col;
  q.lines = p.rows;
  q.context = p.context;
  q.width = p.width;
  q.z_group = z.group;
  q.x_group = x.group;
  q.whole = whole_chunks(x.data, dtype_v<T>, x.col, p.width, p.rows > 1 ? x.row : 0, x.group, 0);
  return q;
}

template <class T>
Output<T> output(void* y, int64_t groups, int64_t rows, int64_t cols) {
  Output<T> out;
  out.y = static_cast<T*>(y);
  out.groups = groups;
  out.rows = rows;
  out.cols = cols;
  return out;
}

// Bytes of `count` partial results.
template <class T>
int64_t partial_bytes(const Output<T>& out, int64_t count) {
  return count * out.groups * out.rows * out.cols * int64_t(sizeof(AccOf<T>));
}

// Runs launch(call) with partial sums where the sum is split, and adds them up.
template <class T, class Call, class Launch>
void run_product(const Place& place, const Tensor& like, Call call, Launch&& launch) {
  const int64_t splits = call.grid.splits;
  if (splits == 1) return launch(place, call);
  const Scratch scratch(like, partial_bytes(call.out, splits));
  call.out.partials = scratch.at<AccOf<T>>();
  launch(place, call);
  launch_reduce<T>(place, call.out, splits);
}

template <class T>
void launch_product(const Place& place, const ForwardCall<T>& call) {
  if constexpr (!std::is_same_v<T, tf32>)
    if (call.streams) return launch_stream(place, call);
  launch_forward(place, call);
}

// y = z^T W x + U z + V x + c; `weight` is of contiguous groups.
template <class T>
ForwardCall<T> forward_call(const ProblemSize& p, const TensorRef& x, const TensorRef& z, const TensorRef& weight,
                            const TensorRef& weight_z, const TensorRef& weight_x, const TensorRef& bias,
                            const Output<T>& out, const Machine& machine) {
  ForwardCall<T> call{};
  const bool has_weight = weight.data && p.context * p.width > 0;
  const ForwardPlan plan = plan_forward(p, has_weight, dtype_v<T>, machine);
  call.streams = plan.streams;
  call.grid = plan.grid;
  call.by_items = plan.by_items;
  if (has_weight) {
    call.depth = plan.by_items ? p.width : p.context * p.width;
    call.products = products<T>(z, x, p);
    call.weight = plan.by_items ? weight_items<T>(weight, p) : weight_matrix<T>(weight, p);
  }
  call.left[0] = matrix<T>(z, p.rows, p.context);
  call.left[1] = matrix<T>(x, p.rows, p.width);
  call.right[0] = matrix<T>(weight_z, p.out, p.context);
  call.right[1] = matrix<T>(weight_x, p.out, p.width);
  call.depths[0] = weight_z.data ? p.context : 0;
  call.depths[1] = weight_x.data ? p.width : 0;
  call.stream_chunks = call.depth == 0 || (call.products.whole && call.weight.whole);
  for (int q = 0; q < 2; ++q)
    call.stream_chunks = call.stream_chunks && (call.depths[q] == 0 || (call.left[q].whole && call.right[q].whole));
  call.out = out;
  call.out.bias = static_cast<const T*>(bias.data);
  call.out.bias_group = bias.group;
  call.out.bias_col = bias.row;
  return call;
}

}  // namespace mi_kernels::cuda
