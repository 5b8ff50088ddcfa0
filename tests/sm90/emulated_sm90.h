// The instructions of the sm_90a engine on the host, in place of Sm90 in csrc/cuda/common/ptx.cuh.
#pragma once

#include "async.h"

namespace emulated {

struct EmulatedSm90 {
  using TensorMap = emulated::TensorMap;

  static int thread() { return current->thread->index; }
  static int warp() { return current->thread->index / 32; }
  static int block() { return current->first_block + current->thread->block; }
  static int blocks() { return current->grid_blocks; }
  static int cluster_rank() { return current->thread->block; }
  static uint32_t shared_address(const void*) { return 16; }  // the engine has to align it
  static int opaque(int value) { return value; }

  static void sync_warp() { sync(this_warp()); }
  static void sync_block() { sync(this_block().threads); }
  static void sync_warpgroup(int warpgroup) { sync(this_block().warpgroups[warpgroup]); }
  static void sync_consumers() { sync(this_block().consumers); }
  static void sync_cluster() { sync(current->all_threads); }
  static void mbarrier_init(uint32_t address, int count) {
    require(address % 8 == 0 && !this_block().barriers.count(address),
            "an mbarrier is not aligned, or initialised twice");
    this_block().barriers[address] = {count, count, 0, 0};
  }
  static void mbarrier_init_fence() {}
  static void arrive(Block& block, uint32_t address, int bytes) {
    Barrier& barrier = barrier_at(block, address);
    require(barrier.pending > 0, "more arrivals than an mbarrier counts");
    barrier.bytes += bytes;
    --barrier.pending;
    barrier.complete_phase_if_done();
  }
  // Waiting threads may run before this thread's next instruction.
  static void arrive_and_pause(Block& block, uint32_t address) {
    arrive(block, address, 0);
    if (current->random() % 2) yield();
  }
  static void mbarrier_arrive(uint32_t address) { arrive_and_pause(this_block(), address); }
  static void mbarrier_arrive_cluster(uint32_t address, int rank) {
    arrive_and_pause(current->blocks[size_t(rank)], address);
  }
  static void mbarrier_expect(uint32_t address, int bytes) { arrive(this_block(), address, bytes); }
  template <bool kCluster>
  static void mbarrier_wait(uint32_t address, uint32_t parity) {
    block_while(&barrier_at(this_block(), address).phase, 1, parity);
  }

  static void tma_load(const TensorMap* map, uint32_t dest, uint32_t barrier, int c0, int c1, int c2, int c3) {
    issue_load(map, dest, barrier, 1u << cluster_rank(), c0, c1, c2, c3);
  }
  static void tma_load_multicast(const TensorMap* map, uint32_t dest, uint32_t barrier, uint16_t mask, int c0, int c1,
                                 int c2, int c3) {
    issue_load(map, dest, barrier, mask, c0, c1, c2, c3);
  }
  static void tma_store(const TensorMap* map, uint32_t src, int c0, int c1, int c2, int c3) {
    Block* block = &this_block();
    current->thread->stores.push_back([=] {
      for_each_in_box(*map, {c0, c1, c2, c3}, [&](uint32_t byte, const uint16_t* element) {
        const uint32_t address = swizzled(src + byte);
        require(!block->unfenced.count(address & ~3u), "TMA reads a write that was not fenced");
        if (element) std::memcpy(const_cast<uint16_t*>(element), &block->shared[address], 2);
      });
    });
  }
  static void tma_store_commit() {}
  static void tma_store_wait() {  // as late as possible
    for (const auto& store : current->thread->stores) store();
    current->thread->stores.clear();
  }
  static void fence_async_proxy() {
    for (const uint32_t address : current->thread->unfenced) this_block().unfenced.erase(address);
    current->thread->unfenced.clear();
    current->thread->read.clear();
  }
  static void store_shared(uint32_t dest, uint32_t value) {
    require(dest % 4 == 0 && dest + 4 <= this_block().shared.size(),
            "a store to shared memory is not aligned or past its end");
    std::memcpy(&this_block().shared[dest], &value, 4);
    this_block().unfenced.insert(dest);
    current->thread->unfenced.push_back(dest);
  }
  static void store_shared(uint32_t dest, float value) { store_shared(dest, bits_of(value)); }
  static float load_shared_cluster(uint32_t src, int rank) {
    require(src % 4 == 0 && rank < current->size, "a load from another block's shared memory");
    float value;
    std::memcpy(&value, &current->blocks[size_t(rank)].shared[src], 4);
    return value;
  }

  template <int kCount>
  static void dealloc_registers() {}
  template <int kCount>
  static void alloc_registers() {}
  static void load_matrices(uint32_t (&r)[4], uint32_t row) {
    require(row % 16 == 0, "ldmatrix: a row is not aligned");
    current->thread->ldmatrix_row = row;
    sync_warp();
    const int l = current->thread->index % 32;
    for (int q = 0; q < 4; ++q) {
      const uint32_t word = lane(8 * q + l / 4).ldmatrix_row + uint32_t(l % 4 * 4);
      std::memcpy(&r[q], &this_block().shared[word], 4);
      current->thread->read.push_back(word);
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

  template <class T, int kTileN, bool kAdd>
  static void wgmma(float (&d)[kTileN / 2], const uint32_t (&a)[4], uint64_t descriptor) {
    Thread& t = *current->thread;
    require(t.wgmma_fenced, "wgmma without a wgmma.fence since the previous group");
    t.wgmmas.push_back({d, &a, descriptor, kTileN, kAdd, T::kBfloat16, false});
    if (!current->early) return;
    sync_warp();
    if (t.index % 32 == 0) complete_oldest_wgmma();
    sync_warp();
  }
  static void wgmma_fence() { current->thread->wgmma_fenced = true; }
  static void wgmma_commit() {
    Thread& t = *current->thread;
    t.wgmma_fenced = false;
    if (!t.wgmmas.empty()) t.wgmmas.back().committed = true;
  }
  template <int kPending>
  static void wgmma_wait() {
    sync_warp();
    if (current->thread->index % 32 == 0) {
      const auto groups = [&] {
        int count = 0;
        for (const Wgmma& m : current->thread->wgmmas) count += m.committed;
        return count;
      };
      while (groups() > kPending) complete_oldest_wgmma();
    }
    sync_warp();
  }
  static void fence_operand(uint32_t (&)[kMmasPerStep][4]) {}
  template <int kCount>
  static void fence_operand(float (&)[kCount]) {}
};

}  // namespace emulated
