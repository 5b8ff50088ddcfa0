// dx = rstd (a - m(a) - n m(a n)) + grad_x with a = g F(scale) w and m the mean over a set, dh = gate dx, and of each
// channel the sums over the rows of a unit of g n, of g and of h dx, from which the other gradients follow. The second
// look at a row, or at a set, finds it in the cache.
//
// Short summation blocks of rows in accumulation type are added up in double, as in modulate_grads.cpp.
#include "cpu/kernels/norm_channels.h"

namespace mi_kernels::MI_ISA {
namespace {

constexpr int64_t kSumBlock = 16, kShortSumBlock = 4, kFewRows = 128;
constexpr int kSums = NormGradsCall::kSums;

template <class S>
class NormGrads : NormChannels<S> {
  using Base = NormChannels<S>;
  using Base::L, Base::for_each_step, Base::sum_over, Base::first_channel, Base::channel_count;
  using typename Base::Acc, typename Base::V, typename Base::Channels;

  // Of one task: channels, a / g, sums of a block of rows and of all rows, sums of the weights' gradients, and, by
  // channel, what pixels need.
  struct Buffers : Channels {
    Acc *product, *slope, *sums[kSums];
    double *totals[kSums], *weights[2], *pixels[2];
    Acc *mean, *rstd, *by_grad, *by_x, *constant;
  };

  // One position of the block.
  struct Row {
    const S *x, *grad, *grad_x, *h;
    S *dx, *dh;
    const Acc *mean, *rstd;  // of its first group
  };

  const NormGradsCall& call;
  const Executor& executor;

 public:
  NormGrads(const NormGradsCall& c, const Executor& e) : Base(c), call(c), executor(e) {}

  void run() {
    run_tasks(executor, call.tasks, [this](int64_t t, int64_t worker) { task(t, worker); });
    if (call.partial_sums() == 0) return;
    run_tasks(executor, ceil_div(call.channels, kNormSumChannels), [this](int64_t chunk, int64_t worker) {
      const int64_t first = chunk * kNormSumChannels, n = min(kNormSumChannels, call.channels - first);
      call.splits > 1 ? sum_units(first, n, worker) : sum_tasks(first, n, worker);
    });
  }

 private:
  Buffers buffers(int64_t worker) const {
    ScratchAllocator scratch{executor.scratch + worker * call.worker_bytes};
    const int64_t n = max(call.block_channels(), kNormSumChannels);
    Buffers b;
    static_cast<Channels&>(b) = this->allocate_channels(scratch, n);
    for (Acc** p :
         {&b.product, &b.slope, &b.sums[0], &b.sums[1], &b.sums[2], &b.mean, &b.rstd, &b.by_grad, &b.by_x, &b.constant})
      *p = scratch.allocate<Acc>(n);
    for (double** p :
         {&b.totals[0], &b.totals[1], &b.totals[2], &b.weights[0], &b.weights[1], &b.pixels[0], &b.pixels[1]})
      *p = scratch.allocate<double>(n);
    if (!call.weight.data) b.product = b.factor;
    return b;
  }

  void task(int64_t t, int64_t worker) const {
    const Buffers b = buffers(worker);
    const int64_t block = t % call.blocks, part = t / call.blocks, n = channel_count(block);
    this->load_weights(first_channel(block), n, b);
    for (double* total : b.totals) clear(total, n);
    for (double* sum : b.weights) clear(sum, n);
    if (call.splits > 1) {
      const int64_t unit = part / call.splits, begin = part % call.splits * call.row_step;
      add_rows(unit, begin, min(begin + call.row_step, call.rows), block, b);
      for (int s = 0; call.partial_sums() > 0 && s < kSums; ++s)
        __builtin_memcpy(partial(unit, part % call.splits, s) + first_channel(block), b.totals[s],
                         size_t(n) * sizeof(double));
      return;
    }
    for (int64_t unit = part * call.unit_step; unit < min((part + 1) * call.unit_step, call.units); ++unit) {
      add_rows(unit, 0, call.rows, block, b);
      finish(unit, first_channel(block), n, b);
      for (double* total : b.totals) clear(total, call.rows == 1 ? 0 : n);
    }
    for (int s = 0; call.partial_sums() > 0 && s < 2; ++s)
      __builtin_memcpy(partial(0, part, s) + first_channel(block), b.weights[s], size_t(n) * sizeof(double));
  }

