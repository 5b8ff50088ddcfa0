// Normalisation with modulation and a gated residual, and its gradients: parameters of the kernels and their launches.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/modulate_operands.h"
#include "cuda/host/device_properties.h"

namespace mi_kernels::cuda {

inline constexpr int kNormThreads = 256, kWarpThreads = 32;

// Indices into strides. Results of the size of x have those of `y`; `stat` are mean and rstd, `sum` the results that
// are summed over rows.
enum class Norm : int { x, h, gate, scale, shift, weight, bias, y, grad, grad_x, stat, sum, count };
inline constexpr int kNormOperands = int(Norm::count);

struct NormAxis {
  int64_t size;
  int64_t stride[kNormOperands];
};

// What all kernels read. A set, which is normalised by itself, has lines along its inner axis, which is contiguous in
// y: channels of each position, or positions of each channel.
struct NormOperands {
  int64_t sets;
  NormAxis line, inner;
  bool vectorized[kNormOperands];   // whether an operand is read or written 16 bytes at a time
  const void* data[kNormOperands];  // null where there is none
  const void *mean, *rstd;          // [sets]; without mean none is subtracted
  ScaleFunction function;
};

// The outer axes are those before the channels, and the groups: a set is a position on them.
struct NormSetOperands : NormOperands {
  int64_t outer_axes;
  NormAxis outer[kMaxAxes];
};

struct NormParams : NormSetOperands {
  void *y, *x_new, *mean_out, *rstd_out;  // without mean_out no mean is subtracted
  double eps;
};

// dx = rstd (a - m(a) - n m(a n)) + grad_x and dh = gate dx, and both means for NormSumsParams.
struct NormInputGradsParams : NormSetOperands {
  void *dx, *dh;  // null if not wanted
  void* means;    // [2][sets]: m(a), m(a n)
};

// Sums over the axes in which a context (or weight) has size 1. A unit is a position on the kept axes: a chunk of
// channels where these are the inner axis, else a channel. Its terms are positions on the reduced axes or, if the inner
// axis has positions, chunks of them.
struct NormSumsParams : NormOperands {
  bool channels_inner, weighted;  // weighted: the sums for dweight and dbias, with g F for g
  int64_t kept_axes, reduced_axes;
  NormAxis kept[kMaxAxes], reduced[kMaxAxes];
  const void* means;
  void *dgate, *dscale, *dshift;  // null if not wanted; weighted: null, dweight, dbias
  int64_t chunks, units, terms;   // chunks along the inner axis
  int64_t units_per_block;        // which have equal shares of its threads
  int64_t splits, split_size;     // of the terms; the splits' sums are added in order
};

void plan_norm_sums(NormSumsParams&, DType, const DeviceProperties&);

class DeviceStream;
void launch_norm(const DeviceStream&, DType, const NormParams&);
void launch_norm_input_grads(const DeviceStream&, DType, const NormInputGradsParams&);
// `partials`: [splits][units][3][chunk] doubles, null if there is one split.
void launch_norm_sums(const DeviceStream&, DType, const NormSumsParams&, double* partials);

}  // namespace mi_kernels::cuda
