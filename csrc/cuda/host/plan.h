// How the kernels split a call into blocks: pure functions of sizes, dtype and device.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/problem_size.h"
#include "cuda/common/grid.h"
#include "cuda/host/device_properties.h"

namespace mi_kernels::cuda {

struct WeightLayout;

struct TileShape {
  int64_t rows, cols, k;
};
// The tiles of a matrix product, and of dx and dz, which keep a second tile of accumulators.
TileShape matmul_tile(DType);
TileShape input_grads_tile(DType);

// Results [groups][rows][cols] summed over k.
Grid plan_matmul(int64_t groups, int64_t rows, int64_t cols, int64_t k, bool may_split, DType, const DeviceProperties&);

// Whether the small-batch kernels take this call. They are bound by memory, where tf32 is no faster than float32.
bool use_small_batch(const ProblemSize&, DType);

// Splits are of the Z X elements of the reduction or, if per_context, of the contexts.
struct ForwardPlan {
  Grid grid;
  bool small_batch, per_context;
  bool n_major, repacked;  // W is read along its outputs; it is copied to contiguous groups first
};
// `layout` of W, null without it.
ForwardPlan plan_forward(const ProblemSize&, const WeightLayout* layout, DType, const DeviceProperties&);

// Whether W is copied for dx and dz, and for the sm_90a engine.
bool repacks_for_input_grads(const ProblemSize&, const WeightLayout&, DType);
bool repacks_for_sm90(const WeightLayout&);

// T_i[rows][width] for each context i; splits are of the contexts.
Grid plan_input_grads(int64_t groups, int64_t rows, int64_t context, int64_t width, DType, const DeviceProperties&);
// The same on the small-batch kernel; `vectorized` is whether it reads W by chunks.
Grid plan_small_batch_input_grads(const ProblemSize&, bool vectorized, DType, const DeviceProperties&,
                                  InputGradsSplits&);
Grid plan_small_batch_input_grads_n_major(const ProblemSize&, bool vectorized, DType, const DeviceProperties&,
                                          InputGradsSplits&);

// The name of a dtype's arithmetic in a plan.
const char* algorithm_name(DType);

// Whether the sm_90a engine is meant for a forward pass. It also needs 16-byte alignment: sm90_args.h. `layout` of W,
// null without it.
bool prefers_sm90(const ProblemSize&, DType, const WeightLayout* layout, const DeviceProperties&);

// Whether an operand can be read in chunks of 16 bytes: contiguous along its inner dimension, with a whole number of
// chunks there, and 16-byte aligned at every outer index, group and context. Decided here alone.
bool can_vectorize(const void* data, DType, int64_t inner_stride, int64_t inner_size, int64_t outer_stride,
                   int64_t group_stride, int64_t context_stride);

}  // namespace mi_kernels::cuda