  // The sums of a part of a unit, or, with two sums of weights, of a task.
  double* partial(int64_t unit, int64_t part, int sum) const {
    const int64_t index = (unit * call.splits + part) * call.partial_sums() + sum;
    return reinterpret_cast<double*>(executor.partials) + index * call.channels;
  }

  void add_rows(int64_t unit, int64_t begin, int64_t end, int64_t block, const Buffers& b) const {
    const AxisIterator kept(call.kept, call.kept_axes, unit);
    const int64_t n = channel_count(block);
    this->load_contexts(kept, first_channel(block), n, b);
    for (int64_t c = 0; b.product != b.factor && c < n; ++c) b.product[c] = b.factor[c] * b.weight[c];
    AxisIterator reduced(call.reduced, call.reduced_axes, begin);
    const int64_t longest = call.rows <= kFewRows ? kShortSumBlock : kSumBlock;
    for (int64_t row = begin; row < end;) {
      const int64_t stop = min(row + longest, end);
      for (int s = 0; s < kSums; ++s)
        if (has_sum(s) && (s == 2 || call.rows > 1 || call.spatial > 1)) clear(b.sums[s], n);
      for (; row < stop; ++row, reduced.next()) add_row(row_at(kept, reduced, block), channel_count(block), b);
      if (call.rows == 1) return;  // finish() takes these
      for (int s = 0; s < kSums; ++s)
        for (int64_t c = 0; has_sum(s) && c < n; ++c) b.totals[s][c] += double(b.sums[s][c]);
    }
    for (int s = 0; s < kSums; ++s)
      for (int64_t c = 0; has_sum(s) && c < n; ++c) b.sums[s][c] = Acc(b.totals[s][c]);
  }

  bool has_sum(int s) const { return s == 2 ? call.dgate != nullptr : call.sums_grad(); }

  void add_row(const Row& row, int64_t channels, const Buffers& b) const {
    if (call.spatial == 1)
      add_features(row, b);
    else if (call.channels_last)
      add_pixels(row, channels, b);
    else
      add_maps(row, channels, b);
  }

  template <class Position>
  Row row_at(const Position& kept, const Position& reduced, int64_t block) const {
    const int64_t first = first_channel(block) * (call.channels_last ? 1 : call.spatial);
    const auto offset = [&](int operand) { return kept.offset(operand) + reduced.offset(operand); };
    const auto src = [&](const void* data, int operand) {
      return data ? static_cast<const S*>(data) + offset(operand) + first : nullptr;
    };
    const int64_t position = offset(kNormOut), out = position * call.channels * call.spatial + first;
    const int64_t group = position * call.groups + block * call.block_groups;
    const auto dest = [&](void* data) { return data ? static_cast<S*>(data) + out : nullptr; };
    const auto statistic = [&](const void* data) { return data ? static_cast<const Acc*>(data) + group : nullptr; };
    return {src(call.x, kNormX),
            src(call.grad, kNormGrad),
            src(call.grad_x, kNormGradX),
            src(call.h, kNormH),
            dest(call.dx),
            dest(call.dh),
            statistic(call.mean),
            statistic(call.rstd)};
  }

  // The means over a set of a and of a n.
  struct Means {
    Acc a, an;
  };
  Means means(double a, double an, int64_t size) const {
    return {call.center ? Acc(a / double(size)) : Acc(0), Acc(an / double(size))};
  }
  static Acc at(const Acc* statistic, int64_t group) { return statistic ? statistic[group] : Acc(0); }

  // The sets of a row of channels.
  void add_features(const Row& row, const Buffers& b) const {
    const int64_t width = call.group_channels();
    for (int64_t first = 0, g = 0; g < call.groups; ++g, first += width) {
      const Means m = !call.sums_grad() ? feature_sums<Sums::kNone>(row, g, first, width, b)
                      : call.rows == 1  ? feature_sums<Sums::kOnly>(row, g, first, width, b)
                                        : feature_sums<Sums::kAdded>(row, g, first, width, b);
      if (!call.has_dnew()) continue;
      if (row.grad_x || row.dh || call.dgate)
        features<true>(row, m, g, first, width, b);
      else
        features<false>(row, m, g, first, width, b);
    }
  }

