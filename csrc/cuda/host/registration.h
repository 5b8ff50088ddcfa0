// The operations that the kernels are registered for. The tests build the same sources for the host, under another
// name and key.
#pragma once

#ifndef MI_OPERATORS
#define MI_OPERATORS mi_kernels
#define MI_DISPATCH_KEY CUDA
#endif
