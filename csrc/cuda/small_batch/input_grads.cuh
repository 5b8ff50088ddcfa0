// dx and dz of a few rows: W streams past once. A thread has kN neighbouring inputs j, of all rows of the block, and
// sums T_ij = sum_o g[o] W[o, i, j] over the outputs of its split for one i after the other; z_i T_ij is added to its
// dx, and the sums over j of x_j T_ij are dz_i. `team` threads lie along j, 256 / team along i.
//
// Compiled, and run on the emulator of tests/emulated; not yet run on a GPU.
#pragma once

#include "cuda/small_batch/forward.cuh"

namespace mi_kernels::cuda {

// Outputs whose chunks of W are under way together.
template <class T>
inline constexpr int kStreamDeep = sizeof(T) == 8 ? 2 : 4;

template <class T>
constexpr int stream_grads_shared_bytes() {
  return kEngineThreads * kChunk<T> * kStreamRows<T> * int(sizeof(AccOf<T>));
}

// sums[r] = sum over o from `begin` to `end` of g[row0 + r, o] W[o, ...] at `from` and on.
template <class T, int kN>
MI_DEVICE void stream_outputs(const StreamMatrix<T>& grad, const T* from, int64_t line, int64_t row0, int64_t begin,
                              int64_t end, AccOf<T> (&sums)[kStreamRows<T>][kN]) {
  using Acc = AccOf<T>;
  from += begin * line;
  MI_NO_UNROLL for (int64_t o = begin; o < end; o += kStreamDeep<T>) {
    Chunk<T> weight[kStreamDeep<T>];
    MI_UNROLL for (int d = 0; d < kStreamDeep<T>; ++d) if (o + d < end) weight[d] = load_elements<kN>(from + d * line);
    MI_UNROLL for (int d = 0; d < kStreamDeep<T>; ++d) {
      if (o + d >= end) break;
      MI_UNROLL for (int r = 0; r < kStreamRows<T>; ++r) {
        const Acc g = Acc(*grad.from(row0 + r, o + d));
        MI_UNROLL for (int e = 0; e < kN; ++e) sums[r][e] += g * Acc(weight[d].element[e]);
      }
    }
    from += kStreamDeep<T> * line;
  }
}

// Sums of the `team` values that lie `stride` apart, to the first of them. All threads come here, and each may then
// write its own values again.
template <class Gpu, int kCount, class Acc>
MI_DEVICE void add_up(Acc* values, int place, int team, int stride) {
  MI_NO_UNROLL for (int half = team / 2; half > 0; half /= 2) {
    Gpu::sync_block();
    if (place < half)
      MI_UNROLL for (int v = 0; v < kCount; ++v) values[v * kEngineThreads] +=
          values[v * kEngineThreads + half * stride];
  }
  Gpu::sync_block();
}

template <class Gpu, class T, int kN>
MI_DEVICE void stream_grads(const InputGradsCall<T>& call) {
  using Acc = AccOf<T>;
  constexpr int kRows = kStreamRows<T>;
  const TilePlace p = tile_place(call.grid, Gpu::block_x());
  const GradsStream& s = call.stream;
  const int team = s.team, teams = kEngineThreads / team, member = Gpu::thread() % team, own = Gpu::thread() / team;
  // Splits are of the items first and of the outputs second.
  const int64_t item_split = p.split % s.item_splits, out_split = p.split / s.item_splits;
  const int64_t row0 = p.row_tile * kRows, j = (p.col_tile * team + member) * kN;
  const int64_t i0 = item_split * call.grid.step, o0 = out_split * s.out_step;
  const int64_t i1 = i0 + call.grid.step < call.context ? i0 + call.grid.step : call.context;
  const int64_t o1 = o0 + s.out_step < call.depth ? o0 + s.out_step : call.depth;
  const StreamMatrix<T> grad(call.grad, p.group), weight(call.weight, p.group);
  const auto row = [&](int r) { return grad.within(row0 + r); };
  const T* z = call.z + p.group * call.z_group;
  const T* x = call.x + p.group * call.x_group;
  auto* shared = reinterpret_cast<Acc*>(Gpu::shared()) + Gpu::thread();
  const bool inside = j < call.width;
  Acc own_x[kRows][kN] = {}, dx[kRows][kN] = {};
  if (call.dz && inside)
    MI_UNROLL for (int r = 0; r < kRows; ++r) MI_UNROLL for (int e = 0; e < kN; ++e) own_x[r][e] =
        Acc(x[row(r) * call.x_row + (j + e) * call.x_col]);
  MI_NO_UNROLL for (int64_t i_team = i0; i_team < i1; i_team += teams) {
    const int64_t i = i_team + own;
    Acc sums[kRows][kN] = {}, share[kRows] = {};
    if (inside && i < i1) {
      stream_outputs<T, kN>(grad, weight.data + i * call.weight.item + j, call.weight.line, row0, o0, o1, sums);
      MI_UNROLL for (int r = 0; r < kRows; ++r) {
        const Acc factor = call.dx ? Acc(z[row(r) * call.z_row + i * call.z_col]) : Acc(0);
        MI_UNROLL for (int e = 0; e < kN; ++e) {
          if (call.dx) dx[r][e] += factor * sums[r][e];
          share[r] += own_x[r][e] * sums[r][e];
        }
      }
    }
    if (!call.dz) continue;
    MI_UNROLL for (int r = 0; r < kRows; ++r) shared[r * kEngineThreads] = share[r];
    add_up<Gpu, kRows>(shared, member, team, 1);
    if (member == 0 && i < i1)
      MI_UNROLL for (int r = 0; r < kRows; ++r) if (row0 + r < call.rows) call
          .dz[(((out_split * call.grid.col_tiles + p.col_tile) * call.grid.groups + p.group) * call.rows + row0 + r) *
                  call.context +
              i] = shared[r * kEngineThreads];
  }
  if (!call.dx) return;
  MI_UNROLL for (int r = 0; r < kRows; ++r) MI_UNROLL for (int e = 0; e < kN; ++e)
      shared[(r * kN + e) * kEngineThreads] = dx[r][e];
  add_up<Gpu, kRows * kN>(shared, own, teams, team);
  if (own > 0 || !inside) return;
  MI_UNROLL for (int r = 0; r < kRows; ++r) MI_UNROLL for (int e = 0; e < kN; ++e) if (row0 + r < call.rows)
      call.dx[((p.split * call.grid.groups + p.group) * call.rows + row0 + r) * call.width + j + e] =
      shared[(r * kN + e) * kEngineThreads];
}

template <class Gpu, class T>
MI_DEVICE void stream_grads_block(const InputGradsCall<T>& call) {
  if (call.stream_chunks)
    stream_grads<Gpu, T, kChunk<T>>(call);
  else
    stream_grads<Gpu, T, 1>(call);
}

}  // namespace mi_kernels::cuda
