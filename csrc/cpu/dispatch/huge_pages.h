// Large results come from the allocator as memory that was never touched, and each of its pages costs a fault on
// the first write: at 4 KiB a page that takes longer than computing a weight gradient of a few rows.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mi_kernels {

// Asks for huge pages for the part of new memory that they cover entirely, so that nothing beyond it is taken up.
// A hint: where the system does not give them, nothing changes.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  constexpr int64_t kWorthAsking = 32 << 20;  // smaller blocks are kept by glibc, and in use already
  if (bytes < kWorthAsking) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// A result that was just allocated.
inline torch::stable::Tensor on_huge_pages(torch::stable::Tensor result) {
  prefer_huge_pages(result.mutable_data_ptr(), result.numel() * int64_t(result.element_size()));
  return result;
}

}  // namespace mi_kernels
