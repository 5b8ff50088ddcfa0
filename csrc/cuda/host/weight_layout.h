// How W [O, Z, X] lies in memory: which kernels can read it there.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "common/problem_size.h"
#include "common/tensor_ref.h"

namespace mi_kernels::cuda {

struct WeightLayout {
  bool exchanged = false;                // z is inside x: the product is to be that with x and z exchanged
  bool k_major = true, n_major = false;  // contiguous along the inner feature axis; along the outputs
  bool flat = true;                      // both feature axes are one with a single stride
  bool outputs_outermost = true;         // the features of an output do not overlap those of the next
  bool aligned = true;                   // to 16 bytes, wherever what is contiguous begins
};

struct PlacedWeight {
  WeightRef ref;
  WeightLayout layout;
};

// An axis of a single element has no stride of its own: it gets one that suits the others. `exchanged` is still to be
// done.
inline PlacedWeight place_weight(const ProblemSize& p, WeightRef w) {
  if (p.width <= 1) w.width = p.context > 1 ? w.context : 1;
  if (p.context <= 1) w.context = p.width * w.width;
  WeightLayout layout;
  // A stride of 0 repeats elements: it is no faster than any other.
  const auto slow = [](int64_t stride) { return stride > 0 ? stride : INT64_MAX; };
  layout.exchanged = p.width > 1 && p.context > 1 && slow(w.context) < slow(w.width);
  const int64_t inner = layout.exchanged ? p.context : p.width, outer = layout.exchanged ? p.width : p.context;
  const int64_t fast = layout.exchanged ? w.context : w.width, slower = layout.exchanged ? w.width : w.context;
  if (p.out <= 1) w.out = std::max(outer * slower, int64_t(1));
  layout.k_major = fast == 1;
  layout.n_major = !layout.k_major && w.out == 1;
  layout.flat = slower == inner * fast;
  layout.outputs_outermost = slow(w.out) >= slow(slower) && w.out >= outer * slower;
  return {w, layout};
}

// The strides of W in contiguous groups, all of which share it if `shared`.
inline WeightRef contiguous_weight(const void* data, const ProblemSize& p, bool shared) {
  return {data, shared ? 0 : p.out * p.context * p.width, p.context * p.width, p.width, 1};
}

// The layout for a plan query. The strides along [O, Z, X] may follow its `count` sizes, from which they are removed.
inline std::vector<int64_t> take_strides(std::vector<int64_t>& sizes, size_t count) {
  if (sizes.size() != count + 3) return {};
  const std::vector<int64_t> strides(sizes.end() - 3, sizes.end());
  sizes.resize(count);
  return strides;
}
inline WeightLayout weight_layout(const ProblemSize& p, const std::vector<int64_t>& strides) {
  if (strides.empty()) return {};
  return place_weight(p, {nullptr, 0, strides[0], strides[1], strides[2]}).layout;
}

inline ProblemSize exchanged(const ProblemSize& p, const WeightLayout& layout) {
  return layout.exchanged ? ProblemSize{p.groups, p.rows, p.width, p.context, p.out} : p;
}

}  // namespace mi_kernels::cuda
