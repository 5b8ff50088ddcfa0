// A CPU that runs the sm_90a engine: what Hopper in csrc/cuda/ptx.cuh is on the device. One file, though a long one:
// its parts (fibers, copies, wgmma, barriers) share the state of one struct, as those of Hopper do.
//
// Each thread of a cluster is a fiber. Everything asynchronous happens as late or as early as the rules of the PTX ISA
// allow, chosen by a seed: copies land in any order, wgmma reads its registers and shared memory when it is waited for
// (or when it is issued), warps run at different speeds. What is not yet written reads as NaN. Nothing left to run
// while threads wait is a deadlock. So a missing wait, a stage released too soon or a register written too soon gives a
// wrong result here for some seed. What the machine does with addresses, descriptors and registers is written from the
// ISA's text, not from the engine's functions.
#pragma once

#include <ucontext.h>

#include <cmath>
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
#include "numbers.h"

namespace emulated {

using mi_kernels::cuda::sm90::kInstructions;
using mi_kernels::cuda::sm90::kThreads;
using mi_kernels::cuda::sm90::View;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "machine: %s\n", what.c_str());
  std::exit(1);
}
inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

// ---- the state of one cluster ----

struct Map {
  View view;
  int box_rows = 0;
};

struct Barrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // still to come in this phase
  uint32_t phase = 0;
  void settle() {
    if (pending == 0 && bytes == 0) pending = count, ++phase;
  }
};

struct Meeting {  // of the threads of a warp, warpgroup, block or cluster
  int expected = 0, arrived = 0;
  uint32_t times = 0;
};

struct Multiplication {
  float* sums;
  const uint32_t (*left)[4];
  uint64_t descriptor;
  int out;
  bool add, bfloat16, committed;
};

struct Thread {
  int block = 0, index = 0;
  bool done = false;
  const uint32_t* watched = nullptr;  // blocked while (*watched & mask) == value
  uint32_t mask = 0, value = 0;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::deque<Multiplication> running;
  bool fenced = false;
  uint32_t row = 0;                // named to ldmatrix
  std::vector<uint32_t> unfenced;  // bytes written and not yet visible to the copy engine
  std::vector<uint32_t> read;      // words read, which the copy engine may not write yet
  std::vector<std::function<void()>> stores;
};

struct Block {
  std::vector<uint8_t> shared = std::vector<uint8_t>(228 * 1024, 0xFF);
  std::set<uint32_t> unfenced;
  std::map<uint32_t, Barrier> barriers;
  Meeting all, consumers, warps[kThreads / 32], warpgroups[kThreads / 128];
};

struct Cluster {
  int cluster = 1, first_block = 0, blocks = 1;
  bool early = false;  // wgmma reads when it is issued, not when it is waited for
  std::mt19937 random;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Block> members;
  std::vector<std::function<void()>> copies;  // in flight
  Meeting everyone;
  ucontext_t scheduler;
  Thread* now = nullptr;
  std::function<void()> body;
};
inline Cluster* world = nullptr;

inline Block& here() { return world->members[size_t(world->now->block)]; }
inline void yield() { swapcontext(&world->now->context, &world->scheduler); }
inline void block_while(const uint32_t* watched, uint32_t mask, uint32_t value) {
  Thread& t = *world->now;
  t.watched = watched, t.mask = mask, t.value = value;
  if ((*watched & mask) == value) yield();
  t.watched = nullptr;
}
// Returns true to the last one that comes.
inline void meet(Meeting& m) {
  if (++m.arrived == m.expected) {
    m.arrived = 0;
    ++m.times;
  } else {
    block_while(&m.times, ~0u, m.times);
  }
}
inline Meeting& my_warp() { return here().warps[world->now->index / 32]; }
inline Thread& lane(int index) {
  const Thread& t = *world->now;
  return *world->threads[size_t(t.block * kThreads + t.index / 32 * 32 + index)];
}

inline Barrier& barrier_at(Block& block, uint32_t address) {
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) fail("no barrier was initialised at this address");
  return found->second;
}

// The right operand as the hardware finds it: K-major, 128-byte swizzle applied to the address.
inline float right_element(const Block& block, uint64_t descriptor, int row, int depth, bool bfloat16) {
  const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  uint32_t address = start + uint32_t(row / 8) * eight_rows + uint32_t(row % 8) * 128 + uint32_t(depth) * 2;
  address ^= (address >> 7 & 7) << 4;
  require(address + 1 < block.shared.size(), "wgmma reads past the end of shared memory");
  return widen(uint16_t(block.shared[address] | block.shared[address + 1] << 8), bfloat16);
}

