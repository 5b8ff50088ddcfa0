// y = F(scale) * x + shift, or F(scale) * (x - shift) + shift. The activation is computed once for all rows that share
// a run of scale, or for whole vectors of rows if each row has a single scale; x is read once and y is written once.
#include <numeric>

#include "cpu/kernels/modulate_runs.h"

namespace mi_kernels::MI_ISA {
namespace {

// Elements up to which runs with one scale each are walked as one; longer ones are as fast one by one.
constexpr int64_t kWalkedRun = kShortRun / 2;

template <class S>
class Modulate {
  using Acc = decltype(to_acc(S{}));
  static constexpr int L = Simd<Acc>::lanes;

  const ModulateCall& call;

 public:
  explicit Modulate(const ModulateCall& c) : call(c) {}

  void run(const Executor& executor) {
    run_tasks(executor, call.tasks, [this](int64_t t, int64_t) { task(t); });
  }

 private:
  enum Added { kNothing, kShiftOfRun, kShiftOfElement, kMixed };
  template <class F>
  MI_INLINE void for_added(F&& f) const {
    if (!call.shift) return f(Index<kNothing>{});
    if (call.mixes) return f(Index<kMixed>{});
    call.inner.stride[kShift] == 0 ? f(Index<kShiftOfRun>{}) : f(Index<kShiftOfElement>{});
  }

  void task(int64_t t) const {
    if (call.chunks == 0) return for_added([&](auto added) { elements<added>(t * kModulateTask); });
    const int64_t begin = t / call.chunks * call.row_step, end = min(begin + call.row_step, call.rows);
    if (has_short_runs()) return for_added([&](auto added) { short_runs<added>(begin, end); });
    if (has_repeated_runs()) return repeated_runs(begin, end);
    long_runs(begin, end, t % call.chunks * kModulateChunk);
  }

  // Operands of one size, in registers: no run of scale serves more than one of x.
  template <int kAdded>
  void elements(int64_t first) const {
    const int64_t n = min(kModulateTask, call.inner.size - first);
    const S *x = static_cast<const S*>(call.x) + first, *scale = static_cast<const S*>(call.scale) + first;
    const S* shift = kAdded ? static_cast<const S*>(call.shift) + first : nullptr;
    S* y = static_cast<S*>(call.y) + first;
    const Acc multiple = Acc(call.function.factor), offset = Acc(call.function.offset);
    for_activation<VectorMath>(call.function.activation, [&](auto act) {
      for_each_vector<L>(n, [&](int64_t i, auto lanes) {
        const Vec<Acc> factor = act.value(lanes.load(scale + i)) * multiple + offset;
        Vec<Acc> v = lanes.load(x + i), added{};
        if constexpr (kAdded) added = lanes.load(shift + i);
        if constexpr (kAdded == kMixed) v -= added;
        lanes.store(y + i, kAdded == kNothing ? Vec<Acc>(factor * v) : Vec<Acc>(factor * v + added));
      });
    });
  }

  void long_runs(int64_t begin, int64_t end, int64_t first) const {
    const int64_t n = min(kModulateChunk, call.inner.size - first);
    alignas(64) Acc factor[kModulateChunk];
    alignas(64) Acc factors[kModulateChunk];
    alignas(64) S shift[kModulateChunk];
    alignas(64) S gathered[kModulateChunk];
    const int64_t scale_stride = call.inner.stride[kScale], shift_stride = call.inner.stride[kShift];
    const bool scale_by_row = scale_stride == 0;
    const S *last_scale = nullptr, *last_shift = nullptr;
    RunOperands operands{
        nullptr, factor, shift, n, nullptr, scale_by_row ? 0 : ~int64_t(0), shift_stride == 0 ? 0 : ~int64_t(0)};
    const Axis last = last_axis();
    for_each_segment(begin, end, [&](const AxisIterator<Axis>& it, int64_t, int64_t count) {
      for (int64_t k = 0; k < count; ++k) {
        const auto src = [&](const void* data, int operand) {
          return static_cast<const S*>(data) + it.offset(operand) + k * last.stride[operand] +
                 first * call.inner.stride[operand];
        };
        if (scale_by_row) {
          if (k % kModulateChunk == 0)
            activate_run(call.function, src(call.scale, kScale), last.stride[kScale], min(count - k, kModulateChunk),
                         factors);
          store(factor, Vec<Acc>{} + factors[k % kModulateChunk]);
        } else if (const S* scale = src(call.scale, kScale); scale != last_scale) {
          activate_run(call.function, scale, scale_stride, n, factor);
          last_scale = scale;
        }
        if (const S* next = call.shift ? src(call.shift, kShift) : nullptr; next != last_shift) {
          last_shift = next;
          if (shift_stride == 0) unroll<L>([&](auto l) MI_INLINED { shift[l] = *last_shift; });
          operands.shift = shift_stride == 0 ? shift : contiguous_run(last_shift, shift_stride, n, shift);
        }
        operands.x = contiguous_run(src(call.x, kX), call.inner.stride[kX], n, gathered);
        operands.y = static_cast<S*>(call.y) + it.offset(kY) + k * last.stride[kY] + first;
        write(operands);
      }
    });
  }

