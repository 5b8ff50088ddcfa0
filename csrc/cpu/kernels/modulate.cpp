// y = F(scale) * x + shift, or F(scale) * (x - shift) + shift. The activation is computed once for all rows that share
// a run of scale, or for whole vectors of rows if each row has a single scale; x is read once and y is written once.
#include "cpu/kernels/modulate_runs.h"

namespace mi_kernels::MI_ISA {
namespace {

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
  void task(int64_t t) const {
    const int64_t begin = t / call.chunks * call.row_step, end = min(begin + call.row_step, call.rows);
    const int64_t first = t % call.chunks * kModulateChunk, n = min(kModulateChunk, call.inner.size - first);
    if (has_short_runs(n)) return short_runs(begin, end, n);
    alignas(64) Acc factor[kModulateChunk];
    alignas(64) Acc factors[kModulateChunk];
    alignas(64) S shift[kModulateChunk];
    alignas(64) S gathered[kModulateChunk];
    const int64_t scale_stride = call.inner.stride[kScale], shift_stride = call.inner.stride[kShift];
    const bool scale_by_row = scale_stride == 0;
    const S *last_scale = nullptr, *last_shift = nullptr;
    RunOperands operands{
        nullptr, factor, shift, n, nullptr, scale_by_row ? 0 : ~int64_t(0), shift_stride == 0 ? 0 : ~int64_t(0)};
    const Axis none{1, {}}, &last = call.axes > 0 ? call.outer[call.axes - 1] : none;
    // Along the last outer axis, each operand has a constant stride.
    for (int64_t row = begin, count; row < end; row += count) {
      count = min(end - row, last.size - row % last.size);
      const AxisIterator it(call.outer, call.axes, row);
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
          if (shift_stride == 0)
            for (int l = 0; l < L; ++l) shift[l] = *last_shift;
          operands.shift = shift_stride == 0 ? shift : contiguous_run(last_shift, shift_stride, n, shift);
        }
        operands.x = contiguous_run(src(call.x, kX), call.inner.stride[kX], n, gathered);
        operands.y = static_cast<S*>(call.y) + it.offset(kY) + k * last.stride[kY] + first;
        call.mixes ? write<true, true>(operands) : call.shift ? write<true>(operands) : write<false>(operands);
      }
    }
  }

  // Short rows with one scale each, and a constant stride from row to row, as of a small feature map.
  // There, computing a row's addresses for arbitrary axes would cost as much as the row.
  bool has_short_runs(int64_t n) const {
    return call.axes == 1 && n == call.inner.size && n >= L && n <= 16 * L && call.inner.stride[kX] == 1 &&
           call.inner.stride[kScale] == 0 && (!call.shift || call.inner.stride[kShift] <= 1);
  }

  void short_runs(int64_t begin, int64_t end, int64_t n) const {
    alignas(64) Acc factors[kModulateChunk];
    const auto at = [&](const void* data, int operand, int64_t row) {
      return static_cast<const S*>(data) + row * call.outer[0].stride[operand];
    };
    for (int64_t first = begin; first < end; first += kModulateChunk) {
      const int64_t count = min(end - first, kModulateChunk);
      activate_run(call.function, at(call.scale, kScale, first), call.outer[0].stride[kScale], count, factors);
      for (int64_t row = first; row < first + count; ++row) {
        const S* x = at(call.x, kX, row);
        S* y = static_cast<S*>(call.y) + row * call.outer[0].stride[kY];
        const S* shift = call.shift ? at(call.shift, kShift, row) : nullptr;
        const Acc factor = factors[row - first];
        const bool one_shift = call.inner.stride[kShift] == 0;
        Vec<Acc> shifts{};
        if (shift && one_shift) shifts += to_acc(*shift);
        const auto write = [&](int64_t i) {
          auto v = load_acc<L>(x + i);
          if (shift && !one_shift) shifts = load_acc<L>(shift + i);
          v = factor * (call.mixes ? Vec<Acc>(v - shifts) : v);
          store_acc<L>(y + i, shift ? v + shifts : v);
        };
        for (int64_t i = 0; i + L <= n; i += L) write(i);
        if (n % L) write(n - L);  // overlaps the vector before, with the same values
      }
    }
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

  template <bool Shift, bool Mixes = false>
  static void write(const RunOperands& r) {
    const int64_t n = r.n;
    S* y = r.y;
    const auto value = [&](int64_t i, auto lanes) {
      const auto factor = load_run<lanes>(r.factor + (i & r.factor_mask));
      auto x = load_run<lanes>(r.x + i);
      if constexpr (!Shift) {
        return factor * x;
      } else {
        const auto shift = load_run<lanes>(r.shift + (i & r.shift_mask));
        if constexpr (Mixes) x -= shift;
        return factor * x + shift;
      }
    };
    int64_t i = 0;
    for (; i + L <= n; i += L) store_run<L>(y + i, value(i, Index<L>{}));
    for (; i < n; ++i) store_run<1>(y + i, value(i, Index<1>{}));
  }
};

}  // namespace

void modulate(DType dtype, const ModulateCall& call, const Executor& executor) {
  for_dtype(dtype, [&](auto s) { Modulate<decltype(s)>(call).run(executor); });
}

}  // namespace mi_kernels::MI_ISA
