#include "cpu/dispatch/plan.h"

namespace mi_kernels {
namespace {

// `results`: rows of the result of all groups, of `lanes` elements each.
void plan_tasks(RegionPlan& r, int64_t results, int64_t lanes, int64_t rows) {
  // An element takes at least as long to write as kElementOperations take to compute.
  constexpr int64_t kElementOperations = 8;
  r.operations = results * lanes * max(2 * rows, kElementOperations);
  r.row_step = max(ceil_div(results, split_count(kTasks, 1, r.operations, results)), 1);
  r.tasks = ceil_div(results, r.row_step);
}

}  // namespace

bool plan_outer(WeightGradsPlan& w, const ProblemSize& p, const MulTraits& m, const MulTraits& sum_traits,
                const bool (&want)[4]) {
  constexpr int64_t kMostElements = 1 << 18;  // of the inputs of a group, which each worker copies
  if (p.rows < 1 || p.rows > kOuterRows || (p.width + p.context) * p.rows > kMostElements) return false;
  // A short row of dW is stored as a whole vector of `rows` terms, most of which the next ones overwrite.
  if (want[0] && p.width > 1 && p.width <= 2 * p.rows && p.context > p.width) return false;
  w.outer = true;
  w.context_lanes = want[0] && p.width == 1;
  const int64_t lanes[3] = {w.context_lanes ? p.context : p.width, p.context, p.width};
  const int64_t extents[3] = {w.context_lanes ? p.width : p.context, 1, 1};
  RegionPlan* const regions[3] = {&w.weight, &w.weight_z, &w.weight_x};
  for (int t = 0; t < 3; ++t) {
    if (!want[t]) continue;
    RegionPlan& r = *regions[t];
    plan_tasks(r, p.groups * p.out * extents[t], lanes[t], p.rows);
    r.extent = extents[t];
    r.wide = 2 * p.groups * p.out * extents[t] * lanes[t] * p.rows <= kWideOperations;
    const MulTraits& traits = r.wide ? sum_traits : m;
    // Rows of the lanes and of the other factor, with a vector to read beyond them.
    w.worker_bytes = max(w.worker_bytes, scratch_bytes(p.rows * (lanes[t] + traits.lanes) * traits.acc_bytes) +
                                             scratch_bytes(p.rows * (r.extent + traits.lanes) * traits.acc_bytes));
  }
  plan_tasks(w.bias, p.groups, p.out, p.rows);
  return true;
}

}  // namespace mi_kernels
