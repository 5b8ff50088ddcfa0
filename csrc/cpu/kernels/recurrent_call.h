// What the kernels of multiplicative RNNs are called with. mi_kernels/ops/recurrent/schema.py has the formulas.
#pragma once

#include <cstdint>

#include "common/activation_kind.h"
#include "common/tensor_ref.h"

namespace mi_kernels {

enum class RecurrentStructure : int { factored, integrated, dense };
enum class RecurrentCell : int { plain, lstm, gru };

// A matrix as the steps read it: for each panel of vectors of units, for each gate, for each of `outer` matrices that
// a feature of x multiplies, [words][vectors of the panel]. A single step reads one that is contiguous along the depth
// as it is: packing it would take longer than the product.
struct RecurrentMatrix {
  int64_t units = 0, gates = 1, depth = 0, outer = 1;
  int64_t words = 0, vectors = 0;  // along the depth, at least one; of units
  int64_t offset = 0, bytes = 0;   // in the shared memory
  TensorRef weight = {};           // its units, of all gates, are `row` apart, and elements along the depth `col`
  bool in_place = false;
};

// Matrices of a call by what they multiply: h or the gradients of p for the first product of a step, m = factors_x a or
// their counterpart, r h of a gru, o tanh(c).
enum RecurrentProduct : int { kOfState, kOfFactors, kOfReset, kOfHidden, kFactors, kRecurrentProducts };

// The left operands of these products, [rows][stride] in the type in which they are multiplied. The state has two
// copies: a step reads one and writes the other.
enum RecurrentOperand : int { kStateOperand, kNextStateOperand, kFactorsOperand, kHiddenOperand, kRecurrentOperands };

// Rows are divided into chains, which share nothing but the matrices; the members of a chain share the units of each
// of its products, and meet after it.
struct RecurrentPlan {
  int64_t chain_rows, chains, members, operations;  // operations of one step of a chain
  RecurrentMatrix matrix[kRecurrentProducts];
  int64_t stride[kRecurrentOperands], operand_offset[kRecurrentOperands];  // in the memory of a chain
  int64_t unit_stride, cell_offset, extra_offset;                          // [rows][unit_stride] of accumulators
  int64_t sums_offset, team_offset;
  int64_t shared_bytes, chain_bytes, worker_bytes;
};

// Row r of the kernels, by decreasing length, is row_of[r] of the tensors; active[t] of them make step t. Both are null
// where all rows make all steps. All tensors but the weights are contiguous.
struct RecurrentCall {
  RecurrentStructure structure;
  RecurrentCell cell;
  Activation activation;
  bool reverse, has_state_product, projected;  // whether there are a weight_hh and a weight_hr
  int64_t steps, rows, units, state, factors;
  const int64_t *row_of, *active;
  TensorRef weight_hh, weight_hm, weight_mh, weight_hr;
  WeightRef weight;
  const void *integration, *gates_x, *factors_x, *h0, *c0;

  int64_t gates() const { return cell == RecurrentCell::lstm ? 4 : cell == RecurrentCell::gru ? 3 : 1; }
  bool integrated() const { return structure == RecurrentStructure::integrated; }
  bool factored() const { return structure == RecurrentStructure::factored; }
  bool dense() const { return structure == RecurrentStructure::dense; }
};

// Kept results are null where they are not wanted. With the tangents of the arguments, the results are tangents:
// gates_t is read instead of gates_x, and what the forward pass kept is read.
struct RecurrentStepsCall : RecurrentCall {
  bool tangents;
  void *out, *h_n, *c_n, *gates_kept, *products, *cells, *hidden;
  const void *gates_t, *factors_t, *products_t, *out_t, *h0_t, *c0_t;
  const void *kept_out, *kept_gates, *kept_products, *kept_cells;
};

struct RecurrentGradsCall : RecurrentCall {
  const void *grad, *grad_h, *grad_c, *out, *gates_in, *products, *cells;
  void *dgates, *dfactors, *dproducts, *dh0, *dc0, *dintegration, *dout;
};

}  // namespace mi_kernels
