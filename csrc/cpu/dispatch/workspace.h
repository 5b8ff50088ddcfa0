// Threads and scratch memory of a call.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>

#include "common/allocate.h"
#include "cpu/dispatch/plan.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels {

using torch::stable::Tensor;

// A free worker takes the next task from a counter; what a task computes does not depend on its worker.
inline void run_on_threads(int64_t tasks, int64_t workers, void (*body)(void*, int64_t, int64_t), void* closure) {
  workers = std::min(tasks, workers);
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(closure, task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next++; task < tasks; task = next++) body(closure, task, worker);
  });
}

// The workers that share a call, and the scratch memory that they need.
struct WorkspaceSize {
  int64_t workers, worker_bytes, partial_bytes;
  WorkspaceSize(int64_t tasks, int64_t operations, int64_t worker, int64_t partial) {
    constexpr int64_t kWorthSharing = 2 * kTaskOperations;
    const int64_t threads = operations < kWorthSharing ? 1 : torch::stable::get_num_threads();
    workers = std::max<int64_t>(std::min(threads, tasks), 1);
    worker_bytes = scratch_bytes(worker);
    partial_bytes = partial;
  }
  int64_t bytes() const { return workers * worker_bytes + partial_bytes + kScratchAlign; }
  Executor executor(char* start) const { return {workers, start, start + workers * worker_bytes, run_on_threads}; }
};

// Scratch memory comes from torch's allocator, so that its profiler and its limits see it.
struct __attribute__((visibility("hidden"))) Workspace {
  Tensor bytes;
  Executor executor;
  Workspace(const Tensor& like, const WorkspaceSize& size) : bytes(allocate_bytes(like, size.bytes())) {
    const auto address = reinterpret_cast<uintptr_t>(bytes.mutable_data_ptr());
    auto* start = reinterpret_cast<char*>(round_up(int64_t(address), kScratchAlign));
    executor = size.executor(start);
  }
};

// What the calls for a part of a larger call need at most: on all threads, and on one.
struct WorkspaceNeeds {
  int64_t workers = 1, bytes = 0, serial_bytes = 0;
};

// Where a call gets its scratch memory. A part of a larger call is measured first, and then runs in memory that the
// larger call has allocated for all its parts.
struct __attribute__((visibility("hidden"))) WorkspaceSource {
  const Tensor* like = nullptr;     // new memory, from the allocator of this tensor
  WorkspaceNeeds* needs = nullptr;  // none: nothing runs
  char* start = nullptr;            // this memory, aligned
  bool serial = false;              // on this thread alone

  template <class Run>
  void run(WorkspaceSize size, const Run& run) const {
    if (like) return run(Workspace(*like, size).executor);
    if (needs) {
      needs->workers = std::max(needs->workers, size.workers);
      needs->bytes = std::max(needs->bytes, size.bytes());
    }
    if (needs || serial) size.workers = 1;
    if (needs)
      needs->serial_bytes = std::max(needs->serial_bytes, size.bytes());
    else
      run(size.executor(start));
  }
};

}  // namespace mi_kernels
