// Results of partial sums, and gates of softmax.
#include "common/integers.h"
#include "cuda/common/kernels.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/simt.cuh"

namespace mi_kernels::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const Output<T> out, int64_t splits) {
  reduce_block<Gpu, T>(out, splits);
}
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    softmax_kernel(const Output<T> out, int64_t splits, const AccOf<T>* shift, int64_t shift_splits) {
  softmax_block<Gpu, T>(out, splits, shift, shift_splits);
}

}  // namespace

template <class T>
void launch_reduce(const Place& place, const Output<T>& out, int64_t splits) {
  const int64_t size = out.groups * out.rows * out.cols;
  launch("reduce", place, reduce_kernel<T>, grid_of(ceil_div(size, kReduceThreads)), kReduceThreads, 0, out, splits);
}
template <class T>
void launch_softmax(const Place& place, const Output<T>& out, int64_t splits, const AccOf<T>* shift,
                    int64_t shift_splits) {
  launch("softmax", place, softmax_kernel<T>, grid_of(out.rows), kReduceThreads, kReduceThreads * sizeof(AccOf<T>), out,
         splits, shift, shift_splits);
}
#define MI_INSTANCE(T)                                                     \
  template void launch_reduce<T>(const Place&, const Output<T>&, int64_t); \
  template void launch_softmax<T>(const Place&, const Output<T>&, int64_t, const AccOf<T>*, int64_t);
MI_FOR_EACH_DTYPE(MI_INSTANCE)

}  // namespace mi_kernels::cuda
