// Every PTX instruction of the CUDA kernels; nothing else in csrc/cuda has any. Names follow the PTX ISA, which defines
// what each one does.
#pragma once

#include <cstdint>

#include "gpu.cuh"
#include "numbers.cuh"

namespace mi_kernels::cuda {

// What the mma engine asks of a GPU of sm_80 and later. The tests run the same engine on another struct.
struct Ampere : Gpu {
  // Sixteen bytes to shared memory, or zeros in their place.
  static MI_DEVICE void copy_async(void* shared, const void* global, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(present ? 16 : 0)
                 : "memory");
  }
  static MI_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kPending>
  static MI_DEVICE void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }
  // Four 8x8 matrices of 16-bit elements; thread t of eight gives the address of a line.
  template <bool kTransposed>
  static MI_DEVICE void load_matrices(uint32_t (&r)[4], const void* shared) {
    const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address)
                   : "memory");
    }
  }
  // d += a b for tiles 16 x 16 and 16 x 8.
  template <class T>
  static MI_DEVICE void mma(float* d, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, bf16>) {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
};

}  // namespace mi_kernels::cuda
