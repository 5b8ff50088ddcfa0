// Threads and scratch memory of a call.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>

#include "cpu/kernels/calls.h"

namespace mi_kernels {

using torch::stable::Tensor;

// Tasks are taken from a counter by whichever worker is free; what a task computes does not depend on that.
inline void run(int64_t tasks, int64_t workers, void (*body)(void*, int64_t, int64_t), void* context) {
  workers = std::min(tasks, workers);
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next++; task < tasks; task = next++) body(context, task, worker);
  });
}

// How many workers share a call, and the scratch memory that they need.
struct Demand {
  int64_t workers, worker_bytes, partial_bytes;
  Demand(int64_t tasks, int64_t operations, int64_t worker, int64_t partial) {
    constexpr int64_t kWorthSharing = 2 * plan::kTaskOperations;
    const int64_t threads = operations < kWorthSharing ? 1 : torch::stable::get_num_threads();
    workers = std::max<int64_t>(std::min(threads, tasks), 1);
    worker_bytes = round_up(worker, kAlign);
    partial_bytes = partial;
  }
  int64_t bytes() const { return workers * worker_bytes + partial_bytes + kAlign; }
  static constexpr int64_t kAlign = 64;
};

// Scratch comes from torch's allocator, so that its profiler and limits see it.
struct __attribute__((visibility("hidden"))) Workspace {
  Tensor bytes;
  Execution execution;
  Workspace(const Tensor& like, const Demand& demand)
      : bytes(torch::stable::new_empty(like, {demand.bytes()}, torch::headeronly::ScalarType::Byte)) {
    const auto address = reinterpret_cast<uintptr_t>(bytes.mutable_data_ptr());
    auto* start = reinterpret_cast<char*>(round_up(int64_t(address), Demand::kAlign));
    execution = {demand.workers, start, start + demand.workers * demand.worker_bytes, run};
  }
};

}  // namespace mi_kernels
