// Normalisation with modulation on a GPU: checks, plans and launches.
#include "cuda/modulate/norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/integers.h"
#include "common/modulate_axes.h"
#include "common/norm_arguments.h"
#include "common/registration.h"
#include "cuda/host/device_stream.h"

namespace mi_kernels::cuda {
namespace {

constexpr const char* kForward = "norm_modulate";
constexpr const char* kGrads = "norm_modulate_grads";

const Tensor* pointer(const Optional& t) { return t.has_value() ? &*t : nullptr; }

// Whether the positions behind `dim` are one axis.
bool is_flat(const Tensor& t, int64_t dim) {
  int64_t expected = -1;
  for (int64_t d = t.dim() - 1; d > dim; --d) {
    if (t.size(d) == 1) continue;
    if (expected >= 0 && t.stride(d) != expected) return false;
    expected = t.stride(d) * t.size(d);
  }
  return true;
}

// The sizes of a call.
struct NormProblem {
  const Tensor& x;
  int64_t dim, groups, channels, space, sets;
  DType dtype;
  bool channels_last, channels_inner;
  std::vector<Tensor> copies;  // of operands whose positions are more than one axis

  Tensor result(bool wanted) const { return wanted ? allocate_in_layout(x, dim, channels_last) : allocate(x, {0}); }
  const Tensor* flat(const Tensor* t) {
    if (!t || is_flat(*t, dim)) return t;
    copies.push_back(in_layout(*t, dim, channels_last));
    return &copies.back();
  }
};

NormProblem norm_problem(const char* op, const NormArguments& a) {
  check_norm(op, a);
  const Tensor& x = a.x;
  const int64_t channels = x.size(a.dim) / a.groups;
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  NormProblem p{x, a.dim, a.groups, channels, 1, a.groups, dtype, has_channels_last(x, a.dim), false, {}};
  for (int64_t d = 0; d < a.dim; ++d) p.sets *= x.size(d);
  for (int64_t d = a.dim + 1; d < x.dim(); ++d) p.space *= x.size(d);
  p.channels_inner = p.space == 1 || p.channels_last;
  p.copies.reserve(8);  // flat() returns their addresses
  return p;
}

// The operands of a call on its axes.
class NormAxes {
 public:
  NormAxes(NormProblem& problem, NormOperands& operands) : p_(problem), operands_(operands) {
    operands_.sets = p_.sets;
    for (int64_t d = 0; d < p_.dim; ++d) lead_.push_back({p_.x.size(d), {}});
    lead_.push_back({p_.groups, {}});
    (p_.channels_inner ? operands_.inner : operands_.line).size = p_.channels;
    (p_.channels_inner ? operands_.line : operands_.inner).size = p_.space;
    Sizes sizes;
    for (const NormAxis& axis : lead_) sizes.push_back(axis.size);
    set_strides(Norm::stat, contiguous_strides(sizes), 0, 0);
  }
  void add(Norm operand, const Tensor* t) {
    if (!t) return;
    operands_.data[int(operand)] = t->const_data_ptr();
    add_strides(operand, strides_of(*t));
  }
  // The strides of results.
  void add_strides(Norm operand, const Sizes& strides) {
    int64_t space = 0;
    for (int64_t d = p_.x.dim() - 1; d > p_.dim && space == 0; --d) space = strides[size_t(d)];
    Sizes lead(strides.begin(), strides.begin() + p_.dim);
    lead.push_back(strides[size_t(p_.dim)] * p_.channels);
    set_strides(operand, lead, strides[size_t(p_.dim)], space);
  }
  // After all operands: whether an operand, or the result of the strides of y, can be read in chunks of 16 bytes.
  void vectorize(std::initializer_list<const void*> results) {
    const int64_t elements = 16 / storage_bytes(p_.dtype);
    for (int o = 0; o < kNormOperands; ++o) {
      bool fits = operands_.inner.stride[o] == 1 && operands_.inner.size % elements == 0 &&
                  operands_.line.stride[o] % elements == 0 && aligned(operands_.data[o]);
      for (const NormAxis& axis : lead_) fits = fits && axis.stride[o] % elements == 0;
      if (o == int(Norm::y))
        for (const void* result : results) fits = fits && aligned(result);
      operands_.vectorized[o] = fits;
    }
  }
  // The axes for which chosen(d) holds, d = `dim` for the groups, without those of size 1; neighbours are merged.
  template <class Chosen>
  int64_t copy_axes(NormAxis (&axes)[kMaxAxes], const char* op, Chosen&& chosen) const {
    std::vector<NormAxis> found;
    for (size_t d = 0; d < lead_.size(); ++d) {
      if (lead_[d].size == 1 || !chosen(int64_t(d))) continue;
      NormAxis axis = lead_[d];
      bool merges = !found.empty();
      for (int o = 0; merges && o < kNormOperands; ++o) merges = found.back().stride[o] == axis.stride[o] * axis.size;
      if (merges) {
        axis.size *= found.back().size;
        found.pop_back();
      }
      found.push_back(axis);
    }
    STD_TORCH_CHECK(found.size() < size_t(kMaxAxes), op, ": x: expected less than ", kMaxAxes,
                    " dimensions that do not follow each other in memory, got ", found.size());
    std::copy(found.begin(), found.end(), axes);
    return int64_t(found.size());
  }

