// y = (act(scale) + s) * x + shift. The activation is taken once for all rows that share a stretch of scale; x is
// read once and y written once.
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
    alignas(64) Acc shift[kModulateChunk];
    alignas(64) S gathered[kModulateChunk];
    const S *last_scale = nullptr, *last_shift = nullptr;
    Walk walk(call.outer, call.axes, begin);
    for (int64_t row = begin; row < end; ++row, walk.next()) {
      const S* scale = place<S>(call.scale, walk, kScale, first);
      if (scale != last_scale)
        activate_run(call.activation, Acc(call.offset), scale, call.inner.stride[kScale], n, gate);
      last_scale = scale;
      if (call.shift) {
        const S* from = place<S>(call.shift, walk, kShift, first);
        if (from != last_shift) map_run(from, call.inner.stride[kShift], n, shift, [](const Vec<Acc>& v) { return v; });
        last_shift = from;
      }
      const S* x = contiguous_run(place<S>(call.x, walk, kX, first), call.inner.stride[kX], n, gathered);
      S* y = static_cast<S*>(call.y) + walk.at(kY) + first;
      if (call.shift)
        call.stream ? write<true, true>(x, gate, shift, n, y) : write<true, false>(x, gate, shift, n, y);
      else
        call.stream ? write<false, true>(x, gate, shift, n, y) : write<false, false>(x, gate, shift, n, y);
    }
    if (call.stream) finish_streaming();
  }

  template <class T>
  const T* place(const void* data, const Walk& walk, int operand, int64_t first) const {
    return static_cast<const T*>(data) + walk.at(operand) + first * call.inner.stride[operand];
  }

  template <bool Shift, bool Stream>
  static void write(const S* x, const Acc* gate, const Acc* shift, int64_t n, S* y) {
    const auto value = [&](int64_t i, auto lanes) {
      auto v = load_run<lanes>(gate + i) * load_run<lanes>(x + i);
      if constexpr (Shift) v += load_run<lanes>(shift + i);
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
