// The launches of the mma engine's forms, one for each dtype; their kernels are in *_mma.cu.
#pragma once

#include "families.cuh"
#include "place.h"

namespace mi_kernels::cuda {

template <class T>
void launch_forward(const Place&, const ForwardCall<T>&);
template <class T>
void launch_stream(const Place&, const ForwardCall<T>&);
template <class T>
void launch_gate(const Place&, const GateCall<T>&);
template <class T>
void launch_weight_grads(const Place&, const WeightGradsCall<T>&);
template <class T>
void launch_linear(const Place&, const LinearCall<T>&);
template <class T>
void launch_input_grads(const Place&, const InputGradsCall<T>&);
template <class T>
void launch_reduce(const Place&, const Output<T>&, int64_t splits);
template <class T>
void launch_softmax(const Place&, const Output<T>&, int64_t splits, const AccOf<T>* shift, int64_t shift_splits);

#define MI_FOR_EACH_DTYPE(m) m(double) m(float) m(bf16) m(f16)

// The arithmetic of a dtype on tiles of products and of input gradients.
template <class Gpu, class T, bool kTwo = false>
using ProductMath = std::conditional_t<sizeof(T) == 2, MmaMath<Gpu, T, MmaTile<128, 128, 2>, kTwo>, FmaMath<Gpu, T, FmaTile, kTwo>>;
template <class Gpu, class T>
using InputGradsMath = std::conditional_t<sizeof(T) == 2, MmaMath<Gpu, T, MmaTile<128, 64, 4>>, FmaMath<Gpu, T>>;

}  // namespace mi_kernels::cuda