// The oldest multiplication of the warp of this thread; every lane has issued it.
inline void multiply_oldest() {
  const Block& block = here();
  const Multiplication first = lane(0).running.front();
  require(first.descriptor >> 62 == 1 && (first.descriptor >> 49 & 7) == 0, "descriptor: swizzle or base offset");
  static thread_local std::vector<float> right;
  right.resize(size_t(first.out * 16));
  for (int n = 0; n < first.out; ++n)
    for (int k = 0; k < 16; ++k)
      right[size_t(n * 16 + k)] = right_element(block, first.descriptor, n, k, first.bfloat16);
  float left[16][16];
  for (int l = 0; l < 32; ++l) {
    const Multiplication& m = lane(l).running.front();
    require(m.descriptor == first.descriptor && m.out == first.out, "lanes disagree about a wgmma");
    for (int r = 0; r < 4; ++r)  // ISA: registers hold rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8
      for (int h = 0; h < 2; ++h)
        left[l / 4 + (r % 2) * 8][l % 4 * 2 + (r / 2) * 8 + h] = widen(uint16_t((*m.left)[r] >> (16 * h)), m.bfloat16);
  }
  for (int l = 0; l < 32; ++l) {
    const Multiplication m = lane(l).running.front();
    lane(l).running.pop_front();
    for (int r = 0; r < m.out / 2; ++r) {  // ISA: groups of four registers are columns 8i + 2t, + 1 of rows g and g + 8
      const int row = l / 4 + r / 2 % 2 * 8, col = r / 4 * 8 + l % 4 * 2 + r % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += left[row][k] * right[size_t(col * 16 + k)];
      m.sums[r] = m.add ? m.sums[r] + sum : sum;
    }
  }
}

// ---- the copy engine ----

// Calls visit(byte of the box in shared memory, element or null) for each element of a box.
template <class Visit>
void box(const Map& map, const int (&c)[4], Visit&& visit) {
  const View& v = map.view;
  require(v.data != nullptr, "a tensor map that was not made");
  for (int row = 0; row < map.box_rows; ++row)
    for (int col = 0; col < 64; ++col) {
      const int64_t at[4] = {c[0] + int64_t(col), c[1], c[2] + int64_t(row), c[3]};
      bool inside = true;
      int64_t offset = 0;
      for (int d = 0; d < 4; ++d) {
        inside = inside && at[d] >= 0 && at[d] < v.size[d];
        offset += at[d] * (v.size[d] == 1 ? 0 : v.stride[d]);
      }
      visit(uint32_t(row * 128 + col * 2), inside ? static_cast<const uint16_t*>(v.data) + offset : nullptr);
    }
}
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// ISA, "Async proxy": accesses of the generic proxy, reads too, come before those of the copy engine only by a fence
// that the thread executes which made them.
inline void require_fenced(int index, uint32_t begin, uint32_t end) {
  const Block& block = world->members[size_t(index)];
  const auto written = block.unfenced.lower_bound(begin);
  require(written == block.unfenced.end() || *written >= end, "a copy overwrites what was written without a fence");
  for (int t = 0; t < kThreads; ++t)
    for (const uint32_t word : world->threads[size_t(index * kThreads + t)]->read)
      require(word < begin || word >= end, "a copy overwrites what was read without a fence");
}

inline void issue_load(const Map* map, uint32_t to, uint32_t barrier, uint32_t mask, int c0, int c1, int c2, int c3) {
  require(to % 1024 == 0, "a box is not aligned to the pattern of the swizzle");
  for (int b = 0; b < world->cluster; ++b) {
    if (!(mask >> b & 1)) continue;
    Block& block = world->members[size_t(b)];
    require(to + map->box_rows * 128 <= block.shared.size(), "a box ends past shared memory");
    require_fenced(b, to, to + uint32_t(map->box_rows) * 128);
    std::memset(&block.shared[to], 0xFF, size_t(map->box_rows) * 128);
    world->copies.push_back([=, &block] {
      box(*map, {c0, c1, c2, c3}, [&](uint32_t byte, const uint16_t* element) {
        const uint16_t value = element ? *element : 0;  // what lies outside of the tensor is 0
        std::memcpy(&block.shared[swizzled(to + byte)], &value, 2);
      });
      Barrier& full = barrier_at(block, barrier);
      full.bytes -= map->box_rows * 128;
      full.settle();
    });
  }
}

