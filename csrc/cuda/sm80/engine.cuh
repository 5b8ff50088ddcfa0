// The engine for sm_80 and later: sums over k of a(row, k) b(col, k), tile by tile. cp.async keeps kStages - 1 stages
// in flight. Operands that are generated are prefetched to registers before a stage is computed and stored to shared
// memory after it.
//
// Compiled and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/sm80/mma.cuh"

namespace mi_kernels::cuda {

// A thread's share of loading one operand: the chunks that it copies, and their current coordinates.
template <class Arch, class Operand, int kRows, Major kMajor>
class TileLoader {
  using T = typename Operand::Element;
  using Layout = TileLayout<int(sizeof(T)), kRows, kMajor>;
  static constexpr int kN = Layout::kChunksPerThread;

 public:
  static constexpr int kBytes = Layout::kBytes;

  MI_DEVICE TileLoader(const Operand& operand, int64_t row0, int64_t k0, int64_t stages)
      : operand_(operand), row0_(row0), k0_(k0), stages_(stages) {
    rewind();
  }

  // Issues the copies of a stage, or prefetches what has to be generated.
  MI_DEVICE void issue(char* tile) {
    MI_UNROLL
    for (int q = 0; q < kN; ++q) {
      if constexpr (Operand::kGenerated)
        prefetched_[q] = operand_.prefetch(coord_[q]);
      else
        operand_.template copy_chunk<Arch>(coord_[q], tile + byte(q));
    }
    advance();
  }
  // Generates and stores what was prefetched.
  MI_DEVICE void store(char* tile) {
    if constexpr (Operand::kGenerated) {
      MI_UNROLL
      for (int q = 0; q < kN; ++q)
        store_chunk(reinterpret_cast<T*>(tile + byte(q)), Operand::template generate<Arch>(prefetched_[q]));
    }
  }

 private:
  static MI_DEVICE int byte(int q) {
    const int id = Arch::thread() + q * kEngineThreads;
    return Layout::chunk_byte(id / Layout::kChunksPerLine, id % Layout::kChunksPerLine);
  }
  MI_DEVICE void rewind() {
    MI_UNROLL
    for (int q = 0; q < kN; ++q) {
      const int id = Arch::thread() + q * kEngineThreads;
      const int line = id / Layout::kChunksPerLine, inner = id % Layout::kChunksPerLine * Layout::kElementsPerChunk;
      if constexpr (kMajor == Major::k) {
        const bool second = Operand::kPair && line >= kRows / 2;
        coord_[q] = operand_.coord(row0_ + line - (second ? kRows / 2 : 0), k0_ + inner, second);
      } else {
        coord_[q] = operand_.coord(k0_ + line, row0_ + inner, false);
      }
    }
    stage_ = 0;
  }
  MI_DEVICE void advance() {
    if (++stage_ == stages_) {
      operand_.next_context();
      return rewind();
    }
    MI_UNROLL
    for (int q = 0; q < kN; ++q) {
      if constexpr (kMajor == Major::k)
        operand_.move_inner(coord_[q], Layout::kStageK);
      else
        operand_.move_outer(coord_[q], Layout::kStageK);
    }
  }

  Operand operand_;
  int64_t row0_, k0_, stages_, stage_;
  typename Operand::Coord coord_[kN];
  typename Operand::Prefetched prefetched_[kN];
};

template <class Mma>
constexpr int stage_bytes() {
  return (Mma::Tile::kRows + Mma::Tile::kCols) * kStageBytes;
}
// Elements between rows of the accumulator tile in shared memory; the padding spreads rows over the banks.
template <class Mma>
constexpr int epilogue_pitch() {
  return Mma::Tile::kCols + 16 / int(sizeof(typename Mma::Acc));
}
template <class Mma>
constexpr int engine_shared_bytes() {
  constexpr int stages = kStages * stage_bytes<Mma>();
  constexpr int accumulators = Mma::Tile::kRows * epilogue_pitch<Mma>() * int(sizeof(typename Mma::Acc));
  return stages > accumulators ? stages : accumulators;
}

struct NoOp {
  MI_DEVICE void operator()(int64_t) const {}
};

// The main loop: `contexts` products of `stages` stages each, in one pipeline. context_done(context) sees the
// accumulators after each of them and clears them if it needs to.
template <class Arch, class Mma, Major kMajorA, Major kMajorB, Sums kSums = Sums::both, class A, class B,
          class ContextDone>
MI_DEVICE void mainloop(const A& a, const B& b, int64_t row0, int64_t col0, int64_t k0, int64_t stages,
                        int64_t contexts, typename Mma::Accumulators& acc, ContextDone&& context_done) {
  if (stages <= 0 || contexts <= 0) return;
  TileLoader<Arch, A, Mma::Tile::kRows, kMajorA> load_a(a, row0, k0, stages);
  TileLoader<Arch, B, Mma::Tile::kCols, kMajorB> load_b(b, col0, k0, stages);
  char* const shared = Arch::shared();
  const auto a_tile = [&](int64_t step) { return shared + step % kStages * stage_bytes<Mma>(); };
  const auto b_tile = [&](int64_t step) { return a_tile(step) + load_a.kBytes; };
  const int64_t steps = stages * contexts;
  Arch::sync_block();  // the shared memory may still be in use
  MI_NO_UNROLL
  for (int64_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) {
      load_a.issue(a_tile(step));
      load_b.issue(b_tile(step));
      load_a.store(a_tile(step));
      load_b.store(b_tile(step));
    }
    Arch::commit();
  }
  int64_t stage = 0, context = 0;
  MI_NO_UNROLL
  for (int64_t step = 0; step < steps; ++step) {
    Arch::template wait<kStages - 2>();
    Arch::sync_block();
    const int64_t next = step + kStages - 1;
    if (next < steps) {
      load_a.issue(a_tile(next));
      load_b.issue(b_tile(next));
    }
    Arch::commit();
    Mma::template multiply<A, B, kMajorA, kMajorB, kSums>(a_tile(step), b_tile(step), acc);
    if (next < steps) {
      load_a.store(a_tile(next));
      load_b.store(b_tile(next));
    }
    if (++stage == stages) {
      context_done(context++);
      stage = 0;
    }
  }
  Arch::template wait<0>();
}

template <class Mma>
MI_DEVICE auto in_group(const MatrixOperand<typename Mma::T>& matrix, int64_t group) {
  auto operand = Mma::operand(matrix);
  operand.to_group(group);
  return operand;
}

}  // namespace mi_kernels::cuda
