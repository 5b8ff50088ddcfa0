// The instruction set that the kernels run on, chosen once when they are first used.
#pragma once

#include "cpu/kernels/calls.h"

namespace mi_kernels {

// Kernels of the best compiled-in set that this CPU has, or of the one that the environment variable
// MI_KERNELS_CPU_ISA names; throws where that one is unknown, not compiled in or not supported.
const Kernels& selected_kernels();

// "compiled,...;supported,...;selected"
const char* describe_isa();

}  // namespace mi_kernels
