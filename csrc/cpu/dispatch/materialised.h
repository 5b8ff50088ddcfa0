// The dense interaction as plain matrix products with P = z x [B, Z X] in scratch memory, y = P W^T, T = g W and dW =
// g^T P, for sizes at which these are faster than to generate P inside of the kernels: short rows of W, of which a tile
// would hold several, and a few rows of the batch. P is never larger than the largest of inputs, outputs and weights.
#pragma once

#include "cpu/dispatch/weight_layout.h"
#include "cpu/dispatch/workspace.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels {

// Whether a primitive takes this form; the sizes are those after exchange().
bool materialises_forward(DType, const ProblemSize&, const PlacedWeight&);
bool materialises_input_grads(DType, const ProblemSize&, const PlacedWeight&);
bool materialises_weight_grads(DType, const ProblemSize&);

// The primitives in this form. `needs` measures them instead; `like` is then not read.
void materialised_forward(DType, const Tensor* like, ForwardCall, WorkspaceNeeds* needs = nullptr);
void materialised_input_grads(DType, const Tensor* like, InputGradsCall, WorkspaceNeeds* needs = nullptr);
void materialised_weight_grads(DType, const Tensor* like, WeightGradsCall, WorkspaceNeeds* needs = nullptr);

}  // namespace mi_kernels
