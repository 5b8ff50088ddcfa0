// The sm_90a engine: a matrix product whose left operand z_i x is made in registers, tile by tile.
//
// One warp loads: it fills a ring of stages in shared memory through the copy engine. Two warpgroups of consumers take
// 64 rows each. An operand x[64 rows, 64] stays in registers while the blocks W[o, i, 64 inputs] of all i pass by. Two
// ways to bring z_i in:
//
//     scaled   the operand of wgmma is z_i x, rounded to 16 bits; all steps add to one accumulator
//     exact    the operand is x; what comes out for one i and 64 inputs is multiplied with z_i in float and added
//
// The rule that shapes the scaled loop: wgmma reads its left operand from registers after it was issued, so that these
// may not be written again before it is known to be complete. So there are two sets, filled in turn; a set is filled
// while the wgmmas of the other run, and they are waited for before it is their turn again.
//
// The machine M is a struct of static functions: Hopper in ptx.cuh, or the one of the tests, which runs this file on a
// CPU. Everything here is plain C++.
#pragma once

#include "cuda/sm90/layout.h"

namespace mi_kernels::cuda::sm90 {

struct Bf16 {
  static constexpr bool kBfloat16 = true;
  static constexpr uint16_t kOne = 0x3F80;
};
struct F16 {
  static constexpr bool kBfloat16 = false;
  static constexpr uint16_t kOne = 0x3C00;
};

// A strided tensor of 16-bit numbers that is read element by element.
struct Elements {
  const uint16_t* data = nullptr;
  int64_t group = 0, row = 0, col = 0;
};

template <class M>
struct Call {
  typename M::TensorMap x, z, weight, weight_z, weight_x, y;
  int x_group, z_group, weight_group, weight_z_group, weight_x_group;  // View::group
  Problem problem;
  Elements scales;    // z again: one number per row and step
  Elements bias;      // [groups, out]: `row` is not used
  uint16_t* result;   // y [groups, rows, out], contiguous
  bool store_blocks;  // through the tensor map of y, else element by element
  int split;          // Shape::kSplit: blocks that share a tile, a cluster for each tile
};

template <class M, class T, class Shape>
struct Producer {
  const Call<M>& call;
  const uint32_t base;
  const int rank;
  Tile tile = {};
  Ring ring = {};

  MI_DEVICE Producer(const Call<M>& c, uint32_t b, int r) : call(c), base(b), rank(r) {}

  MI_DEVICE uint32_t stage() const { return base + uint32_t(ring.stage * Shape::kStageBytes); }
  MI_DEVICE uint32_t full() const { return base + uint32_t(Shape::full(ring.stage)); }

  // Waits until the consumers of all blocks of the cluster have left the stage.
  MI_DEVICE void acquire(int bytes) {
    M::template barrier_wait<(Shape::kCluster > 1)>(base + uint32_t(Shape::empty(ring.stage)), ring.phase ^ 1);
    M::barrier_expect(full(), bytes);
  }
  MI_DEVICE void operand(Factor factor, int block) {
    const bool is_x = factor == Factor::x;
    acquire(Shape::kOperandBytes);
    M::load(is_x ? &call.x : &call.z, stage(), full(), block * kDepth, 0, tile.row,
            tile.group * (is_x ? call.x_group : call.z_group));
    advance<Shape::kStages>(ring);
  }
  MI_DEVICE void block_of(const typename M::TensorMap* map, int col, int context, int group) {
    acquire(Shape::kWeightBytes);
    if constexpr (Shape::kCluster == 1) {
      M::load(map, stage(), full(), col, context, tile.out, group);
    } else {  // each block of the cluster loads its share of the outputs, for all
      constexpr int kShare = Shape::kOut / Shape::kCluster;
      M::load_multicast(map, stage() + uint32_t(rank * kShare * kRowBytes), full(), (1 << Shape::kCluster) - 1, col,
                        context, tile.out + rank * kShare, group);
    }
    advance<Shape::kStages>(ring);
  }
  MI_DEVICE void weights(Factor factor, int block, int first, int contexts, bool plain) {
    const int col = block * kDepth, group = tile.group;
    MI_NO_UNROLL
    for (int i = first; i < first + contexts; ++i) block_of(&call.weight, col, i, group * call.weight_group);
    if (!plain) return;
    if (factor == Factor::x)
      block_of(&call.weight_x, col, 0, group * call.weight_x_group);
    else
      block_of(&call.weight_z, col, 0, group * call.weight_z_group);
  }
};

template <class M, class T, class Shape, bool kExact>
struct Consumer {
  static constexpr int kSums = Shape::kOut / 2;

