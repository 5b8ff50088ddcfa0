// The table of the kernels of one instruction set.
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {

namespace {

template <template <class> class MulFor>
MulTraits describe(DType dtype) {
  MulTraits m{};
  for_dtype(dtype, [&](auto s) {
    using Mul = typename MulFor<decltype(s)>::type;
    m = {Simd<typename Mul::Acc>::lanes, Mul::pair, sizeof(typename Mul::Word), sizeof(typename Mul::Acc)};
  });
  return m;
}

}  // namespace

MulTraits mul_traits(DType dtype) { return describe<MulOf>(dtype); }
MulTraits sum_traits(DType dtype) { return describe<SumMulOf>(dtype); }

DType element(DType dtype) {
  const MulTraits m = mul_traits(dtype);
  return m.pair == 2 ? DType::bf16 : m.acc_bytes == 8 ? DType::f64 : DType::f32;
}

const Kernels kernels = {mul_traits, sum_traits,     element,      forward,        linear,    linear_stream,
                         dual,       input_grads,    weight_grads, outer_products, contract,  softmax_rows,
                         modulate,   modulate_grads, norm,         norm_grads,     recurrent, recurrent_grads};

}  // namespace mi_kernels::MI_ISA