 private:
  static bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
  void set_strides(Norm operand, const Sizes& lead, int64_t channel, int64_t space) {
    for (size_t d = 0; d < lead_.size(); ++d) lead_[d].stride[int(operand)] = lead_[d].size == 1 ? 0 : lead[d];
    (p_.channels_inner ? operands_.inner : operands_.line).stride[int(operand)] = channel;
    (p_.channels_inner ? operands_.line : operands_.inner).stride[int(operand)] = space;
  }

  NormProblem& p_;
  NormOperands& operands_;
  std::vector<NormAxis> lead_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_modulate(const Tensor& x, const Optional& h, const Optional& gate,
                                                         const Optional& scale, const Optional& shift,
                                                         const Optional& weight, const Optional& bias, int64_t dim,
                                                         int64_t groups, bool center, double eps,
                                                         std::string activation, double offset) {
  const ScaleFunction function{activation_of(activation, kForward, false), offset};
  const NormArguments a{x, h, gate, scale, shift, weight, bias, dim, groups, center, function};
  NormProblem p = norm_problem(kForward, a);
  NormParams params{};
  params.function = function;
  params.eps = eps;
  Tensor y = p.result(true), x_new = p.result(h.has_value());
  Tensor mean = allocate_statistic(x, dim, groups, center), rstd = allocate_statistic(x, dim, groups, true);
  if (x.numel() == 0) {  // means of nothing
    for (Tensor* t : {&mean, &rstd})
      if (t->numel() > 0) torch::stable::fill_(*t, __builtin_nan(""));
    return {y, x_new, mean, rstd};
  }
  const DeviceStream stream(x);
  NormAxes axes(p, params);
  axes.add(Norm::x, p.flat(&x));
  axes.add(Norm::h, p.flat(pointer(h)));
  axes.add(Norm::gate, pointer(gate));
  axes.add(Norm::scale, pointer(scale));
  axes.add(Norm::shift, pointer(shift));
  axes.add(Norm::weight, pointer(weight));
  axes.add(Norm::bias, pointer(bias));
  axes.add_strides(Norm::y, strides_of(y));
  params.y = y.mutable_data_ptr();
  params.x_new = h.has_value() ? x_new.mutable_data_ptr() : nullptr;
  params.mean_out = center ? mean.mutable_data_ptr() : nullptr;
  params.rstd_out = rstd.mutable_data_ptr();
  axes.vectorize({params.y, params.x_new});
  params.outer_axes = axes.copy_axes(params.outer, kForward, [](int64_t) { return true; });
  launch_norm(stream, p.dtype, params);
  return {y, x_new, mean, rstd};
}

void run_norm_sums(NormSumsParams& params, const NormAxes& axes, const NormProblem& p, const Sizes& size,
                   const DeviceStream& stream) {
  const auto kept = [&](int64_t d) { return d == p.dim || size[size_t(d)] != 1; };
  params.channels_inner = p.channels_inner;
  params.kept_axes = axes.copy_axes(params.kept, kGrads, kept);
  params.reduced_axes = axes.copy_axes(params.reduced, kGrads, [&](int64_t d) { return !kept(d); });
  if (p.channels_inner)
    params.reduced[params.reduced_axes++] = params.line;
  else
    params.kept[params.kept_axes++] = params.line;
  plan_norm_sums(params, p.dtype, stream.device());
  const int64_t elements = 16 / storage_bytes(p.dtype);
  const int64_t bytes = params.splits > 1 ? params.splits * params.units * 3 * elements * int64_t(sizeof(double)) : 0;
  const Scratch scratch(p.x, bytes);
  launch_norm_sums(stream, p.dtype, params, bytes ? scratch.at<double>() : nullptr);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients norm_modulate_grads(const Tensor& grad, const Tensor& x, const Optional& grad_x, const Optional& h,
                              const Optional& gate, const Optional& scale, const Optional& shift,
                              const Optional& weight, const Optional& bias, const Optional& mean, const Tensor& rstd,
                              int64_t dim, int64_t groups, bool center, std::string activation, double offset,
                              bool want_x, bool want_h, bool want_gate, bool want_scale, bool want_shift,
                              bool want_weight, bool want_bias) {
  const ScaleFunction function{activation_of(activation, kGrads, false), offset};
  const NormArguments a{x, h, gate, scale, shift, weight, bias, dim, groups, center, function};
  NormProblem p = norm_problem(kGrads, a);
  check_norm_grads(kGrads, a, grad, grad_x, mean, rstd, want_h, want_gate, want_scale, want_shift, want_weight,
                   want_bias);
  const auto sum = [&](bool wanted, const Optional& t) { return allocate(x, wanted ? sizes_of(*t) : Sizes{0}); };
  Tensor dx = p.result(want_x), dh = p.result(want_h);
  Tensor dgate = sum(want_gate, gate), dscale = sum(want_scale, scale), dshift = sum(want_shift, shift);
  Tensor dweight = sum(want_weight, weight), dbias = sum(want_bias, bias);
  Gradients results{dx, dh, dgate, dscale, dshift, dweight, dbias};
  if (x.numel() == 0) {  // empty sums
    for (Tensor* t : {&dgate, &dscale, &dshift, &dweight, &dbias})
      if (t->numel() > 0) torch::stable::zero_(*t);
    return results;
  }
  const DeviceStream stream(x);
  const Tensor rstds = in_layout(rstd, 0, false), means = center ? in_layout(*mean, 0, false) : rstds;
  const Tensor of_a = allocate(rstd, {2, p.sets});
  const Tensor *flat_grad = p.flat(&grad), *flat_x = p.flat(&x), *flat_grad_x = p.flat(pointer(grad_x));
  const Tensor* flat_h = want_gate ? p.flat(pointer(h)) : nullptr;
  const auto operands = [&](NormOperands& params) {
    params.function = function;
    params.mean = center ? means.const_data_ptr() : nullptr;
    params.rstd = rstds.const_data_ptr();
    NormAxes axes(p, params);
    axes.add(Norm::grad, flat_grad);
    axes.add(Norm::x, flat_x);
    axes.add(Norm::grad_x, flat_grad_x);
    axes.add(Norm::gate, pointer(gate));
    axes.add(Norm::scale, pointer(scale));
    axes.add(Norm::weight, pointer(weight));
    axes.add(Norm::bias, pointer(bias));
    return axes;
  };
  const auto result = [](bool wanted, Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; };
  if (want_x || want_h || want_gate) {
    NormInputGradsParams params{};
    NormAxes axes = operands(params);
    axes.add_strides(Norm::y, strides_of(want_x ? dx : want_h ? dh : *flat_x));
    params.dx = result(want_x, dx);
    params.dh = result(want_h, dh);
    params.means = of_a.mutable_data_ptr();
    axes.vectorize({params.dx, params.dh});
    params.outer_axes = axes.copy_axes(params.outer, kGrads, [](int64_t) { return true; });
    launch_norm_input_grads(stream, p.dtype, params);
  }
  const auto sums = [&](bool weighted, const Optional& like, void* gates, void* products, void* plain) {
    if (!gates && !products && !plain) return;
    const Sizes size = sizes_of(*like);
    NormSumsParams params{};
    NormAxes axes = operands(params);
    axes.add(Norm::h, flat_h);
    axes.add_strides(Norm::sum, contiguous_strides(size));
    axes.vectorize({});
    params.weighted = weighted;
    params.means = of_a.const_data_ptr();
    params.dgate = gates, params.dscale = products, params.dshift = plain;
    run_norm_sums(params, axes, p, size, stream);
  };
  const Optional &context = gate ? gate : scale ? scale : shift, &affine = weight ? weight : bias;
  sums(false, context, result(want_gate, dgate), result(want_scale, dscale), result(want_shift, dshift));
  sums(true, affine, nullptr, result(want_weight, dweight), result(want_bias, dbias));
  return results;
}

}  // namespace

void plan_norm_sums(NormSumsParams& p, DType dtype, const DeviceProperties& device) {
  const int64_t elements = 16 / storage_bytes(dtype);
  int64_t kept = 1, reduced = 1;
  for (int64_t a = 0; a < p.kept_axes; ++a) kept *= p.kept[a].size;
  for (int64_t a = 0; a < p.reduced_axes; ++a) reduced *= p.reduced[a].size;
  p.chunks = ceil_div(p.inner.size, elements);
  p.units = p.channels_inner ? kept * p.chunks : kept;
  p.terms = p.channels_inner ? reduced : reduced * p.chunks;
  // Neighbouring threads read neighbouring chunks: of 32 units and more if these are chunks of channels, else of one.
  int64_t group_threads = p.channels_inner ? kNormThreads / kWarpThreads : kNormThreads;
  while (group_threads > 1 && group_threads / 2 >= p.terms) group_threads /= 2;
  p.units_per_block = kNormThreads / group_threads;
  // As those of modulate_grads: four blocks on each multiprocessor, and 8 terms for each thread at least.
  const int64_t wanted = ceil_div(4 * device.sm_count, ceil_div(p.units, p.units_per_block));
  // A thread adds 16 blocks of 16 terms at most, but for what a grid has no room for.
  const int64_t most = p.terms / (8 * group_threads), least = ceil_div(p.terms, 256 * group_threads);
  p.split_size = ceil_div(p.terms, std::clamp<int64_t>(std::max(std::min(wanted, most), least), 1, 65535));
  p.splits = ceil_div(p.terms, p.split_size);
}

}  // namespace mi_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, MI_DISPATCH_KEY, m) {
  m.impl("norm_modulate", TORCH_BOX(&mi_kernels::cuda::norm_modulate));
  m.impl("norm_modulate_grads", TORCH_BOX(&mi_kernels::cuda::norm_modulate_grads));
}