  Axis last_axis() const { return call.axes > 0 ? call.outer[call.axes - 1] : Axis{1, {}}; }

  // f(iterator, row, count) for the rows that follow each other along the last outer axis, where each operand has a
  // constant stride.
  template <class F>
  MI_INLINE void for_each_segment(int64_t begin, int64_t end, F&& f) const {
    const int64_t size = last_axis().size;
    for (int64_t row = begin, count; row < end; row += count) {
      count = min(end - row, size - row % size);
      f(AxisIterator(call.outer, call.axes, row), row, count);
    }
  }

  // Whether the rows of an operand follow each other in memory, as if there were no axes.
  bool is_dense(int operand) const {
    if (call.inner.stride[operand] != 1) return false;
    int64_t size = call.inner.size;
    for (int64_t a = call.axes; a-- > 0; size *= call.outer[a].size)
      if (call.outer[a].stride[operand] != size) return false;
    return true;
  }

  // Short runs with one scale each, as of a small feature map. They are walked as one, in whole vectors: the scale of
  // each lane is looked up among those of its own and the next runs.
  bool has_short_runs() const {
    return call.axes > 0 && call.inner.size <= kWalkedRun && call.inner.stride[kScale] == 0 && is_dense(kX) &&
           is_dense(kY) && (!call.shift || (call.inner.stride[kShift] == 0 && !call.mixes) || is_dense(kShift));
  }

  // Which of the runs from that of the first lane on each lane is in, by the first lane's place in its run.
  struct RunsOfLanes {
    using Int = decltype(Vec<Acc>{} < Vec<Acc>{});
    int64_t n, first;  // size of a run; the first place from which on a vector reaches the next run
    Int of_lanes[L];

    explicit RunsOfLanes(int64_t size) : n(size), first(size > L ? size - L : 0) {
      Int lane{};
      unroll<L>([&](auto l) MI_INLINED { lane[l.value] = l; });
      for (int64_t p = first; p < min(n, first + L); ++p) {
        Int run{};
        for (int64_t next = n; next < p + L; next += n) run -= lane >= Int{} + Lane<Int>(next - p);
        of_lanes[p - first] = run;
      }
    }
    const Int& at(int64_t place) const { return of_lanes[place > first ? place - first : 0]; }
  };

  template <int kAdded>
  void short_runs(int64_t begin, int64_t end) const {
    constexpr int64_t kRows = kModulateChunk;  // a multiple of L, so that each block of rows begins with a vector
    alignas(64) Acc factors[kRows + L], shifts[kRows + L];
    const RunsOfLanes runs(call.inner.size);
    const Axis last = last_axis();
    for (int64_t first = begin; first < end; first += kRows) {
      const int64_t count = min(end - first, kRows), start = first * runs.n;
      for_each_segment(first, first + count, [&](const AxisIterator<Axis>& it, int64_t row, int64_t rows) {
        const auto src = [&](const void* data, int operand) {
          return static_cast<const S*>(data) + it.offset(operand);
        };
        activate_run(call.function, src(call.scale, kScale), last.stride[kScale], rows, factors + (row - first));
        if constexpr (kAdded == kShiftOfRun) {
          const S* shift = src(call.shift, kShift);
          for (int64_t k = 0; k < rows; ++k) shifts[row - first + k] = to_acc(shift[k * last.stride[kShift]]);
        }
      });
      const S* shift = kAdded > kShiftOfRun ? static_cast<const S*>(call.shift) + start : nullptr;
      walk<kAdded>(runs, count, static_cast<const S*>(call.x) + start, shift, factors, shifts,
                   static_cast<S*>(call.y) + start);
    }
  }

