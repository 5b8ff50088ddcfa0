#include "cpu/dispatch/materialised.h"

#include <algorithm>
#include <optional>

#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/interaction.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/linear_call.h"
#include "cpu/dispatch/plan.h"

namespace mi_kernels {
namespace {

int64_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Elements from one row of P to the next: with room for a vector, and an odd number of cache lines, as rows at a
// distance of a power of two would share their sets of the cache.
int64_t row_stride(DType dtype, const ProblemSize& p) {
  constexpr int64_t kLine = 64;
  const int64_t lanes = selected_kernels().mul_traits(dtype).lanes, item = element_bytes(dtype);
  const int64_t lines = ceil_div((p.context * p.width + lanes) * item, kLine);
  return (lines | 1) * (kLine / item);
}

// P as the only input of a product without W.
ProblemSize without_weight(const ProblemSize& p) { return {p.groups, p.rows, 0, p.context * p.width, p.out}; }

// The dtypes whose products are rounded as P is, and sizes at which P is not larger than everything else. `weights`:
// how many W there are.
bool allows(DType dtype, const ProblemSize& p, int64_t weights) {
  if (selected_kernels().element(dtype) != dtype || p.context * p.width * p.rows * p.out == 0) return false;
  const int64_t largest_rows = p.groups * p.rows * max(max(p.context, p.width), p.out);
  return p.groups * p.rows * row_stride(dtype, p) <= max(weights * p.out * p.context * p.width, largest_rows);
}

bool fits(DType dtype, const ProblemSize& p, const PlacedWeight& weight) {
  const WeightLayout& layout = weight.layout;
  return layout.flat && layout.major != Major::neither && allows(dtype, p, weight.ref.group ? p.groups : 1);
}

// Rows of a task, and the executor's memory, for `rows` rows of Z X elements.
struct RowTasks {
  int64_t step, tasks, operations, worker_bytes;
  RowTasks(DType dtype, const ProblemSize& p) {
    constexpr int64_t kElements = 1 << 15;
    const MulTraits m = selected_kernels().mul_traits(dtype);
    const int64_t rows = p.groups * p.rows;
    step = max(kElements / max(p.context * p.width, 1), 1);
    tasks = ceil_div(rows, step);
    operations = 8 * rows * p.context * p.width;  // by their time
    worker_bytes =
        2 * scratch_bytes((p.context + m.lanes) * m.acc_bytes) + 2 * scratch_bytes((p.width + m.lanes) * m.acc_bytes);
  }
  WorkspaceSize size() const { return {tasks, operations, worker_bytes, 0}; }
};

// Scratch tensors and workspaces of a call, which are allocated or, where it is measured, added up.
class __attribute__((visibility("hidden"))) Memory {
  const Tensor* like_;
  WorkspaceNeeds* needs_;
  int64_t held_ = 0;

 public:
  Memory(const Tensor* like, WorkspaceNeeds* needs) : like_(like), needs_(needs) {}

  std::optional<Tensor> hold(int64_t bytes) {
    held_ += bytes;
    if (needs_) return {};
    Tensor held = allocate_bytes(*like_, bytes);
    prefer_huge_pages(held.mutable_data_ptr(), bytes);
    return held;
  }
  // Calls run(source) with memory for a part of the call.
  template <class Run>
  void part(const Run& run) {
    WorkspaceSource source;
    WorkspaceNeeds part;
    if (needs_)
      source.needs = &part;
    else
      source.like = like_;
    run(source);
    if (needs_) needs_->bytes = std::max(needs_->bytes, held_ + part.bytes);
  }
};

void* data_of(const std::optional<Tensor>& held) {
  static char nothing;  // of calls that are only measured
  return held ? held->mutable_data_ptr() : &nothing;
}

// P in new memory.
struct __attribute__((visibility("hidden"))) Products {
  std::optional<Tensor> memory;
  TensorRef ref;