  const Call<M>& call;
  const uint32_t base;
  const int warpgroup, thread;  // within the warpgroup
  const Share share;
  const uint16_t* scales[2] = {};
  Ring ring = {};
  uint32_t left[kInstructions][4];       // the operand
  uint32_t scaled[2][kInstructions][4];  // z_i times it, for even and odd steps
  float sums[kSums];

  // z_i of the two rows in which a thread has elements, in the low and the high half.
  using Scale = uint32_t;
  MI_DEVICE static uint16_t half(Scale z, int row) { return uint16_t(row == 0 ? z : z >> 16); }

  MI_DEVICE Consumer(const Call<M>& c, uint32_t b, int warp, Share part)
      : call(c), base(b), warpgroup(warp / 4), thread(M::thread() % kWarpgroupThreads), share(part) {}

  MI_DEVICE uint32_t stage() const { return base + uint32_t(ring.stage * Shape::kStageBytes); }
  MI_DEVICE void wait() { M::template barrier_wait<false>(base + uint32_t(Shape::full(ring.stage)), ring.phase); }
  MI_DEVICE void release(int stage) {
    M::sync_warp();
    const uint32_t empty = base + uint32_t(Shape::empty(stage));
    if constexpr (Shape::kCluster == 1) {
      if (thread % 32 == 0) M::barrier_arrive(empty);
    } else {
      if (thread % 32 < Shape::kCluster) M::barrier_arrive_at(empty, thread % 32);
    }
  }

  MI_DEVICE float bias(const Tile& tile, int out) const {
    if (!call.problem.bias || out >= call.problem.out || share.index > 0) return 0;
    return M::template widen<T>(call.bias.data[tile.group * call.bias.group + int64_t(out) * call.bias.col]);
  }

  // The sums start from the bias. Rows past the end are computed with the last one's numbers and not stored.
  MI_DEVICE void begin(const Tile& tile) {
    const int here = M::fresh(thread);
    MI_UNROLL
    for (int r = 0; r < kSums; r += 4) {
      const int out = tile.out + sum_place(here, r).col;
      sums[r] = sums[r + 2] = bias(tile, out);
      sums[r + 1] = sums[r + 3] = bias(tile, out + 1);
    }
    MI_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = tile.row + warpgroup * kWarpgroupRows + operand_place(thread, h, 0).row;
      const int last = call.problem.rows - 1;
      scales[h] = call.scales.data + tile.group * call.scales.group + (row < last ? row : last) * call.scales.row;
    }
  }

  MI_DEVICE void operand(Factor, int) {
    const Place named = operand_row(thread);
    wait();
    MI_UNROLL
    for (int k = 0; k < kInstructions; ++k)
      M::load_matrices(left[k],
                       stage() + block_byte(warpgroup * kWarpgroupRows + named.row, k * kInstructionDepth + named.col));
    // The copy engine writes here next. It is another proxy than these loads, which no barrier alone orders before it;
    // wgmma reads the blocks of W through the copy engine's own.
    M::shared_fence();
    release(ring.stage);
    advance<Shape::kStages>(ring);
  }

  // Past the last context, 1: what V and U are multiplied with.
  MI_DEVICE Scale scale(int i, int last) const {
    if (i >= last) return T::kOne * 0x10001u;
    const int64_t at = i * call.scales.col;
    return scales[0][at] | uint32_t(scales[1][at]) << 16;
  }

