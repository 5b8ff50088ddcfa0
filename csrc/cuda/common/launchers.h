// The launch functions of the kernels, one for each dtype. They are defined in sm80/, small_batch/, reduce.cu and
// repack.cu; the tests define them again for the emulator.
#pragma once

#include "cuda/common/params.cuh"
#include "cuda/common/repack.cuh"

namespace mi_kernels::cuda {

class DeviceStream;

template <class T>
void launch_forward(const DeviceStream&, const ForwardParams<T>&);
template <class T>
void launch_small_batch_forward(const DeviceStream&, const ForwardParams<T>&);
template <class T>
void launch_diagonal(const DeviceStream&, const DiagonalParams<T>&);
template <class T>
void launch_dual_linear(const DeviceStream&, const DualLinearParams<T>&);
template <class T>
void launch_input_grads(const DeviceStream&, const InputGradsParams<T>&);
template <class T>
void launch_small_batch_input_grads(const DeviceStream&, const InputGradsParams<T>&);
template <class T>
void launch_linear(const DeviceStream&, const LinearParams<T>&);
template <class T>
void launch_weight_grads(const DeviceStream&, const WeightGradsParams<T>&);
template <class T>
void launch_reduce(const DeviceStream&, const Epilogue<T>&, int64_t splits);
template <class T>
void launch_softmax(const DeviceStream&, const Epilogue<T>&, int64_t splits, const AccOf<T>* shift,
                    int64_t shift_splits);
void launch_repack(const DeviceStream&, DType, const RepackParams&);

#define MI_FOR_EACH_STORED_DTYPE(m) m(double) m(float) m(bf16) m(f16)
#define MI_FOR_EACH_DTYPE(m) MI_FOR_EACH_STORED_DTYPE(m) m(tf32)

}  // namespace mi_kernels::cuda
