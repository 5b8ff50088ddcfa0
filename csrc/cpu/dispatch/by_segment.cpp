// The dense interaction with weights chosen for each row: rows of groups of unequal length, in any order, one weight
// for each group. A piece of a group (row_pieces.h) is one call of the plain kernels. Rows that are not one after the
// other in memory are copied for one piece at a time; W is read where it lies.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/registration.h"
#include "common/tensor_args.h"
#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/interaction.h"
#include "cpu/dispatch/overflow.h"
#include "cpu/dispatch/row_pieces.h"
#include "cpu/dispatch/weight_layout.h"

namespace mi_kernels {
namespace {

// Rows of one piece: enough that packing W again for each costs little, few enough that they stay in the cache.
constexpr int64_t kPieceRows = 512;

ProblemSize rows_shape(const char* op, const Tensor& x, const Tensor& z) {
  check_defined(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2, op, ": x: expected 2 dimensions, got ", x.dim());
  return input_shape(op, x, z).problem;
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes) {
  return on_huge_pages(torch::stable::new_empty(like, sizes));
}

// What the pieces of a call have in common.
struct Pieces {
  const RowGroups& order;
  int64_t element_bytes;

  template <class Ref>
  Ref of_group(Ref ref, int64_t group) const {
    if (ref.data) ref.data = static_cast<const char*>(ref.data) + group * ref.group * element_bytes;
    return ref;
  }
  void* at(const OutputRef& result, int64_t element) const {
    return result.data ? static_cast<char*>(result.data) + element * element_bytes : nullptr;
  }
  const int64_t* index(const RowPiece& piece) const { return order.row_index() + piece.first; }
  bool in_place(const RowPiece& piece, const WorkspaceSource& memory) const {
    return piece.consecutive || memory.needs;  // what is only measured is not moved
  }

