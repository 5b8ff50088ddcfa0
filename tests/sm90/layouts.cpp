// Checks each layout function of the sm_90a engine against the text of the PTX ISA and the driver API.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <utility>
#include <vector>

#include "cuda/host/sm90_args.h"

using namespace mi_kernels::cuda::sm90;
using mi_kernels::ceil_div;

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// The pattern has eight rows of 128 bytes: 16-byte piece c of row r is stored at piece c XOR r (mod 8).
void swizzles() {
  std::set<uint32_t> bytes;
  for (int row = 0; row < 64; ++row)
    for (int col = 0; col < kTileK; ++col) {
      const int piece = col / 8, within = col % 8 * 2;
      require(box_byte(row, col) == uint32_t(row * 128 + (piece ^ row % 8) * 16 + within), "box_byte");
      bytes.insert(box_byte(row, col));
    }
  require(bytes.size() == 64 * 64 && *bytes.rbegin() == 64 * 128 - 2, "box_byte is not a bijection");
  for (uint32_t a = 0; a < 1 << 16; ++a) require(swizzle(swizzle(a)) == a && swizzle(a) / 1024 == a / 1024, "swizzle");
  // A warp stores 8 rows and 4 pairs of columns of the result at a time, each to a bank of its own.
  std::set<uint32_t> banks;
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixCoord place = accumulator_coord(lane, 4);
    banks.insert(box_byte(place.row, place.col) / 4 % 32);
  }
  require(banks.size() == 32, "two lanes write to one bank");
}

// ISA, "Matrix Descriptor Format": encode(x) = (x & 0x3FFFF) >> 4.
void descriptors() {
  for (const uint32_t address : {0u, 1024u, 0x2C000u, 0x37C00u}) {
    const uint64_t d = matrix_descriptor(address);
    require((d & 0x3FFF) == address >> 4, "bits 0-13: start address");
    require((d >> 14 & 3) == 0 && (d >> 30 & 3) == 0 && (d >> 46 & 7) == 0 && (d >> 52 & 0x3FF) == 0, "unused bits");
    require((d >> 16 & 0x3FFF) == 1, "bits 16-29: leading offset, assumed to be 1 for a swizzled K-major layout");
    require((d >> 32 & 0x3FFF) == 1024 >> 4, "bits 32-45: from eight rows to the next");
    require((d >> 49 & 7) == 0, "bits 49-51: base offset");
    require(d >> 62 == 1, "bits 62-63: 128-byte swizzle");
    for (int k = 0; k < kMmasPerStep; ++k)
      require(advance_k(d, k) == matrix_descriptor(address + uint32_t(32 * k)), "16 elements are 32 bytes");
  }
}

// ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16", and "ldmatrix" with .x4.
void fragments() {
  std::set<std::pair<int, int>> operand, sums, named;
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    const int warp = t / 32, group = t % 32 / 4, in_group = t % 4;
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 2; ++h) {
        const int i = r * 2 + h;  // a0 .. a7
        const MatrixCoord p = a_coord(t, r, h);
        require(p.row == 16 * warp + ((i < 2 || (4 <= i && i < 6)) ? group : group + 8), "operand: row");
        require(p.col == in_group * 2 + (i & 1) + (i < 4 ? 0 : 8), "operand: column");
        operand.insert({p.row, p.col});
        // ldmatrix: register r holds row `group`, columns 2 in_group and the next, of the r-th matrix. Lanes 8r to 8r +
        // 7 pass the addresses of its rows.
        const MatrixCoord row = ldmatrix_row(32 * warp + 8 * r + group);
        require(p.row == row.row && p.col == row.col + in_group * 2 + h, "ldmatrix loads other elements");
      }
    for (int r = 0; r < 128; ++r) {
      const MatrixCoord p = accumulator_coord(t, r);
      require(p.row == 16 * warp + group + (r % 4 < 2 ? 0 : 8) && p.col == 8 * (r / 4) + 2 * in_group + r % 2, "sums");
      sums.insert({p.row, p.col});
    }
  }
  require(operand.size() == 64 * 16 && sums.size() == 64 * 256, "an element is held twice, or not at all");
}

template <class S>
void stages() {
  require(S::kSharedBytes <= 232448, "more shared memory than a block may have");
  require(S::full_barrier(0) % 8 == 0 && S::empty_barrier(0) == S::full_barrier(S::kStages - 1) + 8, "barriers");
  require(S::empty_barrier(S::kStages - 1) + 8 <= S::kSharedBytes - kAlignment, "the barriers do not fit");
  PipelineState state;
  for (int step = 0; step < 5 * S::kStages; ++step, advance<S::kStages>(state))
    require(state.stage == step % S::kStages && state.phase == uint32_t(step / S::kStages % 2), "state");
}

