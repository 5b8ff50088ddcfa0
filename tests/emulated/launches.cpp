// The launch functions of the CUDA kernels on the emulator, one block after another.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cuda/common/launchers.h"
#include "cuda/common/reduce.cuh"
#include "cuda/host/operands.h"
#include "cuda/modulate/dual_linear_grads.cuh"
#include "cuda/modulate/kernels.cuh"
#include "cuda/modulate/norm_sums.cuh"
#include "cuda/sm80/diagonal.cuh"
#include "cuda/sm80/dual_linear.cuh"
#include "cuda/sm80/forward.cuh"
#include "cuda/sm80/input_grads.cuh"
#include "cuda/sm80/linear.cuh"
#include "cuda/sm80/weight_grads.cuh"
#include "cuda/small_batch/forward.cuh"
#include "cuda/small_batch/forward_n_major.cuh"
#include "cuda/small_batch/input_grads.cuh"
#include "cuda/small_batch/input_grads_n_major.cuh"
#include "emulator.h"

namespace mi_kernels::cuda {
namespace {

int64_t conflicts = 0;
int64_t processors = 4;
int64_t repacks = 0;

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
int64_t emulated_repacks() { return std::exchange(repacks, 0); }

}  // namespace

struct DeviceStream::Guard {};
DeviceStream::DeviceStream(const Tensor&) : handle_(nullptr), device_{80, int(processors)} {}
DeviceStream::~DeviceStream() = default;

void launch_modulate(const DeviceStream&, DType dtype, const ModulateParams& params) {
  for_dtype(dtype, [&](auto t) {
    run(params.blocks, 1, kModulateThreads, 0, [&] { modulate_block<EmulatedSm80, decltype(t)>(params); });
  });
}

void launch_modulate_grads(const DeviceStream&, DType dtype, const ModulateGradsParams& params,
                           const ModulateGradsPlan& plan, void* partials) {
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    auto* sums = static_cast<AccOf<T>*>(partials);
    run(plan.blocks, plan.splits, kModulateThreads, modulate_grads_shared_bytes<T>(),
        [&] { modulate_grads_block<EmulatedSm80, T>(params, plan, sums); });
    if (sums)
      run(ceil_div(plan.units, kModulateThreads), 1, kModulateThreads, 0,
          [&] { modulate_grads_reduce_splits<EmulatedSm80, T>(params, plan, sums); });
  });
}

void launch_norm(const DeviceStream&, DType dtype, const NormParams& params) {
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    run(norm_blocks<T>(params), 1, kNormThreads, norm_shared_bytes(1), [&] {
      norm_by_warp<T>(params) ? norm_block<EmulatedSm80, T, kWarpThreads>(params)
                              : norm_block<EmulatedSm80, T, kNormThreads>(params);
    });
  });
}

void launch_norm_input_grads(const DeviceStream&, DType dtype, const NormInputGradsParams& params) {
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    run(norm_blocks<T>(params), 1, kNormThreads, norm_shared_bytes(2), [&] {
      norm_by_warp<T>(params) ? norm_input_grads_block<EmulatedSm80, T, kWarpThreads>(params)
                              : norm_input_grads_block<EmulatedSm80, T, kNormThreads>(params);
    });
  });
}

void launch_norm_sums(const DeviceStream&, DType dtype, const NormSumsParams& params, double* partials) {
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    run(ceil_div(params.units, params.units_per_block), params.splits, kNormThreads, norm_sums_shared_bytes<T>(),
        [&] { norm_sums_block<EmulatedSm80, T>(params, partials); });
    if (params.splits > 1)
      run(ceil_div(params.units, kNormThreads), 1, kNormThreads, 0,
          [&] { norm_sums_reduce_splits<EmulatedSm80, T>(params, partials); });
  });
}

void launch_dual_linear_grads(const DeviceStream&, DType dtype, const DualLinearGradsParams& params) {
  for_dtype(dtype, [&](auto t) {
    run(params.blocks, 1, kModulateThreads, 0, [&] { dual_linear_grads_block<EmulatedSm80, decltype(t)>(params); });
  });
}

