// The operands of the dense interaction, in the order in which the kernels read them best.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "common/tensor_args.h"
#include "cuda/common/launchers.h"
#include "cuda/host/device_stream.h"
#include "cuda/host/plan.h"
#include "cuda/host/weight_layout.h"

namespace mi_kernels::cuda {

struct DenseOperands {
  ProblemSize problem;
  TensorRef x, z;
  WeightRef weight;
  WeightLayout layout;
  TensorRef weight_z, weight_x;
  bool has_weight() const { return weight.data && problem.context * problem.width > 0; }
  const WeightLayout* weight_layout() const { return has_weight() ? &layout : nullptr; }
};

// With x and z exchanged, U and V as well, if z is inside x in the memory of W: it is the same product.
inline DenseOperands dense_operands(const ProblemSize& p, const TensorRef& x, const TensorRef& z,
                                    const Optional& weight, bool grouped, const TensorRef& weight_z,
                                    const TensorRef& weight_x, DType dtype) {
  DenseOperands a{p, x, z, {}, {}, weight_z, weight_x};
  if (!weight.has_value()) return a;
  const int64_t lead = grouped ? 1 : 0;
  const int64_t group = grouped && weight->size(0) > 1 ? weight->stride(0) : 0;
  const PlacedWeight placed = place_weight(
      p, {weight->const_data_ptr(), group, weight->stride(lead), weight->stride(lead + 1), weight->stride(lead + 2)},
      dtype);
  a.problem = placed.problem;
  a.weight = placed.ref;
  a.layout = placed.layout;
  if (a.layout.exchanged) {
    std::swap(a.x, a.z);
    std::swap(a.weight_x, a.weight_z);
  }
  return a;
}

// Bytes of W in contiguous groups.
inline int64_t repack_bytes(const ProblemSize& p, bool shared, DType dtype) {
  return (shared ? 1 : p.groups) * p.out * p.context * p.width * storage_bytes(dtype);
}

// The fields of a plan's answer that tell of W: bytes of its copy, in addition to `scratch`, and the exchange.
inline std::string memory_fields(const WeightLayout& layout, int64_t copied, int64_t scratch) {
  return ";scratch=" + std::to_string(copied + scratch) + ";copied=" + std::to_string(copied) +
         ";exchanged=" + std::to_string(int(layout.exchanged));
}

// Memory for W in contiguous groups, a single one if all groups share it, and W there once start() has been called.
class RepackedWeight {
 public:
  RepackedWeight(const Tensor& like, const DenseOperands& a, DType dtype)
      : dtype_(dtype),
        shared_(a.problem.groups == 1 || a.weight.group == 0),
        scratch_(like, repack_bytes(a.problem, shared_, dtype)),
        ref_(contiguous_weight(scratch_.at<char>(), a.problem, shared_)) {}
  const WeightRef& ref() const { return ref_; }
  void start(const DeviceStream& stream, const DenseOperands& a) const {
    const ProblemSize& p = a.problem;
    const bool along_outputs = a.weight.out > 0 && (a.weight.width <= 0 || a.weight.out < a.weight.width);
    launch_repack(stream, dtype_,
                  {a.weight, scratch_.at<char>(), shared_ ? 1 : p.groups, p.out, p.context, p.width, along_outputs});
  }

 private:
  DType dtype_;
  bool shared_;
  Scratch scratch_;
  WeightRef ref_;
};

// The layout of the copy.
inline WeightLayout repacked_layout(const WeightLayout& layout) {
  WeightLayout copy;
  copy.exchanged = layout.exchanged;
  return copy;
}

// Copies W if it has to be, and makes the copy the weight of `a`. What it returns holds its memory.
inline std::optional<RepackedWeight> repack_weight(bool wanted, const DeviceStream& stream, const Tensor& like,
                                                   DenseOperands& a, DType dtype) {
  if (!wanted) return std::nullopt;
  RepackedWeight copy(like, a, dtype);
  copy.start(stream, a);
  a.weight = copy.ref();
  a.layout = repacked_layout(a.layout);
  return copy;
}

}  // namespace mi_kernels::cuda
