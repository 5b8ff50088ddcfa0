#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {

namespace {

template <template <class> class MulFor>
Machine describe(DType dtype) {
  Machine m{};
  for_dtype(dtype, [&](auto s) {
    using Mul = typename MulFor<decltype(s)>::type;
    m = {Simd<typename Mul::Acc>::lanes, Mul::pair, sizeof(typename Mul::Word), sizeof(typename Mul::Acc)};
  });
  return m;
}

}  // namespace

Machine machine(DType dtype) { return describe<MulOf>(dtype); }
Machine sums_machine(DType dtype) { return describe<SumMulOf>(dtype); }

// In which dtype elements are multiplied.
DType element(DType dtype) {
  const Machine m = machine(dtype);
  return m.pair == 2 ? DType::bf16 : m.acc_bytes == 8 ? DType::f64 : DType::f32;
}

const Kernels kernels = {machine,     sums_machine, element,      forward,  linear,        linear_stream,
                         input_grads, weight_grads, softmax_rows, modulate, modulate_grads};

}  // namespace mi_kernels::MI_ISA
