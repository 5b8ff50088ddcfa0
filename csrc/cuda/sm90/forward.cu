// The dense forward pass for sm_90a: the kernels and their launch. Compiled and run on an emulated machine by the
// tests; not run on a GPU.
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/host/sm90_args.h"
#include "cuda/host/tensor_map.h"

namespace mi_kernels::cuda::sm90 {
namespace {

template <class T, class Shape, bool kExact>
__global__ void __launch_bounds__(kThreads, 1) interaction_forward_sm90(const __grid_constant__ Call<Hopper> call) {
  extern __shared__ unsigned char memory[];
  forward<Hopper, T, Shape, kExact>(call, memory);
}

template <class T, class Shape, bool kExact>
void launch_shape(const ForwardOperands& f, const ForwardChoice& choice, cudaStream_t stream) {
  constexpr const char* op = "interaction (sm_90a)";
  const auto kernel = interaction_forward_sm90<T, Shape, kExact>;
  // First a call of the runtime, which makes a context current in a thread that has none: the driver's entry point for
  // tensor maps does not. cudaSetDevice would do too, but would replace a context that the caller has made current.
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             Shape::kBytes),
        op);
  const Call<Hopper> call = forward_call<Hopper, Shape>(
      f, choice.split, [](const View& view, int rows) { return tensor_map(view, T::kBfloat16, rows); });
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(choice.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Shape::kBytes;
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(Shape::kCluster * choice.split);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, call), op);
}

template <class T, int kOut, bool kExact>
void launch_out(const ForwardOperands& f, const ForwardChoice& choice, cudaStream_t stream) {
  if (choice.split > 1) {
    if constexpr (kOut <= 128) return launch_shape<T, Shape<kOut, 1, true>, kExact>(f, choice, stream);
    STD_TORCH_CHECK(false, "mi_kernels: no kernel for sm_90a shares tiles of ", kOut, " outputs");
  }
  if (choice.cluster == 1)
    launch_shape<T, Shape<kOut, 1>, kExact>(f, choice, stream);
  else
    launch_shape<T, Shape<kOut, 2>, kExact>(f, choice, stream);
}

}  // namespace

void run_forward(const ForwardOperands& f, const ForwardChoice& choice, bool bfloat16, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  STD_TORCH_CHECK(choice.exact == !bfloat16 && (choice.cluster == 1 || (choice.cluster == 2 && choice.split == 1)),
                  "mi_kernels: the plan names a kernel for sm_90a that does not exist");
  if (bfloat16) {
    switch (choice.out_tile) {
      case 64: return launch_out<Bf16, 64, false>(f, choice, on);
      case 128: return launch_out<Bf16, 128, false>(f, choice, on);
      case 256: return launch_out<Bf16, 256, false>(f, choice, on);
    }
  } else {
    switch (choice.out_tile) {
      case 64: return launch_out<F16, 64, true>(f, choice, on);
      case 128: return launch_out<F16, 128, true>(f, choice, on);
    }
  }
  STD_TORCH_CHECK(false, "mi_kernels: no kernel for sm_90a has tiles of ", choice.out_tile, " outputs");
}

}  // namespace mi_kernels::cuda::sm90