inline void land_one_copy() {
  auto& copies = world->copies;
  const size_t which = world->random() % copies.size();
  const auto copy = copies[which];
  copies.erase(copies.begin() + int64_t(which));
  copy();
}

struct Machine {
  using TensorMap = Map;

  static int thread() { return world->now->index; }
  static int warp() { return world->now->index / 32; }
  static int block() { return world->first_block + world->now->block; }
  static int blocks() { return world->blocks; }
  static int rank() { return world->now->block; }
  static uint32_t shared_address(const void*) { return 16; }  // not aligned: the engine sees to that
  static int fresh(int value) { return value; }

  static void sync_warp() { meet(my_warp()); }
  static void sync_block() { meet(here().all); }
  static void sync_warpgroup(int warpgroup) { meet(here().warpgroups[warpgroup]); }
  static void sync_consumers() { meet(here().consumers); }
  static void sync_cluster() { meet(world->everyone); }
  static void barrier_init(uint32_t address, int count) {
    require(address % 8 == 0 && !here().barriers.count(address), "a barrier is not aligned, or initialised twice");
    here().barriers[address] = {count, count, 0, 0};
  }
  static void barrier_init_fence() {}
  static void arrive(Block& block, uint32_t address, int bytes) {
    Barrier& barrier = barrier_at(block, address);
    require(barrier.pending > 0, "more arrivals than a barrier counts");
    barrier.bytes += bytes;
    --barrier.pending;
    barrier.settle();
  }
  // What waits for an arrival may run before the thread's next instruction.
  static void arrive_and_pause(Block& block, uint32_t address) {
    arrive(block, address, 0);
    if (world->random() % 2) yield();
  }
  static void barrier_arrive(uint32_t address) { arrive_and_pause(here(), address); }
  static void barrier_arrive_at(uint32_t address, int rank) { arrive_and_pause(world->members[size_t(rank)], address); }
  static void barrier_expect(uint32_t address, int bytes) { arrive(here(), address, bytes); }
  template <bool kCluster>
  static void barrier_wait(uint32_t address, uint32_t parity) {
    block_while(&barrier_at(here(), address).phase, 1, parity);
  }

  static void load(const Map* map, uint32_t to, uint32_t barrier, int c0, int c1, int c2, int c3) {
    issue_load(map, to, barrier, 1u << rank(), c0, c1, c2, c3);
  }
  static void load_multicast(const Map* map, uint32_t to, uint32_t barrier, uint16_t mask, int c0, int c1, int c2,
                             int c3) {
    issue_load(map, to, barrier, mask, c0, c1, c2, c3);
  }
  static void store(const Map* map, uint32_t from, int c0, int c1, int c2, int c3) {
    Block* block = &here();
    world->now->stores.push_back([=] {
      box(*map, {c0, c1, c2, c3}, [&](uint32_t byte, const uint16_t* element) {
        const uint32_t address = swizzled(from + byte);
        require(!block->unfenced.count(address & ~3u), "the copy engine reads what was written without a fence");
        if (element) std::memcpy(const_cast<uint16_t*>(element), &block->shared[address], 2);
      });
    });
  }
  static void store_commit() {}
  static void store_wait() {  // as late as possible
    for (const auto& store : world->now->stores) store();
    world->now->stores.clear();
  }
  static void shared_fence() {
    for (const uint32_t address : world->now->unfenced) here().unfenced.erase(address);
    world->now->unfenced.clear();
    world->now->read.clear();
  }
  static void shared_store(uint32_t to, uint32_t value) {
    require(to % 4 == 0 && to + 4 <= here().shared.size(), "a store to shared memory is not aligned or past its end");
    std::memcpy(&here().shared[to], &value, 4);
    here().unfenced.insert(to);
    world->now->unfenced.push_back(to);
  }
  static void shared_store(uint32_t to, float value) { shared_store(to, bits_of(value)); }
  static float shared_load_at(uint32_t from, int rank) {
    require(from % 4 == 0 && rank < world->cluster, "a load from another block's shared memory");
    float value;
    std::memcpy(&value, &world->members[size_t(rank)].shared[from], 4);
    return value;
  }

