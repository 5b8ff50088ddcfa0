// The gated forms on a GPU: products with a gate in their epilogue or, for softmax, in a kernel of its own.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/registration.h"
#include "common/text.h"
#include "cuda/host/make_params.h"
#include "cuda/host/precision.h"

namespace mi_kernels::cuda {
namespace {

// x and z, the weights of the gate (U, V, bias) and those of the shift (C and its bias); the operands of the gate with
// W.
struct GateTensors {
  TensorRef x, z, weight_z, weight_x, bias, shift_weight, shift_bias;
  DenseOperands dense;
};

template <class T>
GateEpilogue<T> gate_epilogue(const GateTensors& a, Activation activation, double offset, void* pre_activation) {
  GateEpilogue<T> g;
  g.present = true;
  g.activation = activation;
  g.offset = offset;
  g.x = static_cast<const T*>(a.x.data);
  g.x_row = a.x.row;
  g.x_col = a.x.col;
  g.pre_activation = static_cast<T*>(pre_activation);
  g.shift_bias = static_cast<const T*>(a.shift_bias.data);
  g.shift_bias_stride = a.shift_bias.row;
  return g;
}

// Gate and shift of z in one tile, half of its columns each.
template <class T>
void run_diagonal(const DeviceStream& stream, const ProblemSize& p, const GateTensors& a, const Epilogue<T>& out) {
  DiagonalParams<T> params{};
  params.grid = plan_matmul(1, p.rows, 2 * p.out, 0, false, dtype_v<T>, stream.device());
  params.a[0] = matrix_operand<T>(a.z, p.rows, p.context);
  params.a[1] = matrix_operand<T>(a.x, p.rows, p.width);
  params.b[0] = {matrix_operand<T>(a.weight_z, p.out, p.context), matrix_operand<T>(a.shift_weight, p.out, p.context)};
  params.b[1].first = matrix_operand<T>(a.weight_x, p.out, p.width);
  params.k[0] = p.context;
  params.k[1] = a.weight_x.data ? p.width : 0;
  params.epilogue = out;
  params.epilogue.bias = static_cast<const T*>(a.bias.data);
  params.epilogue.bias_col = a.bias.row;
  launch_diagonal(stream, params);
}

// Softmax needs whole rows: gate and shift are computed as partial sums first.
template <class T>
void run_softmax(const DeviceStream& stream, const Tensor& like, const ProblemSize& p, const ForwardParams<T>& gate,
                 const GateTensors& a) {
  using Acc = AccOf<T>;
  auto shift = forward_params<T>({p, a.x, a.z, {}, {}, a.shift_weight, {}},
                                 plan_forward(p, nullptr, dtype_v<T>, stream.device()), {},
                                 epilogue_to<T>(nullptr, 1, p.rows, p.out));
  const bool has_shift = a.shift_weight.data;
  const Scratch scratch(like, partial_bytes(gate.epilogue, gate.grid.splits + (has_shift ? shift.grid.splits : 0)));
  auto product = gate;
  product.epilogue.partials = scratch.at<Acc>();
  shift.epilogue.partials = has_shift ? scratch.at<Acc>(partial_bytes(gate.epilogue, gate.grid.splits)) : nullptr;
  launch_planned_forward(stream, product);
  if (has_shift) launch_planned_forward(stream, shift);
  launch_softmax<T>(stream, product.epilogue, gate.grid.splits, shift.epilogue.partials, shift.grid.splits);
}

template <class T>
void run_gated(const DeviceStream& stream, const Tensor& like, const ProblemSize& p, const GateTensors& a,
               const ForwardPlan& plan, Activation activation, double offset, void* y, void* pre_activation) {
  auto out = epilogue_to<T>(y, 1, p.rows, p.out);
  out.gate = gate_epilogue<T>(a, activation, offset, pre_activation);
  if (!a.dense.weight.data && a.shift_weight.data && activation != Activation::softmax)
    return run_diagonal<T>(stream, p, a, out);
  const auto params = forward_params<T>(a.dense, plan, a.bias, out);
  if (activation == Activation::softmax) return run_softmax<T>(stream, like, p, params, a);
  launch_and_reduce<T>(stream, like, params, launch_planned_forward<T>);
}

std::tuple<Tensor, Tensor> gated(const char* op, const Tensor& x, const Tensor& z, const Optional& weight,
                                 const Optional& weight_z, const Optional& weight_x, const Optional& bias,
                                 const Optional& shift_weight, const Optional& shift_bias, Activation activation,
                                 double offset, bool keep, const char* name_z = "weight_z") {
  check_defined(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2, op, ": x: expected 2 dimensions, got ", x.dim());
  CallShape shape = input_shape(op, x, z);
  shape.problem.out = shape.problem.width;
  const ProblemSize& p = shape.problem;
  check_weights(op, x, shape, weight, weight_z, weight_x, name_z);
  if (bias.has_value()) check_sizes(op, "bias", *bias, x, 1, false, {p.out});
  if (shift_weight.has_value()) check_sizes(op, "shift_weight", *shift_weight, x, 1, false, {p.out, p.context});
  if (shift_bias.has_value()) check_sizes(op, "shift_bias", *shift_bias, x, 1, false, {p.out});
  const DType dtype = product_dtype(x, p, op);
  Tensor y = torch::stable::new_empty(x, {p.rows, p.out});
  Tensor pre_activation = torch::stable::new_empty(x, {keep ? p.rows : 0, p.out});
  if (y.numel() == 0) return {y, pre_activation};
  const DeviceStream stream(x);
  GateTensors a{tensor_ref(x, false),          tensor_ref(z, false),
                tensor_ref(weight_z, false),   tensor_ref(weight_x, false),
                tensor_ref(bias, false),       tensor_ref(shift_weight, false),
                tensor_ref(shift_bias, false), {}};
  a.dense = dense_operands(p, a.x, a.z, weight, false, a.weight_z, a.weight_x, dtype);
  const ForwardPlan plan = plan_forward(a.dense.problem, a.dense.weight_layout(), dtype, stream.device());
  const auto copy = repack_weight(plan.repacked, stream, x, a.dense, dtype);
  for_arithmetic(dtype, [&](auto t) {
    run_gated<decltype(t)>(stream, x, p, a, plan, activation, offset, y.mutable_data_ptr(),
                           keep ? pre_activation.mutable_data_ptr() : nullptr);
  });
  return {y, pre_activation};
}

std::tuple<Tensor, Tensor> diagonal(const Tensor& x, const Tensor& z, const Tensor& weight, const Optional& bias,
                                    const Optional& shift_weight, const Optional& shift_bias, const Optional& weight_x,
                                    Text activation, double offset, bool keep_gate) {
  constexpr const char* op = "diagonal";
  check_defined(op, "weight", weight);
  return gated(op, x, z, {}, weight, weight_x, bias, shift_weight, shift_bias, activation_of(activation, op, true),
               offset, keep_gate, "weight");
}

std::tuple<Tensor, Tensor> gated_interaction(const Tensor& x, const Tensor& z, const Optional& weight,
                                             const Optional& weight_z, const Optional& weight_x, const Optional& bias,
                                             Text activation, bool keep_gate) {
  constexpr const char* op = "gated_interaction";
  return gated(op, x, z, weight, weight_z, weight_x, bias, {}, {}, activation_of(activation, op, true), 0.0, keep_gate);
}

// As cuda_interaction_plan, for sizes [B, Z, X] and the strides of W. The bits of `terms`: W, U, V, a shift, a C in it,
// and that W does not begin at a multiple of 16 bytes.
std::string cuda_gate_plan(std::vector<int64_t> sizes, torch::headeronly::ScalarType type, int64_t terms, bool softmax,
                           int64_t arch, int64_t processors) {
  constexpr const char* op = "cuda_gate_plan";
  const std::vector<int64_t> strides = take_strides(sizes, 3);
  const ProblemSize p = gate_problem_size(op, sizes, terms, 6);
  check_gpu(op, arch, processors);
  const DType given = dtype_of(type, op, "dtype"), dtype = use_small_batch(p, given) ? given : product_dtype(given);
  const auto [product, ref, layout] =
      terms & 1 ? place_queried_weight(p, strides, !(terms & 32), given) : PlacedWeight{p, {}, {}};
  const DeviceProperties device{int(arch), int(processors)};
  const bool gate_and_shift = !(terms & 1) && terms & 16 && !softmax;
  const ForwardPlan gate =
      plan_forward(product, terms & 1 && p.context * p.width > 0 ? &layout : nullptr, dtype, device);
  const int64_t shift_splits = terms & 16 ? plan_forward(p, nullptr, dtype, device).grid.splits : 0;
  const int64_t partials = softmax ? gate.grid.splits + shift_splits : gate.grid.splits > 1 ? gate.grid.splits : 0;
  const int64_t bytes = gate_and_shift ? 0 : partials * p.rows * p.out * accumulator_bytes(dtype);
  return std::string("algorithm=") + (gate.small_batch && !gate_and_shift ? "stream" : algorithm_name(dtype)) +
         memory_fields(layout, has_result(p, "forward", terms) && gate.repacked ? repack_bytes(p, false, dtype) : 0,
                       has_result(p, "forward", terms) ? bytes : 0);
}

}  // namespace
}  // namespace mi_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_gate_plan", TORCH_BOX(&mi_kernels::cuda::cuda_gate_plan));
}

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, MI_DISPATCH_KEY, m) {
  m.impl("diagonal", TORCH_BOX(&mi_kernels::cuda::diagonal));
  m.impl("gated_interaction", TORCH_BOX(&mi_kernels::cuda::gated_interaction));
}
