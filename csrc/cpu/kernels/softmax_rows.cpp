// The gate of a few rows under softmax: each row of y, which holds its logits, is normalised and multiplied by x in
// place. The rows are few and their making has read all of W, so this is not where the time goes.
#include "cpu/engine/vector_activations.h"
#include "cpu/kernels/family.h"

namespace mi_kernels::MI_ISA {
namespace {

template <class S>
void softmax_row(const S* x, int64_t x_stride, S* y, int64_t width) {
  using Acc = decltype(to_acc(S{}));
  using V = Vec<Acc>;
  constexpr int L = Simd<Acc>::lanes;
  Acc largest = to_acc(y[0]);
  for (int64_t j = 1; j < width; ++j) largest = to_acc(y[j]) > largest ? to_acc(y[j]) : largest;
  const auto exponentials = [&](int64_t j) {
    V v{};
    for (int64_t l = 0; l < min(L, width - j); ++l) v[l] = to_acc(y[j + l]);
    return first_lanes(exp(V(v - largest)), width - j);
  };
  double total = 0;
  for (int64_t j = 0; j < width; j += L) total += double(sum_lanes(exponentials(j)));
  for (int64_t j = 0; j < width; j += L) {
    const V e = exponentials(j);
    for (int64_t l = 0; l < min(L, width - j); ++l)
      from_acc(Acc(double(e[l]) / total) * to_acc(x[(j + l) * x_stride]), y[j + l]);
  }
}

}  // namespace

void softmax_rows(DType dtype, const TensorRef& x, Result y, int64_t rows, int64_t width, const Execution& execution) {
  for_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    run_tasks(execution, rows, [&](int64_t b, int64_t) {
      softmax_row(static_cast<const S*>(x.data) + b * x.row, x.col, static_cast<S*>(y.data) + b * width, width);
    });
  });
}

}  // namespace mi_kernels::MI_ISA
