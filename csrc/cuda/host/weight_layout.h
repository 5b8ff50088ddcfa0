// How W [O, Z, X] lies in memory: which kernels can read it there.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "common/problem_size.h"
#include "common/tensor_ref.h"
#include "cuda/host/plan.h"

namespace mi_kernels::cuda {

struct WeightLayout {
  bool exchanged = false;                // z is inside x: the product is that with x and z exchanged
  bool k_major = true, n_major = false;  // contiguous along the inner feature axis; along the outputs
  bool flat = true;                      // both feature axes are one with a single stride
  bool nested = true;                    // no axis overlaps the next one in, of whose stride its own is a multiple
  bool aligned = true;                   // to 16 bytes, wherever what is contiguous begins
  bool shared = false;                   // by several groups
};

// With x and z exchanged if they are to be.
struct PlacedWeight {
  ProblemSize problem;
  WeightRef ref;
  WeightLayout layout;
};

// An axis of a single element has no stride of its own: it gets one that suits the others.
inline PlacedWeight place_weight(ProblemSize p, WeightRef w, DType dtype) {
  if (p.width <= 1) w.width = p.context > 1 ? w.context : 1;
  if (p.context <= 1) w.context = p.width * w.width;
  WeightLayout layout;
  // A stride of 0 repeats elements: it is no faster than any other.
  const auto slow = [](int64_t stride) { return stride > 0 ? stride : INT64_MAX; };
  layout.exchanged = p.width > 1 && p.context > 1 && slow(w.context) < slow(w.width);
  if (layout.exchanged) {
    std::swap(p.width, p.context);
    std::swap(w.width, w.context);
  }
  if (p.out <= 1) w.out = std::max(p.context * w.context, int64_t(1));
  layout.k_major = w.width == 1;
  layout.n_major = !layout.k_major && w.out == 1;
  layout.flat = w.context == p.width * w.width;
  layout.nested = w.context > 0 && w.context >= p.width * w.width && w.out >= p.context * w.context &&
                  (p.context <= 1 || p.out <= 1 || w.out % w.context == 0);
  layout.shared = p.groups > 1 && w.group == 0;
  const int64_t line = layout.n_major ? (p.width > 1 ? w.width : 0) : (p.out > 1 ? w.out : 0);
  layout.aligned = can_vectorize(w.data, dtype, 1, 0, line, w.group, p.context > 1 ? w.context : 0);
  return {p, w, layout};
}

// The strides of W in contiguous groups, all of which share it if `shared`.
inline WeightRef contiguous_weight(const void* data, const ProblemSize& p, bool shared) {
  return {data, shared ? 0 : p.out * p.context * p.width, p.context * p.width, p.width, 1};
}

// W of a plan query. Its strides along [O, Z, X] may follow the `count` sizes, from which they are removed.
inline std::vector<int64_t> take_strides(std::vector<int64_t>& sizes, size_t count) {
  if (sizes.size() != count + 3) return {};
  const std::vector<int64_t> strides(sizes.end() - 3, sizes.end());
  sizes.resize(count);
  return strides;
}
// Contiguous if there are none. Only whether it begins at a multiple of 16 bytes is known of its address.
inline PlacedWeight place_queried_weight(const ProblemSize& p, const std::vector<int64_t>& strides, bool begins_aligned,
                                         DType dtype) {
  WeightRef w = contiguous_weight(reinterpret_cast<const void*>(uintptr_t(begins_aligned ? 16 : 1)), p, p.groups == 1);
  if (!strides.empty()) w = {w.data, w.group, strides[0], strides[1], strides[2]};
  return place_weight(p, w, dtype);
}

}  // namespace mi_kernels::cuda
