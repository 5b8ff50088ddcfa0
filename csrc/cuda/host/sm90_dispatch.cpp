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

bool run_forward_sm90(const DeviceStream& stream, const Tensor& like, DType dtype, const DenseOperands& a,
                      const TensorRef& bias, void* y) {
  const ProblemSize& p = a.problem;
  if (!kHaveSm90 || !prefers_sm90(p, dtype, a.weight_layout(), stream.device()) || !sm90::fits_int(p)) return false;
  std::optional<RepackedWeight> copy;
  if (repacks_for_sm90(a.layout)) copy.emplace(like, a, dtype);
  const sm90::ForwardArgs args =
      sm90::forward_args(p, a.x, a.z, copy ? copy->ref() : a.weight, a.weight_z, a.weight_x, bias, y);
  if (sm90::why_not(args)) return false;
  if (copy) copy->start(stream, a);
#if defined(MI_HAVE_SM90)
  const bool bfloat16 = dtype == DType::bf16;
  const sm90::KernelConfig config = sm90::choose_config(args.shape, bfloat16, stream.device().sm_count);
  sm90::launch_forward(args, config, bfloat16, stream.handle());
#endif
  return true;
}

std::string forward_plan_sm90(const ProblemSize& p, DType dtype, int64_t terms, const WeightLayout& layout,
                              const DeviceProperties& device) {
  const WeightLayout* const weight = terms & 1 && p.context * p.width > 0 ? &layout : nullptr;
  const bool repacked = weight && repacks_for_sm90(layout), weight_aligned = repacked || layout.aligned;
  const bool aligned = !(terms & 64) && weight_aligned && p.width % 8 == 0 && (!(terms & 2) || p.context % 8 == 0);
  if (!kHaveSm90 || !aligned || !sm90::fits_int(p) || !prefers_sm90(p, dtype, weight, device)) return {};
  const sm90::ProblemShape shape = sm90::problem_shape(p, terms & 1, terms & 2, terms & 4, terms & 8);
  const sm90::KernelConfig c = sm90::choose_config(shape, dtype == DType::bf16, device.sm_count);
  return std::string("algorithm=") + (c.exact ? "wgmma-exact" : "wgmma") +
         memory_fields(layout, repacked ? repack_bytes(p, false, dtype) : 0, 0) +
         ";blocks=" + std::to_string(c.blocks) + ";splits=" + std::to_string(c.splits);
}

}  // namespace mi_kernels::cuda