  // Leaves its own wgmmas running and completes those of the step before, whose stage it releases.
  template <int kSet>
  MI_DEVICE void scaled_step(Scale z, bool first) {
    MI_UNROLL
    for (int k = 0; k < kInstructions; ++k) MI_UNROLL
    for (int r = 0; r < 4; ++r) scaled[kSet][k][r] = M::template multiply<T>(left[k][r], half(z, r & 1) * 0x10001u);
    wait();
    M::mma_fence();
    const uint64_t block = matrix_descriptor(stage());
    MI_UNROLL
    for (int k = 0; k < kInstructions; ++k)
      M::template mma<T, Shape::kOut, true>(sums, scaled[kSet][k], advance(block, k));
    M::mma_commit();
    M::template mma_wait<1>();
    M::hold(scaled[1 - kSet]);
    if (!first) release(ring.stage == 0 ? Shape::kStages - 1 : ring.stage - 1);
    advance<Shape::kStages>(ring);
  }

  MI_DEVICE void scaled_weights(int from, int last, int count) {
    Scale even = scale(from, last), odd = scale(from + 1, last);
    MI_NO_UNROLL
    for (int i = 0; i + 1 < count; i += 2) {
      const Scale now = even, then = odd;
      even = scale(from + i + 2, last), odd = scale(from + i + 3, last);
      scaled_step<0>(now, i == 0);
      scaled_step<1>(then, false);
    }
    if (count % 2 == 1) scaled_step<0>(even, count == 1);
    M::template mma_wait<0>();
    M::hold(scaled[0]);
    M::hold(scaled[1]);
    M::hold(sums);
    release(ring.stage == 0 ? Shape::kStages - 1 : ring.stage - 1);
  }

  MI_DEVICE void exact_weights(int from, int last, int count) {
    float part[kSums];
    Scale next = scale(from, last);
    MI_NO_UNROLL
    for (int i = 0; i < count; ++i) {
      const Scale z = next;
      next = scale(from + i + 1, last);
      wait();
      M::mma_fence();
      const uint64_t block = matrix_descriptor(stage());
      M::template mma<T, Shape::kOut, false>(part, left[0], block);
      MI_UNROLL
      for (int k = 1; k < kInstructions; ++k) M::template mma<T, Shape::kOut, true>(part, left[k], advance(block, k));
      M::mma_commit();
      M::template mma_wait<0>();
      M::hold(left);
      M::hold(part);
      release(ring.stage);
      advance<Shape::kStages>(ring);
      const float factors[2] = {M::template widen<T>(half(z, 0)), M::template widen<T>(half(z, 1))};
      MI_UNROLL
      for (int r = 0; r < kSums; ++r) sums[r] += factors[r >> 1 & 1] * part[r];
    }
  }

  MI_DEVICE void weights(Factor, int, int from, int contexts, bool plain) {
    const int count = contexts + (plain ? 1 : 0);
    if constexpr (kExact)
      exact_weights(from, from + contexts, count);
    else
      scaled_weights(from, from + contexts, count);
  }

  // ---- the result ----

  // Calls put(row, col, pair) for the pairs of columns that this thread has.
  template <class Put>
  MI_DEVICE void pairs(Put&& put) {
    const int here = M::fresh(thread);
    MI_UNROLL
    for (int r = 0; r < kSums; r += 2) {
      const Place place = sum_place(here, r);
      put(place.row, place.col, M::template pack<T>(sums[r], sums[r + 1]));
    }
  }

  MI_DEVICE void store_blocks(const Tile& tile) {
    constexpr int kBlock = kWarpgroupRows * kRowBytes;
    const uint32_t results = base + uint32_t(Shape::kResults + warpgroup * (Shape::kOut / 64) * kBlock);
    if (thread == 0) M::store_wait();  // the stores of the tile before have read their blocks
    M::sync_warpgroup(warpgroup);
    pairs([&](int row, int col, uint32_t pair) {
      M::shared_store(results + uint32_t(col / 64 * kBlock) + block_byte(row, col % 64), pair);
    });
    M::shared_fence();
    M::sync_warpgroup(warpgroup);
    const int row = tile.row + warpgroup * kWarpgroupRows;
    if (thread != 0 || row >= call.problem.rows) return;
    MI_NO_UNROLL
    for (int q = 0; q < Shape::kOut / 64; ++q)
      if (tile.out + q * 64 < call.problem.out)
        M::store(&call.y, results + uint32_t(q * kBlock), tile.out + q * 64, 0, row, tile.group);
    M::store_commit();
  }