  template <int kAdded>
  static void walk(const RunsOfLanes& runs, int64_t count, const S* x, const S* shift, const Acc* factors,
                   const Acc* shifts, S* y) {
    const int64_t n = runs.n, size = count * n;
    const auto step = [&](int64_t i, auto lanes, const Vec<Acc>& factor, const Vec<Acc>& shift_of_run) {
      Vec<Acc> v = lanes.load(x + i), added = shift_of_run;
      if constexpr (kAdded > kShiftOfRun) added = lanes.load(shift + i);
      if constexpr (kAdded == kMixed) v -= added;
      lanes.store(y + i, kAdded == kNothing ? Vec<Acc>(factor * v) : Vec<Acc>(factor * v + added));
    };
    const auto look_up = [&](int64_t i, auto lanes, int64_t run, int64_t place) {
      const auto of_lanes = runs.at(place);
      const auto found = [&](const Acc* p) { return Vec<Acc>(__builtin_shuffle(load<Vec<Acc>>(p + run), of_lanes)); };
      step(i, lanes, found(factors), kAdded == kShiftOfRun ? found(shifts) : Vec<Acc>{});
    };
    if (n < 4 * L) {
      const int64_t whole = L / n, rest = L % n;
      int64_t run = 0, place = 0;  // of the first lane
      return for_each_vector<L>(size, [&](int64_t i, auto lanes) {
        look_up(i, lanes, run, place);
        place += rest;
        const bool next = place >= n;
        place -= next ? n : 0;
        run += whole + next;
      });
    }
    int64_t i = 0;  // in most vectors all lanes are of one run
    for (int64_t run = 0, end = n; run < count; ++run, end += n) {
      const auto factor = Vec<Acc>{} + factors[run];
      const auto added = kAdded == kShiftOfRun ? Vec<Acc>{} + shifts[run] : Vec<Acc>{};
      for (; i + L <= end; i += L) step(i, Whole{}, factor, added);
      if (i == end || i + L > size) continue;
      look_up(i, Whole{}, run, i - (end - n));
      i += L;
    }
    if (i < size) look_up(i, Part{size - i}, count - 1, i - (size - n));
  }

  // Short runs that share their scales, as of a batch of few features: several of them are one run, with the scales
  // repeated, as far as possible a whole number of vectors.
  bool has_repeated_runs() const {
    const Axis &last = last_axis(), &inner = call.inner;
    const int64_t n = inner.size;
    const auto follows = [&](int operand) { return inner.stride[operand] == 1 && last.stride[operand] == n; };
    return last.size > 1 && n < kShortRun && n % L != 0 && inner.stride[kScale] == 1 && last.stride[kScale] == 0 &&
           follows(kX) && follows(kY) &&
           (!call.shift || (inner.stride[kShift] == 1 && (last.stride[kShift] == 0 || follows(kShift))));
  }

  void repeated_runs(int64_t begin, int64_t end) const {
    constexpr int64_t kElements = 2 * kModulateChunk;
    alignas(64) Acc factor[kElements];
    alignas(64) S shift[kElements];
    const Axis last = last_axis();
    const int64_t n = call.inner.size, aligned = L / std::gcd(n, int64_t(L));
    const bool repeats_shift = call.shift && last.stride[kShift] == 0;
    int64_t most = max(kModulateChunk / (n * aligned), 1) * aligned;
    most = min(min(most, kElements / n), last.size);
    const S *last_scale = nullptr, *last_shift = nullptr;
    for_each_segment(begin, end, [&](const AxisIterator<Axis>& it, int64_t, int64_t count) {
      const auto src = [&](const void* data, int operand) {
        return data ? static_cast<const S*>(data) + it.offset(operand) : nullptr;
      };
      const S *x = src(call.x, kX), *scale = src(call.scale, kScale), *added = src(call.shift, kShift);
      S* y = static_cast<S*>(call.y) + it.offset(kY);
      if (scale != last_scale) {
        activate_run(call.function, scale, 1, n, factor);
        repeat_run(factor, n, most);
        last_scale = scale;
      }
      if (repeats_shift && added != last_shift) {
        __builtin_memcpy(shift, added, size_t(n) * sizeof(S));
        repeat_run(shift, n, most);
        last_shift = added;
      }
      for (int64_t k = 0; k < count; k += most) {
        const int64_t i = k * n, size = min(most, count - k) * n;
        write({x + i, factor, repeats_shift ? shift : added + i, size, y + i, ~int64_t(0), ~int64_t(0)});
      }
    });
  }

  // One run of each operand. A mask is 0 if a single vector serves the whole run, and all ones otherwise.
  struct RunOperands {
    const S* x;
    const Acc* factor;
    const S* shift;
    int64_t n;
    S* y;
    int64_t factor_mask, shift_mask;
  };

  void write(const RunOperands& r) const {
    call.mixes ? write<true, true>(r) : call.shift ? write<true>(r) : write<false>(r);
  }

  template <bool Shift, bool Mixes = false>
  static void write(const RunOperands& r) {
    S* y = r.y;
    for_each_vector<L>(r.n, [&](int64_t i, auto lanes) {
      const auto factor = lanes.load(r.factor + (i & r.factor_mask));
      auto x = lanes.load(r.x + i);
      if constexpr (!Shift) {
        lanes.store(y + i, Vec<Acc>(factor * x));
      } else {
        const auto shift = lanes.load(r.shift + (i & r.shift_mask));
        if constexpr (Mixes) x -= shift;
        lanes.store(y + i, Vec<Acc>(factor * x + shift));
      }
    });
  }
};

}  // namespace

void modulate(DType dtype, const ModulateCall& call, const Executor& executor) {
  for_dtype(dtype, [&](auto s) { Modulate<decltype(s)>(call).run(executor); });
}

}  // namespace mi_kernels::MI_ISA