  // What the row adds to the sums of its unit, and the means of the set. Pointers are copied first: a store could
  // change what is read through a reference.
  enum class Sums { kNone, kAdded, kOnly };  // kOnly: a unit of one row needs no sums before
  template <Sums kind>
  MI_INLINE Means feature_sums(const Row& row, int64_t g, int64_t start, int64_t width, const Buffers& b) const {
    const S *const x = row.x, *const grad = row.grad;
    const Acc mean = at(row.mean, g), rstd = row.rstd[g];
    const Acc* const products = b.product;
    Acc *const n_sums = b.sums[0], *const g_sums = b.sums[1];
    double a_sum = 0, an_sum = 0;
    for (int64_t first = start, end = start + width; first < end; first += kNormChunk) {
      V a_acc{}, an_acc{};
      Acc a_rest{}, an_rest{};
      for_each_step(min(kNormChunk, end - first), [&](int64_t i, auto lanes) {
        const int64_t c = first + i;
        const auto value = load_run<lanes>(grad + c);
        const auto n = (load_run<lanes>(x + c) - mean) * rstd;
        const auto a = value * load_run<lanes>(products + c);
        if constexpr (lanes == 1) {
          a_rest += a;
          an_rest += a * n;
        } else {
          a_acc += a;
          an_acc += a * n;
        }
        if constexpr (kind == Sums::kAdded) {
          store_run<lanes>(n_sums + c, load_run<lanes>(n_sums + c) + value * n);
          store_run<lanes>(g_sums + c, load_run<lanes>(g_sums + c) + value);
        } else if constexpr (kind == Sums::kOnly) {
          store_run<lanes>(n_sums + c, value * n);
          store_run<lanes>(g_sums + c, value);
        }
      });
      a_sum += double(sum_lanes(a_acc)) + double(a_rest);
      an_sum += double(sum_lanes(an_acc)) + double(an_rest);
    }
    return means(a_sum, an_sum, width);
  }

  template <bool Residual>
  MI_INLINE void features(const Row& of_row, const Means& m, int64_t g, int64_t first, int64_t width,
                          const Buffers& b) const {
    const Row row = of_row;
    const Acc mean = at(row.mean, g), rstd = row.rstd[g], m_a = m.a, m_an = m.an;
    const Acc *const products = b.product, *const gates = b.gate;
    Acc* const sums = call.dgate ? b.sums[2] : nullptr;
    for_each_step(width, [&](int64_t i, auto lanes) {
      const int64_t c = first + i;
      const auto n = (load_run<lanes>(row.x + c) - mean) * rstd;
      auto d = (load_run<lanes>(row.grad + c) * load_run<lanes>(products + c) - m_a - n * m_an) * rstd;
      if constexpr (Residual) {
        if (row.grad_x) d += load_run<lanes>(row.grad_x + c);
        if (row.dh) store_run<lanes>(row.dh + c, d * load_run<lanes>(gates + c));
        if (sums) store_run<lanes>(sums + c, load_run<lanes>(sums + c) + d * load_run<lanes>(row.h + c));
      }
      if (row.dx) store_run<lanes>(row.dx + c, d);
    });
  }

  // Sets that are contiguous, of maps.
  void add_maps(const Row& row, int64_t channels, const Buffers& b) const {
    const int64_t width = call.group_channels(), spatial = call.spatial;
    for (int64_t g = 0; g * width < channels; ++g) {
      const Acc mean = at(row.mean, g), rstd = row.rstd[g];
      double a_sum = 0, an_sum = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const S *x = row.x + c * spatial, *grad = row.grad + c * spatial;
        double n_sum = 0, g_sum = 0;
        for (int64_t first = 0; first < spatial; first += kNormChunk) {
          const int64_t count = min(kNormChunk, spatial - first);
          n_sum += sum_over(count, [&](int64_t i, auto lanes) {
            return (load_run<lanes>(x + first + i) - mean) * rstd * load_run<lanes>(grad + first + i);
          });
          g_sum += sum_over(count, [&](int64_t i, auto lanes) { return load_run<lanes>(grad + first + i); });
        }
        a_sum += double(b.product[c]) * g_sum;
        an_sum += double(b.product[c]) * n_sum;
        b.sums[0][c] += Acc(n_sum);
        b.sums[1][c] += Acc(g_sum);
      }
      if (!call.has_dnew()) continue;
      const Means m = means(a_sum, an_sum, width * spatial);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) add_map(row, c, m, mean, rstd, b);
    }
  }