  Products(DType dtype, const ProblemSize& p, const TensorRef& x, const TensorRef& z, Memory& source) {
    const int64_t stride = row_stride(dtype, p);
    memory = source.hold(p.groups * p.rows * stride * element_bytes(dtype));
    ref = {data_of(memory), p.rows * stride, stride, 1};
    const RowTasks tasks(dtype, p);
    const OuterCall call{p.groups, p.rows,          p.context, p.width,    x,
                         z,        data_of(memory), stride,    tasks.step, tasks.worker_bytes};
    source.part([&](const WorkspaceSource& part) {
      part.run(tasks.size(),
               [&](const Executor& executor) { selected_kernels().outer_products(dtype, call, executor); });
    });
  }
};

// W as the matrix [O, Z X].
TensorRef matrix_of(const WeightRef& w) { return {w.data, w.group, w.out, w.width}; }

}  // namespace

// Thresholds by measurement (docs/performance.md): rows of W shorter than four vectors leave lanes of the generated
// form empty, and P pays off from some tens of outputs on. A W that exceeds the cache is read faster by the stream of a
// plain product, and a few more rows than that stream takes fill vectors of the product's outputs, not of the batch.
bool materialises_forward(DType dtype, const ProblemSize& p, const PlacedWeight& weight) {
  if (!fits(dtype, p, weight)) return false;
  const MulTraits m = selected_kernels().mul_traits(dtype);
  const bool is_short = p.width < 4 * m.lanes && p.out >= 96;
  return is_short || (p.rows <= 12 && p.out >= 64 && uncached(p, m));
}

bool materialises_input_grads(DType dtype, const ProblemSize& p, const PlacedWeight& weight) {
  if (!fits(dtype, p, weight)) return false;
  const MulTraits m = selected_kernels().mul_traits(dtype);
  return p.out >= 64 && (p.width < 4 * m.lanes || (m.pair == 1 && p.rows > kInputStreamRows && p.rows <= 64));
}

bool materialises_weight_grads(DType dtype, const ProblemSize& p) {
  if (!allows(dtype, p, p.groups)) return false;
  const MulTraits m = selected_kernels().mul_traits(dtype);
  return p.width < 4 * m.lanes ? p.out >= 32 : p.width < 8 * m.lanes && p.out >= 200 && p.rows > kOuterRows;
}

void materialised_forward(DType dtype, const Tensor* like, ForwardCall call, WorkspaceNeeds* needs) {
  const ProblemSize p = call.problem;
  Memory memory(like, needs);
  const Products products(dtype, p, call.x, call.z, memory);
  LinearCall rest{
      p.groups,  p.rows,
      p.out,     {linear_term(call.z, call.weight_z, p.context), linear_term(call.x, call.weight_x, p.width)},
      call.bias, call.y};
  if (!rest.terms[0].rows.data) std::swap(rest.terms[0], rest.terms[1]);
  const bool others = rest.terms[0].rows.data;
  std::optional<Tensor> sum;
  if (others) sum = memory.hold(p.groups * p.rows * p.out * element_bytes(dtype));
  memory.part([&](const WorkspaceSource& part) {
    const OutputRef y = others ? OutputRef{data_of(sum)} : call.y;
    const TensorRef bias = others ? TensorRef{} : call.bias;
    forward_part(dtype, part, {without_weight(p), products.ref, {}, {}, {}, matrix_of(call.weight), bias, y}, {});
  });
  if (!others) return;
  rest.addend = {data_of(sum), p.rows * p.out, p.out, 1};
  const Kernels& kernels = selected_kernels();
  const LinearPlan plan = plan_linear(p.groups, p.rows, p.out, {rest.terms[0].depth, rest.terms[1].depth, 0}, false,
                                      kernels.mul_traits(dtype));
  memory.part([&](const WorkspaceSource& part) {
    part.run({plan.tasks, plan.operations, plan.worker_bytes, 0},
             [&](const Executor& executor) { kernels.linear(dtype, rest, plan, executor); });
  });
}

void materialised_input_grads(DType dtype, const Tensor* like, InputGradsCall call, WorkspaceNeeds* needs) {
  const ProblemSize p = call.problem;
  Memory memory(like, needs);
  const int64_t item = element_bytes(dtype), lanes = selected_kernels().mul_traits(dtype).lanes;
  const auto matrix = memory.hold((p.groups * p.rows * p.context * p.width + lanes) * item);
  InputGradsCall others = call;  // through U and V
  others.weight = {};
  if (!call.weight_x.data) others.dx = {};
  if (!call.weight_z.data) others.dz = {};
  if (others.dx.data || others.dz.data)
    memory.part([&](const WorkspaceSource& part) { input_grads_part(dtype, part, others, {}); });
  InputGradsCall product{without_weight(p), call.grad, {}, {}, {}, {}, matrix_of(call.weight), {data_of(matrix)}, {}};
  product.x = {data_of(matrix), 0, 0, 1};  // only its sizes count
  memory.part([&](const WorkspaceSource& part) { input_grads_part(dtype, part, product, {}); });
  const RowTasks tasks(dtype, p);
  const ContractCall sums{p.groups,
                          p.rows,
                          p.context,
                          p.width,
                          call.x,
                          call.z,
                          data_of(matrix),
                          call.dx,
                          call.dz,
                          bool(others.dx.data),
                          bool(others.dz.data),
                          tasks.step,
                          tasks.worker_bytes};
  memory.part([&](const WorkspaceSource& part) {
    part.run(tasks.size(), [&](const Executor& executor) { selected_kernels().contract(dtype, sums, executor); });
  });
}

void materialised_weight_grads(DType dtype, const Tensor* like, WeightGradsCall call, WorkspaceNeeds* needs) {
  {
    Memory memory(like, needs);
    const Products products(dtype, call.problem, call.x, call.z, memory);
    WeightGradsCall product{without_weight(call.problem), call.grad, products.ref, {}, {}, {}, call.weight, {}};
    memory.part([&](const WorkspaceSource& part) { weight_grads_part(dtype, part, product); });
  }
  call.weight = {};
  Memory(like, needs).part([&](const WorkspaceSource& part) { weight_grads_part(dtype, part, call); });
}

}  // namespace mi_kernels
