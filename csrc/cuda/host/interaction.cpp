// The dense interaction on a GPU: checks, plans and launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/registration.h"
#include "common/text.h"
#include "cuda/host/make_params.h"
#include "cuda/host/precision.h"
#include "cuda/host/sm90_dispatch.h"
#include "cuda/modulate/modulate.h"

namespace mi_kernels::cuda {
namespace {

Tensor empty(const Tensor& like, const CallShape& shape, std::vector<int64_t> sizes) {
  if (shape.grouped) sizes.insert(sizes.begin(), shape.problem.groups);
  return torch::stable::new_empty(like, sizes);
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

Tensor forward(const Tensor& x, const Tensor& z, const Optional& weight, const Optional& weight_z,
               const Optional& weight_x, const Optional& bias) {
  constexpr const char* op = "interaction";
  const CallShape shape = forward_shape(op, x, z, weight, weight_z, weight_x, bias);
  const ProblemSize& p = shape.problem;
  const DType dtype = product_dtype(x, p, op);
  Tensor y = empty(x, shape, {p.rows, p.out});
  if (y.numel() == 0) return y;
  const DeviceStream stream(x);
  const auto ref = [&](const auto& tensor) { return tensor_ref(tensor, shape.grouped); };
  DenseOperands a = dense_operands(p, ref(x), ref(z), weight, shape.grouped, ref(weight_z), ref(weight_x), dtype);
  if (run_forward_sm90(stream, x, dtype, a, ref(bias), y.mutable_data_ptr())) return y;
  const ForwardPlan plan = plan_forward(a.problem, a.weight_layout(), dtype, stream.device());
  const auto copy = repack_weight(plan.repacked, stream, x, a, dtype);
  for_arithmetic(dtype, [&](auto t) {
    using T = decltype(t);
    const auto epilogue = epilogue_to<T>(y.mutable_data_ptr(), p.groups, p.rows, p.out);
    launch_and_reduce<T>(stream, x, forward_params<T>(a, plan, ref(bias), epilogue), launch_planned_forward<T>);
  });
  return y;
}

// g M, stored as results or, if `partial` is given, as one partial sum among others.
template <class T>
void run_linear(const DeviceStream& stream, const Tensor& like, const ProblemSize& p, const TensorRef& grad,
                const TensorRef& m, const Epilogue<T>& out, AccOf<T>* partial) {
  LinearParams<T> params{};
  params.grid = plan_matmul(p.groups, p.rows, out.cols, p.out, !partial, dtype_v<T>, stream.device());
  params.grad = matrix_operand<T>(grad, p.rows, p.out);
  params.matrix = matrix_operand<T>(m, p.out, out.cols);
  params.k = p.out;
  params.epilogue = out;
  params.epilogue.partials = partial;
  if (partial) return launch_linear(stream, params);
  launch_and_reduce<T>(stream, like, params, launch_linear<T>);
}

// How many partial sums there are of dx and of dz: those of the product with W, and one through V or U.
struct InputGradsPlan {
  bool small_batch;
  InputGradsSplits splits{0, 1, 1, 0};
  Grid grid;
  int64_t dx, dz;
  InputGradsPlan(const ProblemSize& p, bool n_major, bool vectorized, DType dtype, const DeviceProperties& device,
                 bool want_x, bool want_z, bool u, bool v)
      : small_batch(use_small_batch(p, dtype)),
        grid(!small_batch ? plan_input_grads(p.groups, p.rows, p.context, p.width, dtype, device)
             : n_major    ? plan_small_batch_input_grads_n_major(p, vectorized, dtype, device, splits)
                          : plan_small_batch_input_grads(p, vectorized, dtype, device, splits)),
        dx(want_x ? grid.splits + v : 0),
        dz(want_z ? grid.col_tiles * splits.out_splits + u : 0) {}
  int64_t dx_elements(const ProblemSize& p) const { return dx * p.groups * p.rows * p.width; }
  int64_t dz_elements(const ProblemSize& p) const { return dz * p.groups * p.rows * p.context; }
};

template <class T>
void launch_planned_input_grads(const DeviceStream& stream, const InputGradsParams<T>& params, bool small_batch) {
  if constexpr (!std::is_same_v<T, tf32>)
    if (small_batch) return launch_small_batch_input_grads(stream, params);
  launch_input_grads(stream, params);
}

template <class T>
void run_input_grads(const DeviceStream& stream, const Tensor& like, const TensorRef& grad, const DenseOperands& a,
                     void* dx, void* dz) {
  using Acc = AccOf<T>;
  const ProblemSize& p = a.problem;
  const bool n_major = a.layout.n_major;
  const TensorRef &x = a.x, &z = a.z, &weight_z = a.weight_z, &weight_x = a.weight_x;
  const MatrixOperand<T> w = weight_per_context<T>(a.weight, p, n_major);
  const InputGradsPlan plan(p, n_major, w.vectorized, dtype_v<T>, stream.device(), dx, dz, weight_z.data,
                            weight_x.data);
  const int64_t dx_elements = plan.dx_elements(p);
  const Scratch scratch(like, (dx_elements + plan.dz_elements(p)) * int64_t(sizeof(Acc)));
  auto out_x = epilogue_to<T>(dx, p.groups, p.rows, p.width), out_z = epilogue_to<T>(dz, p.groups, p.rows, p.context);
  out_x.partials = scratch.at<Acc>();
  out_z.partials = out_x.partials + dx_elements;
  InputGradsParams<T> params{};
  params.vectorized = w.vectorized;
  params.n_major = n_major;
  params.splits = plan.splits;
  params.grid = plan.grid;
  params.grad = matrix_operand<T>(grad, p.rows, p.out);
  params.weight = w;
  params.k = p.out;
  params.rows = p.rows;
  params.context = p.context;
  params.width = p.width;
  params.x = static_cast<const T*>(x.data);
  params.z = static_cast<const T*>(z.data);
  params.x_group = x.group;
  params.x_row = x.row;
  params.x_col = x.col;
  params.z_group = z.group;
  params.z_row = z.row;
  params.z_col = z.col;
  params.dx = dx ? out_x.partials : nullptr;
  params.dz = dz ? out_z.partials : nullptr;
  launch_planned_input_grads(stream, params, plan.small_batch);
  const auto partial = [&](const Epilogue<T>& out, int64_t index) {
    return out.partials + index * out.groups * out.rows * out.cols;
  };
  if (dx && weight_x.data) run_linear<T>(stream, like, p, grad, weight_x, out_x, partial(out_x, plan.dx - 1));
  if (dz && weight_z.data) run_linear<T>(stream, like, p, grad, weight_z, out_z, partial(out_z, plan.dz - 1));
  if (dx) launch_reduce(stream, out_x, plan.dx);
  if (dz) launch_reduce(stream, out_z, plan.dz);
}

std::tuple<Tensor, Tensor> input_grads(const Tensor& grad, const Tensor& x, const Tensor& z, const Optional& weight,
                                       const Optional& weight_z, const Optional& weight_x, bool want_x, bool want_z) {
  constexpr const char* op = "interaction_input_grads";
  const CallShape shape = grads_shape(op, grad, x, z);
  const ProblemSize& p = shape.problem;
  check_weights(op, x, shape, weight, weight_z, weight_x);
  const DType dtype = product_dtype(x, p, op);
  Tensor dx = want_x ? empty(x, shape, {p.rows, p.width}) : nothing(x);
  Tensor dz = want_z ? empty(z, shape, {p.rows, p.context}) : nothing(z);
  if (dx.numel() + dz.numel() == 0) return {dx, dz};
  const DeviceStream stream(x);
  const auto ref = [&](const auto& tensor) { return tensor_ref(tensor, shape.grouped); };
  if (weight.has_value() && weight->numel() > 0) {
    DenseOperands a = dense_operands(p, ref(x), ref(z), weight, shape.grouped, ref(weight_z), ref(weight_x), dtype);
    const auto copy = repack_weight(repacks_for_input_grads(a.problem, a.layout, dtype), stream, x, a, dtype);
    void* grads[] = {want_x ? dx.mutable_data_ptr() : nullptr, want_z ? dz.mutable_data_ptr() : nullptr};
    if (a.layout.exchanged) std::swap(grads[0], grads[1]);
    for_arithmetic(dtype, [&](auto t) { run_input_grads<decltype(t)>(stream, x, ref(grad), a, grads[0], grads[1]); });
    return {dx, dz};
  }
  for_arithmetic(dtype, [&](auto t) {
    using T = decltype(t);
    const auto without_weight = [&](Tensor& to, const TensorRef& m, int64_t features) {
      if (to.numel() == 0) return;
      if (!m.data || p.out == 0) return void(torch::stable::zero_(to));
      run_linear<T>(stream, x, p, ref(grad), m, epilogue_to<T>(to.mutable_data_ptr(), p.groups, p.rows, features),
                    nullptr);
    };
    without_weight(dx, ref(weight_x), p.width);
    without_weight(dz, ref(weight_z), p.context);
  });
  return {dx, dz};
}

template <class T>
WeightGradsParams<T> weight_grads_params(const ProblemSize& p, const TensorRef& grad, const Epilogue<T>& out,
                                         const DeviceProperties& device) {
  WeightGradsParams<T> params{};
  params.grid = plan_matmul(p.groups, p.out, out.cols, p.rows, true, dtype_v<T>, device);
  params.grad = matrix_operand<T>(grad, p.rows, p.out);
  params.k = p.rows;
  params.epilogue = out;
  return params;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weight_grads(const Tensor& grad, const Tensor& x, const Tensor& z,
                                                        bool want_weight, bool want_weight_z, bool want_weight_x,
                                                        bool want_bias) {
  constexpr const char* op = "interaction_weight_grads";
  const CallShape shape = grads_shape(op, grad, x, z);
  const ProblemSize& p = shape.problem;
  check_products(op, "x", p, want_weight);
  const DType dtype = product_dtype(x, op);
  Tensor dweight = want_weight ? empty(x, shape, {p.out, p.context, p.width}) : nothing(x);
  Tensor dweight_z = want_weight_z ? empty(x, shape, {p.out, p.context}) : nothing(x);
  Tensor dweight_x = want_weight_x ? empty(x, shape, {p.out, p.width}) : nothing(x);
  Tensor dbias = want_bias ? empty(x, shape, {p.out}) : nothing(x);
  const auto ref = [&](const auto& tensor) { return tensor_ref(tensor, shape.grouped); };
  const TensorRef x_ref = ref(x), z_ref = ref(z);
  if (dweight.numel() + dweight_z.numel() + dweight_x.numel() > 0) {
    const DeviceStream stream(x);
    for_arithmetic(dtype, [&](auto t) {
      using T = decltype(t);
      const auto sum = [&](Tensor& to, int64_t cols, const TensorRef* features) {
        if (to.numel() == 0) return;
        const auto out = epilogue_to<T>(to.mutable_data_ptr(), p.groups, p.out, cols);
        auto params = weight_grads_params<T>(p, ref(grad), out, stream.device());
        params.generated = !features;
        if (features)
          params.features = matrix_operand<T>(*features, p.rows, cols);
        else
          params.zx = outer_products<T>(z_ref, x_ref, p);
        launch_and_reduce<T>(stream, x, params, launch_weight_grads<T>);
      };
      sum(dweight, p.context * p.width, nullptr);
      sum(dweight_z, p.context, &z_ref);
      sum(dweight_x, p.width, &x_ref);
    });
  }
  if (dbias.numel() > 0) {  // a bias is a shift that all rows share
    std::vector<int64_t> bias_size{1, p.out};
    if (shape.grouped) bias_size.insert(bias_size.begin(), p.groups);
    if (p.rows == 0)
      torch::stable::zero_(dbias);
    else
      sum_to_size(grad, bias_size, dbias, dtype);
  }
  return {dweight, dweight_z, dweight_x, dbias};
}

// Bytes of the partial sums of `results` results.
int64_t split_bytes(const Grid& grid, int64_t results, DType dtype) {
  return grid.splits > 1 ? grid.splits * results * accumulator_bytes(dtype) : 0;
}

// What a plan query answers. Of several products, one after the other, the last one's grid and the most bytes.
struct PrimitivePlan {
  Grid grid{};
  int64_t bytes = 0;
  bool small_batch = false, per_context = false, repacked = false;
  void add(const Grid& next, int64_t results, DType dtype) {
    grid = next;
    bytes = std::max(bytes, split_bytes(next, results, dtype));
  }
};

// `terms` of a plan query.
PrimitivePlan input_grads_plan(const ProblemSize& p, DType dtype, int64_t terms, WeightLayout layout,
                               const DeviceProperties& device) {
  PrimitivePlan found;
  if (!(terms & 1) || p.context * p.width * p.out == 0) {
    const auto add = [&](int64_t cols) {
      found.add(plan_matmul(p.groups, p.rows, cols, p.out, true, dtype, device), p.groups * p.rows * cols, dtype);
    };
    if (terms & 32 && terms & 2) add(p.context);
    if (terms & 16 && terms & 4) add(p.width);
    return found;
  }
  found.repacked = repacks_for_input_grads(p, layout, dtype);
  if (found.repacked) layout = repacked_layout(layout);
  const int64_t inner = layout.n_major ? p.out : p.width;
  const bool vectorized = layout.aligned && inner % (16 / storage_bytes(dtype)) == 0;
  const InputGradsPlan plan(p, layout.n_major, vectorized, dtype, device, terms & 16, terms & 32, terms & 2, terms & 4);
  found.small_batch = plan.small_batch;
  found.grid = plan.grid;
  found.bytes = (plan.dx_elements(p) + plan.dz_elements(p)) * accumulator_bytes(dtype);
  return found;
}

// The terms of a plan query with x and z exchanged: U and V, dx and dz.
int64_t exchanged_terms(int64_t terms) {
  const auto swapped = [terms](int64_t low) { return (terms & low) << 1 | (terms & low << 1) >> 1; };
  return (terms & ~int64_t(2 | 4 | 16 | 32)) | swapped(2) | swapped(16);
}

// The plan of a primitive as "name=value;..." for sizes [G, B, Z, X, O], followed by the strides of W [O, Z, X] unless
// it is contiguous, on a GPU of `processors` multiprocessors. The bits of `terms`: W, U, V and the bias are given, dx
// and dz are wanted, another operand is not 16-byte aligned, W does not begin at a multiple of 16 bytes.
std::string cuda_interaction_plan(Text primitive, std::vector<int64_t> sizes, torch::headeronly::ScalarType type,
                                  int64_t terms, int64_t arch, int64_t processors) {
  constexpr const char* op = "cuda_interaction_plan";
  const std::vector<int64_t> strides = take_strides(sizes, 5);
  const ProblemSize asked = interaction_problem_size(op, sizes, terms, 8);
  check_gpu(op, arch, processors);
  const DType given = dtype_of(type, op, "dtype");
  const bool reads_weight = terms & 1 && primitive != "weight_grads";
  const auto [p, ref, layout] =
      reads_weight ? place_queried_weight(asked, strides, !(terms & 128), given) : PlacedWeight{asked, {}, {}};
  if (layout.exchanged) terms = exchanged_terms(terms);
  const DType dtype = primitive != "weight_grads" && use_small_batch(p, given) ? given : product_dtype(given);
  const DeviceProperties device{int(arch), int(processors)};
  const bool has_weight = terms & 1 && p.context * p.width > 0;
  PrimitivePlan plan;
  if (primitive == "forward") {
    if (const std::string found = forward_plan_sm90(p, dtype, terms, layout, device); !found.empty()) return found;
    const ForwardPlan forward = plan_forward(p, has_weight ? &layout : nullptr, dtype, device);
    plan = {forward.grid, split_bytes(forward.grid, p.groups * p.rows * p.out, dtype), forward.small_batch,
            forward.per_context, forward.repacked};
  } else if (primitive == "input_grads") {
    plan = input_grads_plan(p, dtype, terms, layout, device);
  } else {
    STD_TORCH_CHECK(primitive == "weight_grads", op,
                    ": primitive: expected forward, input_grads or weight_grads, got '", primitive, "'");
    const auto add = [&](int64_t cols) {
      plan.add(plan_matmul(p.groups, p.out, cols, p.rows, true, dtype, device), p.groups * p.out * cols, dtype);
    };
    if (terms & 2) add(p.context);
    if (terms & 4) add(p.width);
    if (terms & 1) add(p.context * p.width);
  }
  const char* path = algorithm_name(dtype);
  if (dtype == DType::f16 && has_weight && primitive != "input_grads")
    path = plan.per_context ? "mma-exact" : "mma-widened";
  if (plan.small_batch) path = "stream";
  if (!has_result(p, primitive, terms)) plan.bytes = plan.repacked = 0;
  return std::string("algorithm=") + path +
         memory_fields(layout, plan.repacked ? repack_bytes(p, false, dtype) : 0, plan.bytes) +
         ";blocks=" + std::to_string(plan.grid.blocks()) + ";splits=" + std::to_string(plan.grid.splits);
}

bool cuda_aligned(const Tensor& t) {
  check_defined("cuda_aligned", "tensor", t);
  STD_TORCH_CHECK(t.layout() == torch::headeronly::Layout::Strided,
                  "cuda_aligned: tensor: expected a dense (strided) tensor");
  const DType dtype = dtype_of(t.scalar_type(), "cuda_aligned", "tensor");
  const int64_t last = t.dim() - 1, inner_stride = last < 0 || t.size(last) <= 1 ? 1 : t.stride(last);
  bool aligned = can_vectorize(t.const_data_ptr(), dtype, inner_stride, 0, 0, 0, 0);
  for (int64_t d = 0; d < last; ++d)
    if (t.size(d) > 1)
      aligned = aligned && can_vectorize(t.const_data_ptr(), dtype, inner_stride, 0, t.stride(d), 0, 0);
  return aligned;
}

// The architectures that this library was built for.
std::string cuda_architectures() { return MI_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace mi_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, MI_DISPATCH_KEY, m) {
  m.impl("interaction", TORCH_BOX(&mi_kernels::cuda::forward));
  m.impl("interaction_input_grads", TORCH_BOX(&mi_kernels::cuda::input_grads));
  m.impl("interaction_weight_grads", TORCH_BOX(&mi_kernels::cuda::weight_grads));
}

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_interaction_plan", TORCH_BOX(&mi_kernels::cuda::cuda_interaction_plan));
  m.impl("cuda_aligned", TORCH_BOX(&mi_kernels::cuda::cuda_aligned));
  m.impl("cuda_architectures", TORCH_BOX(&mi_kernels::cuda::cuda_architectures));
}
