// The sm_90a engine: a matrix product whose A operand z_i x is generated in registers, tile by tile.
//
// One producer warp fills the stages of shared memory by TMA. Two consumer warpgroups compute 64 rows each. An operand
// x[64 rows, 64] stays in registers while the boxes W[o, i, 64 inputs] of all contexts i pass by. z_i comes in one of
// two ways:
//
//     scaled   the A operand of wgmma is z_i x, rounded to 16 bits; all steps share one accumulator
//     exact    the A operand is x; the product for one i and 64 inputs is scaled by z_i in float and added
//
// What shapes the scaled loop: wgmma reads its A operand from registers asynchronously, so they must not be overwritten
// before it has completed. There are two sets, used in turn: one is filled while the wgmmas that read the other run,
// and these are waited for before their set is filled again.
//
// Arch is a struct of static functions: Sm90 in ptx.cuh, or the emulator of the tests, which runs this file on a CPU.
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

// A tensor of 16-bit elements that is read element by element, with its strides.
struct StridedTensor {
  const uint16_t* data = nullptr;
  int64_t group = 0, row = 0, col = 0;
};

template <class Arch>
struct Params {
  typename Arch::TensorMap x, z, weight, weight_z, weight_x, y;
  int x_per_group, z_per_group, weight_per_group, weight_z_per_group, weight_x_per_group;  // TensorView::per_group
  ProblemShape shape;
  StridedTensor z_values;  // z as the factor of each row and step
  StridedTensor bias;      // [groups, out]; the row stride is not used
  uint16_t* y_data;        // [groups, rows, out], contiguous
  bool tma_store;          // through the tensor map of y, otherwise element by element
  int splits;              // blocks of a split tile, which form a cluster
};

template <class Arch, class T, class Traits>
struct Producer {
  const Params<Arch>& params;
  const uint32_t base;
  const int rank;
  WorkTile tile = {};
  PipelineState state = {};

  MI_DEVICE Producer(const Params<Arch>& p, uint32_t b, int r) : params(p), base(b), rank(r) {}

  MI_DEVICE uint32_t stage() const { return base + uint32_t(state.stage * Traits::kStageBytes); }
  MI_DEVICE uint32_t full() const { return base + uint32_t(Traits::full_barrier(state.stage)); }

  // Waits until the consumers of all blocks of the cluster have released the stage.
  MI_DEVICE void acquire(int bytes) {
    Arch::template mbarrier_wait<(Traits::kCluster > 1)>(base + uint32_t(Traits::empty_barrier(state.stage)),
                                                         state.phase ^ 1);
    Arch::mbarrier_expect(full(), bytes);
  }
  MI_DEVICE void a_step(AOperand operand, int k_block) {
    const bool is_x = operand == AOperand::x;
    acquire(Traits::kABytes);
    Arch::tma_load(is_x ? &params.x : &params.z, stage(), full(), k_block * kTileK, 0, tile.row,
                   tile.group * (is_x ? params.x_per_group : params.z_per_group));
    advance<Traits::kStages>(state);
  }
  MI_DEVICE void load_weights(const typename Arch::TensorMap* map, int col, int context, int group) {
    acquire(Traits::kWeightBytes);
    if constexpr (Traits::kCluster == 1) {
      Arch::tma_load(map, stage(), full(), col, context, tile.out, group);
    } else {  // each block of the cluster loads a slice of the outputs for all of them
      constexpr int kSlice = Traits::kTileN / Traits::kCluster;
      Arch::tma_load_multicast(map, stage() + uint32_t(rank * kSlice * kRowBytes), full(), (1 << Traits::kCluster) - 1,
                               col, context, tile.out + rank * kSlice, group);
    }
    advance<Traits::kStages>(state);
  }
  MI_DEVICE void b_steps(AOperand operand, int k_block, int first, int contexts, bool linear) {
    const int col = k_block * kTileK, group = tile.group;
    MI_NO_UNROLL
    for (int i = first; i < first + contexts; ++i)
      load_weights(&params.weight, col, i, group * params.weight_per_group);
    if (!linear) return;
    if (operand == AOperand::x)
      load_weights(&params.weight_x, col, 0, group * params.weight_x_per_group);
    else
      load_weights(&params.weight_z, col, 0, group * params.weight_z_per_group);
  }
};

template <class Arch, class T, class Traits, bool kExact>
struct Consumer {
  static constexpr int kAccumulators = Traits::kTileN / 2;

