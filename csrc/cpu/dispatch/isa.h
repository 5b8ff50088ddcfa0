// The instruction set that the kernels run on, chosen once, on first use.
#pragma once

#include "cpu/kernels/calls.h"

namespace mi_kernels {

// The kernels of the best instruction set that is compiled in and supported by this CPU, or of the one that the
// environment variable MI_KERNELS_CPU_ISA names; throws if that one is unknown, not compiled in or not supported.
const Kernels& selected_kernels();

// "compiled,...;supported,...;selected"
const char* describe_isa();

}  // namespace mi_kernels