  void add_map(const Row& of_row, int64_t c, const Means& m, Acc mean, Acc rstd, const Buffers& b) const {
    const Row row = of_row;
    const int64_t spatial = call.spatial, start = c * spatial;
    const Acc by_grad = b.product[c] * rstd, by_x = -m.an * rstd * rstd, constant = -m.a * rstd, gate = b.gate[c];
    const auto value = [&](int64_t i, auto lanes) {
      const auto x = load_run<lanes>(row.x + i) - mean;
      auto d = load_run<lanes>(row.grad + i) * by_grad + (x * by_x + constant);
      if (row.grad_x) d += load_run<lanes>(row.grad_x + i);
      if (row.dx) store_run<lanes>(row.dx + i, d);
      if (row.dh) store_run<lanes>(row.dh + i, d * gate);
      return d;
    };
    if (!call.dgate) return for_each_step(spatial, [&](int64_t i, auto lanes) { value(start + i, lanes); });
    double sum = 0;
    for (int64_t first = 0; first < spatial; first += kNormChunk)
      sum += sum_over(min(kNormChunk, spatial - first), [&](int64_t i, auto lanes) {
        const int64_t at = start + first + i;
        return value(at, lanes) * load_run<lanes>(row.h + at);
      });
    b.sums[2][c] += Acc(sum);
  }

