// How W lies in memory, and the exchange of x and z that makes the width the faster of its feature axes.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "common/tensor_args.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels {

// The strides of W [O, Z, X] of these sizes. An axis of a single element has no stride: it gets one that makes rows
// evenly spaced. `exchanged` is still to be done by exchange().
struct PlacedWeight {
  WeightRef ref;
  WeightLayout layout;
};

inline PlacedWeight place_weight(const ProblemSize& p, WeightRef w) {
  const int64_t sizes[] = {p.width, p.context, p.out}, strides[] = {w.width, w.context, w.out};
  int64_t expected = 1;
  bool contiguous = true;
  for (int axis = 0; axis < 3; ++axis) {
    contiguous = contiguous && (sizes[axis] <= 1 || strides[axis] == expected);
    expected *= std::max<int64_t>(sizes[axis], 1);
  }
  if (contiguous) {
    w.width = 1, w.context = p.width, w.out = p.context * p.width;
    return {w, {}};
  }
  if (p.width <= 1) w.width = p.context > 1 ? w.context : 1;
  if (p.context <= 1) w.context = p.width * w.width;
  WeightLayout layout;
  // A stride of 0 repeats elements: it is no faster than any other.
  const auto slow = [](int64_t stride) { return stride > 0 ? stride : INT64_MAX; };
  layout.exchanged = p.width > 1 && p.context > 1 && slow(w.context) < slow(w.width);
  const int64_t inner = layout.exchanged ? p.context : p.width;
  const int64_t fast = layout.exchanged ? w.context : w.width, slower = layout.exchanged ? w.width : w.context;
  if (p.out <= 1) w.out = std::max(slower * (layout.exchanged ? p.width : p.context), int64_t(1));
  layout.major = fast == 1 ? Major::k : w.out == 1 && p.out > 1 ? Major::n : Major::neither;
  layout.flat = slower == inner * fast;
  layout.outputs_slowest = slow(w.out) >= slow(slower);
  return {w, layout};
}

inline PlacedWeight place_weight(const ProblemSize& p, const Tensor& weight, bool grouped) {
  const int64_t lead = grouped ? 1 : 0;
  return place_weight(p, {weight.const_data_ptr(), grouped && weight.size(0) > 1 ? weight.stride(0) : 0,
                          weight.stride(lead), weight.stride(lead + 1), weight.stride(lead + 2)});
}

// Removes from the sizes of a plan query the three strides that may follow them.
inline std::vector<int64_t> take_strides(std::vector<int64_t>& sizes, size_t count) {
  if (sizes.size() != count + 3) return {};
  const std::vector<int64_t> strides(sizes.end() - 3, sizes.end());
  sizes.resize(count);
  return strides;
}

// W for a plan query: `strides` along [O, Z, X], none if it is contiguous. Its address only stands for its presence.
inline PlacedWeight weight_for_query(const ProblemSize& p, const std::vector<int64_t>& strides) {
  static const char nothing = 0;
  if (strides.empty()) return place_weight(p, {&nothing, 0, p.context * p.width, p.width, 1});
  return place_weight(p, {&nothing, 0, strides[0], strides[1], strides[2]});
}

inline WeightLayout weight_layout(const ProblemSize& p, const std::vector<int64_t>& strides) {
  return strides.empty() ? WeightLayout{} : weight_for_query(p, strides).layout;
}

inline ProblemSize exchanged(const ProblemSize& p, const WeightLayout& layout) {
  return layout.exchanged ? ProblemSize{p.groups, p.rows, p.width, p.context, p.out} : p;
}

// The same product with z in the place of x.
template <class Call>
void exchange(Call& call) {
  call.problem = {call.problem.groups, call.problem.rows, call.problem.width, call.problem.context, call.problem.out};
  std::swap(call.x, call.z);
  std::swap(call.weight_x, call.weight_z);
  std::swap(call.weight.width, call.weight.context);
  if constexpr (requires { call.dx; }) std::swap(call.dx, call.dz);
}

}  // namespace mi_kernels
