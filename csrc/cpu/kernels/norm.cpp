// y = (n w + b) F(scale) + shift, n = (x_new - mean) rstd, x_new = x + gate h. A set stays in the cache from its
// residual to its result, so x and h are read once from memory, and x_new and y written once.
//
// The mean and the squared deviations from it are two passes over a chunk of a set; chunks are combined in double, as
// in Chan's algorithm, so that a large mean costs no digits.
#include "cpu/kernels/norm_channels.h"

namespace mi_kernels::MI_ISA {
namespace {

// Count, mean and sum of squared deviations of what was seen so far.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(double n, double other_mean, double other_squares) {
    if (count == 0) {
      *this = {n, other_mean, other_squares};
      return;
    }
    const double total = count + n, step = other_mean - mean;
    mean += step * (n / total);
    squares += other_squares + step * step * (count * n / total);
    count = total;
  }
};

template <class S>
class Norm : NormChannels<S> {
  using Base = NormChannels<S>;
  using Base::L, Base::for_each_step, Base::sum_over;
  using typename Base::Acc, typename Base::V, typename Base::Channels;

  // Of one task: the channels of its block, and of each channel sums, mean and rstd, by pixels; moments of groups.
  struct Buffers : Channels {
    double *sums, *deviations;
    Acc *mean, *rstd;
    Moments* moments;
  };

  // One position of the block.
  struct Row {
    const S *x, *h;
    S *x_new, *y;
    Acc *mean, *rstd;  // of its first group
  };

  const NormCall& call;
  const Executor& executor;

 public:
  Norm(const NormCall& c, const Executor& e) : Base(c), call(c), executor(e) {}

