// The memory of a large new result has never been touched, and the first write to each page costs a page fault: at 4
// KiB a page, that takes longer than computing a weight gradient of a few rows.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mi_kernels {

// Asks for huge pages that are entirely within new memory, so that no other memory is affected. It is a hint: if
// the system has none to give, nothing changes.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  constexpr int64_t kWorthAsking = 8 << 20;  // smaller blocks have few pages, which the allocator mostly keeps
  if (bytes < kWorthAsking) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// For a result that was just allocated.
inline torch::stable::Tensor on_huge_pages(torch::stable::Tensor result) {
  prefer_huge_pages(result.mutable_data_ptr(), result.numel() * int64_t(result.element_size()));
  return result;
}

}  // namespace mi_kernels
