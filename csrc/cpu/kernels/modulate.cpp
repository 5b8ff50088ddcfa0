// y = (act(scale) + s) * x + shift. The activation is taken once for all rows that share a stretch of scale, and
// by whole vectors of rows where each row has a scale of its own; x is read once and y written once.
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

  void run(const Execution& execution) {
    run_tasks(execution, call.tasks, [this](int64_t t, int64_t) { task(t); });
  }

 private:
  void task(int64_t t) const {
    const int64_t begin = t / call.chunks * call.row_step, end = min(begin + call.row_step, call.rows);
    const int64_t first = t % call.chunks * kModulateChunk, n = min(kModulateChunk, call.inner.size - first);
    if (short_rows(n)) return each_row(begin, end, n);
    alignas(64) Acc gate[kModulateChunk];
    alignas(64) Acc gates[kModulateChunk];
    alignas(64) S shift[kModulateChunk];
    alignas(64) S gathered[kModulateChunk];
    const int64_t scale_stride = call.inner.stride[kScale], shift_stride = call.inner.stride[kShift];
    const bool by_row = scale_stride == 0;
    const S *last_scale = nullptr, *from = nullptr;
    Strip strip{nullptr, gate, shift, n, nullptr, by_row ? 0 : ~int64_t(0), shift_stride == 0 ? 0 : ~int64_t(0)};
    const Axis none{1, {}}, &last = call.axes > 0 ? call.outer[call.axes - 1] : none;
    // Along the last of the outer axes there is one stride for each operand.
    for (int64_t row = begin, panel; row < end; row += panel) {
      panel = min(end - row, last.size - row % last.size);
      const Walk walk(call.outer, call.axes, row);
      for (int64_t k = 0; k < panel; ++k) {
        const auto place = [&](const void* data, int operand) {
          return static_cast<const S*>(data) + walk.at(operand) + k * last.stride[operand] +
                 first * call.inner.stride[operand];
        };
        if (by_row) {
          if (k % kModulateChunk == 0)
            activate_run(call.activation, Acc(call.offset), place(call.scale, kScale), last.stride[kScale],
                         min(panel - k, kModulateChunk), gates);
          store(gate, Vec<Acc>{} + gates[k % kModulateChunk]);
        } else if (const S* scale = place(call.scale, kScale); scale != last_scale) {
          activate_run(call.activation, Acc(call.offset), scale, scale_stride, n, gate);
          last_scale = scale;
        }
        if (const S* next = call.shift ? place(call.shift, kShift) : nullptr; next != from) {
          from = next;
          if (shift_stride == 0)
            for (int l = 0; l < L; ++l) shift[l] = *from;
          strip.shift = shift_stride == 0 ? shift : contiguous_run(from, shift_stride, n, shift);
        }
        strip.x = contiguous_run(place(call.x, kX), call.inner.stride[kX], n, gathered);
        strip.y = static_cast<S*>(call.y) + walk.at(kY) + k * last.stride[kY] + first;
        call.shift ? write<true>(strip) : write<false>(strip);
      }
    }
  }

  // Rows of a small feature map, say: one scale and shift for each, one stride from row to row. Finding a row's
  // operands as any axes have them would cost as much as the row.
  bool short_rows(int64_t n) const {
    return call.axes == 1 && n == call.inner.size && n >= L && n <= 16 * L && call.inner.stride[kX] == 1 &&
           call.inner.stride[kScale] == 0 && (!call.shift || call.inner.stride[kShift] == 0);
  }

  void each_row(int64_t begin, int64_t end, int64_t n) const {
    alignas(64) Acc gates[kModulateChunk];
    const auto at = [&](const void* data, int operand, int64_t row) {
      return static_cast<const S*>(data) + row * call.outer[0].stride[operand];
    };
    for (int64_t first = begin; first < end; first += kModulateChunk) {
      const int64_t count = min(end - first, kModulateChunk);
      activate_run(call.activation, Acc(call.offset), at(call.scale, kScale, first), call.outer[0].stride[kScale],
                   count, gates);
      for (int64_t row = first; row < first + count; ++row) {
        const S* x = at(call.x, kX, row);
        S* y = static_cast<S*>(call.y) + row * call.outer[0].stride[kY];
        const Acc gate = gates[row - first], shift = call.shift ? to_acc(*at(call.shift, kShift, row)) : Acc(0);
        const auto write = [&](int64_t i) {
          const auto v = gate * load_acc<L>(x + i);
          store_acc<L>(y + i, call.shift ? v + shift : v);
        };
        for (int64_t i = 0; i + L <= n; i += L) write(i);
        if (n % L) write(n - L);  // the end again, which changes nothing
      }
    }
  }

  // A run of x and what meets it. An index is masked with 0 where one vector serves the whole run.
  struct Strip {
    const S* x;
    const Acc* gate;
    const S* shift;
    int64_t n;
    S* y;
    int64_t gate_mask, shift_mask;
  };

  template <bool Shift>
  static void write(const Strip& s) {
    const int64_t n = s.n;
    S* y = s.y;
    const auto value = [&](int64_t i, auto lanes) {
      auto v = load_run<lanes>(s.gate + (i & s.gate_mask)) * load_run<lanes>(s.x + i);
      if constexpr (Shift) v += load_run<lanes>(s.shift + (i & s.shift_mask));
      return v;
    };
    int64_t i = 0;
    for (; i + L <= n; i += L) store_run<L>(y + i, value(i, Index<L>{}));
    for (; i < n; ++i) store_run<1>(y + i, value(i, Index<1>{}));
  }
};

}  // namespace

void modulate(DType dtype, const ModulateCall& call, const Execution& execution) {
  for_dtype(dtype, [&](auto s) { Modulate<decltype(s)>(call).run(execution); });
}

}  // namespace mi_kernels::MI_ISA