  void run() {
    run_tasks(executor, call.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
  }

 private:
  Buffers buffers(int64_t worker) const {
    ScratchAllocator scratch{executor.scratch + worker * call.worker_bytes};
    Buffers b;
    static_cast<Channels&>(b) = this->allocate_channels(scratch, call.block_channels());
    b.sums = scratch.allocate<double>(call.block_channels());
    b.deviations = scratch.allocate<double>(call.block_channels());
    b.mean = scratch.allocate<Acc>(call.block_channels());
    b.rstd = scratch.allocate<Acc>(call.block_channels());
    b.moments = scratch.allocate<Moments>(call.block_groups);
    return b;
  }

  void task(int64_t t, int64_t worker) const {
    const Buffers b = buffers(worker);
    const int64_t block = t % call.blocks, begin = t / call.blocks * call.row_step;
    const int64_t end = min(begin + call.row_step, call.units * call.rows);
    const int64_t channel = this->first_channel(block), n = this->channel_count(block);
    this->load_weights(channel, n, b);
    for (int64_t row = begin, count; row < end; row += count) {
      const int64_t unit = row / call.rows, first = row % call.rows;
      count = min(end - row, call.rows - first);
      const AxisIterator kept(call.kept, call.kept_axes, unit);
      this->load_contexts(kept, channel, n, b);
      AxisIterator reduced(call.reduced, call.reduced_axes, first);
      for (int64_t r = 0; r < count; ++r, reduced.next()) {
        const Row at = row_at(kept, reduced, block);
        if (call.channels_last)
          pixels(at, block, b);
        else
          sets(at, block, b);
      }
    }
  }

  template <class Position>
  Row row_at(const Position& kept, const Position& reduced, int64_t block) const {
    const int64_t first = this->first_channel(block) * (call.channels_last ? 1 : call.spatial);
    const auto offset = [&](int operand) { return kept.offset(operand) + reduced.offset(operand); };
    const int64_t position = offset(kNormOut), out = position * call.channels * call.spatial + first;
    const int64_t group = position * call.groups + block * call.block_groups;
    Row row{};
    row.x = static_cast<const S*>(call.x) + offset(kNormX) + first;
    if (call.h) {
      row.h = static_cast<const S*>(call.h) + offset(kNormH) + first;
      row.x_new = static_cast<S*>(call.x_new) + out;
    }
    row.y = static_cast<S*>(call.y) + out;
    row.mean = call.mean ? static_cast<Acc*>(call.mean) + group : nullptr;
    row.rstd = static_cast<Acc*>(call.rstd) + group;
    return row;
  }

  Acc store_statistics(const Row& row, int64_t group, const Moments& m, Acc& mean) const {
    const Acc rstd = Acc(1 / __builtin_sqrt(m.squares / m.count + call.eps));
    mean = call.center ? Acc(m.mean) : Acc(0);
    if (row.mean) row.mean[group] = mean;
    row.rstd[group] = rstd;
    return rstd;
  }

  // Sets that are contiguous.
  void sets(const Row& row, int64_t block, const Buffers& b) const {
    const int64_t width = call.group_channels(), size = width * call.spatial;
    for (int64_t g = 0; g * width < this->channel_count(block); ++g) {
      const S* x = row.x + g * size;
      S* y = row.y + g * size;
      if (row.h) {
        residual(x, row.h + g * size, b.gate + g * width, row.x_new + g * size);
        x = row.x_new + g * size;
      }
      Acc mean;
      const Acc rstd = store_statistics(row, g, moments(x, size), mean);
      if (call.spatial == 1)
        this->affine() ? apply<true>(x, g * width, width, mean, rstd, b, y)
                       : apply<false>(x, g * width, width, mean, rstd, b, y);
      else
        apply_maps(x, g * width, width, mean, rstd, b, y);
    }
  }

  void residual(const S* x, const S* h, const Acc* gate, S* x_new) const {
    const int64_t width = call.group_channels(), spatial = call.spatial;
    if (spatial == 1)
      return for_each_step(width, [&](int64_t i, auto lanes) {
        store_run<lanes>(x_new + i, load_run<lanes>(h + i) * load_run<lanes>(gate + i) + load_run<lanes>(x + i));
      });
    for (int64_t c = 0; c < width; ++c, x += spatial, h += spatial, x_new += spatial) {
      const Acc factor = gate[c];
      for_each_step(spatial, [&](int64_t i, auto lanes) {
        store_run<lanes>(x_new + i, load_run<lanes>(h + i) * factor + load_run<lanes>(x + i));
      });
    }
  }

  Moments moments(const S* x, int64_t size) const {
    Moments m;
    for (int64_t first = 0; first < size; first += kNormChunk) {
      const S* p = x + first;
      const int64_t n = min(kNormChunk, size - first);
      double center = 0;
      if (call.center) center = sum_over(n, [&](int64_t i, auto lanes) { return load_run<lanes>(p + i); }) / double(n);
      const Acc rounded = Acc(center);
      const double squares = sum_over(n, [&](int64_t i, auto lanes) {
        const auto d = load_run<lanes>(p + i) - rounded;
        return d * d;
      });
      const double error = double(rounded) - center;
      m.add(double(n), center, squares - double(n) * error * error);
    }
    return m;
  }

  template <bool Affine>
  void apply(const S* x, int64_t first, int64_t n, Acc mean, Acc rstd, const Buffers& b, S* y) const {
    const Acc *factor = b.factor + first, *shift = b.shift + first, *weight = b.weight + first, *bias = b.bias + first;
    for_each_step(n, [&](int64_t i, auto lanes) {
      auto v = (load_run<lanes>(x + i) - mean) * rstd;
      if constexpr (Affine) v = v * load_run<lanes>(weight + i) + load_run<lanes>(bias + i);
      store_run<lanes>(y + i, v * load_run<lanes>(factor + i) + load_run<lanes>(shift + i));
    });
  }

  void apply_maps(const S* x, int64_t first, int64_t width, Acc mean, Acc rstd, const Buffers& b, S* y) const {
    for (int64_t c = first; c < first + width; ++c, x += call.spatial, y += call.spatial) {
      const Acc factor = b.factor[c], shift = b.shift[c], weight = b.weight[c], bias = b.bias[c];
      for_each_step(call.spatial, [&](int64_t i, auto lanes) {
        const auto v = (load_run<lanes>(x + i) - mean) * rstd * weight + bias;
        store_run<lanes>(y + i, v * factor + shift);
      });
    }
  }

  // Sets whose pixels have the channels of other sets between them: all sets of the block at once, by blocks of pixels.
  void pixels(const Row& of_row, int64_t block, const Buffers& of_task) const {
    const Row row = of_row;  // a store could change what is read through a reference
    const Buffers b = of_task;
    const int64_t step = call.channels;
    const int64_t n = this->channel_count(block), width = call.group_channels(), groups = n / width;
    if (row.h)
      for_each_pixel(n, call.spatial, [&](int64_t c, int64_t first, int64_t count, auto lanes) {
        const auto gate = load_run<lanes>(b.gate + c);
        for (int64_t i = first * step + c, k = 0; k < count; ++k, i += step)
          store_run<lanes>(row.x_new + i, load_run<lanes>(row.h + i) * gate + load_run<lanes>(row.x + i));
      });
    const S* x = row.h ? row.x_new : row.x;
    for (int64_t g = 0; g < groups; ++g) b.moments[g] = {};
    // A part of the pixels, so that the second pass over it finds it in the cache.
    const int64_t part = max((int64_t(1) << 17) / max(n, 1) / kPixelBlock * kPixelBlock, kPixelBlock);
    for (int64_t first = 0; first < call.spatial; first += part)
      add_moments(x + first * step, min(part, call.spatial - first), n, b);
    for (int64_t g = 0; g < groups; ++g) {
      Acc mean;
      const Acc rstd = store_statistics(row, g, b.moments[g], mean);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) b.mean[c] = mean, b.rstd[c] = rstd;
    }
    for_each_pixel(n, call.spatial, [&](int64_t c, int64_t first, int64_t count, auto lanes) {
      const auto mean = load_run<lanes>(b.mean + c), rstd = load_run<lanes>(b.rstd + c);
      const auto weight = load_run<lanes>(b.weight + c), bias = load_run<lanes>(b.bias + c);
      const auto factor = load_run<lanes>(b.factor + c), shift = load_run<lanes>(b.shift + c);
      for (int64_t i = first * step + c, k = 0; k < count; ++k, i += step) {
        const auto v = (load_run<lanes>(x + i) - mean) * rstd * weight + bias;
        store_run<lanes>(row.y + i, v * factor + shift);
      }
    });
  }

