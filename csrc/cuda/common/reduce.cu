#include "common/integers.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/simt.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const Epilogue<T> epilogue, int64_t splits) {
  reduce_block<Simt, T>(epilogue, splits);
}
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    softmax_kernel(const Epilogue<T> epilogue, int64_t splits, const AccOf<T>* shift, int64_t shift_splits) {
  softmax_block<Simt, T>(epilogue, splits, shift, shift_splits);
}

}  // namespace

template <class T>
void launch_reduce(const DeviceStream& stream, const Epilogue<T>& epilogue, int64_t splits) {
  const int64_t blocks = ceil_div(epilogue.groups * epilogue.rows * epilogue.cols, kReduceThreads);
  launch("reduce", stream, reduce_kernel<T>, grid_of(blocks), kReduceThreads, 0, epilogue, splits);
}
template <class T>
void launch_softmax(const DeviceStream& stream, const Epilogue<T>& epilogue, int64_t splits, const AccOf<T>* shift,
                    int64_t shift_splits) {
  launch("softmax", stream, softmax_kernel<T>, grid_of(epilogue.rows), kReduceThreads,
         kReduceThreads * sizeof(AccOf<T>), epilogue, splits, shift, shift_splits);
}
#define MI_INSTANCE(T)                                                              \
  template void launch_reduce<T>(const DeviceStream&, const Epilogue<T>&, int64_t); \
  template void launch_softmax<T>(const DeviceStream&, const Epilogue<T>&, int64_t, const AccOf<T>*, int64_t);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