  const Params<Arch>& params;
  const uint32_t base;
  const int warpgroup, thread;  // within the warpgroup
  const Split split;
  const uint16_t* z_rows[2] = {};
  PipelineState state = {};
  uint32_t a[kMmasPerStep][4];            // fragments of the operand
  uint32_t scaled_a[2][kMmasPerStep][4];  // z_i times it, for even and odd steps
  float acc[kAccumulators];

  // z_i of the two rows in which a thread has elements, in the low and the high half.
  using Scale = uint32_t;
  MI_DEVICE static uint16_t half(Scale z, int row) { return uint16_t(row == 0 ? z : z >> 16); }

  MI_DEVICE Consumer(const Params<Arch>& p, uint32_t b, int warp, Split s)
      : params(p), base(b), warpgroup(warp / 4), thread(Arch::thread() % kWarpgroupThreads), split(s) {}

  MI_DEVICE uint32_t stage() const { return base + uint32_t(state.stage * Traits::kStageBytes); }
  MI_DEVICE void wait() {
    Arch::template mbarrier_wait<false>(base + uint32_t(Traits::full_barrier(state.stage)), state.phase);
  }
  MI_DEVICE void release(int stage) {
    Arch::sync_warp();
    const uint32_t empty = base + uint32_t(Traits::empty_barrier(stage));
    if constexpr (Traits::kCluster == 1) {
      if (thread % 32 == 0) Arch::mbarrier_arrive(empty);
    } else {
      if (thread % 32 < Traits::kCluster) Arch::mbarrier_arrive_cluster(empty, thread % 32);
    }
  }
  MI_DEVICE void release_previous() { release(state.stage == 0 ? Traits::kStages - 1 : state.stage - 1); }

  MI_DEVICE float bias(const WorkTile& tile, int out) const {
    if (!params.shape.bias || out >= params.shape.out || split.index > 0) return 0;
    return Arch::template widen<T>(params.bias.data[tile.group * params.bias.group + int64_t(out) * params.bias.col]);
  }

