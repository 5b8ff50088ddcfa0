// An emulator of sm_80 on the host, in place of Sm80 in csrc/cuda/common/ptx.cuh. The threads of a block take turns,
// and instructions do what the PTX ISA says. Asynchronous copies land as late as the waits allow and shared memory
// starts as NaN, so that a missing wait or barrier gives wrong results.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "cuda/common/numbers.cuh"

namespace mi_kernels::cuda {

class Block {
 public:
  static constexpr int kStack = 64 << 10, kThreads = 256, kWarp = 32;
  static inline Block* now = nullptr;

  int64_t index_x, index_y;
  std::vector<char> shared;
  int64_t conflicts = 0;  // reads of shared memory that hit a bank twice

  struct Barrier {
    int arrived = 0;
    int64_t generation = 0;
  };
  struct Copy {
    void* to;
    const void* from;
    bool present;
  };
  struct Thread {
    ucontext_t start;
    jmp_buf context;
    bool started = false, done = false;
    std::vector<std::vector<Copy>> groups{1};
    int64_t exchanges = 0;
  };
  struct Lane {
    uint32_t a[4], b[2];
    const char* address;
  };

  Block(int threads, size_t shared_bytes) : shared(shared_bytes + 128), threads_(threads), warps_(threads / kWarp) {
    if (threads > kThreads) std::abort();
  }

  void run(const std::function<void()>& body, int64_t x, int64_t y) {
    index_x = x, index_y = y;
    std::memset(shared.data(), 0xff, shared.size());
    body_ = &body;
    now = this;
    threads_state_.assign(size_t(threads_), Thread{});
    for (int left = threads_; left > 0;) {
      const int before = left;
      const int64_t progress = progress_;
      for (current_ = 0; current_ < threads_; ++current_) {
        Thread& t = threads_state_[size_t(current_)];
        if (t.done) continue;
        resume(t);
        left -= t.done;
      }
      if (left == before && progress == progress_) throw std::runtime_error("emulator: deadlock");
    }
    now = nullptr;
  }

  char* shared_memory() {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.data()) + 127) / 128 * 128);
  }
  int thread() const { return current_; }
  Thread& state() { return threads_state_[size_t(current_)]; }
  void sync_block() { wait(block_, threads_); }
  // The arguments of all lanes of a warp to a collective instruction. A lane is at most one instruction ahead of the
  // others, so two buffers in turn suffice.
  const Lane* exchange(const Lane& mine) {
    Warp& w = warps_[size_t(current_ / kWarp)];
    Lane* lanes = w.lanes[state().exchanges++ % 2];
    lanes[current_ % kWarp] = mine;
    wait(w.barrier, kWarp);
    return lanes;
  }

 private:
  struct Warp {
    Barrier barrier;
    Lane lanes[2][kWarp];
  };

  void wait(Barrier& b, int count) {
    const int64_t generation = b.generation;
    ++progress_;
    if (++b.arrived == count) {
      b.arrived = 0;
      ++b.generation;
      return;
    }
    while (b.generation == generation) yield();
  }
  void yield() {
    if (_setjmp(state().context) == 0) _longjmp(scheduler_, 1);
  }
  void resume(Thread& t) {
    if (_setjmp(scheduler_) != 0) return;
    if (t.started) _longjmp(t.context, 1);
    t.started = true;
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = stacks_.get() + size_t(current_) * kStack;
    t.start.uc_stack.ss_size = kStack;
    t.start.uc_link = nullptr;
    makecontext(&t.start, &Block::entry, 0);
    setcontext(&t.start);
  }
  static void entry() {
    (*now->body_)();
    now->state().done = true;
    ++now->progress_;
    _longjmp(now->scheduler_, 1);
  }

  int threads_, current_ = 0;
  int64_t progress_ = 0;
  Barrier block_;
  std::vector<Warp> warps_;
  std::vector<Thread> threads_state_;
  // Not a vector, which would zero it at every launch.
  static inline const std::unique_ptr<char[]> stacks_{new char[size_t(kThreads) * kStack]};
  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
};