  // The rows of a piece: where they are, or copied to `space`, which moves on.
  TensorRef rows(TensorRef ref, int64_t features, const RowPiece& piece, const WorkspaceSource& memory,
                 char*& space) const {
    if (!ref.data || features == 0 || ref.row == 0) return ref;
    if (in_place(piece, memory)) {
      ref.data = static_cast<const char*>(ref.data) + index(piece)[0] * ref.row * element_bytes;
      return ref;
    }
    gather_rows(ref, index(piece), piece.rows, features, element_bytes, space, memory.serial);
    const TensorRef copied{space, 0, features, 1};
    space += piece.rows * features * element_bytes;
    return copied;
  }
  // Where a piece writes its result, which put_back() then takes to its rows.
  OutputRef result(const OutputRef& all, int64_t features, const RowPiece& piece, const WorkspaceSource& memory,
                   char*& space) const {
    if (!all.data) return {};
    if (in_place(piece, memory)) return {at(all, index(piece)[0] * features)};
    const OutputRef own{space};
    space += piece.rows * features * element_bytes;
    return own;
  }
  void put_back(const OutputRef& own, const OutputRef& all, int64_t features, const RowPiece& piece,
                const WorkspaceSource& memory) const {
    if (all.data && !in_place(piece, memory))
      scatter_rows(static_cast<const char*>(own.data), index(piece), piece.rows, features * element_bytes,
                   static_cast<char*>(all.data), memory.serial);
  }
};

// The weights have a leading dimension of groups.
void check_group_weights(const char* op, const Tensor& x, const ProblemSize& p, int64_t groups, const Optional& weight,
                         const Optional& weight_z, const Optional& weight_x) {
  check_products(op, "x", p, weight.has_value());
  if (weight.has_value()) check_sizes(op, "weight", *weight, x, groups, true, {p.out, p.context, p.width});
  if (weight_z.has_value()) check_sizes(op, "weight_z", *weight_z, x, groups, true, {p.out, p.context});
  if (weight_x.has_value()) check_sizes(op, "weight_x", *weight_x, x, groups, true, {p.out, p.width});
}

int64_t out_features(const char* op, const Optional& weight, const Optional& weight_z, const Optional& weight_x,
                     const Optional& bias) {
  const Optional* const weights[] = {&weight, &weight_z, &weight_x, &bias};
  constexpr const char* kNames[] = {"weight", "weight_z", "weight_x", "bias"};
  constexpr int64_t kDimensions[] = {4, 3, 3, 2};
  for (int t = 0; t < 4; ++t) {
    if (!weights[t]->has_value()) continue;
    const Tensor& first = **weights[t];
    check_defined(op, kNames[t], first);
    STD_TORCH_CHECK(first.dim() == kDimensions[t], op, ": ", kNames[t], ": expected ", kDimensions[t],
                    " dimensions, got ", first.dim());
    return first.size(1);
  }
  STD_TORCH_CHECK(false, op, ": weight: expected at least one of weight, weight_z, weight_x and bias, got none");
}

Tensor forward_by_segment(const Tensor& x, const Tensor& z, const Optional& weight, const Optional& weight_z,
                          const Optional& weight_x, const Optional& bias, const Tensor& row_index,
                          const Tensor& offsets) {
  constexpr const char* op = "interaction_by_segment";
  ProblemSize p = rows_shape(op, x, z);
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  p.out = out_features(op, weight, weight_z, weight_x, bias);
  const RowGroups order(op, row_index, offsets, x, p.rows);
  check_group_weights(op, x, p, order.groups(), weight, weight_z, weight_x);
  if (bias.has_value()) check_sizes(op, "bias", *bias, x, order.groups(), true, {p.out});
  Tensor y = empty(x, {p.rows, p.out});
  if (p.rows * p.out == 0) return y;

  PlacedWeight placed;
  if (weight.has_value()) placed = place_weight(p, *weight, true);
  const bool reads_x = weight.has_value() || weight_x.has_value(), reads_z = weight.has_value() || weight_z.has_value();
  const ForwardCall all{p,
                        tensor_ref(x, false),
                        tensor_ref(z, false),
                        placed.ref,
                        tensor_ref(weight_z, true),
                        tensor_ref(weight_x, true),
                        tensor_ref(bias, true),
                        {y.mutable_data_ptr()}};
  const Pieces pieces{order, storage_bytes(dtype)};
  const int64_t row_bytes = (reads_x * p.width + reads_z * p.context + p.out) * pieces.element_bytes;
  const int64_t terms =
      weight.has_value() * p.context * p.width + weight_z.has_value() * p.context + weight_x.has_value() * p.width;
  run_pieces(x, order.pieces(kPieceRows), row_bytes, 2 * p.out * terms,
             [&](const RowPiece& piece, const WorkspaceSource& memory, char* space) {
               ForwardCall call = all;
               call.problem.rows = piece.rows;
               call.y = pieces.result(all.y, p.out, piece, memory, space);
               if (reads_x) call.x = pieces.rows(all.x, p.width, piece, memory, space);
               if (reads_z) call.z = pieces.rows(all.z, p.context, piece, memory, space);
               call.weight = pieces.of_group(call.weight, piece.group);
               for (TensorRef* ref : {&call.weight_z, &call.weight_x, &call.bias})
                 *ref = pieces.of_group(*ref, piece.group);
               forward_part(dtype, memory, call, placed.layout);
               pieces.put_back(call.y, all.y, p.out, piece, memory);
             });
  if (weight.has_value() && may_overflow(dtype) && !all_finite(y))
    replace_not_finite(y, forward_by_segment(in_double(x), in_double(z), in_double(weight), in_double(weight_z),
                                             in_double(weight_x), in_double(bias), row_index, offsets));
  return y;
}

std::tuple<Tensor, Tensor> input_grads_by_segment(const Tensor& grad, const Tensor& x, const Tensor& z,
                                                  const Optional& weight, const Optional& weight_z,
                                                  const Optional& weight_x, bool want_x, bool want_z,
                                                  const Tensor& row_index, const Tensor& offsets) {
  constexpr const char* op = "interaction_by_segment_input_grads";
  rows_shape(op, x, z);
  const ProblemSize p = grads_shape(op, grad, x, z).problem;
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  const RowGroups order(op, row_index, offsets, x, p.rows);
  check_group_weights(op, x, p, order.groups(), weight, weight_z, weight_x);
  Tensor dx = empty(x, want_x ? std::vector<int64_t>{p.rows, p.width} : std::vector<int64_t>{0});
  Tensor dz = empty(z, want_z ? std::vector<int64_t>{p.rows, p.context} : std::vector<int64_t>{0});
  if (dx.numel() == 0 && dz.numel() == 0) return {dx, dz};

  PlacedWeight placed;
  if (weight.has_value()) placed = place_weight(p, *weight, true);
  InputGradsCall all{p,          tensor_ref(grad, false),    tensor_ref(x, false),       tensor_ref(z, false),
                     placed.ref, tensor_ref(weight_z, true), tensor_ref(weight_x, true), {},
                     {}};
  if (dx.numel() > 0) all.dx.data = dx.mutable_data_ptr();
  if (dz.numel() > 0) all.dz.data = dz.mutable_data_ptr();
  const Pieces pieces{order, storage_bytes(dtype)};
  const int64_t inputs = weight.has_value() ? p.width + p.context : 0;
  const int64_t results = (all.dx.data ? p.width : 0) + (all.dz.data ? p.context : 0);
  const int64_t terms = weight.has_value() ? p.context * p.width : p.context + p.width;
  run_pieces(x, order.pieces(kPieceRows), (p.out + inputs + results) * pieces.element_bytes, 2 * p.out * terms,
             [&](const RowPiece& piece, const WorkspaceSource& memory, char* space) {
               InputGradsCall call = all;
               call.problem.rows = piece.rows;
               call.dx = pieces.result(all.dx, p.width, piece, memory, space);
               call.dz = pieces.result(all.dz, p.context, piece, memory, space);
               const OutputRef own_dx = call.dx, own_dz = call.dz;
               call.grad = pieces.rows(all.grad, p.out, piece, memory, space);
               if (inputs) {
                 call.x = pieces.rows(all.x, p.width, piece, memory, space);
                 call.z = pieces.rows(all.z, p.context, piece, memory, space);
               }
               call.weight = pieces.of_group(call.weight, piece.group);
               for (TensorRef* ref : {&call.weight_z, &call.weight_x}) *ref = pieces.of_group(*ref, piece.group);
               input_grads_part(dtype, memory, call, placed.layout);
               pieces.put_back(own_dx, all.dx, p.width, piece, memory);
               pieces.put_back(own_dz, all.dz, p.context, piece, memory);
             });
  if (weight.has_value() && may_overflow(dtype) && !(all_finite(dx) && all_finite(dz))) {
    const auto [exact_x, exact_z] =
        input_grads_by_segment(in_double(grad), in_double(x), in_double(z), in_double(weight), in_double(weight_z),
                               in_double(weight_x), want_x, want_z, row_index, offsets);
    replace_not_finite(dx, exact_x);
    replace_not_finite(dz, exact_z);
  }
  return {dx, dz};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weight_grads_by_segment(const Tensor& grad, const Tensor& x, const Tensor& z,
                                                                   bool want_weight, bool want_weight_z,
                                                                   bool want_weight_x, bool want_bias,
                                                                   const Tensor& row_index, const Tensor& offsets) {
  constexpr const char* op = "interaction_by_segment_weight_grads";
  rows_shape(op, x, z);
  const ProblemSize p = grads_shape(op, grad, x, z).problem;
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  const RowGroups order(op, row_index, offsets, x, p.rows);
  ProblemSize results_size = p;
  results_size.groups = order.groups(), results_size.rows = 1;
  check_products(op, "x", p, want_weight);
  check_products(op, "offsets", results_size, want_weight);
  const int64_t groups = order.groups();
  const int64_t sizes[4] = {p.out * p.context * p.width, p.out * p.context, p.out * p.width, p.out};
  using Sizes = std::vector<int64_t>;
  Tensor results[4] = {empty(x, want_weight ? Sizes{groups, p.out, p.context, p.width} : Sizes{0}),
                       empty(x, want_weight_z ? Sizes{groups, p.out, p.context} : Sizes{0}),
                       empty(x, want_weight_x ? Sizes{groups, p.out, p.width} : Sizes{0}),
                       empty(x, want_bias ? Sizes{groups, p.out} : Sizes{0})};
  WeightGradsCall all{p, tensor_ref(grad, false), tensor_ref(x, false), tensor_ref(z, false), {}, {}, {}, {}};
  OutputRef* const slots[4] = {&all.weight, &all.weight_z, &all.weight_x, &all.bias};
  const Pieces pieces{order, storage_bytes(dtype)};
  int64_t terms = 0;
  for (int t = 0; t < 4; ++t) {
    if (results[t].numel() == 0) continue;
    slots[t]->data = results[t].mutable_data_ptr();
    terms += sizes[t];
    for (int64_t g = 0; g < groups; ++g)
      if (order.empty(g)) std::memset(pieces.at(*slots[t], g * sizes[t]), 0, size_t(sizes[t] * pieces.element_bytes));
  }
  const bool reads_x = all.weight.data || all.weight_x.data, reads_z = all.weight.data || all.weight_z.data;
  const int64_t row_bytes = (reads_x * p.width + reads_z * p.context + p.out) * pieces.element_bytes;
  if (terms > 0 && p.rows > 0)
    run_pieces(x, order.pieces(p.rows), row_bytes, 2 * terms,
               [&](const RowPiece& piece, const WorkspaceSource& memory, char* space) {
                 WeightGradsCall call = all;
                 call.problem.rows = piece.rows;
                 call.grad = pieces.rows(all.grad, p.out, piece, memory, space);
                 if (reads_x) call.x = pieces.rows(all.x, p.width, piece, memory, space);
                 if (reads_z) call.z = pieces.rows(all.z, p.context, piece, memory, space);
                 OutputRef* const own[4] = {&call.weight, &call.weight_z, &call.weight_x, &call.bias};
                 for (int t = 0; t < 4; ++t) own[t]->data = pieces.at(*slots[t], piece.group * sizes[t]);
                 weight_grads_part(dtype, memory, call);
               });
  if (may_overflow(dtype) && all.weight.data) {
    // Inspects whichever has fewer elements: the gradient or its inputs.
    const bool finite = results[0].numel() < grad.numel() + x.numel() + z.numel() ? all_finite(results[0])
                                                                                  : products_fit({grad, x, z}, p.rows);
    if (!finite) {
      const auto exact = weight_grads_by_segment(in_double(grad), in_double(x), in_double(z), true, false, false, false,
                                                 row_index, offsets);
      replace_not_finite(results[0], std::get<0>(exact));
    }
  }
  return {results[0], results[1], results[2], results[3]};
}

// The rows in the order of their groups, and where each group begins: a counting sort.
std::tuple<Tensor, Tensor> segment_order(const Tensor& segment_ids, int64_t groups) {
  constexpr const char* op = "segment_order";
  constexpr int64_t kMostGroups = int64_t(1) << 30;
  const Tensor ids = int64_vector(op, "segment_ids", segment_ids, segment_ids);
  STD_TORCH_CHECK(groups >= 0 && groups <= kMostGroups, op, ": groups: expected 0 to 2^30, got ", groups);
  const int64_t rows = ids.numel();
  const auto* group = static_cast<const int64_t*>(ids.const_data_ptr());
  Tensor row_index = torch::stable::new_empty(ids, {rows}), offsets = torch::stable::new_empty(ids, {groups + 1});
  auto* index = static_cast<int64_t*>(row_index.mutable_data_ptr());
  auto* next = static_cast<int64_t*>(offsets.mutable_data_ptr());
  std::fill(next, next + groups + 1, 0);
  for (int64_t n = 0; n < rows; ++n) {
    STD_TORCH_CHECK(uint64_t(group[n]) < uint64_t(groups), op, ": segment_ids: expected values from 0 to ", groups - 1,
                    ", got ", group[n], ", which is out of bounds");
    ++next[group[n] + 1];
  }
  for (int64_t g = 0; g < groups; ++g) next[g + 1] += next[g];
  for (int64_t n = 0; n < rows; ++n) index[next[group[n]]++] = n;  // next[g] is then where g + 1 begins
  for (int64_t g = groups; g > 0; --g) next[g] = next[g - 1];
  next[0] = 0;
  return {row_index, offsets};
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CPU, m) {
  m.impl("interaction_by_segment", TORCH_BOX(&mi_kernels::forward_by_segment));
  m.impl("interaction_by_segment_input_grads", TORCH_BOX(&mi_kernels::input_grads_by_segment));
  m.impl("interaction_by_segment_weight_grads", TORCH_BOX(&mi_kernels::weight_grads_by_segment));
  m.impl("segment_order", TORCH_BOX(&mi_kernels::segment_order));
}
