// A thread block cluster on the host: its threads are fibers, which take turns.
//
// Everything asynchronous happens as late or as early as the PTX ISA allows, chosen by a seed: copies land in any
// order, wgmma reads its registers and shared memory when it is waited for (or when it is issued), warps run at
// different speeds. Memory that has not been written reads as NaN, and it is a deadlock if all threads wait with no
// copy in flight. So a missing wait, or a stage or register that is reused too soon, gives a wrong result for some
// seed.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda/host/sm90_args.h"

namespace emulated {

using mi_kernels::cuda::sm90::kMmasPerStep;
using mi_kernels::cuda::sm90::kThreads;
using mi_kernels::cuda::sm90::TensorView;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: %s\n", what.c_str());
  std::exit(1);
}
inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

// ---- state ----

struct TensorMap {
  TensorView view;
  int box_rows = 0;
};

struct Barrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // still expected in this phase
  uint32_t phase = 0;
  void complete_phase_if_done() {
    if (pending == 0 && bytes == 0) pending = count, ++phase;
  }
};

// A barrier of the threads of a warp, warpgroup, block or cluster.
struct Rendezvous {
  int expected = 0, arrived = 0;
  uint32_t generation = 0;
};

struct Wgmma {
  float* d;
  const uint32_t (*a)[4];
  uint64_t descriptor;
  int n;
  bool add, bfloat16, committed;
};

struct Thread {
  int block = 0, index = 0;
  bool done = false;
  const uint32_t* watched = nullptr;  // blocked while (*watched & mask) == value
  uint32_t mask = 0, value = 0;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::deque<Wgmma> wgmmas;  // issued and not complete
  bool wgmma_fenced = false;
  uint32_t ldmatrix_row = 0;       // the address it passed
  std::vector<uint32_t> unfenced;  // words written and not yet visible to TMA
  std::vector<uint32_t> read;      // words read, which TMA may not overwrite yet
  std::vector<std::function<void()>> stores;
};

struct Block {
  std::vector<uint8_t> shared = std::vector<uint8_t>(228 * 1024, 0xFF);
  std::set<uint32_t> unfenced;
  std::map<uint32_t, Barrier> barriers;
  Rendezvous threads, consumers, warps[kThreads / 32], warpgroups[kThreads / 128];
};

struct Cluster {
  int size = 1, first_block = 0, grid_blocks = 1;
  bool early = false;  // wgmma reads its operands when it is issued instead of when it is waited for
  std::mt19937 random;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Block> blocks;
  std::vector<std::function<void()>> copies;  // in flight
  Rendezvous all_threads;
  ucontext_t scheduler;
  Thread* thread = nullptr;  // the one that runs
  std::function<void()> body;
};
inline Cluster* current = nullptr;  // the one that runs

inline Block& this_block() { return current->blocks[size_t(current->thread->block)]; }
inline void yield() { swapcontext(&current->thread->context, &current->scheduler); }
inline void block_while(const uint32_t* watched, uint32_t mask, uint32_t value) {
  Thread& t = *current->thread;
  t.watched = watched, t.mask = mask, t.value = value;
  if ((*watched & mask) == value) yield();
  t.watched = nullptr;
}
inline void sync(Rendezvous& m) {
  if (++m.arrived == m.expected) {
    m.arrived = 0;
    ++m.generation;
  } else {
    block_while(&m.generation, ~0u, m.generation);
  }
}
inline Rendezvous& this_warp() { return this_block().warps[current->thread->index / 32]; }
inline Thread& lane(int index) {
  const Thread& t = *current->thread;
  return *current->threads[size_t(t.block * kThreads + t.index / 32 * 32 + index)];
}

inline Barrier& barrier_at(Block& block, uint32_t address) {
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) fail("no mbarrier was initialised at this address");
  return found->second;
}

// ---- execution ----

inline void complete_one_copy() {
  auto& copies = current->copies;
  const size_t which = current->random() % copies.size();
  const auto copy = copies[which];
  copies.erase(copies.begin() + int64_t(which));
  copy();
}

inline void enter() {
  current->body();
  current->thread->done = true;
  yield();
}

inline void run_cluster(Cluster& c) {
  current = &c;
  c.blocks = std::vector<Block>(size_t(c.size));
  c.all_threads.expected = c.size * kThreads;
  for (int b = 0; b < c.size; ++b) {
    Block& block = c.blocks[size_t(b)];
    block.threads.expected = kThreads, block.consumers.expected = 256;
    for (Rendezvous& m : block.warps) m.expected = 32;
    for (Rendezvous& m : block.warpgroups) m.expected = 128;
    for (int i = 0; i < kThreads; ++i) {
      constexpr size_t kStack = 64 << 10;
      c.threads.push_back(std::make_unique<Thread>());
      Thread& t = *c.threads.back();
      t.block = b, t.index = i;
      t.stack = std::make_unique<char[]>(kStack);
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get(), t.context.uc_stack.ss_size = kStack, t.context.uc_link = nullptr;
      makecontext(&t.context, enter, 0);
    }
  }
  const size_t warps = c.threads.size() / 32;
  int idle = 0;
  for (bool alive = true; alive;) {
    alive = false;
    bool progress = false;
    for (size_t w = 0; w < warps; ++w) {
      const bool asleep = idle == 0 && c.random() % 2;
      for (size_t l = 0; l < 32; ++l) {
        Thread& t = *c.threads[w * 32 + l];
        alive = alive || !t.done;
        if (t.done || asleep || (t.watched && (*t.watched & t.mask) == t.value)) continue;
        c.thread = &t;
        swapcontext(&c.scheduler, &t.context);
        progress = true;
      }
    }
    idle = progress ? 0 : idle + 1;
    if (!c.copies.empty() && (c.random() % 4 == 0 || idle > 0)) {
      complete_one_copy();
      idle = 0;
    }
    if (alive && idle > 2) fail("deadlock: all threads wait and no copy is in flight");
  }
  require(c.copies.empty(), "a copy is still in flight at the end");
  for (const Block& block : c.blocks)
    for (const auto& [address, barrier] : block.barriers)
      require(barrier.bytes == 0, "an mbarrier still expects bytes at the end");
}

// Runs the clusters of a grid one after another.
inline void launch(int blocks, int cluster, uint32_t seed, const std::function<void()>& body) {
  for (int first = 0; first < blocks; first += cluster) {
    Cluster c;
    c.size = cluster, c.first_block = first, c.grid_blocks = blocks, c.early = seed % 2 == 1;
    c.random.seed(seed * 7919 + uint32_t(first));
    c.body = body;
    run_cluster(c);
  }
}

}  // namespace emulated