  // f(element, lanes) of each pixel of a block, for all channels of the block, then of the next.
  template <class F>
  MI_INLINE void for_each_pixel(int64_t channels, F&& f) const {
    for (int64_t first = 0; first < call.spatial; first += kPixelBlock)
      for_each_step(channels, [&](int64_t c, auto lanes) {
        f(c, first * call.channels + c, min(kPixelBlock, call.spatial - first), lanes);
      });
  }
  // Sets whose pixels have the channels of other sets between them.
  void add_pixels(const Row& of_row, int64_t channels, const Buffers& of_task) const {
    const Row row = of_row;
    const Buffers b = of_task;
    const bool sums_h = call.dgate != nullptr;
    const int64_t width = call.group_channels(), step = call.channels;
    for (int64_t c = 0; c < channels; ++c) b.mean[c] = at(row.mean, c / width), b.rstd[c] = row.rstd[c / width];
    for (double* sums : b.pixels) clear(sums, channels);
    for_each_pixel(channels, [&](int64_t c, int64_t i, int64_t count, auto lanes) {
      const auto mean = load_run<lanes>(b.mean + c);
      auto g_sum = load_run<lanes>(row.grad + i);
      auto n_sum = g_sum * (load_run<lanes>(row.x + i) - mean);
      for (int64_t k = 1; k < count; ++k) {
        i += step;
        const auto grad = load_run<lanes>(row.grad + i);
        g_sum += grad;
        n_sum += grad * (load_run<lanes>(row.x + i) - mean);
      }
      this->add_in_double(b.pixels[0] + c, n_sum);
      this->add_in_double(b.pixels[1] + c, g_sum);
    });
    for (int64_t g = 0; g * width < channels; ++g) {
      double a_sum = 0, an_sum = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const double n_sum = b.pixels[0][c] * double(b.rstd[c]);
        a_sum += double(b.product[c]) * b.pixels[1][c];
        an_sum += double(b.product[c]) * n_sum;
        b.sums[0][c] += Acc(n_sum);
        b.sums[1][c] += Acc(b.pixels[1][c]);
      }
      const Means m = means(a_sum, an_sum, width * call.spatial);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const Acc rstd = b.rstd[c];
        b.by_grad[c] = b.product[c] * rstd, b.by_x[c] = -m.an * rstd * rstd, b.constant[c] = -m.a * rstd;
      }
    }
    if (!call.has_dnew()) return;
    clear(b.pixels[0], channels);
    for_each_pixel(channels, [&](int64_t c, int64_t i, int64_t count, auto lanes) {
      const auto mean = load_run<lanes>(b.mean + c), gate = load_run<lanes>(b.gate + c);
      const auto by_grad = load_run<lanes>(b.by_grad + c), by_x = load_run<lanes>(b.by_x + c);
      const auto constant = load_run<lanes>(b.constant + c);
      auto sum = this->zero_like(gate);
      for (int64_t k = 0; k < count; ++k, i += step) {
        auto d = load_run<lanes>(row.grad + i) * by_grad + ((load_run<lanes>(row.x + i) - mean) * by_x + constant);
        if (row.grad_x) d += load_run<lanes>(row.grad_x + i);
        if (row.dx) store_run<lanes>(row.dx + i, d);
        if (row.dh) store_run<lanes>(row.dh + i, d * gate);
        if (sums_h) sum += d * load_run<lanes>(row.h + i);
      }
      if (sums_h) this->add_in_double(b.pixels[0] + c, sum);
    });
    for (int64_t c = 0; call.dgate && c < channels; ++c) b.sums[2][c] += Acc(b.pixels[0][c]);
  }

  // The gradients of a unit's contexts from its sums, and what it adds to those of the weights.
  void finish(int64_t unit, int64_t first, int64_t n, const Buffers& b) const {
    const Acc *by_n = b.sums[0], *by_one = b.sums[1];
    const auto dest = [&](void* data) { return static_cast<S*>(data) + unit * call.channels + first; };
    const auto copy = [&](const Acc* sums, void* data) {
      if (data)
        for_each_step(n, [&](int64_t c, auto lanes) { store_run<lanes>(dest(data) + c, load_run<lanes>(sums + c)); });
    };
    if (call.dscale && call.function.activation == Activation::identity && call.function.factor == 1 &&
        !this->affine()) {
      copy(by_n, call.dscale);
    } else if (call.dscale) {
      const AxisIterator kept(call.kept, call.kept_axes, unit);
      const S* scale = this->channel(call.scale, kept.offset(kNormScale), first);
      for_activation<VectorMath>(call.function.activation, [&](auto act) {
        map_run(scale, call.scale.step, n, b.slope, [&](const V& v) { return act.derivative(v); });
      });
      // 0 times an infinite sum is no number.
      const bool selected = backward_selects(call.function.activation), has_bias = call.bias.data != nullptr;
      for_each_step(n, [&](int64_t c, auto lanes) {
        const auto slope = load_run<lanes>(b.slope + c), bias = load_run<lanes>(b.bias + c);
        auto sum = load_run<lanes>(b.weight + c) * load_run<lanes>(by_n + c);
        const auto none = this->zero_like(sum);
        if (has_bias) sum += bias == Acc(0) ? none : decltype(sum)(bias * load_run<lanes>(by_one + c));
        decltype(sum) product = slope * sum;
        if (selected) product = slope == Acc(0) ? none : product;
        store_run<lanes>(dest(call.dscale) + c, product);
      });
    }
    copy(by_one, call.dshift);
    copy(b.sums[2], call.dgate);
    for (int s = 0; s < 2; ++s)
      if (s == 0 ? call.dweight != nullptr : call.dbias != nullptr)
        for (int64_t c = 0; c < n; ++c) b.weights[s][c] += double(b.factor[c]) * double(b.sums[s][c]);
  }

  void store_weights(int64_t first, int64_t n, const Buffers& b) const {
    for (int64_t c = 0; call.dweight && c < n; ++c)
      from_acc(Acc(b.weights[0][c]), static_cast<S*>(call.dweight)[first + c]);
    for (int64_t c = 0; call.dbias && c < n; ++c)
      from_acc(Acc(b.weights[1][c]), static_cast<S*>(call.dbias)[first + c]);
  }

  // Adds up the parts of each unit, and finishes it.
  void sum_units(int64_t first, int64_t n, int64_t worker) const {
    const Buffers b = buffers(worker);
    this->load_weights(first, n, b);
    for (double* sum : b.weights) clear(sum, n);
    for (int64_t unit = 0; unit < call.units; ++unit) {
      for (int s = 0; s < kSums; ++s) {
        clear(b.totals[s], n);
        for (int64_t split = 0; split < call.splits; ++split) {
          const double* src = partial(unit, split, s) + first;
          for (int64_t c = 0; c < n; ++c) b.totals[s][c] += src[c];
        }
        for (int64_t c = 0; c < n; ++c) b.sums[s][c] = Acc(b.totals[s][c]);
      }
      this->load_factor(AxisIterator(call.kept, call.kept_axes, unit), first, n, b);
      finish(unit, first, n, b);
    }
    store_weights(first, n, b);
  }

  void sum_tasks(int64_t first, int64_t n, int64_t worker) const {
    const Buffers b = buffers(worker);
    for (int s = 0; s < 2; ++s) {
      clear(b.weights[s], n);
      for (int64_t part = 0; part < call.tasks / call.blocks; ++part) {
        const double* src = partial(0, part, s) + first;
        for (int64_t c = 0; c < n; ++c) b.weights[s][c] += src[c];
      }
    }
    store_weights(first, n, b);
  }
};

}  // namespace

void norm_grads(DType dtype, const NormGradsCall& call, const Executor& executor) {
  for_dtype(dtype, [&](auto s) { NormGrads<decltype(s)>(call, executor).run(); });
}

}  // namespace mi_kernels::MI_ISA
