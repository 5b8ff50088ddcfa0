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

// An instruction set that differs from another in bf16 alone (MI_SHARED_ISA) has kernels for bf16 alone.
template <auto kOwn, auto kShared>
struct ByDtype;
template <class R, class... A, R (*kOwn)(DType, A...), R (*kShared)(DType, A...)>
struct ByDtype<kOwn, kShared> {
  static R call(DType dtype, A... a) { return dtype == DType::bf16 ? kOwn(dtype, a...) : kShared(dtype, a...); }
};

}  // namespace

MulTraits mul_traits(DType dtype) { return describe<MulOf>(dtype); }
MulTraits sum_traits(DType dtype) { return describe<SumMulOf>(dtype); }

DType element(DType dtype) {
  const MulTraits m = mul_traits(dtype);
  return m.pair == 2 ? DType::bf16 : m.acc_bytes == 8 ? DType::f64 : DType::f32;
}

#if defined(MI_SHARED_ISA)
#define MI_KERNEL(name) ByDtype<&name, &MI_SHARED_ISA::name>::call
#else
#define MI_KERNEL(name) name
#endif

const Kernels kernels = {MI_KERNEL(mul_traits),     MI_KERNEL(sum_traits),     MI_KERNEL(element),
                         MI_KERNEL(forward),        MI_KERNEL(linear),         MI_KERNEL(linear_stream),
                         MI_KERNEL(dual),           MI_KERNEL(input_grads),    MI_KERNEL(weight_grads),
                         MI_KERNEL(outer_products), MI_KERNEL(contract),       MI_KERNEL(softmax_rows),
                         MI_KERNEL(modulate),       MI_KERNEL(modulate_grads), MI_KERNEL(norm),
                         MI_KERNEL(norm_grads),     MI_KERNEL(recurrent),      MI_KERNEL(recurrent_grads)};

}  // namespace mi_kernels::MI_ISA
