// Two products that are multiplied, on a GPU: one tile of two accumulators, and the elementwise gradients.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "common/integers.h"
#include "common/registration.h"
#include "common/text.h"
#include "cuda/host/make_params.h"
#include "cuda/host/precision.h"
#include "cuda/modulate/dual_linear_grads.h"

namespace mi_kernels::cuda {
namespace {

struct DualLinearTensors {
  TensorRef x, z, weight_x, weight_z, bias_x, bias_z;
  Activation activation_x, activation_z;
};

void check_ranks(const char* op, int64_t features, int64_t ranks) {
  STD_TORCH_CHECK(ranks >= 1 && features % ranks == 0, op, ": ranks: expected a positive divisor of N=", features,
                  ", got ", ranks);
}

// A weight [ranks * out][features], whose groups are the ranks.
template <class T>
MatrixOperand<T> weight_by_rank(TensorRef weight, int64_t ranks, int64_t out, int64_t features) {
  weight.group = ranks > 1 ? out * weight.row : 0;
  return matrix_operand<T>(weight, out, features);
}

// `p`: one rank's outputs.
template <class T>
DualLinearParams<T> dual_linear_params(const ProblemSize& p, int64_t ranks, const DualLinearTensors& a,
                                       const DeviceProperties& device) {
  DualLinearParams<T> params{};
  params.grid = plan_matmul(1, p.rows, 2 * p.out, 0, false, dtype_v<T>, device);
  params.shared = !a.z.data;
  params.a[0] = matrix_operand<T>(a.x, p.rows, p.width);
  params.a[1] = matrix_operand<T>(a.z, p.rows, p.context);
  params.b[0].first = weight_by_rank<T>(a.weight_x, ranks, p.out, p.width);
  params.b[params.shared ? 0 : 1].second = weight_by_rank<T>(a.weight_z, ranks, p.out, p.context);
  params.k[0] = p.width;
  params.k[1] = p.context;
  auto& epilogue = params.epilogue;
  const TensorRef biases[] = {a.bias_x, a.bias_z};
  for (int s = 0; s < 2; ++s) {
    epilogue.bias[s] = static_cast<const T*>(biases[s].data);
    epilogue.bias_stride[s] = biases[s].row;
  }
  epilogue.rows = p.rows;
  epilogue.cols = p.out;
  epilogue.ranks = ranks;
  epilogue.activation[0] = a.activation_x;
  epilogue.activation[1] = a.activation_z;
  return params;
}

std::tuple<Tensor, Tensor, Tensor> dual_linear(const Tensor& x, const Optional& z, const Tensor& weight_x,
                                               const Tensor& weight_z, const Optional& bias_x, const Optional& bias_z,
                                               Text activation_x, Text activation_z, int64_t ranks, bool keep) {
  constexpr const char* op = "dual_linear";
  check_defined(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2, op, ": x: expected 2 dimensions, got ", x.dim());
  check_defined(op, "weight_x", weight_x);
  STD_TORCH_CHECK(weight_x.dim() == 2, op, ": weight_x: expected 2 dimensions, got ", weight_x.dim());
  const int64_t features = weight_x.size(0);
  check_ranks(op, features, ranks);
  ProblemSize p = input_shape(op, x, z.has_value() ? *z : x).problem;
  p.out = features;
  check_products(op, "x", p, false);
  check_sizes(op, "weight_x", weight_x, x, 1, false, {p.out, p.width});
  check_sizes(op, "weight_z", weight_z, x, 1, false, {p.out, p.context});
  if (bias_x.has_value()) check_sizes(op, "bias_x", *bias_x, x, 1, false, {p.out});
  if (bias_z.has_value()) check_sizes(op, "bias_z", *bias_z, x, 1, false, {p.out});
  const DualLinearTensors a{tensor_ref(x, false),
                            tensor_ref(z, false),
                            tensor_ref(weight_x, false),
                            tensor_ref(weight_z, false),
                            tensor_ref(bias_x, false),
                            tensor_ref(bias_z, false),
                            activation_of(activation_x, op, false, "activation_x"),
                            activation_of(activation_z, op, false, "activation_z")};
  const DType dtype = product_dtype(x, op);
  p.out = features / ranks;
  Tensor y = torch::stable::new_empty(x, {p.rows, p.out});
  const int64_t kept = keep ? p.rows : 0;
  Tensor pre_x = torch::stable::new_empty(x, {kept, features}), pre_z = torch::stable::new_empty(x, {kept, features});
  if (y.numel() == 0) return {y, pre_x, pre_z};
  const DeviceStream stream(x);
  for_arithmetic(dtype, [&](auto t) {
    using T = decltype(t);
    auto params = dual_linear_params<T>(p, ranks, a, stream.device());
    params.epilogue.y = static_cast<T*>(y.mutable_data_ptr());
    if (keep) {
      params.epilogue.p = static_cast<T*>(pre_x.mutable_data_ptr());
      params.epilogue.q = static_cast<T*>(pre_z.mutable_data_ptr());
    }
    launch_dual_linear(stream, params);
  });
  return {y, pre_x, pre_z};
}

// A matrix [rows][cols] whose chunks begin at multiples of their size in each line of `period` columns.
ElementwiseOperand elementwise_operand(const Tensor& t, DType dtype, int64_t period) {
  const TensorRef ref = tensor_ref(t, false);
  return {ref.data, ref.row, ref.col, can_vectorize(ref.data, dtype, ref.col, period, ref.row, 0, 0)};
}

Tensor dual_linear_grads(const Tensor& grad, const Tensor& p, const Tensor& q, Text activation_x, Text activation_z,
                         int64_t ranks) {
  constexpr const char* op = "dual_linear_grads";
  check_defined(op, "p", p);
  STD_TORCH_CHECK(p.dim() == 2, op, ": p: expected 2 dimensions, got ", p.dim());
  const int64_t rows = p.size(0), features = p.size(1);
  check_ranks(op, features, ranks);
  check_sizes(op, "grad", grad, p, 1, false, {rows, features / ranks});
  check_sizes(op, "q", q, p, 1, false, {rows, features});
  DualLinearGradsParams params{};
  params.activation[0] = activation_of(activation_x, op, false, "activation_x");
  params.activation[1] = activation_of(activation_z, op, false, "activation_z");
  const DType dtype = dtype_of(p.scalar_type(), op, "p");
  Tensor d = torch::stable::new_empty(p, {rows, 2 * features});
  if (d.numel() == 0) return d;
  params.rows = rows;
  params.features = features;
  params.out = features / ranks;
  params.grad = elementwise_operand(grad, dtype, params.out);
  params.p = elementwise_operand(p, dtype, features);
  params.q = elementwise_operand(q, dtype, features);
  params.d = d.mutable_data_ptr();
  params.stores_chunks = can_vectorize(params.d, dtype, 1, features, 2 * features, 0, 0);
  params.chunks = ceil_div(features, 16 / storage_bytes(dtype));
  params.blocks = ceil_div(rows * params.chunks, kModulateThreads);
  const DeviceStream stream(p);
  launch_dual_linear_grads(stream, dtype, params);
  return d;
}

}  // namespace
}  // namespace mi_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, MI_DISPATCH_KEY, m) {
  m.impl("dual_linear", TORCH_BOX(&mi_kernels::cuda::dual_linear));
  m.impl("dual_linear_grads", TORCH_BOX(&mi_kernels::cuda::dual_linear_grads));
}
