// A grid of output tiles in one dimension, and the coordinates of a block in it.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/integers.h"

namespace mi_kernels::cuda {

// Row tiles vary fastest, so that blocks that run together share the weights; then column tiles, splits of the
// reduction (split-K) and groups.
struct Grid {
  int64_t row_tiles, col_tiles, splits, split_size;  // split_size: elements of the reduction in each split
  int64_t groups;
  int64_t blocks() const { return row_tiles * col_tiles * splits * groups; }
};

struct TileCoord {
  int64_t row_tile, col_tile, split, group;
};
MI_HOST_DEVICE TileCoord tile_coord(const Grid& grid, int64_t block) {
  TileCoord t;
  t.row_tile = block % grid.row_tiles;
  block /= grid.row_tiles;
  t.col_tile = block % grid.col_tiles;
  block /= grid.col_tiles;
  t.split = block % grid.splits;
  t.group = block / grid.splits;
  return t;
}

// Stages of `stage_k` elements in a split of a reduction over k; the last split may be shorter, or empty.
MI_HOST_DEVICE int64_t stages_in_split(const Grid& grid, int64_t split, int64_t k, int64_t stage_k) {
  const int64_t begin = split * grid.split_size, rest = k - begin < grid.split_size ? k - begin : grid.split_size;
  return rest <= 0 ? 0 : ceil_div(rest, stage_k);
}

// How the small-batch kernel for dx and dz is split: over contexts, and within those over outputs.
struct InputGradsSplits {
  int group_threads;  // threads of a thread group, laid out along the width; a power of 2
  int64_t context_splits, out_splits, out_split_size;
};

}  // namespace mi_kernels::cuda
