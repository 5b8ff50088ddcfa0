// The host side of sm90/forward.cu, as nvcc compiled it, each call in a thread of its own. The linker puts the
// functions
// __wrap_* below in the place of the runtime's; nothing is run.
#include <cuda_runtime.h>

#include <cstdlib>
#include <thread>

#include "contiguous.h"
#include "cuda/host/tensor_map.h"

namespace sm90 = mi_kernels::cuda::sm90;

namespace {

// A thread has no context until it makes a call of the runtime that needs one.
thread_local bool has_context = false;
thread_local int maps = 0, launches = 0, shared_bytes = 0;
thread_local const void* prepared = nullptr;
thread_local sm90::ForwardChoice choice;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

template <int kOut>
int bytes_of() {
  if (choice.split > 1) {
    if constexpr (kOut <= 128) return sm90::Shape<kOut, 1, true>::kBytes;
    return 0;
  }
  return choice.cluster == 1 ? sm90::Shape<kOut, 1>::kBytes : sm90::Shape<kOut, 2>::kBytes;
}

void run(const ContiguousCall& call) {
  const sm90::ForwardOperands f = operands_of(call.problem);
  require(!sm90::refusal(f), "a call that the engine refuses");
  choice = sm90::choose_forward(f.problem, call.bfloat16, kHopper.sm_count);
  sm90::run_forward(f, choice, call.bfloat16, nullptr);
  require(launches == 1, "not one launch");
  require(maps == 5 + sm90::loadable(sm90::result_view(f)),
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

extern "C" cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  has_context = true;
  ++launches;
  const int expected = choice.out_tile == 64    ? bytes_of<64>()
                       : choice.out_tile == 128 ? bytes_of<128>()
                                                : bytes_of<256>();
  require(function == prepared, "another kernel is launched than was prepared");
  require(int(config->dynamicSmemBytes) == expected && shared_bytes == expected, "shared memory of another shape");
  require(int(config->gridDim.x) == choice.blocks && int(config->blockDim.x) == sm90::kThreads, "grid");
  require(config->numAttrs == 1 && config->attrs[0].id == cudaLaunchAttributeClusterDimension, "no cluster");
  require(int(config->attrs[0].val.clusterDim.x) == choice.cluster * choice.split, "size of the cluster");
  require(config->gridDim.x % config->attrs[0].val.clusterDim.x == 0, "a part of a cluster");
  return cudaSuccess;
}

namespace mi_kernels::cuda::sm90 {

CUtensorMap tensor_map(const View& view, bool, int rows) {
  require(has_context, "cuTensorMapEncodeTiled before the thread has a context");
  require(loadable(view) && rows <= 256, "a tensor or a box that the driver refuses");
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
