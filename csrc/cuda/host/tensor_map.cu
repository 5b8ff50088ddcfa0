#include <cudaTypedefs.h>

#include "cuda/common/launch.cuh"
#include "cuda/host/tensor_map.h"

namespace mi_kernels::cuda::sm90 {
namespace {

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

// Looked up in the driver that the runtime has loaded, so that this library is not linked to libcuda.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status),
        "cuTensorMapEncodeTiled");
#else  // 12.4 has only the older function, which returns the entry point of its own headers' version
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status),
        "cuTensorMapEncodeTiled");
#endif
  STD_TORCH_CHECK(status == cudaDriverEntryPointSuccess && found,
                  "mi_kernels: this driver has no cuTensorMapEncodeTiled: expected one for CUDA 12.0 or later");
  return reinterpret_cast<Encode>(found);
}

}  // namespace

CUtensorMap tensor_map(const TensorView& view, bool bfloat16, int rows) {
  static const Encode encode = find_encode();
  cuuint64_t size[4], stride[3];
  cuuint64_t span = 0;  // bytes of all dimensions inside this one, a multiple of 16
  for (int d = 0; d < 4; ++d) {
    size[d] = cuuint64_t(view.size[d]);
    if (d == 0) {
      span = (size[0] * 2 + 15) / 16 * 16;
      continue;
    }
    // The stride of a dimension of size 1 is never used, but it has to be valid.
    stride[d - 1] = size[d] == 1 ? span : cuuint64_t(view.stride[d]) * 2;
    span = stride[d - 1] * size[d];
  }
  const cuuint32_t box[4] = {cuuint32_t(kTileK), 1, cuuint32_t(rows), 1}, step[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             const_cast<void*>(view.data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "mi_kernels: cuTensorMapEncodeTiled rejects a tensor of ", view.size[0],
                  " x ", view.size[1], " x ", view.size[2], " x ", view.size[3], " elements: error ", int(result));
  return map;
}

}  // namespace mi_kernels::cuda::sm90