  // The accumulators start from the bias. Rows past the end are computed from the last row and not stored.
  MI_DEVICE void begin(const WorkTile& tile) {
    const int here = Arch::opaque(thread);
    MI_UNROLL
    for (int r = 0; r < kAccumulators; r += 4) {
      const int out = tile.out + accumulator_coord(here, r).col;
      acc[r] = acc[r + 2] = bias(tile, out);
      acc[r + 1] = acc[r + 3] = bias(tile, out + 1);
    }
    MI_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = tile.row + warpgroup * kWarpgroupM + a_coord(thread, h, 0).row;
      const int last = params.shape.rows - 1;
      z_rows[h] =
          params.z_values.data + tile.group * params.z_values.group + (row < last ? row : last) * params.z_values.row;
    }
  }

  MI_DEVICE void a_step(AOperand, int) {
    const MatrixCoord source = ldmatrix_row(thread);
    wait();
    MI_UNROLL
    for (int k = 0; k < kMmasPerStep; ++k)
      Arch::load_matrices(a[k], stage() + box_byte(warpgroup * kWarpgroupM + source.row, k * kMmaK + source.col));
    // TMA writes here next. It is of the async proxy, and no barrier alone orders it after these loads, which are of
    // the generic proxy. The boxes of W need no fence: wgmma reads them through the async proxy too.
    Arch::fence_async_proxy();
    release(state.stage);
    advance<Traits::kStages>(state);
  }

  // Past the last context it is 1, the factor of V and U.
  MI_DEVICE Scale scale(int i, int last) const {
    if (i >= last) return T::kOne * 0x10001u;
    const int64_t at = i * params.z_values.col;
    return z_rows[0][at] | uint32_t(z_rows[1][at]) << 16;
  }

  // Leaves its own wgmmas running. Completes those of the previous step and releases their stage.
  template <int kSet>
  MI_DEVICE void scaled_step(Scale z, bool first) {
    MI_UNROLL
    for (int k = 0; k < kMmasPerStep; ++k) {
      MI_UNROLL
      for (int r = 0; r < 4; ++r) scaled_a[kSet][k][r] = Arch::template multiply<T>(a[k][r], half(z, r & 1) * 0x10001u);
    }
    wait();
    Arch::wgmma_fence();
    const uint64_t weights = matrix_descriptor(stage());
    MI_UNROLL
    for (int k = 0; k < kMmasPerStep; ++k)
      Arch::template wgmma<T, Traits::kTileN, true>(acc, scaled_a[kSet][k], advance_k(weights, k));
    Arch::wgmma_commit();
    Arch::template wgmma_wait<1>();
    Arch::fence_operand(scaled_a[1 - kSet]);
    if (!first) release_previous();
    advance<Traits::kStages>(state);
  }

  MI_DEVICE void scaled_steps(int from, int last, int count) {
    Scale even = scale(from, last), odd = scale(from + 1, last);
    MI_NO_UNROLL
    for (int i = 0; i + 1 < count; i += 2) {
      const Scale now = even, then = odd;
      even = scale(from + i + 2, last), odd = scale(from + i + 3, last);
      scaled_step<0>(now, i == 0);
      scaled_step<1>(then, false);
    }
    if (count % 2 == 1) scaled_step<0>(even, count == 1);
    Arch::template wgmma_wait<0>();
    Arch::fence_operand(scaled_a[0]);
    Arch::fence_operand(scaled_a[1]);
    Arch::fence_operand(acc);
    release_previous();
  }

  MI_DEVICE void exact_steps(int from, int last, int count) {
    float product[kAccumulators];
    Scale next = scale(from, last);
    MI_NO_UNROLL
    for (int i = 0; i < count; ++i) {
      const Scale z = next;
      next = scale(from + i + 1, last);
      wait();
      Arch::wgmma_fence();
      const uint64_t weights = matrix_descriptor(stage());
      Arch::template wgmma<T, Traits::kTileN, false>(product, a[0], weights);
      MI_UNROLL
      for (int k = 1; k < kMmasPerStep; ++k)
        Arch::template wgmma<T, Traits::kTileN, true>(product, a[k], advance_k(weights, k));
      Arch::wgmma_commit();
      Arch::template wgmma_wait<0>();
      Arch::fence_operand(a);
      Arch::fence_operand(product);
      release(state.stage);
      advance<Traits::kStages>(state);
      const float factors[2] = {Arch::template widen<T>(half(z, 0)), Arch::template widen<T>(half(z, 1))};
      MI_UNROLL
      for (int r = 0; r < kAccumulators; ++r) acc[r] += factors[r >> 1 & 1] * product[r];
    }
  }

  MI_DEVICE void b_steps(AOperand, int, int from, int contexts, bool linear) {
    const int count = contexts + (linear ? 1 : 0);
    if constexpr (kExact)
      exact_steps(from, from + contexts, count);
    else
      scaled_steps(from, from + contexts, count);
  }

  // ---- the result ----

  // Calls put(row, col, pair) for this thread's pairs of columns.
  template <class Put>
  MI_DEVICE void for_each_pair(Put&& put) {
    const int here = Arch::opaque(thread);
    MI_UNROLL
    for (int r = 0; r < kAccumulators; r += 2) {
      const MatrixCoord at = accumulator_coord(here, r);
      put(at.row, at.col, Arch::template pack<T>(acc[r], acc[r + 1]));
    }
  }

  MI_DEVICE void store_boxes(const WorkTile& tile) {
    constexpr int kBoxBytes = kWarpgroupM * kRowBytes;
    const uint32_t results = base + uint32_t(Traits::kResultOffset + warpgroup * (Traits::kTileN / 64) * kBoxBytes);
    if (thread == 0) Arch::tma_store_wait();  // the stores of the previous tile have read their boxes
    Arch::sync_warpgroup(warpgroup);
    for_each_pair([&](int row, int col, uint32_t pair) {
      Arch::store_shared(results + uint32_t(col / 64 * kBoxBytes) + box_byte(row, col % 64), pair);
    });
    Arch::fence_async_proxy();
    Arch::sync_warpgroup(warpgroup);
    const int row = tile.row + warpgroup * kWarpgroupM;
    if (thread != 0 || row >= params.shape.rows) return;
    MI_NO_UNROLL
    for (int q = 0; q < Traits::kTileN / 64; ++q)
      if (tile.out + q * 64 < params.shape.out)
        Arch::tma_store(&params.y, results + uint32_t(q * kBoxBytes), tile.out + q * 64, 0, row, tile.group);
    Arch::tma_store_commit();
  }

  MI_DEVICE void store_pair(const WorkTile& tile, int row, int col, uint32_t pair) {
    const ProblemShape& p = params.shape;
    const int b = tile.row + warpgroup * kWarpgroupM + row, o = tile.out + col;
    if (b >= p.rows) return;
    uint16_t* y = params.y_data + (int64_t(tile.group) * p.rows + b) * p.out + o;
    if (o < p.out) y[0] = uint16_t(pair);
    if (o + 1 < p.out) y[1] = uint16_t(pair >> 16);
  }

  // Each block of a split tile adds and stores a part of the columns, in the order of the splits, so that the result
  // does not depend on timing.
  MI_DEVICE void store_split(const WorkTile& tile) {
    const int index = Arch::opaque(warpgroup * kWarpgroupThreads + thread);
    Arch::sync_consumers();  // the other warpgroup may still read the stages
    MI_UNROLL
    for (int r = 0; r < kAccumulators; ++r)
      Arch::store_shared(base + uint32_t(Traits::accumulator_byte(index, r)), acc[r]);
    Arch::sync_cluster();
    const int own = kAccumulators / split.count;
    MI_NO_UNROLL
    for (int r = split.index * own; r < (split.index + 1) * own; r += 2) {
      float low = 0, high = 0;
      MI_NO_UNROLL
      for (int s = 0; s < split.count; ++s) {
        low += Arch::load_shared_cluster(base + uint32_t(Traits::accumulator_byte(index, r)), s);
        high += Arch::load_shared_cluster(base + uint32_t(Traits::accumulator_byte(index, r + 1)), s);
      }
      const MatrixCoord at = accumulator_coord(index % kWarpgroupThreads, r);
      store_pair(tile, at.row, at.col, Arch::template pack<T>(low, high));
    }
  }

  MI_DEVICE void finish(const WorkTile& tile) {
    if constexpr (Traits::kSplit)
      store_split(tile);
    else if (params.tma_store)
      store_boxes(tile);
    else
      for_each_pair([&](int row, int col, uint32_t pair) { store_pair(tile, row, col, pair); });
  }
};

