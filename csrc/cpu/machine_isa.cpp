#include "family.h"

namespace mi_kernels::MI_ISA {

Machine machine(DType dtype) {
  Machine m{};
  for_dtype(dtype, [&](auto s) {
    using Mul = typename MulOf<decltype(s)>::type;
    m = {Simd<typename Mul::Acc>::lanes, Mul::pair, sizeof(typename Mul::Word), sizeof(typename Mul::Acc)};
  });
  return m;
}

const Kernels kernels = {machine, forward, input_grads, weight_grads};

}  // namespace mi_kernels::MI_ISA
