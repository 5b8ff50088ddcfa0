// y = (act(scale) + s) * x + shift. The activation is taken once for all rows that share a stretch of scale, and
// by whole vectors of rows where each row has a scale of its own; x is read once and y written once.
#include "modulate_rows.h"

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
    alignas(64) Acc gate[kModulateChunk];
    alignas(64) Acc gates[kModulateChunk];
    alignas(64) S shift[kModulateChunk];
    alignas(64) S gathered[kModulateChunk];
    const int64_t scale_stride = call.inner.stride[kScale], shift_stride = call.inner.stride[kShift];
    const bool by_row = scale_stride == 0;
    const S *last_scale = nullptr, *from = nullptr;
    Walk walk(call.outer, call.axes, begin);
    Strip strip{x_of(walk, first), gate, shift, n, nullptr, by_row ? 0 : ~int64_t(0), shift_stride == 0 ? 0 : ~int64_t(0)};
    for (int64_t row = begin; row < end; ++row, walk.next()) {
      if (by_row) {
        if ((row - begin) % kModulateChunk == 0) activate_rows(walk, min(end - row, kModulateChunk), gathered, gates);
        store(gate, Vec<Acc>{} + gates[(row - begin) % kModulateChunk]);
      } else if (const S* scale = place(call.scale, walk, kScale, first); scale != last_scale) {
        activate_run(call.activation, Acc(call.offset), scale, scale_stride, n, gate);
        last_scale = scale;
      }
      if (call.shift) {
        from = place(call.shift, walk, kShift, first);
        if (shift_stride == 0)
          for (int l = 0; l < L; ++l) shift[l] = *from;
        strip.shift = shift_stride == 0 ? shift : contiguous_run(from, shift_stride, n, shift);
      }
      strip.x = contiguous_run(x_of(walk, first), call.inner.stride[kX], n, gathered);
      strip.y = static_cast<S*>(call.y) + walk.at(kY) + first;
      if (call.shift)
        call.stream ? write<true, true>(strip) : write<true, false>(strip);
      else
        call.stream ? write<false, true>(strip) : write<false, false>(strip);
    }
    if (call.stream) finish_streaming();
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

  // act(scale) + s of `count` rows with a scale each.
  void activate_rows(Walk walk, int64_t count, S* scales, Acc* gates) const {
    for (int64_t row = 0; row < count; ++row, walk.next()) scales[row] = *place(call.scale, walk, kScale, 0);
    activate_run(call.activation, Acc(call.offset), scales, 1, count, gates);
  }

  const S* x_of(const Walk& walk, int64_t first) const { return place(call.x, walk, kX, first); }
  const S* place(const void* data, const Walk& walk, int operand, int64_t first) const {
    return static_cast<const S*>(data) + walk.at(operand) + first * call.inner.stride[operand];
  }

  template <bool Shift, bool Stream>
  static void write(const Strip& s) {
    const int64_t n = s.n;
    S* y = s.y;
    const auto value = [&](int64_t i, auto lanes) {
      auto v = load_run<lanes>(s.gate + (i & s.gate_mask)) * load_run<lanes>(s.x + i);
      if constexpr (Shift) v += load_run<lanes>(s.shift + (i & s.shift_mask));
      return v;
    };
    int64_t i = 0;
    if constexpr (Stream) {
      for (; i < n && reinterpret_cast<uintptr_t>(y + i) % 64 != 0; ++i) store_run<1>(y + i, value(i, Index<1>{}));
      for (; i + L <= n; i += L) stream_run<L>(y + i, value(i, Index<L>{}));
    } else {
      for (; i + L <= n; i += L) store_run<L>(y + i, value(i, Index<L>{}));
    }
    for (; i < n; ++i) store_run<1>(y + i, value(i, Index<1>{}));
  }
};

}  // namespace

void modulate(DType dtype, const ModulateCall& call, const Execution& execution) {
  for_dtype(dtype, [&](auto s) { Modulate<decltype(s)>(call).run(execution); });
}

}  // namespace mi_kernels::MI_ISA
