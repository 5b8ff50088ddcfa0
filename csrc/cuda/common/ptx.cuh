// Every PTX instruction of the CUDA kernels; no other file in csrc/cuda has any. The PTX ISA documents each by its
// name.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/numbers.cuh"
#include "cuda/common/simt.cuh"

namespace mi_kernels::cuda {

// The instructions of the sm_80 engine.
struct Sm80 : Simt {
  // Copies 16 bytes to shared memory, or writes zeros if they are not present.
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
  // Four 8x8 matrices of 16-bit elements; lanes 8q to 8q + 7 pass the addresses of the lines of matrix q.
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
  // Four words for each thread.
  static MI_DEVICE void load_words(uint32_t (&r)[4], const char* const (&shared)[4]) {
    MI_UNROLL
    for (int q = 0; q < 4; ++q) r[q] = *reinterpret_cast<const uint32_t*>(shared[q]);
  }
  // Rounds the bits of a float to tf32, to nearest with ties away from zero; NaN and Inf are kept. Matrix instructions
  // alone would truncate.
  static MI_DEVICE uint32_t to_tf32(uint32_t bits) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
  }
  // d += a b for a [16, 16] and b [16, 8]; in tf32 [16, 8] and [8, 8].
  template <class T>
  static MI_DEVICE void mma(float* d, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, tf32>) {
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else if constexpr (std::is_same_v<T, bf16>) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
};

// ---- sm_90a ----

// The operands of wgmma: %0 to %{n/2-1} are the accumulators, followed by four registers of A, the descriptor of B, and
// whether to add to the accumulators (0: overwrite them).
#define MI_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MI_SUMS_16(i) MI_SUMS_4(i), MI_SUMS_4(i + 4), MI_SUMS_4(i + 8), MI_SUMS_4(i + 12)
#define MI_SUMS_64(i) MI_SUMS_16(i), MI_SUMS_16(i + 16), MI_SUMS_16(i + 32), MI_SUMS_16(i + 48)
#define MI_NAMES_0_31                                                                                          \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31"
#define MI_NAMES_32_63                                                                                           \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define MI_NAMES_64_127                                                                                          \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90," \
  "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,"   \
  "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MI_WGMMA(n, type, names, a_registers, b_descriptor, add, ...)                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add                                                      \
               ", 0;\n"                                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, {" a_registers \
               "}, " b_descriptor ", p, 1, 1, 0;\n}\n"                                                      \
               : __VA_ARGS__                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "n"(int(kAdd)))
#define MI_WGMMA_64(type) \
  MI_WGMMA("64", type, MI_NAMES_0_31, "%32,%33,%34,%35", "%36", "%37", MI_SUMS_16(0), MI_SUMS_16(16))
#define MI_WGMMA_128(type) \
  MI_WGMMA("128", type, MI_NAMES_0_31 "," MI_NAMES_32_63, "%64,%65,%66,%67", "%68", "%69", MI_SUMS_64(0))
#define MI_WGMMA_256(type)                                                                                           \
  MI_WGMMA("256", type, MI_NAMES_0_31 "," MI_NAMES_32_63 "," MI_NAMES_64_127, "%128,%129,%130,%131", "%132", "%133", \
           MI_SUMS_64(0), MI_SUMS_64(64))

// The instructions of the sm_90a engine.
struct Sm90 {
  using TensorMap = CUtensorMap;

