// The launches of the mma engine's forms, one for each dtype; their kernels are in sm80/.
#pragma once

#include "cuda/sm80/families.cuh"

namespace mi_kernels::cuda {

class Place;

template <class T>
void launch_forward(const Place&, const ForwardCall<T>&);
template <class T>
void launch_stream(const Place&, const ForwardCall<T>&);
template <class T>
void launch_stream_grads(const Place&, const InputGradsCall<T>&);
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

#define MI_FOR_EACH_STORED_DTYPE(m) m(double) m(float) m(bf16) m(f16)
#define MI_FOR_EACH_DTYPE(m) MI_FOR_EACH_STORED_DTYPE(m) m(tf32)

// The arithmetic of a dtype on tiles of matrices, of matrices with the products z x, and of input gradients.
template <class Gpu, class T, class Tile, bool kTwo = false>
using MatrixMath = std::conditional_t<
    sizeof(T) == 2, MmaMath<Gpu, T, Tile, kTwo>,
    std::conditional_t<std::is_same_v<T, tf32>, Tf32Math<Gpu, T, Tile, kTwo>, FmaMath<Gpu, T, FmaTile, kTwo>>>;
template <class Gpu, class T, bool kTwo = false>
using ProductMath = MatrixMath<Gpu, T, MmaTile<128, 128, 2>, kTwo>;
template <class Gpu, class T>
using MadeMath = std::conditional_t<Products<T>::kWidens, Tf32Math<Gpu, T, MmaTile<128, 128, 2>>, ProductMath<Gpu, T>>;
template <class Gpu, class T>
using InputGradsMath = MatrixMath<Gpu, T, MmaTile<128, 64, 4>>;

// A forward pass by items, which only float16 has, is one of matrices alone.
template <class Gpu, class T, bool kByItems>
using ForwardMath = std::conditional_t<kByItems, ProductMath<Gpu, T>, MadeMath<Gpu, T>>;
template <class Gpu, class T, bool kMade>
using WeightGradsMath = std::conditional_t<kMade, MadeMath<Gpu, T>, ProductMath<Gpu, T>>;

}  // namespace mi_kernels::cuda
