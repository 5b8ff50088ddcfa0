// The primitives of the dense interaction as parts of a larger call: planned, and run in memory from `memory`.
#pragma once

#include "cpu/dispatch/workspace.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels {

void forward_part(DType, const WorkspaceSource& memory, const ForwardCall&, const WeightLayout&);
void input_grads_part(DType, const WorkspaceSource& memory, const InputGradsCall&, const WeightLayout&);
void weight_grads_part(DType, const WorkspaceSource& memory, const WeightGradsCall&);

}  // namespace mi_kernels
