// The launches of the CUDA kernels, on the emulator: block after block.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cuda/common/kernels.h"
#include "cuda/modulate/kernels.cuh"
#include "cuda/modulate/modulate_call.h"
#include "cuda/small_batch/input_grads.cuh"
#include "emulator.h"

namespace mi_kernels::cuda {
namespace {

int64_t conflicts = 0;
int64_t processors = 4;

template <class F>
void run(int64_t blocks_x, int64_t blocks_y, int threads, size_t shared, F&& body) {
  const std::function<void()> function = body;
  Block block(threads, shared);
  for (int64_t y = 0; y < blocks_y; ++y)
    for (int64_t x = 0; x < blocks_x; ++x) block.run(function, x, y);
  conflicts += block.conflicts;
}

int64_t emulated_conflicts() { return std::exchange(conflicts, 0); }
int64_t emulated_processors(int64_t count) { return std::exchange(processors, count); }

}  // namespace

struct Place::Guard {};
Place::Place(const Tensor&) : stream_(nullptr), machine_{80, int(processors), 100 << 10} {}
Place::~Place() = default;

void launch_modulate(const Place&, DType dtype, const ModulateCall& call) {
  for_dtype(dtype, [&](auto t) {
    run(call.blocks, 1, kModulateThreads, 0, [&] { modulate_block<Emulated, decltype(t)>(call); });
  });
}

void launch_modulate_grads(const Place&, DType dtype, const ModulateGradsCall& call, const ModulateGradsPlan& plan,
                           void* partials) {
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    auto* sums = static_cast<AccOf<T>*>(partials);
    run(plan.blocks, plan.splits, kModulateThreads, modulate_grads_shared_bytes<T>(),
        [&] { modulate_grads_block<Emulated, T>(call, plan, sums); });
    if (sums)
      run((plan.units + kModulateThreads - 1) / kModulateThreads, 1, kModulateThreads, 0,
          [&] { modulate_grads_finish<Emulated, T>(call, plan, sums); });
  });
}

template <class T>
void launch_forward(const Place&, const ForwardCall<T>& call) {
  if constexpr (Products<T>::kWidens) {
    if (call.by_items) {
      using Math = ForwardMath<Emulated, T, true>;
      return run(call.grid.blocks(), 1, kEngineThreads, engine_shared_bytes<Math>(),
                 [&] { forward_items_block<Emulated, Math>(call); });
    }
  }
  using Math = ForwardMath<Emulated, T, false>;
  run(call.grid.blocks(), 1, kEngineThreads, engine_shared_bytes<Math>(), [&] { forward_block<Emulated, Math>(call); });
}
template <class T>
void launch_stream(const Place&, const ForwardCall<T>& call) {
  run(call.grid.blocks(), 1, kEngineThreads, stream_shared_bytes<T>(), [&] { stream_block<Emulated, T>(call); });
}
template <class T>
void launch_stream_grads(const Place&, const InputGradsCall<T>& call) {
  run(call.grid.blocks(), 1, kEngineThreads, stream_grads_shared_bytes<T>(),
      [&] { stream_grads_block<Emulated, T>(call); });
}
template <class T>
void launch_gate(const Place&, const GateCall<T>& call) {
  using Math = ProductMath<Emulated, T, true>;
  run(call.grid.blocks(), 1, kEngineThreads, engine_shared_bytes<Math>(), [&] { gate_block<Emulated, Math>(call); });
}
template <class T>
void launch_weight_grads(const Place&, const WeightGradsCall<T>& call) {
  const auto start = [&](auto made) {
    using Math = WeightGradsMath<Emulated, T, made.value>;
    run(call.grid.blocks(), 1, kEngineThreads, engine_shared_bytes<Math>(),
        [&] { weight_grads_block<Emulated, Math, made.value>(call); });
  };
  call.made ? start(std::true_type()) : start(std::false_type());
}
template <class T>
void launch_linear(const Place&, const LinearCall<T>& call) {
  using Math = ProductMath<Emulated, T>;
  run(call.grid.blocks(), 1, kEngineThreads, engine_shared_bytes<Math>(), [&] { linear_block<Emulated, Math>(call); });
}
template <class T>
void launch_input_grads(const Place&, const InputGradsCall<T>& call) {
  using Math = InputGradsMath<Emulated, T>;
  run(call.grid.blocks(), 1, kEngineThreads, input_grads_shared_bytes<Math>(),
      [&] { input_grads_block<Emulated, Math>(call); });
}
template <class T>
void launch_reduce(const Place&, const Output<T>& out, int64_t splits) {
  const int64_t size = out.groups * out.rows * out.cols;
  run((size + kReduceThreads - 1) / kReduceThreads, 1, kReduceThreads, 0,
      [&] { reduce_block<Emulated, T>(out, splits); });
}
template <class T>
void launch_softmax(const Place&, const Output<T>& out, int64_t splits, const AccOf<T>* shift, int64_t shift_splits) {
  run(out.rows, 1, kReduceThreads, kReduceThreads * sizeof(AccOf<T>),
      [&] { softmax_block<Emulated, T>(out, splits, shift, shift_splits); });
}

#define MI_INSTANCES(T)                                                          \
  template void launch_forward<T>(const Place&, const ForwardCall<T>&);          \
  template void launch_gate<T>(const Place&, const GateCall<T>&);                \
  template void launch_weight_grads<T>(const Place&, const WeightGradsCall<T>&); \
  template void launch_linear<T>(const Place&, const LinearCall<T>&);            \
  template void launch_input_grads<T>(const Place&, const InputGradsCall<T>&);   \
  template void launch_reduce<T>(const Place&, const Output<T>&, int64_t);       \
  template void launch_softmax<T>(const Place&, const Output<T>&, int64_t, const AccOf<T>*, int64_t);
MI_FOR_EACH_DTYPE(MI_INSTANCES)
#define MI_STREAMS(T)                                                  \
  template void launch_stream<T>(const Place&, const ForwardCall<T>&); \
  template void launch_stream_grads<T>(const Place&, const InputGradsCall<T>&);
MI_FOR_EACH_STORED_DTYPE(MI_STREAMS)

}  // namespace mi_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(MI_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("emulated_conflicts", TORCH_BOX(&mi_kernels::cuda::emulated_conflicts));
  m.impl("emulated_processors", TORCH_BOX(&mi_kernels::cuda::emulated_processors));
}