template <class T>
void launch_forward(const DeviceStream&, const ForwardParams<T>& params) {
  if constexpr (OuterProducts<T>::kWidens) {
    if (params.per_context) {
      using Mma = ForwardMma<EmulatedSm80, T, true>;
      return run(params.grid.blocks(), 1, kEngineThreads, engine_shared_bytes<Mma>(), [&] {
        params.n_major ? forward_per_context_block<EmulatedSm80, Mma, Major::mn>(params)
                       : forward_per_context_block<EmulatedSm80, Mma, Major::k>(params);
      });
    }
  }
  using Mma = ForwardMma<EmulatedSm80, T, false>;
  run(params.grid.blocks(), 1, kEngineThreads, engine_shared_bytes<Mma>(), [&] {
    params.n_major ? forward_block<EmulatedSm80, Mma, Major::mn>(params)
                   : forward_block<EmulatedSm80, Mma, Major::k>(params);
  });
}
template <class T>
void launch_small_batch_forward(const DeviceStream&, const ForwardParams<T>& params) {
  if (params.n_major)
    return run(params.grid.blocks(), 1, kSmallBatchThreads, small_batch_forward_n_major_shared_bytes<T>(),
               [&] { small_batch_forward_n_major_block<EmulatedSm80, T>(params); });
  run(params.grid.blocks(), 1, kSmallBatchThreads, small_batch_forward_shared_bytes<T>(),
      [&] { small_batch_forward_block<EmulatedSm80, T>(params); });
}
template <class T>
void launch_small_batch_input_grads(const DeviceStream&, const InputGradsParams<T>& params) {
  if (params.n_major)
    return run(params.grid.blocks(), 1, kSmallBatchThreads, small_batch_input_grads_n_major_shared_bytes<T>(),
               [&] { small_batch_input_grads_n_major_block<EmulatedSm80, T>(params); });
  run(params.grid.blocks(), 1, kSmallBatchThreads, small_batch_input_grads_shared_bytes<T>(),
      [&] { small_batch_input_grads_block<EmulatedSm80, T>(params); });
}
template <class T>
void launch_diagonal(const DeviceStream&, const DiagonalParams<T>& params) {
  using Mma = MatrixMma<EmulatedSm80, T, true>;
  run(params.grid.blocks(), 1, kEngineThreads, engine_shared_bytes<Mma>(),
      [&] { diagonal_block<EmulatedSm80, Mma>(params); });
}
template <class T>
void launch_dual_linear(const DeviceStream&, const DualLinearParams<T>& params) {
  using Mma = MatrixMma<EmulatedSm80, T, true>;
  run(params.grid.blocks(), 1, kEngineThreads, dual_linear_shared_bytes<Mma>(params.epilogue.ranks),
      [&] { dual_linear_block<EmulatedSm80, Mma>(params); });
}
template <class T>
void launch_weight_grads(const DeviceStream&, const WeightGradsParams<T>& params) {
  const auto start = [&](auto generated) {
    using Mma = WeightGradsMma<EmulatedSm80, T, generated.value>;
    run(params.grid.blocks(), 1, kEngineThreads, engine_shared_bytes<Mma>(),
        [&] { weight_grads_block<EmulatedSm80, Mma, generated.value>(params); });
  };
  params.generated ? start(std::true_type()) : start(std::false_type());
}
template <class T>
void launch_linear(const DeviceStream&, const LinearParams<T>& params) {
  using Mma = MatrixMma<EmulatedSm80, T>;
  run(params.grid.blocks(), 1, kEngineThreads, engine_shared_bytes<Mma>(),
      [&] { linear_block<EmulatedSm80, Mma>(params); });
}
template <class T>
void launch_input_grads(const DeviceStream&, const InputGradsParams<T>& params) {
  using Mma = InputGradsMma<EmulatedSm80, T>;
  run(params.grid.blocks(), 1, kEngineThreads, input_grads_shared_bytes<Mma>(), [&] {
    params.n_major ? input_grads_block<EmulatedSm80, Mma, Major::k>(params)
                   : input_grads_block<EmulatedSm80, Mma, Major::mn>(params);
  });
}
template <class T>
void launch_reduce(const DeviceStream&, const Epilogue<T>& epilogue, int64_t splits) {
  run(ceil_div(epilogue.groups * epilogue.rows * epilogue.cols, kReduceThreads), 1, kReduceThreads, 0,
      [&] { reduce_block<EmulatedSm80, T>(epilogue, splits); });
}
template <class T>
void launch_softmax(const DeviceStream&, const Epilogue<T>& epilogue, int64_t splits, const AccOf<T>* shift,
                    int64_t shift_splits) {
  run(epilogue.rows, 1, kReduceThreads, kReduceThreads * sizeof(AccOf<T>),
      [&] { softmax_block<EmulatedSm80, T>(epilogue, splits, shift, shift_splits); });
}

