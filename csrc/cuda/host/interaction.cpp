// The dense interaction on a GPU: checks, plans and launches; the arithmetic is in families.cuh.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/host/kernel_params.h"
#include "cuda/host/precision.h"
#include "cuda/host/registration.h"
#include "cuda/host/sm90_dispatch.h"
#include "cuda/modulate/modulate_call.h"

namespace mi_kernels::cuda {
namespace {

Tensor empty(const Tensor& like, const CallShape& a, std::vector<int64_t> sizes) {
  if (a.grouped) sizes.insert(sizes.begin(), a.problem.groups);
  return torch::stable::new_empty(like, sizes);
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

TensorRef contiguous_weight(const Optional& weight, bool grouped, Optional& kept) {
  if (!weight.has_value()) return {};
  kept = with_contiguous_groups(*weight, grouped);
  return weight_ref(*kept, grouped);
}

Tensor forward(const Tensor& x, const Tensor& z, const Optional& weight, const Optional& weight_z,
               const Optional& weight_x, const Optional& bias) {
  constexpr const char* op = "interaction";
  const CallShape a = forward_shape(op, x, z, weight, weight_z, weight_x, bias);
  const ProblemSize& p = a.problem;
  const DType dtype = product_dtype(x, p, op);
  Tensor y = empty(x, a, {p.rows, p.out});
  if (y.numel() == 0) return y;
  const Place place(x);
  Optional kept;
  const TensorRef ox = tensor_ref(x, a.grouped), oz = tensor_ref(z, a.grouped),
                  w = contiguous_weight(weight, a.grouped, kept);
  const TensorRef u = tensor_ref(weight_z, a.grouped), v = tensor_ref(weight_x, a.grouped),
                  c = tensor_ref(bias, a.grouped);
  if (run_forward_sm90(place, p, dtype, ox, oz, w, u, v, c, y.mutable_data_ptr())) return y;
  for_arithmetic(dtype, [&](auto t) {
    using T = decltype(t);
    const auto call = forward_call<T>(p, ox, oz, w, u, v, c, output<T>(y.mutable_data_ptr(), p.groups, p.rows, p.out),
                                      place.machine());
    run_product<T>(place, x, call, launch_product<T>);
  });
  return y;
}

// g M, to results or, for one partial sum among others, to `partial`.
template <class T>
void run_linear(const Place& place, const Tensor& like, const ProblemSize& p, const TensorRef& grad, const TensorRef& m,
                const Output<T>& out, AccOf<T>* partial) {
  LinearCall<T> call{};
  call.grid = plan_product(p.groups, p.rows, out.cols, p.out, !partial, dtype_v<T>, place.machine());
  call.grad = matrix<T>(grad, p.rows, p.out);
  call.matrix = matrix<T>(m, p.out, out.cols);
  call.depth = p.out;
  call.out = out;
  call.out.partials = partial;
  if (partial) return launch_linear(place, call);
  run_product<T>(place, like, call, launch_linear<T>);
}

// Partial sums of dx and of dz: those of the product with W, and one of U or V.
struct InputGradsParts {
  bool streams;
  GradsStream stream{0, 1, 1, 0};
  Grid grid;
  int64_t dx, dz;
  InputGradsParts(const ProblemSize& p, bool chunks, DType dtype, const Machine& machine, bool want_x, bool want_z,
                  bool u, bool v)
      : streams(cuda::streams(p, dtype)),
        grid(streams ? plan_grads_stream(p, chunks, dtype, machine, stream)
                     : plan_input_grads(p.groups, p.rows, p.context, p.width, dtype, machine)),
        dx(want_x ? grid.splits + v : 0),
        dz(want_z ? grid.col_tiles * stream.out_splits + u : 0) {}
  int64_t dx_elements(const ProblemSize& p) const { return dx * p.groups * p.rows * p.width; }
  int64_t dz_elements(const ProblemSize& p) const { return dz * p.groups * p.rows * p.context; }
};

template <class T>
void launch_items(const Place& place, const InputGradsCall<T>& call, bool streams) {
  if constexpr (!std::is_same_v<T, tf32>)
    if (streams) return launch_stream_grads(place, call);
  launch_input_grads(place, call);
}

template <class T>
void run_input_grads(const Place& place, const ProblemSize& p, const Tensor& like, const TensorRef& grad,
                     const TensorRef& x, const TensorRef& z, const TensorRef& weight, const TensorRef& weight_z,
                     const TensorRef& weight_x, void* dx, void* dz) {
  using Acc = AccOf<T>;
  const Matrix<T> items = weight_items<T>(weight, p);
  const InputGradsParts parts(p, items.whole, dtype_v<T>, place.machine(), dx, dz, weight_z.data, weight_x.data);
  const int64_t dx_elements = parts.dx_elements(p);
  const Scratch scratch(like, (dx_elements + parts.dz_elements(p)) * int64_t(sizeof(Acc)));
  auto out_x = output<T>(dx, p.groups, p.rows, p.width), out_z = output<T>(dz, p.groups, p.rows, p.context);
  out_x.partials = scratch.at<Acc>();
  out_z.partials = out_x.partials + dx_elements;
  InputGradsCall<T> call{};
  call.stream_chunks = items.whole;
  call.stream = parts.stream;
  call.grid = parts.grid;
  call.grad = matrix<T>(grad, p.rows, p.out);
  call.weight = items;
  call.depth = p.out;
  call.rows = p.rows;
  call.context = p.context;
  call.width = p.width;
  call.x = static_cast<const T*>(x.data);
  call.z = static_cast<const T*>(z.data);
  call.x_group = x.group;
  call.x_row = x.row;
  call.x_col = x.col;
  call.z_group = z.group;
  call.z_row = z.row;
  call.z_col = z.col;
  call.dx = dx ? out_x.partials : nullptr;
  call.dz = dz ? out_z.partials : nullptr;
  launch_items(place, call, parts.streams);
  const auto last = [&](const Output<T>& out, int64_t parts_before) {
    return out.partials + parts_before * out.groups * out.rows * out.cols;
  };
  if (dx && weight_x.data) run_linear<T>(place, like, p, grad, weight_x, out_x, last(out_x, parts.dx - 1));
  if (dz && weight_z.data) run_linear<T>(place, like, p, grad, weight_z, out_z, last(out_z, parts.dz - 1));
  if (dx) launch_reduce(place, out_x, parts.dx);
  if (dz) launch_reduce(place, out_z, parts.dz);
}

std::tuple<Tensor, Tensor> input_grads(const Tensor& grad, const Tensor& x, const Tensor& z, const Optional& weight,
                                       const Optional& weight_z, const Optional& weight_x, bool want_x, bool want_z) {
  constexpr const char* op = "interaction_input_grads";
  const CallShape a = grads_shape(op, grad, x, z);
  const ProblemSize& p = a.problem;
  check_weights(op, x, a, weight, weight_z, weight_x);
  const DType dtype = product_dtype(x, p, op);
  Tensor dx = want_x ? empty(x, a, {p.rows, p.width}) : nothing(x);
  Tensor dz = want_z ? empty(z, a, {p.rows, p.context}) : nothing(z);
  if (dx.numel() + dz.numel() == 0) return {dx, dz};
  const Place place(x);
  const TensorRef g = tensor_ref(grad, a.grouped), u = tensor_ref(weight_z, a.grouped),
                  v = tensor_ref(weight_x, a.grouped);
  for_arithmetic(dtype, [&](auto t) {
    using T = decltype(t);
    if (weight.has_value() && weight->numel() > 0) {
      Optional kept;
      const TensorRef w = contiguous_weight(weight, a.grouped, kept);
      return run_input_grads<T>(place, p, x, g, tensor_ref(x, a.grouped), tensor_ref(z, a.grouped), w, u, v,
                                want_x ? dx.mutable_data_ptr() : nullptr, want_z ? dz.mutable_data_ptr() : nullptr);
    }
    const auto alone = [&](Tensor& to, const TensorRef& m, int64_t features) {
      if (to.numel() == 0) return;
      if (!m.data || p.out == 0) return void(torch::stable::zero_(to));
      run_linear<T>(place, x, p, g, m, output<T>(to.mutable_data_ptr(), p.groups, p.rows, features), nullptr);
    };
    alone(dx, v, p.width);
    alone(dz, u, p.context);
  });
  return {dx, dz};
}

template <class T>
WeightGradsCall<T> weight_grads_call(const ProblemSize& p, const TensorRef& grad, const Output<T>& out,
                                     const Machine& machine) {
  WeightGradsCall<T> call{};
  call.grid = plan_product(p.groups, p.out, out.cols, p.rows, true, dtype_v<T>, machine);
  call.grad = matrix<T>(grad, p.rows, p.out);
  call.depth = p.rows;
  call.out = out;
  return call;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weight_grads(const Tensor& grad, const Tensor& x, const Tensor& z,
                                                        bool want_weight, bool want_weight_z, bool want_weight_x,
                                                        bool want_bias) {
  constexpr const char* op = "interaction_weight_grads";
  const CallShape a = grads_shape(op, grad, x, z);
  const ProblemSize& p = a.problem;
  check_products(op, "x", p, want_weight);
  const DType dtype = product_dtype(x, op);
  Tensor dw = want_weight ? empty(x, a, {p.out, p.context, p.width}) : nothing(x);
  Tensor du = want_weight_z ? empty(x, a, {p.out, p.context}) : nothing(x);
  Tensor dv = want_weight_x ? empty(x, a, {p.out, p.width}) : nothing(x);
  Tensor dc = want_bias ? empty(x, a, {p.out}) : nothing(x);
  const TensorRef g = tensor_ref(grad, a.grouped), ox = tensor_ref(x, a.grouped), oz = tensor_ref(z, a.grouped);
  if (dw.numel() + du.numel() + dv.numel() > 0) {
    const Place place(x);
    for_arithmetic(dtype, [&](auto t) {
      using T = decltype(t);
      const auto sum = [&](Tensor& to, int64_t cols, const TensorRef* features) {
        if (to.numel() == 0) return;
        const auto out = output<T>(to.mutable_data_ptr(), p.groups, p.out, cols);
        auto call = weight_grads_call<T>(p, g, out, place.machine());
        call.made = !features;
        if (features)
          call.features = matrix<T>(*features, p.rows, cols);
        else
          call.products = products<T>(oz, ox, p);
        run_product<T>(place, x, call, launch_weight_grads<T>);
      };
      sum(dw, p.context * p.width, nullptr);
      sum(du, p.context, &oz);
      sum(dv, p.width, &ox);
    });
  }
  if (dc.numel() > 0) {  // dc is the gradient of a shift that all rows share
    std::vector<int64_t> pattern{1, p.out};
    if (a.grouped) pattern.insert(pattern.begin(), p.groups);
    if (p.rows == 0)
      torch::stable::zero_(dc);
    else
      run_modulate_grads(
          modulate_grads_call(nullptr, nullptr, &dc, pattern, grad, grad, grad, Activation::identity, 0, dtype), x,
          dtype);
  }
  return {dw, du, dv, dc};
}

// The plan of a primitive as "name=value;..." for sizes [G, B, Z, X, O] on a GPU of `processors` multiprocessors;
// `terms` are W, U, V, c, whether dx and dz are wanted, whether an operand does not lie on boundaries of 16
// bytes, and whether W does not.
std::string cuda_interaction_plan(std::string primitive, std::vector<int64_t> sizes, torch::headeronly::ScalarType type,
                                  int64_t terms, int64_t arch, int64_t processors) {
  constexpr const char* op = "cuda_interaction_plan";
  const ProblemSize p = interaction_problem_size(op, sizes, terms, 8);
  check_gpu(op, arch, processors);
  const DType given = dtype_of(type, op, "dtype");
  const DType dtype = primitive != "weight_grads" && streams(p, given) ? given : product_dtype(given);
  const Machine machine{int(arch), int(processors), 0};
  const int64_t acc = accumulator_bytes(dtype), weight = p.context * p.width;
  const auto scratch = [&](const Grid& grid, int64_t results) {
    return grid.splits > 1 ? grid.splits * results * acc : 0;
  };
  Grid grid{};
  int64_t bytes = 0;
  ForwardPlan forward_plan{};
  bool streamed = false;
  if (primitive == "forward") {
    if (const std::string plan = describe_forward_sm90(p, dtype, terms, machine); !plan.empty()) return plan;
    forward_plan = plan_forward(p, terms & 1 && weight > 0, dtype, machine);
    grid = forward_plan.grid;
    streamed = forward_plan.streams;
    bytes = scratch(grid, p.groups * p.rows * p.out);
  } else if (primitive == "input_grads" && terms & 1 && weight > 0 && p.out > 0) {
    const bool chunks = !(terms & 128) && p.width % (16 / storage_bytes(dtype)) == 0;
    const InputGradsParts parts(p, chunks, dtype, machine, terms & 16, terms & 32, terms & 2, terms & 4);
    streamed = parts.streams;
    grid = parts.grid;
    bytes = (parts.dx_elements(p) + parts.dz_elements(p)) * acc;
  } else if (primitive == "input_grads") {
    const int64_t cols = terms & 16 && terms & 4 ? p.width : p.context;
    grid = plan_product(p.groups, p.rows, cols, p.out, true, dtype, machine);
    bytes = scratch(grid, p.groups * p.rows * cols);
  } else {
    STD_TORCH_CHECK(primitive == "weight_grads", op,
                    ": primitive: expected forward, input_grads or weight_grads, got '", primitive, "'");
    const int64_t cols = terms & 1 ? weight : terms & 4 ? p.width : p.context;
    grid = plan_product(p.groups, p.out, cols, p.rows, true, dtype, machine);
    bytes = scratch(grid, p.groups * p.out * cols);
  }
  const char* path = algorithm(dtype);
  if (dtype == DType::f16 && terms & 1 && weight > 0 && primitive != "input_grads")
    path = forward_plan.by_items ? "mma-exact" : "mma-widened";
  if (streamed) path = "stream";
  return std::string("algorithm=") + path + ";scratch=" + std::to_string(has_result(p, primitive, terms) ? bytes : 0) +
         ";blocks=" + std::to_string(grid.blocks()) + ";splits=" + std::to_string(grid.splits);
}

bool cuda_aligned(const Tensor& t) {
  check_defined("cuda_aligned", "tensor", t);
  STD_TORCH_CHECK(t.layout() == torch::headeronly::Layout::Strided,
                  "cuda_aligned: tensor: expected a dense (strided) tensor");
  const DType dtype = dtype_of(t.scalar_type(), "cuda_aligned", "tensor");
  const int64_t last = t.dim() - 1, along = last < 0 || t.size(last) <= 1 ? 1 : t.stride(last);
  bool aligned = whole_chunks(t.const_data_ptr(), dtype, along, 0, 0, 0, 0);
  for (int64_t d = 0; d < last; ++d)
    if (t.size(d) > 1) aligned = aligned && whole_chunks(t.const_data_ptr(), dtype, along, 0, t.stride(d), 0, 0);
  return aligned;
}

// What this library was built for: it is asked itself, as it does not depend on Python and _C does.
std::string cuda_architectures() { return MI_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace mi_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(MI_OPERATORS, MI_DISPATCH_KEY, m) {
  m.impl("interaction", TORCH_BOX(&mi_kernels::cuda::forward));
  m.impl("interaction_input_grads", TORCH_BOX(&mi_kernels::cuda::input_grads));
  m.impl("interaction_weight_grads", TORCH_BOX(&mi_kernels::cuda::weight_grads));
}

STABLE_TORCH_LIBRARY_IMPL(MI_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("cuda_interaction_plan", TORCH_BOX(&mi_kernels::cuda::cuda_interaction_plan));
  m.impl("cuda_aligned", TORCH_BOX(&mi_kernels::cuda::cuda_aligned));
  m.impl("cuda_architectures", TORCH_BOX(&mi_kernels::cuda::cuda_architectures));
}
