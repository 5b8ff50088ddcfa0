// How the gradients of a modulation are cut into blocks: a pure function of sizes, dtype and machine.
#include <algorithm>

#include "common/integers.h"
#include "cuda/modulate/modulate.h"

namespace mi_kernels::cuda {
namespace {

// The largest power of two that is at most n.
int64_t power_of_two(int64_t n) {
  int64_t power = 1;
  while (power * 2 <= n) power *= 2;
  return power;
}

}  // namespace

ModulateGradsPlan plan_modulate_grads(const ModulateGradsCall& call, DType dtype, const Machine& machine) {
  const int64_t elements = 16 / storage_bytes(dtype);
  ModulateGradsPlan p{};
  int64_t groups = 1, rows = 1;
  for (int64_t a = 0; a < call.kept_axes; ++a) groups *= call.kept[a].size;
  for (int64_t a = 0; a < call.reduced_axes; ++a) rows *= call.reduced[a].size;
  p.chunks = ceil_div(call.inner.size, elements);
  p.units = call.inner_kept ? groups * p.chunks : groups;
  p.places = call.inner_kept ? rows : rows * p.chunks;
  // A team walks its places in turn: as many threads as there are places, but where units are neighbours in memory at
  // least 32 of them (512 bytes), so that whole lines are read.
  const int64_t team =
      power_of_two(std::clamp<int64_t>(p.places, 1, call.inner_kept ? kModulateThreads / 32 : kModulateThreads));
  p.keeps = kModulateThreads / team;
  if (call.inner_kept)  // fewer units than that: more threads for each
    while (p.keeps > 1 && p.keeps / 2 >= p.units && kModulateThreads / p.keeps < p.places) p.keeps /= 2;
  p.blocks = ceil_div(p.units, p.keeps);
  // Four blocks for each processor keep it busy; 8 places for each thread are worth a second stage.
  const int64_t wanted = ceil_div(4 * machine.processors, p.blocks);
  const int64_t most = p.places / (8 * (kModulateThreads / p.keeps));
  p.step = ceil_div(p.places, std::max<int64_t>(std::min({wanted, most, int64_t(65535)}), 1));
  p.splits = std::max<int64_t>(ceil_div(p.places, std::max<int64_t>(p.step, 1)), 1);
  const bool sums = call.dscale || call.dshift;
  if (!sums && p.splits > 1)
    p.partial_bytes = 0;
  else if (p.splits > 1)
    p.partial_bytes = p.splits * p.units * 2 * elements * accumulator_bytes(dtype);
  return p;
}

}  // namespace mi_kernels::cuda
