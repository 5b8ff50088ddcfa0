// What the normalisation kernels are called with.
#pragma once

#include <cstdint>

#include "common/modulate_operands.h"

namespace mi_kernels {

// Indices into the strides of a leading axis. Results and statistics count positions, the others elements.
enum NormOperand : int {
  kNormX,
  kNormH,
  kNormGrad,
  kNormGradX,
  kNormGate,
  kNormScale,
  kNormShift,
  kNormOut,
  kNormOperands
};

struct NormAxis {
  int64_t size;
  int64_t stride[kNormOperands];
};

// One number for each channel, `step` elements apart; absent if data is null.
struct ChannelRef {
  const void* data = nullptr;
  int64_t step = 0;
};

// A position has `spatial` times `channels` elements, contiguous: [channels][spatial], or [spatial][channels] if the
// channels are last. A set is one of its groups of channels. The kept axes are those on which the contexts gate, scale
// and shift vary: a unit is a position on them, and has `rows` positions with the same contexts. Tasks are parts of the
// positions, in the order of units, times blocks of whole groups.
struct NormOperands {
  int64_t kept_axes, reduced_axes;
  NormAxis kept[kMaxAxes], reduced[kMaxAxes];
  int64_t units, rows;
  int64_t channels, groups, spatial;
  bool channels_last, center;
  double eps;
  ScaleFunction function;  // of scale
  const void *x, *h;       // h may be null
  ChannelRef gate, scale, shift, weight, bias;
  int64_t block_groups, blocks, worker_bytes;

  int64_t group_channels() const { return channels / groups; }
  int64_t block_channels() const { return block_groups * group_channels(); }
};

// y = (n w + b) F(scale) + shift of x_new = x + gate h; x_new is null without h, mean where it is not subtracted.
struct NormCall : NormOperands {
  void *y, *x_new, *mean, *rstd;
  int64_t row_step, tasks;  // positions of a task
};

// Null for what is not given or not wanted; x is x_new. `splits`: parts of the rows of a unit, whose partial sums are
// added in order; with one, a task has `unit_step` units.
struct NormGradsCall : NormOperands {
  const void *grad, *grad_x, *mean, *rstd;
  void *dx, *dh, *dgate, *dscale, *dshift, *dweight, *dbias;
  int64_t splits, row_step, unit_step, tasks, partial_bytes;

  bool sums_grad() const { return dscale || dshift || dweight || dbias; }
  bool has_dnew() const { return dx || dh || dgate; }
  static constexpr int kSums = 3;  // by channel, of g n, of g and of h dx
  // Of each part, for the second phase: the sums of a unit, or those of the gradients of weight and bias.
  int partial_sums() const {
    if (splits > 1) return sums_grad() || dgate ? kSums : 0;
    return dweight || dbias ? 2 : 0;
  }
};

// Channels that one task adds up over splits and units.
inline constexpr int64_t kNormSumChannels = 128;

}  // namespace mi_kernels
