// Runs the sm_90a engine on the emulator and compares with the formula.
//
//     engine SEEDS     the cases of main()
//     engine calls     those on standard input (contiguous.h), each with the kernel and grid that it is launched with
#include "contiguous.h"
#include "emulated_sm90.h"

namespace sm90 = mi_kernels::cuda::sm90;
using sm90::ProblemShape;

namespace {

// A 16-bit tensor with up to four dimensions, outermost first. Memory between its elements is NaN.
struct Tensor {
  std::vector<uint16_t> memory;
  int64_t start = 0, size[4], stride[4];

  // Rows are padded past the next multiple of `padding`, or not at all if it is 0. `shared`: dimension 0 has stride 0.
  Tensor(std::vector<int64_t> sizes, int64_t padding, bool shared, std::mt19937& random, double scale, bool bfloat16) {
    int64_t span = 1;
    for (int d = 3; d >= 0; --d) {
      size[d] = sizes[size_t(d)];
      stride[d] = d == 0 && shared ? 0 : span;
      if (d == 3)
        span = padding ? size[3] / padding * padding + 2 * padding : size[3];
      else if (!(d == 0 && shared))
        span *= size[d];
    }
    memory.assign(size_t(span + 64), 0x7FFF);
    while (reinterpret_cast<uintptr_t>(memory.data() + start) % 16 != 0) ++start;
    std::normal_distribution<double> normal(0, scale);
    for (int64_t a = 0; a < (shared ? 1 : size[0]); ++a)
      for (int64_t b = 0; b < size[1]; ++b)
        for (int64_t c = 0; c < size[2]; ++c)
          for (int64_t d = 0; d < size[3]; ++d)
            memory[size_t(at(a, b, c, d))] = emulated::narrow(normal(random), bfloat16);
  }
  int64_t at(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return start + a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3];
  }
  // Contiguous.
  std::vector<double> values(bool bfloat16) const {
    std::vector<double> result;
    for (int64_t a = 0; a < size[0]; ++a)
      for (int64_t b = 0; b < size[1]; ++b)
        for (int64_t c = 0; c < size[2]; ++c)
          for (int64_t d = 0; d < size[3]; ++d)
            result.push_back(emulated::widen(memory[size_t(at(a, b, c, d))], bfloat16));
    return result;
  }
  mi_kernels::WeightRef weight_ref(bool present) const {
    if (!present) return {};
    return {memory.data() + start, stride[0], stride[1], stride[2], 1};
  }
  mi_kernels::TensorRef ref(bool present, int row_dimension) const {
    if (!present) return {};
    return {memory.data() + start, stride[0], row_dimension == 3 ? 1 : stride[row_dimension], 1};
  }
};

struct Numbers {
  std::vector<double> x, z, w, u, v, c;
};

struct Case {
  ProblemShape p;
  bool shared_weights = false;
  int nan_row = -1;  // of x
  int blocks = 0;    // of the grid; 0: one for each tile
  int splits = 1;    // blocks of a tile
  int weight_padding = 0;
};