void launch_repack(const DeviceStream&, DType dtype, const RepackParams& params) {
  ++repacks;
  for_word(dtype, [&](auto word) {
    using Word = decltype(word);
    run(repack_blocks<Word>(params), 1, kRepackThreads, RepackTile<Word>::kSharedBytes,
        [&] { repack_block<EmulatedSm80, Word>(params); });
  });
}

// W [(G,) O, Z, X] in contiguous groups, a single one if all share it; exchanged if z is inside x.
Tensor emulated_repack(const Tensor& weight, bool grouped) {
  const int64_t d = grouped ? 1 : 0;
  ProblemSize p{grouped ? weight.size(0) : 1, 1, weight.size(d + 1), weight.size(d + 2), weight.size(d)};
  const DType dtype = dtype_of(weight.scalar_type(), "emulated_repack", "weight");
  const DenseOperands a = dense_operands(p, {}, {}, weight, grouped, {}, {}, dtype);
  p = a.problem;
  if (weight.numel() == 0) return weight;
  const RepackedWeight copy(weight, a, dtype);
  copy.start(DeviceStream(weight), a);
  Tensor result = torch::stable::new_empty(weight, {copy.ref().group ? p.groups : 1, p.out, p.context, p.width});
  std::memcpy(result.mutable_data_ptr(), copy.ref().data, size_t(result.numel() * weight.element_size()));
  return result;
}

#define MI_INSTANCES(T)                                                                   \
  template void launch_forward<T>(const DeviceStream&, const ForwardParams<T>&);          \
  template void launch_diagonal<T>(const DeviceStream&, const DiagonalParams<T>&);        \
  template void launch_dual_linear<T>(const DeviceStream&, const DualLinearParams<T>&);   \
  template void launch_weight_grads<T>(const DeviceStream&, const WeightGradsParams<T>&); \
  template void launch_linear<T>(const DeviceStream&, const LinearParams<T>&);            \
  template void launch_input_grads<T>(const DeviceStream&, const InputGradsParams<T>&);   \
  template void launch_reduce<T>(const DeviceStream&, const Epilogue<T>&, int64_t);       \
  template void launch_softmax<T>(const DeviceStream&, const Epilogue<T>&, int64_t, const AccOf<T>*, int64_t);
MI_FOR_EACH_DTYPE(MI_INSTANCES)
#define MI_STORED_INSTANCES(T)                                                               \
  template void launch_small_batch_forward<T>(const DeviceStream&, const ForwardParams<T>&); \
  template void launch_small_batch_input_grads<T>(const DeviceStream&, const InputGradsParams<T>&);
MI_FOR_EACH_STORED_DTYPE(MI_STORED_INSTANCES)

}  // namespace mi_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("emulated_conflicts", TORCH_BOX(&mi_kernels::cuda::emulated_conflicts));
  m.impl("emulated_processors", TORCH_BOX(&mi_kernels::cuda::emulated_processors));
  m.impl("emulated_repacks", TORCH_BOX(&mi_kernels::cuda::emulated_repacks));
  m.impl("emulated_repack", TORCH_BOX(&mi_kernels::cuda::emulated_repack));
}