// Every element of y belongs to exactly one tile.
template <class S>
void schedules() {
  static_assert(KernelTraits<64, 1, true>::accumulator_byte(255, 31) == 64 * 128 * 4 - 4);
  for (const int groups : {1, 3})
    for (const int rows : {1, 127, 128, 129, 256, 257, 700})
      for (const int out : {1, 63, 64, 65, 256, 257}) {
        const ProblemShape p{groups, rows, 4, 8, out, true, false, false, false};
        const TileScheduler<S> scheduler(p);
        std::vector<int> times(size_t(groups * ceil_div(rows, kTileM) * ceil_div(out, S::kTileN)), 0);
        for (int unit = 0; unit < scheduler.units; ++unit)
          for (int rank = 0; rank < S::kCluster; ++rank) {
            const WorkTile t = scheduler.tile(unit, rank);
            require(t.row % kTileM == 0 && t.out % S::kTileN == 0 && t.group >= 0 && t.group < groups, "tile");
            require(t.out < out && t.row < rows + kTileM * (S::kCluster - 1), "a tile past the end");
            if (rank > 0) require(t.out == scheduler.tile(unit, 0).out, "the blocks of a cluster share their weights");
            if (t.row < rows)
              ++times[size_t((t.group * ceil_div(rows, kTileM) + t.row / kTileM) * ceil_div(out, S::kTileN) +
                             t.out / S::kTileN)];
          }
        require(std::all_of(times.begin(), times.end(), [](int n) { return n == 1; }), "tiles are lost or done twice");
      }
}

void tensors() {
  alignas(16) static uint16_t memory[8];
  const TensorView w{memory, {24, 5, 7, 2}, {1, 24, 120, 840}, 1};
  require(tma_compatible(w), "a contiguous W");
  const auto with = [&](auto change) {
    TensorView v = w;
    change(v);
    return tma_compatible(v);
  };
  require(!with([](TensorView& v) { v.data = memory + 1; }), "address");
  require(!with([](TensorView& v) { v.data = nullptr; }), "no data");
  require(!with([](TensorView& v) { v.stride[0] = 2; }), "a gap between elements");
  require(!with([](TensorView& v) { v.stride[1] = 28; }), "a stride that is no multiple of 16 bytes");
  require(!with([](TensorView& v) { v.stride[1] = 16; }), "rows that overlap");
  require(!with([](TensorView& v) { v.size[1] = 0; }), "an empty dimension");
  require(!with([](TensorView& v) { v.stride[3] = int64_t(1) << 39; }), "a stride of 2^40 bytes");
  require(with([](TensorView& v) { v.size[1] = 1, v.stride[1] = 7; }), "the stride of one element does not matter");
  require(with([](TensorView& v) { v.size[0] = 23; }), "rows with padding");
}

void configs() {
  for (const int out : {1, 64, 100, 256, 1000, 4096})
    for (const int rows : {1, 128, 129, 5000})
      for (const bool bfloat16 : {false, true}) {
        const ProblemShape p{1, rows, 16, 64, out, true, false, false, false};
        const KernelConfig c = choose_config(p, bfloat16, 132);
        require(c.exact == !bfloat16 && c.tile_n <= (c.exact ? 128 : 256), "kernels that do not exist");
        require(c.cluster == (rows > 128 && c.splits == 1 ? 2 : 1) && c.blocks >= c.cluster && c.blocks <= 132 &&
                    c.blocks % c.cluster == 0,
                "blocks");
      }
  const auto tile_n = [](int rows, int out) {
    return choose_config({1, rows, 64, 256, out, true, false, false, false}, true, 132).tile_n;
  };
  // With few tiles they are split over as many blocks as fit, without a cluster for the weights.
  const KernelConfig few = choose_config({1, 256, 64, 512, 256, true, false, false, false}, true, 132);
  require(few.splits > 1 && few.tile_n <= 128 && few.cluster == 1 && few.blocks <= 132 && few.blocks % few.splits == 0,
          "few");
  require(choose_config({1, 256, 3, 512, 256, true, false, false, false}, true, 132).splits == 1,
          "a split without a context");
  require(tile_n(1 << 14, 4096) == 256 && tile_n(1 << 14, 64) == 64 && tile_n(1024, 512) == 64, "choice of a tile");
}

}  // namespace

int main() {
  swizzles();
  descriptors();
  fragments();
  stages<KernelTraits<64, 1>>(), stages<KernelTraits<128, 2>>(), stages<KernelTraits<256, 1>>(),
      stages<KernelTraits<256, 2>>();
  schedules<KernelTraits<64, 1>>(), schedules<KernelTraits<64, 2>>(), schedules<KernelTraits<256, 2>>();
  tensors();
  configs();
  std::puts("the layouts agree with the documents");
}
