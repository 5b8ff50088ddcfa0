#include "cuda/host/sm90_dispatch.h"

#include "cuda/host/plan.h"
#include "cuda/host/sm90_args.h"

namespace mi_kernels::cuda {
namespace {

#if defined(MI_HAVE_SM90)
constexpr bool kHaveSm90 = true;
#else
constexpr bool kHaveSm90 = false;
#endif

}  // namespace

bool run_forward_sm90(const DeviceStream& stream, const ProblemSize& p, DType dtype, const TensorRef& x,
                      const TensorRef& z, const TensorRef& weight, const TensorRef& weight_z, const TensorRef& weight_x,
                      const TensorRef& bias, void* y) {
  if (!kHaveSm90 || !prefers_sm90(p, dtype, weight.data, stream.device()) || !sm90::fits_int(p)) return false;
  const sm90::ForwardArgs args = sm90::forward_args(p, x, z, weight, weight_z, weight_x, bias, y);
  if (sm90::why_not(args)) return false;
#if defined(MI_HAVE_SM90)
  const bool bfloat16 = dtype == DType::bf16;
  const sm90::KernelConfig config = sm90::choose_config(args.shape, bfloat16, stream.device().sm_count);
  sm90::launch_forward(args, config, bfloat16, stream.handle());
#endif
  return true;
}

std::string forward_plan_sm90(const ProblemSize& p, DType dtype, int64_t terms, const DeviceProperties& device) {
  const bool aligned = !(terms & 64) && p.width % 8 == 0 && (!(terms & 2) || p.context % 8 == 0);
  if (!kHaveSm90 || !aligned || !sm90::fits_int(p) || !prefers_sm90(p, dtype, terms & 1, device)) return {};
  const sm90::ProblemShape shape = sm90::problem_shape(p, terms & 1, terms & 2, terms & 4, terms & 8);
  const sm90::KernelConfig c = sm90::choose_config(shape, dtype == DType::bf16, device.sm_count);
  return std::string("algorithm=") + (c.exact ? "wgmma-exact" : "wgmma") +
         ";scratch=0;blocks=" + std::to_string(c.blocks) + ";splits=" + std::to_string(c.splits);
}

}  // namespace mi_kernels::cuda
