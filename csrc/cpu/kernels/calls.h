// What the kernels are called with, and the table of kernels that each instruction set has.
#pragma once

#include "common/dtypes.h"
#include "common/problem_size.h"
#include "common/tensor_ref.h"
#include "cpu/kernels/modulate_call.h"
#include "cpu/kernels/plans.h"

namespace mi_kernels {

struct NormCall;  // norm_call.h
struct NormGradsCall;
struct RecurrentStepsCall;  // recurrent_call.h
struct RecurrentGradsCall;
struct RecurrentPlan;

struct OutputRef {
  void* data = nullptr;  // contiguous; null where it is not wanted
};

// The epilogue of a gated form: with sums p, y = (act(p) + offset) * x + shift_weight z + shift_bias.
struct GateParams {
  bool present = false;
  Activation activation = Activation::identity;
  double offset = 0;
  TensorRef x = {}, shift_weight = {}, shift_bias = {};
  OutputRef pre_activation = {};  // p for the backward pass, in the layout of y
  int* not_finite = nullptr;      // set to 1 if some p is not finite, which act may hide; may be null
};

// packed_weight, if there is one, has the numbers of weight in the dtype and the layout in which they are multiplied,
// [O][outer][row], or [outer][O][row] unless outputs come first; a row is the inner axis of the plan's order, padded.
struct ForwardCall {
  ProblemSize problem;
  TensorRef x, z;
  WeightRef weight;
  TensorRef weight_z, weight_x, bias;
  OutputRef y;
  TensorRef packed_weight = {};
  GateParams gate = {};
};

struct InputGradsCall {
  ProblemSize problem;
  TensorRef grad, x, z;
  WeightRef weight;
  TensorRef weight_z, weight_x;
  OutputRef dx, dz;
};

struct WeightGradsCall {
  ProblemSize problem;
  TensorRef grad, x, z;
  OutputRef weight, weight_z, weight_x, bias;
  bool one = false;  // x has one more feature, which is 1, and weight_x a column for it
};

// One term of a product without W, sum_k rows[b, k] matrix[o, k]; absent if its data is null.
struct LinearTerm {
  TensorRef rows, matrix;
  int64_t depth = 0;
};

// The epilogue of a product of two linear forms p and q, y[o] = sum_r f(p[r, o]) h(q[r, o]). Their matrices have
// `ranks` times `out` rows, r being the slower axis.
struct DualEpilogue {
  int64_t ranks = 0;  // 0: absent
  Activation activation_p = Activation::identity, activation_q = Activation::identity;
  OutputRef p = {}, q = {};  // for the backward pass, [rows][ranks][out]
};

// y[groups][rows][out] = p = terms[0] + terms[1] + bias + addend; with a gate, y = (act(p) + offset) * x + shift +
// shift_bias.
struct LinearCall {
  int64_t groups, rows, out;
  LinearTerm terms[2];
  TensorRef bias;
  OutputRef y;
  GateParams gate = {};  // its shift_weight is not read: see shift
  LinearTerm shift = {};
  DualEpilogue dual = {};  // q = shift + gate.shift_bias
  TensorRef addend = {};   // [groups][rows][out] with contiguous rows; not with a gate or a stream
};

// The same epilogue alone: p and q are [rows][ranks][out] in memory; so are the gradients dp and dq, dq being `out *
// ranks` elements behind dp in rows of twice as many.
struct DualCall {
  int64_t rows, out;
  DualEpilogue dual;
  TensorRef grad = {};  // of y [rows][out]; null in the forward pass
  OutputRef result;     // y, or the gradients
};

// products[groups][rows][context][width] = z x, with rows `row_stride` elements apart, which leave room for a vector.
struct OuterCall {
  int64_t groups, rows, context, width;
  TensorRef x, z;
  void* products;
  int64_t row_stride, row_step, worker_bytes;  // row_step: rows of a task
};

// dx[j] = sum_i z[i] matrix[i][j] and dz[i] = sum_j x[j] matrix[i][j] of each row, added to what they are if `add` says
// so. The matrix has room for a vector after the last row.
struct ContractCall {
  int64_t groups, rows, context, width;
  TensorRef x, z;
  const void* matrix;
  OutputRef dx, dz;
  bool add_x, add_z;
  int64_t row_step, worker_bytes;
};

// Threads and scratch memory: run() calls body(closure, task, worker) for all tasks, on up to `workers` threads.
struct Executor {
  int64_t workers;
  char* scratch;   // workers * plan.worker_bytes
  char* partials;  // plan.partial_bytes
  void (*run)(int64_t tasks, int64_t workers, void (*body)(void*, int64_t, int64_t), void* closure);
};

struct Kernels {
  MulTraits (*mul_traits)(DType);
  MulTraits (*sum_traits)(DType);  // of gradients of the bias and small gradients of weights: double for float
  DType (*element)(DType);         // the dtype in which elements are multiplied
  void (*forward)(DType, const ForwardCall&, const ForwardPlan&, const Executor&);
  void (*linear)(DType, const LinearCall&, const LinearPlan&, const Executor&);
  void (*linear_stream)(DType, const LinearCall&, const LinearPlan&, const Executor&);
  void (*dual)(DType, const DualCall&, const Executor&);
  void (*input_grads)(DType, const InputGradsCall&, const InputGradsPlan&, const Executor&);
  void (*weight_grads)(DType, const WeightGradsCall&, const WeightGradsPlan&, const Executor&);
  void (*outer_products)(DType, const OuterCall&, const Executor&);
  void (*contract)(DType, const ContractCall&, const Executor&);
  // In place, y[b] = softmax(y[b]) * x[b] for rows of y.
  void (*softmax_rows)(DType, const TensorRef& x, OutputRef y, int64_t rows, int64_t width, const Executor&);
  void (*modulate)(DType, const ModulateCall&, const Executor&);
  void (*modulate_grads)(DType, const ModulateGradsCall&, const ModulateGradsPlan&, const Executor&);
  void (*norm)(DType, const NormCall&, const Executor&);
  void (*norm_grads)(DType, const NormGradsCall&, const Executor&);
  void (*recurrent)(DType, const RecurrentStepsCall&, const RecurrentPlan&, const Executor&);
  void (*recurrent_grads)(DType, const RecurrentGradsCall&, const RecurrentPlan&, const Executor&);
};

#define MI_DECLARE_KERNELS(isa)                                                                    \
  namespace isa {                                                                                  \
  MulTraits mul_traits(DType);                                                                     \
  MulTraits sum_traits(DType);                                                                     \
  DType element(DType);                                                                            \
  void forward(DType, const ForwardCall&, const ForwardPlan&, const Executor&);                    \
  void forward_stream(DType, const ForwardCall&, const ForwardPlan&, const Executor&);             \
  void forward_stream_outputs(DType, const ForwardCall&, const ForwardPlan&, const Executor&);     \
  void forward_outputs(DType, const ForwardCall&, const ForwardPlan&, const Executor&);            \
  void linear(DType, const LinearCall&, const LinearPlan&, const Executor&);                       \
  void linear_stream(DType, const LinearCall&, const LinearPlan&, const Executor&);                \
  void dual(DType, const DualCall&, const Executor&);                                              \
  void input_grads(DType, const InputGradsCall&, const InputGradsPlan&, const Executor&);          \
  void input_grads_stream(DType, const InputGradsCall&, const InputGradsPlan&, const Executor&);   \
  void weight_grads(DType, const WeightGradsCall&, const WeightGradsPlan&, const Executor&);       \
  void weight_grads_outer(DType, const WeightGradsCall&, const WeightGradsPlan&, const Executor&); \
  void outer_products(DType, const OuterCall&, const Executor&);                                   \
  void contract(DType, const ContractCall&, const Executor&);                                      \
  void softmax_rows(DType, const TensorRef&, OutputRef, int64_t, int64_t, const Executor&);        \
  void modulate(DType, const ModulateCall&, const Executor&);                                      \
  void modulate_grads(DType, const ModulateGradsCall&, const ModulateGradsPlan&, const Executor&); \
  void norm(DType, const NormCall&, const Executor&);                                              \
  void norm_grads(DType, const NormGradsCall&, const Executor&);                                   \
  void recurrent(DType, const RecurrentStepsCall&, const RecurrentPlan&, const Executor&);         \
  void recurrent_grads(DType, const RecurrentGradsCall&, const RecurrentPlan&, const Executor&);   \
  extern const Kernels kernels;                                                                    \
  }
MI_DECLARE_KERNELS(generic)
MI_DECLARE_KERNELS(avx2)
MI_DECLARE_KERNELS(avx512)
MI_DECLARE_KERNELS(avx512bf16)
#undef MI_DECLARE_KERNELS

}  // namespace mi_kernels