  // f(channel, first pixel, pixels, lanes) for all channels of a block of pixels, then of the next.
  template <class F>
  static MI_INLINE void for_each_pixel(int64_t channels, int64_t pixels, F&& f) {
    for (int64_t first = 0; first < pixels; first += kPixelBlock)
      for_each_step(channels, [&](int64_t c, auto lanes) { f(c, first, min(kPixelBlock, pixels - first), lanes); });
  }

  void add_moments(const S* x, int64_t pixels, int64_t n, const Buffers& of_task) const {
    const Buffers b = of_task;
    const int64_t width = call.group_channels(), groups = n / width, step = call.channels;
    const double count = double(width * pixels);
    const auto sum_of_group = [&](const double* sums, int64_t g) {
      double sum = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += sums[c];
      return sum;
    };
    clear(b.mean, n);
    clear(b.sums, n);
    if (call.center) {
      for_each_pixel(n, pixels, [&](int64_t c, int64_t first, int64_t count, auto lanes) {
        const S* p = x + first * step + c;
        auto sum = load_run<lanes>(p);
        for (int64_t k = 1; k < count; ++k) sum += load_run<lanes>(p += step);
        this->add_in_double(b.sums + c, sum);
      });
      for (int64_t g = 0; g < groups; ++g) {
        const Acc mean = Acc(sum_of_group(b.sums, g) / count);
        for (int64_t c = g * width; c < (g + 1) * width; ++c) b.mean[c] = mean;
      }
      clear(b.sums, n);
    }
    clear(b.deviations, n);
    for_each_pixel(n, pixels, [&](int64_t c, int64_t first, int64_t count, auto lanes) {
      const S* p = x + first * step + c;
      const auto mean = load_run<lanes>(b.mean + c);
      auto sum = load_run<lanes>(p) - mean;
      auto squares = sum * sum;
      for (int64_t k = 1; k < count; ++k) {
        const auto d = load_run<lanes>(p += step) - mean;
        sum += d;
        squares += d * d;
      }
      this->add_in_double(b.deviations + c, sum);
      this->add_in_double(b.sums + c, squares);
    });
    // What the sums of large numbers lost, those of the deviations have.
    for (int64_t g = 0; g < groups; ++g) {
      const double sum = call.center ? sum_of_group(b.deviations, g) : 0;
      b.moments[g].add(count, double(b.mean[g * width]) + sum / count, sum_of_group(b.sums, g) - sum * (sum / count));
    }
  }
};

}  // namespace

void norm(DType dtype, const NormCall& call, const Executor& executor) {
  for_dtype(dtype, [&](auto s) { Norm<decltype(s)>(call, executor).run(); });
}

}  // namespace mi_kernels::MI_ISA
