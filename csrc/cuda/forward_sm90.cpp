#include "forward_sm90.h"

#include "interaction_sm90.h"
#include "plan.h"

namespace mi_kernels::cuda {
namespace {

#if defined(MI_HAVE_SM90)
constexpr bool kHaveSm90 = true;
#else
constexpr bool kHaveSm90 = false;
#endif

// Groups that share one matrix have a stride of 0 between them.
sm90::View view(const Operand& o, int64_t groups, int64_t rows, int64_t cols) {
  if (!o.data) return {};
  const bool apart = groups > 1 && o.group != 0;
  return {o.data, {cols, 1, rows, apart ? groups : 1}, {o.col, 0, o.row, o.group}, apart ? 1 : 0};
}
sm90::View weight_view(const Operand& o, const Problem& p) {  // contiguous within a group
  sm90::View v = view(o, p.groups, p.out, p.width);
  v.size[1] = p.context;
  v.stride[0] = 1;
  v.stride[1] = p.width;
  v.stride[2] = p.context * p.width;
  return v;
}
sm90::Elements elements(const Operand& o, int64_t row, int64_t col) {
  return {static_cast<const uint16_t*>(o.data), o.group, row, col};
}

bool fits_int(const Problem& p) {
  for (const int64_t size : {p.groups, p.rows, p.context, p.width, p.out})
    if (size >= int64_t(1) << 30) return false;
  return true;
}
sm90::Problem problem(const Problem& p, bool weight, bool weight_z, bool weight_x, bool bias) {
  return {int(p.groups), int(p.rows), int(p.context), int(p.width), int(p.out), weight, weight_z, weight_x, bias};
}

}  // namespace

bool run_forward_sm90(const Place& place, const Problem& p, DType dtype, const Operand& x, const Operand& z,
                      const Operand& weight, const Operand& weight_z, const Operand& weight_x, const Operand& bias, void* y) {
  if (!kHaveSm90 || !prefers_sm90(p, dtype, weight.data, place.machine()) || !fits_int(p)) return false;
  sm90::ForwardOperands f{};
  f.problem = problem(p, weight.data, weight_z.data, weight_x.data, bias.data);
  f.x = view(x, p.groups, p.rows, p.width);
  f.z = view(z, p.groups, p.rows, p.context);
  f.weight = weight_view(weight, p);
  f.weight_z = view(weight_z, p.groups, p.out, p.context);
  f.weight_x = view(weight_x, p.groups, p.out, p.width);
  f.scales = elements(z, z.row, z.col);
  f.bias = elements(bias, 0, bias.row);  // its only dimension
  f.result = static_cast<uint16_t*>(y);
  if (sm90::refusal(f)) return false;
#if defined(MI_HAVE_SM90)
  const bool bfloat16 = dtype == DType::bf16;
  sm90::run_forward(f, sm90::choose_forward(f.problem, bfloat16, place.machine().processors), bfloat16, place.stream());
#endif
  return true;
}

std::string describe_forward_sm90(const Problem& p, DType dtype, int64_t terms, const Machine& machine) {
  const bool aligned = p.width % 8 == 0 && (!(terms & 2) || p.context % 8 == 0);
  if (!kHaveSm90 || !aligned || !fits_int(p) || !prefers_sm90(p, dtype, terms & 1, machine)) return {};
  const sm90::ForwardChoice c =
      sm90::choose_forward(problem(p, terms & 1, terms & 2, terms & 4, terms & 8), dtype == DType::bf16, machine.processors);
  return std::string("algorithm=") + (c.exact ? "wgmma-exact" : "wgmma") + ";scratch=0;blocks=" + std::to_string(c.blocks) +
         ";splits=" + std::to_string(c.split);
}

}  // namespace mi_kernels::cuda
