// The host side of sm90/forward.cu as nvcc compiled it, each call in a thread of its own. The linker replaces functions
// of the runtime by the __wrap_* below, and no kernel runs.
#include <cuda_runtime.h>

#include <cstdlib>
#include <thread>

#include "contiguous.h"
#include "cuda/host/tensor_map.h"

namespace sm90 = mi_kernels::cuda::sm90;

namespace {

// A thread has no context until its first runtime call that needs one.
thread_local bool has_context = false;
thread_local int maps = 0, launches = 0, shared_bytes = 0;
thread_local const void* prepared = nullptr;
thread_local sm90::KernelConfig config;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

template <int kTileN>
int shared_bytes_of() {
  if (config.splits > 1) {
    if constexpr (kTileN <= 128) return sm90::KernelTraits<kTileN, 1, true>::kSharedBytes;
    return 0;
  }
  return config.cluster == 1 ? sm90::KernelTraits<kTileN, 1>::kSharedBytes
                             : sm90::KernelTraits<kTileN, 2>::kSharedBytes;
}

void run(const ContiguousCall& call) {
  const sm90::ForwardArgs args = args_of(call.problem);
  require(!sm90::why_not(args), "a call that the engine does not take");
  config = sm90::choose_config(args.shape, call.bfloat16, kHopper.sm_count);
  sm90::launch_forward(args, config, call.bfloat16, nullptr);
  require(launches == 1, "not one launch");
  require(maps == 5 + sm90::tma_compatible(sm90::result_view(args)),
          "a tensor map for each of x, z, W, U, V, and y if it allows it");
}

}  // namespace

extern "C" cudaError_t __wrap_cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  has_context = true;
  require(attribute == cudaFuncAttributeMaxDynamicSharedMemorySize, "an attribute");
  prepared = function;
  shared_bytes = value;
  return cudaSuccess;
}

extern "C" cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* launched, const void* function, void**) {
  has_context = true;
  ++launches;
  const int expected = config.tile_n == 64    ? shared_bytes_of<64>()
                       : config.tile_n == 128 ? shared_bytes_of<128>()
                                              : shared_bytes_of<256>();
  require(function == prepared, "the kernel launched is not the one whose attribute was set");
  require(int(launched->dynamicSmemBytes) == expected && shared_bytes == expected, "shared memory of another shape");
  require(int(launched->gridDim.x) == config.blocks && int(launched->blockDim.x) == sm90::kThreads, "grid");
  require(launched->numAttrs == 1 && launched->attrs[0].id == cudaLaunchAttributeClusterDimension, "no cluster");
  require(int(launched->attrs[0].val.clusterDim.x) == config.cluster * config.splits, "size of the cluster");
  require(launched->gridDim.x % launched->attrs[0].val.clusterDim.x == 0, "a part of a cluster");
  return cudaSuccess;
}

namespace mi_kernels::cuda::sm90 {

CUtensorMap tensor_map(const TensorView& view, bool, int rows) {
  require(has_context, "cuTensorMapEncodeTiled before the thread has a context");
  require(tma_compatible(view) && rows <= 256, "a tensor or a box that the driver rejects");
  ++maps;
  return {};
}

}  // namespace mi_kernels::cuda::sm90

int main() {
  ContiguousCall call;
  int calls = 0;
  for (; read_call(call); ++calls) std::thread(run, call).join();
  std::printf("%d launches as chosen\n", calls);
}
