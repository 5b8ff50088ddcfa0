// The library and the dispatch key that the kernels are registered for. The tests define others to build the same
// sources for the host.
#pragma once

#ifndef MI_OPERATORS
#define MI_OPERATORS mi_kernels
#define MI_DISPATCH_KEY CUDA
#endif