  template <int kCount>
  static void give_registers() {}
  template <int kCount>
  static void take_registers() {}
  static void load_matrices(uint32_t (&r)[4], uint32_t row) {
    require(row % 16 == 0, "ldmatrix: a row is not aligned");
    world->now->row = row;
    sync_warp();
    const int l = world->now->index % 32;
    for (int q = 0; q < 4; ++q) {
      const uint32_t word = lane(8 * q + l / 4).row + uint32_t(l % 4 * 4);
      std::memcpy(&r[q], &here().shared[word], 4);
      world->now->read.push_back(word);
    }
    sync_warp();
  }
  template <class T>
  static float widen(uint16_t bits) {
    return emulated::widen(bits, T::kBfloat16);
  }
  template <class T>
  static uint32_t pack(float low, float high) {
    return narrow(low, T::kBfloat16) | uint32_t(narrow(high, T::kBfloat16)) << 16;
  }
  template <class T>
  static uint32_t multiply(uint32_t a, uint32_t b) {
    const auto product = [&](int shift) {
      return narrow(double(widen<T>(uint16_t(a >> shift))) * widen<T>(uint16_t(b >> shift)), T::kBfloat16);
    };
    return product(0) | uint32_t(product(16)) << 16;
  }

  template <class T, int kOut, bool kAdd>
  static void mma(float (&d)[kOut / 2], const uint32_t (&a)[4], uint64_t descriptor) {
    Thread& t = *world->now;
    require(t.fenced, "wgmma without a fence since the last group");
    t.running.push_back({d, &a, descriptor, kOut, kAdd, T::kBfloat16, false});
    if (!world->early) return;
    sync_warp();
    if (t.index % 32 == 0) multiply_oldest();
    sync_warp();
  }
  static void mma_fence() { world->now->fenced = true; }
  static void mma_commit() {
    Thread& t = *world->now;
    t.fenced = false;
    if (!t.running.empty()) t.running.back().committed = true;
  }
  template <int kRunning>
  static void mma_wait() {
    sync_warp();
    if (world->now->index % 32 == 0) {
      const auto groups = [&] {
        int count = 0;
        for (const Multiplication& m : world->now->running) count += m.committed;
        return count;
      };
      while (groups() > kRunning) multiply_oldest();
    }
    sync_warp();
  }
  static void hold(uint32_t (&)[kInstructions][4]) {}
  template <int kCount>
  static void hold(float (&)[kCount]) {}
};

// ---- running ----

inline void enter() {
  world->body();
  world->now->done = true;
  yield();
}

// Runs one cluster to its end.
inline void run_cluster(Cluster& c) {
  world = &c;
  c.members = std::vector<Block>(size_t(c.cluster));
  c.everyone.expected = c.cluster * kThreads;
  for (int b = 0; b < c.cluster; ++b) {
    Block& block = c.members[size_t(b)];
    block.all.expected = kThreads, block.consumers.expected = 256;
    for (Meeting& m : block.warps) m.expected = 32;
    for (Meeting& m : block.warpgroups) m.expected = 128;
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
    bool moved = false;
    for (size_t w = 0; w < warps; ++w) {
      const bool asleep = idle == 0 && c.random() % 2;
      for (size_t l = 0; l < 32; ++l) {
        Thread& t = *c.threads[w * 32 + l];
        alive = alive || !t.done;
        if (t.done || asleep || (t.watched && (*t.watched & t.mask) == t.value)) continue;
        c.now = &t;
        swapcontext(&c.scheduler, &t.context);
        moved = true;
      }
    }
    idle = moved ? 0 : idle + 1;
    if (!c.copies.empty() && (c.random() % 4 == 0 || idle > 0)) {
      land_one_copy();
      idle = 0;
    }
    if (alive && idle > 2) fail("deadlock: all threads wait and nothing is in flight");
  }
  require(c.copies.empty(), "copies are in flight after the end");
  for (const Block& block : c.members)
    for (const auto& [address, barrier] : block.barriers)
      require(barrier.bytes == 0, "a barrier expects bytes after the end");
}

// Launches a grid: its clusters one after another.
inline void launch(int blocks, int cluster, uint32_t seed, const std::function<void()>& body) {
  for (int first = 0; first < blocks; first += cluster) {
    Cluster c;
    c.cluster = cluster, c.first_block = first, c.blocks = blocks, c.early = seed % 2 == 1;
    c.random.seed(seed * 7919 + uint32_t(first));
    c.body = body;
    run_cluster(c);
  }
}

}  // namespace emulated
