// Names of operations: the namespace is that of this build (MI_NAMESPACE of CMake), so that two builds of the package
// can be in one process. The tests compile the CUDA sources under another, for the host.
#pragma once

#ifndef MI_NAMESPACE
#define MI_NAMESPACE mi_kernels
#endif
#ifndef MI_DISPATCH_KEY
#define MI_DISPATCH_KEY CUDA
#endif

#define MI_TEXT_OF(tokens) #tokens
#define MI_EXPANDED_TEXT_OF(tokens) MI_TEXT_OF(tokens)
// The qualified name, for calls through the dispatcher; `name` is a string literal.
#define MI_OPERATION(name) MI_EXPANDED_TEXT_OF(MI_NAMESPACE) "::" name
