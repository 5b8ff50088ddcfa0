#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"
#include "cuda/common/repack.cuh"
#include "cuda/common/simt.cuh"

namespace mi_kernels::cuda {
namespace {

template <class Word>
__global__ void __launch_bounds__(kRepackThreads) repack_kernel(const RepackParams params) {
  repack_block<Simt, Word>(params);
}

}  // namespace

void launch_repack(const DeviceStream& stream, DType dtype, const RepackParams& params) {
  for_word(dtype, [&](auto word) {
    using Word = decltype(word);
    launch("repack", stream, repack_kernel<Word>, grid_of(repack_blocks<Word>(params)), kRepackThreads,
           RepackTile<Word>::kSharedBytes, params);
  });
}

}  // namespace mi_kernels::cuda
