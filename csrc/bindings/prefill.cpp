// twn_cuda::prefill_group: a site group of any number of rows in one launch, on Hopper.
#include "twn/prefill/launch.h"

#include "common.h"
#include "group_arguments.h"
#include "twn/runtime.h"
#include "workspace.h"

namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "twn_cuda::prefill_group";

const char* launch(const twn::Group& group, const twn::Workspace& workspace, int processors, void* stream) {
#if defined(TWN_SM90A)
  return twn::launch_prefill_sm90a(group, workspace.data, workspace.sync, workspace.report, processors, stream);
#else
  (void)group, (void)workspace, (void)processors, (void)stream;
  return "this build holds no sm_90a code";  // refused before, with the fix
#endif
}

Tensor prefill_group(const Tensor& x, const std::optional<Tensor>& norm_weight, double eps, bool gated,
                     const Tensors& weights, const Tensors& biases, const Tensors& A_r, const Tensors& B_r,
                     const Tensors& A_e, const Tensors& B_e, const std::vector<double>& scaling_r,
                     const std::vector<double>& scaling_e, const std::optional<Tensor>& routes, int64_t present,
                     bool swiglu, const std::optional<Tensor>& residual) {
#if !defined(TWN_SM90A)
  twn::require(false, kOp, ": this build holds no sm_90a code; rebuild with TORCH_CUDA_ARCH_LIST=\"9.0a\".");
#endif
  twn::require(!norm_weight.has_value() && !gated, kOp, ": x must be ready to be multiplied, got ",
               gated ? "gated=True" : "a norm_weight", ". Call twn_cuda::front first.");
  const auto [group, y] = twn::marshal(kOp, {x, norm_weight, eps, gated, weights, biases, A_r, B_r, A_e, B_e, scaling_r,
                                             scaling_e, routes, present, swiglu, residual});
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const twn::DeviceLimits& limits = twn::device_limits(device);
  twn::require(limits.capability == 90, kOp, ": the GPU must have compute capability 9.0, got ", limits.capability / 10,
               ".", limits.capability % 10, ". Use another impl.");
  void* stream = twn::current_stream(device);
  const twn::PrefillSizes sizes = twn::prefill_sizes(group);
  const twn::Workspace workspace =
      twn::acquire(x, stream, twn::Family::kPrefill, sizes.workspace_bytes, sizes.sync_words);
  const char* failure = launch(group, workspace, limits.processors, stream);
  twn::require(failure == nullptr, kOp, ": the kernel did not start: ", failure == nullptr ? "" : failure, ".");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(twn_cuda, m) {
  m.def(
      "prefill_group(Tensor x, Tensor? norm_weight, float eps, bool gated, Tensor[] weights, Tensor[] biases, Tensor[] "
      "A_r, "
      "Tensor[] B_r, Tensor[] A_e, Tensor[] B_e, float[] scaling_r, float[] scaling_e, Tensor? routes, int present, "
      "bool swiglu, "
      "Tensor? residual) -> Tensor");
}

// For every device, so that a tensor elsewhere meets our own message and not the dispatcher's list of keys.
STABLE_TORCH_LIBRARY_IMPL(twn_cuda, CompositeExplicitAutograd, m) {
  m.impl("prefill_group", TORCH_BOX(&prefill_group));
}
