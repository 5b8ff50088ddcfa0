// What the kernels have in common: views of tensors, tasks, scratch memory, dispatch on the dtype.
#pragma once

#include "cpu/engine/engine.h"
#include "cpu/kernels/calls.h"

namespace mi_kernels::MI_ISA {

template <class S>
View<S> batch_view(const TensorRef& t, int64_t group) {  // mn along the batch, k along features
  return {static_cast<const S*>(t.data) + group * t.group, t.row, t.col};
}

template <class F>
void run_tasks(const Executor& executor, int64_t tasks, F&& task) {
  executor.run(
      tasks, executor.workers, [](void* closure, int64_t t, int64_t worker) { (*static_cast<F*>(closure))(t, worker); },
      &task);
}

// Allocates aligned pieces of a worker's scratch memory; the plan has added up their sizes.
struct ScratchAllocator {
  char* next;
  template <class T>
  T* allocate(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += scratch_bytes(count * int64_t(sizeof(T)));
    return piece;
  }
};

// out[e] = the sum over splits of partials[split][e], in order.
template <class Acc, class Out>
void sum_splits(const Executor& executor, const Acc* partials, int64_t splits, int64_t count, Out* out) {
  constexpr int64_t kChunk = 4096;
  run_tasks(executor, ceil_div(count, kChunk), [=](int64_t chunk, int64_t) {
    using V = Vec<Acc>;
    constexpr int L = Simd<Acc>::lanes;
    const int64_t end = min(count, (chunk + 1) * kChunk);
    int64_t e = chunk * kChunk;
    for (; e + L <= end; e += L) {
      V sum = load<V>(partials + e);
      for (int64_t s = 1; s < splits; ++s) sum += load<V>(partials + s * count + e);
      store_acc<L>(out + e, sum);
    }
    for (; e < end; ++e) {
      Acc sum = partials[e];
      for (int64_t s = 1; s < splits; ++s) sum += partials[s * count + e];
      from_acc(sum, out[e]);
    }
  });
}

// Partial sums of dx and dz, [split][group][row][feature] each; a gradient with one split has none.
template <class Acc>
struct InputPartials {
  const InputGradsCall& call;
  const InputGradsPlan& plan;
  const Executor& executor;

  Acc* x(int64_t split) const { return reinterpret_cast<Acc*>(executor.partials) + split * count(call.problem.width); }
  Acc* z(int64_t split) const {
    return x(call.dx.data && plan.x_splits > 1 ? plan.x_splits : 0) + split * count(call.problem.context);
  }
  template <class S>
  void sum() const {
    const ProblemSize& p = call.problem;
    if (call.dx.data && plan.x_splits > 1)
      sum_splits(executor, x(0), plan.x_splits, count(p.width), static_cast<S*>(call.dx.data));
    if (call.dz.data && plan.z_splits > 1)
      sum_splits(executor, z(0), plan.z_splits, count(p.context), static_cast<S*>(call.dz.data));
  }

 private:
  int64_t count(int64_t features) const { return call.problem.groups * call.problem.rows * features; }
};

// The multiplication that this instruction set has for elements stored as S.
template <class S>
struct MulOf {
  using type = MulF32;
};
template <>
struct MulOf<double> {
  using type = MulF64;
};
#if defined(__AVX512BF16__)
template <>
struct MulOf<BFloat16> {
  using type = MulBF16;
};
#endif

// The same for the gradient of the bias and for small gradients of weights. PyTorch sums rows pairwise, so sums in
// float would be less exact over a long batch; these sums are a small part of the work and can be in double.
template <class S>
struct SumMulOf : MulOf<S> {};
template <>
struct SumMulOf<float> {
  using type = MulF64;
};

template <class F>
void for_dtype(DType dtype, F&& f) {
#if defined(MI_SHARED_ISA)  // for another dtype kernel_table.cpp has its kernels
  if (dtype == DType::bf16) f(BFloat16{});
#else
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
    case DType::tf32: break;
  }
#endif
}

template <template <class, class> class Family, class Call, class Plan>
void run_family(DType dtype, const Call& call, const Plan& plan, const Executor& executor) {
  for_dtype(dtype, [&](auto s) { Family<typename MulOf<decltype(s)>::type, decltype(s)>(call, plan, executor).run(); });
}

}  // namespace mi_kernels::MI_ISA