// The whole kernel. `shared`: Traits::kSharedBytes of dynamic shared memory.
template <class Arch, class T, class Traits, bool kExact>
MI_DEVICE void forward(const Params<Arch>& params, const void* shared) {
  const uint32_t base = (Arch::shared_address(shared) + kAlignment - 1) / kAlignment * kAlignment;
  const int warp = Arch::warp(), rank = Traits::kCluster > 1 ? Arch::cluster_rank() : 0;
  if (Arch::thread() == 0) {
    for (int s = 0; s < Traits::kStages; ++s) {
      Arch::mbarrier_init(base + uint32_t(Traits::full_barrier(s)), 1);
      Arch::mbarrier_init(base + uint32_t(Traits::empty_barrier(s)), kConsumerWarps * Traits::kCluster);
    }
    Arch::mbarrier_init_fence();
  }
  // The blocks of a split tile need not meet before they exchange their accumulators.
  if constexpr (Traits::kCluster > 1)
    Arch::sync_cluster();
  else
    Arch::sync_block();

  const TileScheduler<Traits> scheduler(params.shape);
  Split split;
  if constexpr (Traits::kSplit) split = {Arch::cluster_rank(), params.splits};
  const int cluster_size = Traits::kCluster * split.count;
  const int first = Arch::block() / cluster_size, step = Arch::blocks() / cluster_size;
  if (warp >= kConsumerWarps) {
    Arch::template dealloc_registers<kProducerRegisters>();
    if (Arch::thread() == kConsumerWarps * 32) {
      Producer<Arch, T, Traits> producer(params, base, rank);
      MI_NO_UNROLL
      for (int unit = first; unit < scheduler.units; unit += step) {
        producer.tile = scheduler.tile(unit, rank);
        for_each_step(params.shape, split, producer);
      }
    }
    Arch::sync_warp();
    if constexpr (Traits::kSplit) Arch::sync_cluster();  // the one in store_split()
  } else {
    Arch::template alloc_registers<kConsumerRegisters>();
    Consumer<Arch, T, Traits, kExact> consumer(params, base, warp, split);
    MI_NO_UNROLL
    for (int unit = first; unit < scheduler.units; unit += step) {
      const WorkTile tile = scheduler.tile(unit, rank);
      consumer.begin(tile);
      for_each_step(params.shape, split, consumer);
      consumer.finish(tile);
    }
    if (consumer.thread == 0) Arch::tma_store_wait();
  }
  // No block may exit while another of its cluster still uses its shared memory or its barriers.
  if constexpr (Traits::kCluster > 1 || Traits::kSplit) Arch::sync_cluster();
}

}  // namespace mi_kernels::cuda::sm90