  MI_DEVICE void store_pair(const Tile& tile, int row, int col, uint32_t pair) {
    const Problem& p = call.problem;
    const int b = tile.row + warpgroup * kWarpgroupRows + row, o = tile.out + col;
    if (b >= p.rows) return;
    uint16_t* y = call.result + (int64_t(tile.group) * p.rows + b) * p.out + o;
    if (o < p.out) y[0] = uint16_t(pair);
    if (o + 1 < p.out) y[1] = uint16_t(pair >> 16);
  }

  // Where blocks share a tile: each stores a part of the columns, whose sums it adds in the order of the shares, so
  // that the result does not depend on who was first.
  MI_DEVICE void store_share(const Tile& tile) {
    const int index = M::fresh(warpgroup * kWarpgroupThreads + thread);
    M::sync_consumers();  // the other warpgroup may still read the stages
    MI_UNROLL
    for (int r = 0; r < kSums; ++r) M::shared_store(base + uint32_t(Shape::sum_byte(index, r)), sums[r]);
    M::sync_cluster();
    const int mine = kSums / share.count;
    MI_NO_UNROLL
    for (int r = share.index * mine; r < (share.index + 1) * mine; r += 2) {
      float low = 0, high = 0;
      MI_NO_UNROLL
      for (int s = 0; s < share.count; ++s) {
        low += M::shared_load_at(base + uint32_t(Shape::sum_byte(index, r)), s);
        high += M::shared_load_at(base + uint32_t(Shape::sum_byte(index, r + 1)), s);
      }
      const Place place = sum_place(index % kWarpgroupThreads, r);
      store_pair(tile, place.row, place.col, M::template pack<T>(low, high));
    }
  }

  MI_DEVICE void finish(const Tile& tile) {
    if constexpr (Shape::kSplit)
      store_share(tile);
    else if (call.store_blocks)
      store_blocks(tile);
    else
      pairs([&](int row, int col, uint32_t pair) { store_pair(tile, row, col, pair); });
  }
};

// The whole kernel. `shared`: Shape::kBytes of dynamic shared memory.
template <class M, class T, class Shape, bool kExact>
MI_DEVICE void forward(const Call<M>& call, const void* shared) {
  const uint32_t base = (M::shared_address(shared) + kAlignment - 1) / kAlignment * kAlignment;
  const int warp = M::warp(), rank = Shape::kCluster > 1 ? M::rank() : 0;
  if (M::thread() == 0) {
    for (int s = 0; s < Shape::kStages; ++s) {
      M::barrier_init(base + uint32_t(Shape::full(s)), 1);
      M::barrier_init(base + uint32_t(Shape::empty(s)), kConsumerWarps * Shape::kCluster);
    }
    M::barrier_init_fence();
  }
  // Blocks that only share a tile meet when they have something to exchange.
  if constexpr (Shape::kCluster > 1)
    M::sync_cluster();
  else
    M::sync_block();

  const Schedule<Shape> schedule(call.problem);
  Share share;
  if constexpr (Shape::kSplit) share = {M::rank(), call.split};
  const int together = Shape::kCluster * share.count;
  const int first = M::block() / together, step = M::blocks() / together;
  if (warp >= kConsumerWarps) {
    M::template give_registers<kLoaderRegisters>();
    if (M::thread() == kConsumerWarps * 32) {
      Producer<M, T, Shape> producer(call, base, rank);
      MI_NO_UNROLL
      for (int unit = first; unit < schedule.units; unit += step) {
        producer.tile = schedule.tile(unit, rank);
        walk(call.problem, share, producer);
      }
    }
    M::sync_warp();
    if constexpr (Shape::kSplit) M::sync_cluster();  // that of store_share()
  } else {
    M::template take_registers<kConsumerRegisters>();
    Consumer<M, T, Shape, kExact> consumer(call, base, warp, share);
    MI_NO_UNROLL
    for (int unit = first; unit < schedule.units; unit += step) {
      const Tile tile = schedule.tile(unit, rank);
      consumer.begin(tile);
      walk(call.problem, share, consumer);
      consumer.finish(tile);
    }
    if (consumer.thread == 0) M::store_wait();
  }
  // No block may end while another of its cluster still uses its shared memory or its barriers.
  if constexpr (Shape::kCluster > 1 || Shape::kSplit) M::sync_cluster();
}

}  // namespace mi_kernels::cuda::sm90
