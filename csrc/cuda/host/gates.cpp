// The gated forms on a GPU: products with a gate in their epilogue, or, for softmax, after them.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/host/kernel_params.h"
#include "cuda/host/precision.h"
#include "cuda/host/registration.h"

namespace mi_kernels::cuda {
namespace {

// x, z, what makes the gate (W, U, V, c) and what makes the shift (C, d).
struct Arguments {
  TensorRef x, z, weight, weight_z, weight_x, bias, shift_weight, shift_bias;
};

template <class T>
Gate<T> gate_of(const Arguments& a, Activation activation, double offset, void* kept) {
  Gate<T> g;
  g.present = true;
  g.activation = activation;
  g.offset = offset;
  g.x = static_cast<const T*>(a.x.data);
  g.x_row = a.x.row;
  g.x_col = a.x.col;
  g.kept = static_cast<T*>(kept);
  g.shift_bias = static_cast<const T*>(a.shift_bias.data);
  g.shift_col = a.shift_bias.row;
  return g;
}

// Gate and shift from z in one tile; columns of a tile are half of each.
template <class T>
void run_gate(const Place& place, const ProblemSize& p, const Arguments& a, const Output<T>& out) {
  GateCall<T> call{};
  call.grid = plan_product(1, p.rows, 2 * p.out, 0, false, dtype_v<T>, place.machine());
  call.left[0] = matrix<T>(a.z, p.rows, p.context);
  call.left[1] = matrix<T>(a.x, p.rows, p.width);
  call.right[0] = {matrix<T>(a.weight_z, p.out, p.context), matrix<T>(a.shift_weight, p.out, p.context)};
  call.right[1].first = matrix<T>(a.weight_x, p.out, p.width);
  call.depths[0] = p.context;
  call.depths[1] = a.weight_x.data ? p.width : 0;
  call.out = out;
  call.out.bias = static_cast<const T*>(a.bias.data);
  call.out.bias_col = a.bias.row;
  launch_gate(place, call);
}

// softmax needs whole rows: gate and shift as partial sums first.
template <class T>
void run_softmax(const Place& place, const Tensor& like, const ProblemSize& p, const ForwardCall<T>& gate,
                 const Arguments& a) {
  using Acc = AccOf<T>;
  auto shift =
      forward_call<T>(p, a.x, a.z, {}, a.shift_weight, {}, {}, output<T>(nullptr, 1, p.rows, p.out), place.machine());
  const bool has_shift = a.shift_weight.data;
  const Scratch scratch(like, partial_bytes(gate.out, gate.grid.splits + (has_shift ? shift.grid.splits : 0)));
  auto product = gate;
  product.out.partials = scratch.at<Acc>();
  shift.out.partials = has_shift ? scratch.at<Acc>(partial_bytes(gate.out, gate.grid.splits)) : nullptr;
  launch_product(place, product);
  if (has_shift) launch_product(place, shift);
  launch_softmax<T>(place, product.out, gate.grid.splits, shift.out.partials, shift.grid.splits);
}

template <class T>
void run_gated(const Place& place, const Tensor& like, const ProblemSize& p, const Arguments& a, Activation activation,
               double offset, void* y, void* kept) {
  auto out = output<T>(y, 1, p.rows, p.out);
  out.gate = gate_of<T>(a, activation, offset, kept);
  if (!a.weight.data && a.shift_weight.data && activation != Activation::softmax) return run_gate<T>(place, p, a, out);
  const auto call = forward_call<T>(p, a.x, a.z, a.weight, a.weight_z, a.weight_x, a.bias, out, place.machine());
  if (activation == Activation::softmax) return run_softmax<T>(place, like, p, call, a);
  run_product<T>(place, like, call, launch_product<T>);
}

std::tuple<Tensor, Tensor> gated(const char* op, const Tensor& x, const Tensor& z, const Optional& weight,
                                 const Optional& weight_z, const Optional& weight_x, const Optional& bias,
                                 const Optional& shift_weight, const Optional& shift_bias, Activation activation,
                                 double offset, bool keep, const char* name_z = "weight_z") {
  check_defined(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2, op, ": x: expected 2 dimensions, got ", x.dim());
  CallShape given = input_shape(op, x, z);
  given.problem.out = given.problem.width;
  const ProblemSize& p = given.problem;
  check_weights(op, x, given, weight, weight_z, weight_x, name_z);
  if (bias.has_value()) check_sizes(op, "bias", *bias, x, 1, false, {p.out});
  if (shift_weight.has_value()) check_sizes(op, "shift_weight", *shift_weight, x, 1, false, {p.out, p.context});
  if (shift_bias.has_value()) check_sizes(op, "shift_bias", *shift_bias, x, 1, false, {p.out});
  const DType dtype = product_dtype(x, p, op);
  Tensor y = torch::stable::new_empty(x, {p.rows, p.out});
  Tensor kept = torch::stable::new_empty(x, {keep ? p.rows : 0, p.out});
  if (y.numel() == 0) return {y, kept};
  const Place place(x);
  Arguments a{tensor_ref(x, false),
              tensor_ref(z, false),
              {},
              tensor_ref(weight_z, false),
              tensor_ref(weight_x, false),
              tensor_ref(bias, false),
              tensor_ref(shift_weight, false),
              tensor_ref(shift_bias, false)};
  Optional contiguous;
  if (weight.has_value()) {
    contiguous = with_contiguous_groups(*weight, false);
    a.weight = weight_ref(*contiguous, false);
  }
  for_arithmetic(dtype, [&](auto t) {
    run_gated<decltype(t)>(place, x, p, a, activation, offset, y.mutable_data_ptr(),
                           keep ? kept.mutable_data_ptr() : nullptr);
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor> diagonal(const Tensor& x, const Tensor& z, const Tensor& weight, const Optional& bias,
                                    const Optional& shift_weight, const Optional& shift_bias, const Optional& weight_x,
                                    std::string activation, double offset, bool keep_gate) {
  constexpr const char* op = "diagonal";
  check_defined(op, "weight", weight);
  return gated(op, x, z, {}, weight, weight_x, bias, shift_weight, shift_bias, activation_of(activation, op, true),
               offset, keep_gate, "weight");
}

std::tuple<Tensor, Tensor> gated_interaction(const Tensor& x, const Tensor& z, const Optional& weight,
                                             const Optional& weight_z, const Optional& weight_x, const Optional& bias,
                                             std::string activation, bool keep_gate) {
  constexpr const char* op = "gated_interaction";
  return gated(op, x, z, weight, weight_z, weight_x, bias, {}, {}, activation_of(activation, op, true), 0.0, keep_gate);
}

// As cuda_interaction_plan, for sizes [B, Z, X]; `terms` are W, U, V, a shift, and C in it.
std::string cuda_gate_plan(std::vector<int64_t> sizes, torch::headeronly::ScalarType type, int64_t terms, bool softmax,
                           int64_t arch, int64_t processors) {
  constexpr const char* op = "cuda_gate_plan";
  const ProblemSize p = gate_problem_size(op, sizes, terms);
  check_gpu(op, arch, processors);
  const DType given = dtype_of(type, op, "dtype"), dtype = streams(p, given) ? given : product_dtype(given);
  const Machine machine{int(arch), int(processors), 0};
  const bool gate_and_shift = !(terms & 1) && terms & 16 && !softmax;
  const ForwardPlan gate = plan_forward(p, terms & 1 && p.context * p.width > 0, dtype, machine);
  const int64_t shift_splits = terms & 16 ? plan_forward(p, false, dtype, machine).grid.splits : 0;
  const int64_t partials = softmax ? gate.grid.splits + shift_splits : gate.grid.splits > 1 ? gate.grid.splits : 0;
  const int64_t bytes = gate_and_shift ? 0 : partials * p.rows * p.out * accumulator_bytes(dtype);
  return std::string("algorithm=") + (gate.streams && !gate_and_shift ? "stream" : algorithm(dtype)) +
         ";scratch=" + std::to_string(has_result(p, "forward", terms) ? bytes : 0);
}

}  // namespace
}  // namespace mi_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(MI_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("cuda_gate_plan", TORCH_BOX(&mi_kernels::cuda::cuda_gate_plan));
}

STABLE_TORCH_LIBRARY_IMPL(MI_OPERATORS, MI_DISPATCH_KEY, m) {
  m.impl("diagonal", TORCH_BOX(&mi_kernels::cuda::diagonal));
  m.impl("gated_interaction", TORCH_BOX(&mi_kernels::cuda::gated_interaction));
}
