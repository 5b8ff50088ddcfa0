// What the dispatcher (interaction.cpp) and the kernels of one instruction set (interaction_isa.cpp) share.
#pragma once

#include "common/dtypes.h"
#include "common/tensor_ref.h"
#include "cpu/dispatch/plan.h"
#include "cpu/kernels/modulate_call.h"

namespace mi_kernels {

struct Result {
  void* data = nullptr;  // contiguous; null where it is not wanted
};

// What becomes of the sums p of a gated form (out = width): y = (act(p) + offset) * x + (C z + d).
struct GateSpec {
  bool present = false;
  Activation activation = Activation::identity;
  double offset = 0;
  TensorRef shift_weight = {}, shift_bias = {};
  Result kept = {};           // p for the backward pass, laid out as y, where it is wanted
  int* not_finite = nullptr;  // set to 1 where some p is not finite, which act may hide; may be null
};

// weight is contiguous within a group: [O][Z][X] at data + g * group. words, where there are any, are the same
// numbers as they are multiplied, [O][outer][row] with the inner axis of the plan's order along a row.
struct ForwardCall {
  ProblemSize problem;
  TensorRef x, z, weight, weight_z, weight_x, bias;
  Result y;
  TensorRef words = {};
  GateSpec gate = {};
};

struct InputGradsCall {
  ProblemSize problem;
  TensorRef grad, x, z, weight, weight_z, weight_x;
  Result dx, dz;
};

struct WeightGradsCall {
  ProblemSize problem;
  TensorRef grad, x, z;
  Result weight, weight_z, weight_x, bias;
};

// The sums of a product without W, sum_k rows[b, k] matrix[o, k]; no data: absent.
struct LinearTerm {
  TensorRef rows, matrix;
  int64_t depth = 0;
};

// y = terms[0] + terms[1] + bias, [groups][rows][out]; with a gate, y = (act(that) + offset) * x + shift + shift bias.
struct LinearCall {
  int64_t groups, rows, out;
  LinearTerm terms[2];
  TensorRef bias;
  Result y;
  GateSpec gate = {};  // without its shift_weight, which is `shift`
  LinearTerm shift = {};
  TensorRef x = {};
};

// Runs tasks 0 .. tasks-1 on up to `workers` workers; body(context, task, worker).
struct Execution {
  int64_t workers;
  char* scratch;   // workers * plan.worker_bytes
  char* partials;  // plan.partial_bytes
  void (*run)(int64_t tasks, int64_t workers, void (*body)(void*, int64_t, int64_t), void* context);
};

struct Kernels {
  Machine (*machine)(DType);
  Machine (*sums_machine)(DType);  // of dc and small gradients of weights: double for float
  DType (*element)(DType);         // in which elements are multiplied
  void (*forward)(DType, const ForwardCall&, const ForwardPlan&, const Execution&);
  void (*linear)(DType, const LinearCall&, const LinearPlan&, const Execution&);
  void (*linear_stream)(DType, const LinearCall&, const LinearPlan&, const Execution&);
  void (*input_grads)(DType, const InputGradsCall&, const InputGradsPlan&, const Execution&);
  void (*weight_grads)(DType, const WeightGradsCall&, const WeightGradsPlan&, const Execution&);
  // In place, y[b] = softmax(y[b]) * x[b] for rows of y.
  void (*softmax_rows)(DType, const TensorRef& x, Result y, int64_t rows, int64_t width, const Execution&);
  void (*modulate)(DType, const ModulateCall&, const Execution&);
  void (*modulate_grads)(DType, const ModulateGradsCall&, const ModulateGradsPlan&, const Execution&);
};

#define MI_DECLARE_KERNELS(isa)                                                                     \
  namespace isa {                                                                                   \
  Machine machine(DType);                                                                           \
  Machine sums_machine(DType);                                                                      \
  DType element(DType);                                                                             \
  void forward(DType, const ForwardCall&, const ForwardPlan&, const Execution&);                    \
  void forward_stream(DType, const ForwardCall&, const ForwardPlan&, const Execution&);             \
  void linear(DType, const LinearCall&, const LinearPlan&, const Execution&);                       \
  void linear_stream(DType, const LinearCall&, const LinearPlan&, const Execution&);                \
  void input_grads(DType, const InputGradsCall&, const InputGradsPlan&, const Execution&);          \
  void input_grads_stream(DType, const InputGradsCall&, const InputGradsPlan&, const Execution&);   \
  void weight_grads(DType, const WeightGradsCall&, const WeightGradsPlan&, const Execution&);       \
  void softmax_rows(DType, const TensorRef&, Result, int64_t, int64_t, const Execution&);           \
  void modulate(DType, const ModulateCall&, const Execution&);                                      \
  void modulate_grads(DType, const ModulateGradsCall&, const ModulateGradsPlan&, const Execution&); \
  extern const Kernels kernels;                                                                     \
  }
MI_DECLARE_KERNELS(generic)
MI_DECLARE_KERNELS(avx2)
MI_DECLARE_KERNELS(avx512)
MI_DECLARE_KERNELS(avx512bf16)
#undef MI_DECLARE_KERNELS

}  // namespace mi_kernels