template <class T, class Traits, bool kExact>
void run(const Case& test, uint32_t seed) {
  const ProblemShape& p = test.p;
  constexpr bool kBf = T::kBfloat16;
  std::mt19937 random(seed + 17);
  const int64_t g = p.groups, b = p.rows, i = p.context, j = p.width, o = p.out;
  Tensor x({g, b, 1, j}, 8, false, random, 1, kBf), z({g, b, 1, i}, 8, false, random, 1, kBf);
  Tensor w({g, o, i, j}, test.weight_padding, test.shared_weights, random, 1, kBf),
      u({g, o, 1, i}, 8, test.shared_weights, random, 1, kBf);
  Tensor v({g, o, 1, j}, 8, test.shared_weights, random, 1, kBf),
      c({g, 1, 1, o}, 3, test.shared_weights, random, 1, kBf);
  if (test.nan_row >= 0) x.memory[size_t(x.at(0, test.nan_row, 0, 0))] = 0x7FFF;
  constexpr uint16_t kUntouched = 0x7FFE;
  std::vector<uint16_t> memory(size_t(g * b * o + 256), kUntouched);
  int64_t start = 0;
  while (reinterpret_cast<uintptr_t>(memory.data() + start) % 16 != 0) ++start;

  const sm90::ForwardArgs args =
      sm90::forward_args({g, b, i, j, o}, x.ref(true, 1), z.ref(true, 1), w.weight_ref(p.weight), u.ref(p.weight_z, 1),
                         v.ref(p.weight_x, 1), c.ref(p.bias, 3), memory.data() + start);
  if (const char* why = sm90::why_not(args)) emulated::fail(why);
  const auto params = sm90::forward_params<emulated::EmulatedSm90, Traits>(
      args, test.splits, [](const sm90::TensorView& view, int rows) { return emulated::TensorMap{view, rows}; });
  const sm90::TileScheduler<Traits> scheduler(p);
  const int blocks = test.blocks ? test.blocks : scheduler.units * Traits::kCluster * test.splits;
  emulated::launch(blocks, Traits::kCluster * test.splits, seed,
                   [&] { sm90::forward<emulated::EmulatedSm90, T, Traits, kExact>(params, nullptr); });

  const Numbers numbers{x.values(kBf), z.values(kBf), w.values(kBf), u.values(kBf), v.values(kBf), c.values(kBf)};
  // Half a unit in the last place.
  const auto half_ulp = [](double value) {
    return value == 0 ? 0 : std::ldexp(1.0, std::ilogb(value) - (kBf ? 8 : 11));
  };
  for (int64_t n = 0; n < int64_t(memory.size()); ++n)
    if ((n < start || n >= start + g * b * o) && memory[size_t(n)] != kUntouched)
      emulated::fail("written outside of y");
  std::vector<double> products(size_t(i * j));  // z x of a row
  for (int64_t k = 0; k < g; ++k)
    for (int64_t r = 0; r < b; ++r) {
      const double *xs = &numbers.x[size_t((k * b + r) * j)], *zs = &numbers.z[size_t((k * b + r) * i)];
      for (int64_t m = 0; m < i; ++m)
        for (int64_t n = 0; n < j; ++n) {
          const double product = zs[m] * xs[n];
          products[size_t(m * j + n)] = kExact ? product : emulated::widen(emulated::narrow(product, kBf), kBf);
        }
      for (int64_t q = 0; q < o; ++q) {
        const int64_t output = k * o + q;
        double truth = p.bias ? numbers.c[size_t(output)] : 0, size = std::fabs(truth);
        const auto add = [&](const double* left, const std::vector<double>& right, int64_t terms) {
          for (int64_t n = 0; n < terms; ++n) {
            const double term = left[n] * right[size_t(output * terms + n)];
            truth += term, size += std::fabs(term);
          }
        };
        if (p.weight) add(products.data(), numbers.w, i * j);
        if (p.weight_z) add(zs, numbers.u, i);
        if (p.weight_x) add(xs, numbers.v, j);
        const uint16_t bits = memory[size_t(start + (k * b + r) * o + q)];
        const double got = emulated::widen(bits, kBf);
        // The final rounding, and those of the float accumulators.
        const bool good =
            bits != kUntouched &&
            (std::isnan(truth) ? std::isnan(got) : std::fabs(got - truth) <= half_ulp(truth) + 4e-6 * size);
        if (good) continue;
        std::fprintf(stderr,
                     "G %d B %d Z %d X %d O %d terms %d%d%d%d, kTileN %d cluster %d exact %d bf16 %d seed %u: "
                     "y[%d,%d,%d] is %g, expected %g\n",
                     p.groups, p.rows, p.context, p.width, p.out, p.weight, p.weight_z, p.weight_x, p.bias,
                     Traits::kTileN, Traits::kCluster, kExact, kBf, seed, int(k), int(r), int(q), got, truth);
        std::exit(1);
      }
    }
}

template <class T, class Traits, bool kExact>
void run_all(const std::vector<Case>& cases, uint32_t seeds) {
  for (const Case& test : cases)
    for (uint32_t seed = 0; seed < seeds; ++seed) run<T, Traits, kExact>(test, seed);
}

template <class T, int kTileN, bool kExact>
void run_config(const Case& test, const sm90::KernelConfig& config) {
  if (config.splits > 1) {
    if constexpr (kTileN <= 128) run<T, sm90::KernelTraits<kTileN, 1, true>, kExact>(test, 0);
  } else if (config.cluster == 1) {
    run<T, sm90::KernelTraits<kTileN, 1>, kExact>(test, 0);
  } else {
    run<T, sm90::KernelTraits<kTileN, 2>, kExact>(test, 0);
  }
}

