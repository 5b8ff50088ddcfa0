// Outer products of two rows of features, and sums of such a matrix over either of its axes: what is left of the dense
// interaction where z x is an operand in memory and W a plain matrix.
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class S>
struct OuterProducts {
  using Acc = decltype(to_acc(S{}));
  using V = Vec<Acc>;
  static constexpr int L = Simd<Acc>::lanes;

  // A row as whole vectors, whose last one ends with zeros.
  static void widen(const TensorRef& t, int64_t group, int64_t row, int64_t count, Acc* to) {
    const S* from = static_cast<const S*>(t.data) + group * t.group + row * t.row;
    const int64_t stride = t.col;
    int64_t j = 0;
    if (stride == 1)
      for (; j + L <= count; j += L) store(to + j, load_acc<L>(from + j));
    for (; j < count; ++j) to[j] = to_acc(from[j * stride]);
    for (; j % L != 0; ++j) to[j] = Acc(0);
  }

  // Rows are followed by room for a vector, so that each store is a whole one.
  static void multiply(const OuterCall& call, int64_t group, int64_t row, Acc* a, Acc* b) {
    const int64_t context = call.context, width = call.width;
    widen(call.z, group, row, context, a);
    widen(call.x, group, row, width, b);
    S* to = static_cast<S*>(call.products) + (group * call.rows + row) * call.row_stride;
    for (int64_t i = 0; i < context; ++i, to += width) {
      const Acc factor = a[i];
      for (int64_t j = 0; j < width; j += L) store_acc<L>(to + j, V(load<V>(b + j) * factor));
    }
  }

  // The last vector of a row of the matrix reads into the next one; what is there may be anything.
  template <int N>
  MI_INLINE static void contract_rows(const S* from, int64_t width, const Acc* z, const Acc* x, Acc* dx, Acc* dz) {
    V dots[N]{}, factors[N];
    unroll<N>([&](auto n) MI_INLINED { factors[n] = V{} + z[n]; });
    const auto add = [&](int64_t j, auto&& read) {
      V sum = load<V>(dx + j);
      const V right = load<V>(x + j);
      unroll<N>([&](auto n) MI_INLINED {
        const V t = read(from + n * width + j);
        sum += t * factors[n];
        dots[n] += t * right;
      });
      store(dx + j, sum);
    };
    int64_t j = 0;
    for (; j + L <= width; j += L) add(j, [](const S* at) { return load_acc<L>(at); });
    if (j < width) add(j, [&](const S* at) { return first_lanes(load_acc<L>(at), width - j); });
    unroll<N>([&](auto n) MI_INLINED { dz[n] = sum_lanes(dots[n]); });
  }

  static void contract(const ContractCall& call, int64_t group, int64_t row, Acc* z, Acc* x, Acc* dx, Acc* dz) {
    const int64_t context = call.context, width = call.width, at = group * call.rows + row;
    widen(call.z, group, row, context, z);
    widen(call.x, group, row, width, x);
    for (int64_t j = 0; j < width; j += L) store(dx + j, V{});
    const S* from = static_cast<const S*>(call.matrix) + at * context * width;
    int64_t i = 0;
    for (; i + 4 <= context; i += 4) contract_rows<4>(from + i * width, width, z + i, x, dx, dz + i);
    for (; i < context; ++i) contract_rows<1>(from + i * width, width, z + i, x, dx, dz + i);
    narrow(dx, width, call.dx, at, call.add_x);
    narrow(dz, context, call.dz, at, call.add_z);
  }

  static void narrow(const Acc* from, int64_t count, OutputRef result, int64_t at, bool add) {
    if (!result.data) return;
    S* to = static_cast<S*>(result.data) + at * count;
    int64_t j = 0;
    for (; j + L <= count; j += L) {
      V sum = load<V>(from + j);
      if (add) sum += load_acc<L>(to + j);
      store_acc<L>(to + j, sum);
    }
    for (; j < count; ++j) from_acc(add ? Acc(from[j] + to_acc(to[j])) : from[j], to[j]);
  }
};

// Calls f(group, row, scratch) for all rows.
template <class Call, class F>
void for_rows(const Call& call, const Executor& executor, F&& f) {
  const int64_t rows = call.groups * call.rows;
  run_tasks(executor, ceil_div(rows, call.row_step), [&](int64_t t, int64_t worker) {
    for (int64_t at = t * call.row_step; at < min(rows, (t + 1) * call.row_step); ++at)
      f(at / call.rows, at % call.rows, ScratchAllocator{executor.scratch + worker * call.worker_bytes});
  });
}

}  // namespace

void outer_products(DType dtype, const OuterCall& call, const Executor& executor) {
  for_dtype(dtype, [&](auto s) {
    using Kernel = OuterProducts<decltype(s)>;
    using Acc = typename Kernel::Acc;
    for_rows(call, executor, [&](int64_t group, int64_t row, ScratchAllocator scratch) {
      Acc* z = scratch.template allocate<Acc>(call.context + Kernel::L);
      Kernel::multiply(call, group, row, z, scratch.template allocate<Acc>(call.width + Kernel::L));
    });
  });
}

void contract(DType dtype, const ContractCall& call, const Executor& executor) {
  for_dtype(dtype, [&](auto s) {
    using Kernel = OuterProducts<decltype(s)>;
    using Acc = typename Kernel::Acc;
    for_rows(call, executor, [&](int64_t group, int64_t row, ScratchAllocator scratch) {
      Acc* z = scratch.template allocate<Acc>(call.context + Kernel::L);
      Acc* x = scratch.template allocate<Acc>(call.width + Kernel::L);
      Acc* dx = scratch.template allocate<Acc>(call.width + Kernel::L);
      Kernel::contract(call, group, row, z, x, dx, scratch.template allocate<Acc>(call.context + Kernel::L));
    });
  });
}

}  // namespace mi_kernels::MI_ISA