struct EmulatedSm80 {
  static int thread() { return Block::now->thread(); }
  static int64_t block_x() { return Block::now->index_x; }
  static int64_t block_y() { return Block::now->index_y; }
  static void sync_block() { Block::now->sync_block(); }
  static char* shared() { return Block::now->shared_memory(); }
  static double shuffle_xor(double value, int bits) {
    Block::Lane mine{};
    std::memcpy(mine.a, &value, sizeof value);
    const auto* lanes = Block::now->exchange(mine);
    std::memcpy(&value, lanes[Block::now->thread() % 32 ^ bits].a, sizeof value);
    return value;
  }

  static void copy_async(void* to, const void* from, bool present) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
    Block::now->state().groups.back().push_back({to, from, present});
  }
  static void commit() { Block::now->state().groups.emplace_back(); }
  template <int kPending>
  static void wait() {
    auto& groups = Block::now->state().groups;  // the last one is still open
    while (groups.size() > size_t(kPending) + 1) {
      for (const auto& c : groups.front()) {
        if (c.present)
          std::memcpy(c.to, c.from, 16);
        else
          std::memset(c.to, 0, 16);
      }
      groups.erase(groups.begin());
    }
  }

  template <bool kTransposed>
  static void load_matrices(uint32_t (&r)[4], const void* shared) {
    Block& block = *Block::now;
    Block::Lane mine{};
    mine.address = static_cast<const char*>(shared);
    if (reinterpret_cast<uintptr_t>(shared) % 16) std::abort();
    const auto* lanes = block.exchange(mine);
    const int lane = block.thread() % 32;
    for (int m = 0; m < 4; ++m) {
      unsigned banks = 0;
      for (int line = 0; line < 8; ++line)
        banks |= 1u << (reinterpret_cast<uintptr_t>(lanes[m * 8 + line].address) / 16 % 8);
      block.conflicts += lane == 0 && banks != 0xff;
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int line = kTransposed ? lane % 4 * 2 + e : lane / 4, index = kTransposed ? lane / 4 : lane % 4 * 2 + e;
        std::memcpy(&pair[e], lanes[m * 8 + line].address + index * 2, 2);
      }
      std::memcpy(&r[m], pair, 4);
    }
  }

  static void load_words(uint32_t (&r)[4], const char* const (&shared)[4]) {
    Block& block = *Block::now;
    Block::Lane mine{};
    for (int q = 0; q < 4; ++q) {
      std::memcpy(&r[q], shared[q], 4);
      mine.a[q] = uint32_t(shared[q] - block.shared_memory());
    }
    const auto* lanes = block.exchange(mine);
    for (int q = 0; q < 4 && block.thread() % 32 == 0; ++q) {
      uint32_t banks = 0;
      for (int lane = 0; lane < 32; ++lane) banks |= 1u << (lanes[lane].a[q] / 4 % 32);
      block.conflicts += banks != 0xffffffff;
    }
  }
  static uint32_t to_tf32(uint32_t bits) {
    const bool finite = (bits >> 23 & 0xff) != 0xff;
    if (finite) return (bits + 0x1000) & ~0x1fffu;
    return bits & 0x7fffff ? 0x7fffffff : bits;
  }

  // mma.m16n8k16 and, for tf32, m16n8k8, with the fragment layouts of the PTX ISA.
  template <class T>
  static void mma(float* d, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Block::Lane mine{};
    std::memcpy(mine.a, a, sizeof a);
    std::memcpy(mine.b, b, sizeof b);
    const auto* lanes = Block::now->exchange(mine);
    const int lane = Block::now->thread() % 32;
    constexpr int kPack = 4 / int(sizeof(T));  // elements of a register; four registers are half of k
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, col = lane % 4 * 2 + e % 2;
      double sum = 0;
      for (int k = 0; k < 8 * kPack; ++k) {
        const int high = k / (4 * kPack), owner = k % (4 * kPack) / kPack;
        sum += element<T>(lanes[row % 8 * 4 + owner].a[row / 8 + high * 2], k % kPack) *
               element<T>(lanes[col * 4 + owner].b[high], k % kPack);
      }
      d[e] += float(sum);
    }
  }

 private:
  // Of a float the instruction reads the upper 19 bits, those of tf32.
  template <class T>
  static double element(uint32_t word, int index) {
    word = std::is_same_v<T, tf32> ? word & ~0x1fffu : word >> (16 * index);
    T t;
    std::memcpy(&t, &word, sizeof t);
    return double(float(t));
  }
};

}  // namespace mi_kernels::cuda