[[maybe_unused]] int run_calls() {
  ContiguousCall call;
  int calls = 0;
  for (; read_call(call); ++calls) {
    const ProblemShape p = sm90::problem_shape(call.problem, true, true, true, true);
    const sm90::KernelConfig config = sm90::choose_config(p, call.bfloat16, kHopper.sm_count);
    const Case test{p, false, -1, config.blocks, config.splits};
    if (call.bfloat16 && config.tile_n == 64) run_config<sm90::Bf16, 64, false>(test, config);
    if (call.bfloat16 && config.tile_n == 128) run_config<sm90::Bf16, 128, false>(test, config);
    if (call.bfloat16 && config.tile_n == 256) run_config<sm90::Bf16, 256, false>(test, config);
    if (!call.bfloat16 && config.tile_n == 64) run_config<sm90::F16, 64, true>(test, config);
    if (!call.bfloat16 && config.tile_n == 128) run_config<sm90::F16, 128, true>(test, config);
  }
  std::printf("%d calls agree with the formula\n", calls);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
#ifndef MI_FEW
  if (argc > 1 && std::strcmp(argv[1], "calls") == 0) return run_calls();
#endif
  const uint32_t seeds = argc > 1 ? uint32_t(std::atoi(argv[1])) : 2;
  const std::vector<Case> few = {
      // An odd context, a partial block of inputs, tiles past the ends, more tiles than blocks.
      {{1, 130, 5, 72, 136, true, true, true, true}, false, -1, 2},
      {{1, 5, 12, 16, 11, true, true, true, true}},  // rows of y that TMA cannot write
  };
  std::vector<Case> all = few;
  all.insert(all.end(), {
                            {{2, 70, 2, 64, 96, true, false, true, false}, false, 3},
                            {{3, 33, 1, 16, 8, true, true, false, true}, true},
                            {{1, 20, 70, 40, 16, false, true, true, true}},
                            {{1, 9, 4, 8, 40, true, false, false, false}},
                            {{2, 9, 3, 72, 40, true, true, false, true}, false, -1, 0, 1, 8},  // W with padding
                            {{2, 3, 0, 0, 5, true, true, true, true}},  // only the bias contributes
                            {{1, 3, 0, 9, 8, true, true, true, false}},
                            {{1, 3, 9, 0, 8, true, true, true, false}},
                            {{1, 300, 3, 40, 200, true, true, false, true}, false, -1, 2},  // more tiles than blocks
                        });
  const std::vector<Case> wide = {{{1, 140, 6, 72, 300, true, true, true, true}, false, 139, 2}, few[1]};
  const std::vector<Case> split = {
      {{1, 7, 5, 136, 24, true, true, true, true}, false, -1, 0, 2},
      {{2, 130, 9, 40, 40, true, true, true, true}, true, -1, 0, 4},
      {{1, 3, 70, 16, 11, true, true, false, true}, false, 2, 0, 8},
  };
  using namespace sm90;
#ifndef MI_FEW
  run_all<Bf16, KernelTraits<64, 1>, false>(all, seeds);
  run_all<Bf16, KernelTraits<64, 2>, false>(all, seeds);
  run_all<Bf16, KernelTraits<128, 2>, false>(few, seeds);
  run_all<Bf16, KernelTraits<256, 1>, false>(wide, seeds);
  run_all<Bf16, KernelTraits<256, 2>, false>(wide, seeds);
  run_all<Bf16, KernelTraits<64, 1>, true>(few, seeds);
  run_all<F16, KernelTraits<64, 2>, true>(all, seeds);
  run_all<F16, KernelTraits<128, 1>, true>(few, seeds);
  run_all<Bf16, KernelTraits<64, 1, true>, false>(split, seeds);
  run_all<F16, KernelTraits<128, 1, true>, true>({split[1]}, seeds);
#else
  run_all<Bf16, KernelTraits<64, 2>, false>(few, seeds);
  run_all<F16, KernelTraits<64, 1, true>, true>(split, seeds);
#endif
  std::puts("the engine agrees with the formula");
}
