// What happens asynchronously: wgmma and TMA. Written from the text of the PTX ISA, not from the engine's functions.
#pragma once

#include "cluster.h"
#include "numbers.h"

namespace emulated {

// An element of the B operand as the hardware reads it: K-major, with the 128-byte swizzle applied to the address.
inline float b_element(const Block& block, uint64_t descriptor, int row, int k, bool bfloat16) {
  const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  uint32_t address = start + uint32_t(row / 8) * eight_rows + uint32_t(row % 8) * 128 + uint32_t(k) * 2;
  address ^= (address >> 7 & 7) << 4;
  require(address + 1 < block.shared.size(), "wgmma reads past the end of shared memory");
  return widen(uint16_t(block.shared[address] | block.shared[address + 1] << 8), bfloat16);
}

// Computes the oldest wgmma of this thread's warp, which every lane has issued.
inline void complete_oldest_wgmma() {
  const Block& block = this_block();
  const Wgmma first = lane(0).wgmmas.front();
  require(first.descriptor >> 62 == 1 && (first.descriptor >> 49 & 7) == 0, "descriptor: swizzle or base offset");
  static thread_local std::vector<float> b;
  b.resize(size_t(first.n * 16));
  for (int n = 0; n < first.n; ++n)
    for (int k = 0; k < 16; ++k) b[size_t(n * 16 + k)] = b_element(block, first.descriptor, n, k, first.bfloat16);
  float a[16][16];
  for (int l = 0; l < 32; ++l) {
    const Wgmma& m = lane(l).wgmmas.front();
    require(m.descriptor == first.descriptor && m.n == first.n, "lanes disagree about a wgmma");
    for (int r = 0; r < 4; ++r)  // ISA: registers hold rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8
      for (int h = 0; h < 2; ++h)
        a[l / 4 + (r % 2) * 8][l % 4 * 2 + (r / 2) * 8 + h] = widen(uint16_t((*m.a)[r] >> (16 * h)), m.bfloat16);
  }
  for (int l = 0; l < 32; ++l) {
    const Wgmma m = lane(l).wgmmas.front();
    lane(l).wgmmas.pop_front();
    for (int r = 0; r < m.n / 2; ++r) {  // ISA: groups of four registers are columns 8i + 2t, + 1 of rows g and g + 8
      const int row = l / 4 + r / 2 % 2 * 8, col = r / 4 * 8 + l % 4 * 2 + r % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[size_t(col * 16 + k)];
      m.d[r] = m.add ? m.d[r] + sum : sum;
    }
  }
}

// ---- TMA ----

// Calls visit(offset in the box, element or null) for each element of a box; null if it is out of bounds.
template <class Visit>
void for_each_in_box(const TensorMap& map, const int (&c)[4], Visit&& visit) {
  const TensorView& v = map.view;
  require(v.data != nullptr, "a tensor map that was not encoded");
  for (int row = 0; row < map.box_rows; ++row)
    for (int col = 0; col < 64; ++col) {
      const int64_t at[4] = {c[0] + int64_t(col), c[1], c[2] + int64_t(row), c[3]};
      bool inside = true;
      int64_t offset = 0;
      for (int d = 0; d < 4; ++d) {
        inside = inside && at[d] >= 0 && at[d] < v.size[d];
        offset += at[d] * (v.size[d] == 1 ? 0 : v.stride[d]);
      }
      visit(uint32_t(row * 128 + col * 2), inside ? static_cast<const uint16_t*>(v.data) + offset : nullptr);
    }
}
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// ISA, "Async proxy": only a fence by the accessing thread orders its generic accesses, reads included, before accesses
// by TMA.
inline void require_fenced(int index, uint32_t begin, uint32_t end) {
  const Block& block = current->blocks[size_t(index)];
  const auto written = block.unfenced.lower_bound(begin);
  require(written == block.unfenced.end() || *written >= end, "TMA overwrites a write that was not fenced");
  for (int t = 0; t < kThreads; ++t)
    for (const uint32_t word : current->threads[size_t(index * kThreads + t)]->read)
      require(word < begin || word >= end, "TMA overwrites what was read without a fence");
}

inline void issue_load(const TensorMap* map, uint32_t dest, uint32_t barrier, uint32_t mask, int c0, int c1, int c2,
                       int c3) {
  require(dest % 1024 == 0, "a box is not aligned to the swizzle pattern");
  for (int b = 0; b < current->size; ++b) {
    if (!(mask >> b & 1)) continue;
    Block& block = current->blocks[size_t(b)];
    require(dest + map->box_rows * 128 <= block.shared.size(), "a box ends past shared memory");
    require_fenced(b, dest, dest + uint32_t(map->box_rows) * 128);
    std::memset(&block.shared[dest], 0xFF, size_t(map->box_rows) * 128);
    current->copies.push_back([=, &block] {
      for_each_in_box(*map, {c0, c1, c2, c3}, [&](uint32_t byte, const uint16_t* element) {
        const uint16_t value = element ? *element : 0;
        std::memcpy(&block.shared[swizzled(dest + byte)], &value, 2);
      });
      Barrier& full = barrier_at(block, barrier);
      full.bytes -= map->box_rows * 128;
      full.complete_phase_if_done();
    });
  }
}

}  // namespace emulated