  // ---- indices ----
  static MI_DEVICE int thread() { return int(threadIdx.x); }
  // The shuffle tells the compiler that it is uniform in the warp.
  static MI_DEVICE int warp() { return __shfl_sync(0xffffffff, int(threadIdx.x) / 32, 0); }
  static MI_DEVICE int block() { return int(blockIdx.x); }
  static MI_DEVICE int blocks() { return int(gridDim.x); }
  static MI_DEVICE int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
  }
  static MI_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

  // ---- barriers ----
  static MI_DEVICE void sync_warp() { __syncwarp(); }
  static MI_DEVICE void sync_block() { __syncthreads(); }
  static MI_DEVICE void sync_warpgroup(int warpgroup) {
    asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
  }
  static MI_DEVICE void sync_consumers() { asm volatile("bar.sync 3, 256;" ::: "memory"); }
  static MI_DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  }
  static MI_DEVICE void mbarrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
  }
  static MI_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
  static MI_DEVICE void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }
  // At the barrier of the same address in block `rank` of the cluster.
  static MI_DEVICE void mbarrier_arrive_cluster(uint32_t barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
  }
  static MI_DEVICE void mbarrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  }
  // Waits until the phase of this parity is complete. kCluster: acquires what other blocks of the cluster wrote before
  // they arrived.
  template <bool kCluster>
  static MI_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
      if constexpr (kCluster)
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
      else
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
  }

  // ---- TMA: boxes of four-dimensional tensor maps ----
  static MI_DEVICE void tma_load(const CUtensorMap* map, uint32_t dest, uint32_t barrier, int c0, int c1, int c2,
                                 int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], "
        "[%2];" ::"r"(dest),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
  }
  // To the same address in every block of the mask. Each block's own barrier counts the bytes.
  static MI_DEVICE void tma_load_multicast(const CUtensorMap* map, uint32_t dest, uint32_t barrier, uint16_t mask,
                                           int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(dest),
        "l"(map), "r"(barrier), "h"(mask), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
  }
  static MI_DEVICE void tma_store(const CUtensorMap* map, uint32_t src, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
  }
  static MI_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
  // Waits until all stores of this thread have read their source.
  static MI_DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
  // Orders this thread's accesses to shared memory before later ones by TMA, which are of the async proxy.
  static MI_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
  static MI_DEVICE void store_shared(uint32_t dest, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(dest), "r"(value) : "memory");
  }
  static MI_DEVICE void store_shared(uint32_t dest, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(dest), "f"(value) : "memory");
  }
  // From the same address in block `rank` of the cluster.
  static MI_DEVICE float load_shared_cluster(uint32_t src, int rank) {
    float value;
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}\n"
        : "=f"(value)
        : "r"(src), "r"(rank)
        : "memory");
    return value;
  }

  // ---- registers ----
  template <int kCount>
  static MI_DEVICE void dealloc_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
  }
  template <int kCount>
  static MI_DEVICE void alloc_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
  }
  static MI_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  }
  // Two products of 16-bit elements, each rounded once.
  template <class T>
  static MI_DEVICE uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product;
    if constexpr (T::kBfloat16)
      asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    else
      asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
  }
  template <class T>
  static MI_DEVICE uint32_t pack(float low, float high) {
    uint32_t packed;
    if constexpr (T::kBfloat16)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  template <class T>
  static MI_DEVICE float widen(uint16_t bits) {
    float value;
    if constexpr (T::kBfloat16)
      value = __uint_as_float(uint32_t(bits) << 16);
    else
      asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }

  // ---- the tensor cores ----
  // d [64, kTileN] (+)= a [64, 16] times the transpose of the matrix [kTileN, 16] at `descriptor`.
  template <class T, int kTileN, bool kAdd>
  static MI_DEVICE void wgmma(float (&d)[kTileN / 2], const uint32_t (&a)[4], uint64_t descriptor) {
    if constexpr (kTileN == 64 && T::kBfloat16) MI_WGMMA_64("bf16");
    if constexpr (kTileN == 64 && !T::kBfloat16) MI_WGMMA_64("f16");
    if constexpr (kTileN == 128 && T::kBfloat16) MI_WGMMA_128("bf16");
    if constexpr (kTileN == 128 && !T::kBfloat16) MI_WGMMA_128("f16");
    if constexpr (kTileN == 256 && T::kBfloat16) MI_WGMMA_256("bf16");
    if constexpr (kTileN == 256 && !T::kBfloat16) MI_WGMMA_256("f16");
  }
  // Before the first wgmma that reads registers which were written since the previous one.
  static MI_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  static MI_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  // Waits until at most this many committed groups are pending.
  template <int kPending>
  static MI_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  }
  // The same value, but opaque to the compiler: what depends on it is not computed earlier and kept in registers.
  static MI_DEVICE int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
  }
  // Keeps these registers alive up to here: wgmma reads its A operand asynchronously, which the compiler's liveness
  // analysis does not know.
  template <int kCount>
  static MI_DEVICE void fence_operand(uint32_t (&r)[kCount][4]) {
    MI_UNROLL
    for (int k = 0; k < kCount; ++k)
      asm volatile("" : "+r"(r[k][0]), "+r"(r[k][1]), "+r"(r[k][2]), "+r"(r[k][3])::"memory");
  }
  template <int kCount>
  static MI_DEVICE void fence_operand(float (&r)[kCount]) {
    MI_UNROLL
    for (int k = 0; k < kCount; ++k) asm volatile("" : "+f"(r[k])::"memory");
  }
};

}  // namespace mi_kernels::cuda
