// Function attributes for code that is compiled for GPUs and for the host.
#pragma once

#ifndef MI_HOST_DEVICE
#if defined(__CUDACC__)
#define MI_HOST_DEVICE __host__ __device__ __forceinline__
#define MI_DEVICE __device__ __forceinline__
#define MI_UNROLL _Pragma("unroll")
#define MI_NO_UNROLL _Pragma("unroll 1")
#else
#define MI_HOST_DEVICE inline __attribute__((always_inline))
#define MI_DEVICE inline
#define MI_UNROLL
#define MI_NO_UNROLL
#endif
#endif
