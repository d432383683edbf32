// twn_cuda::decode_group: a site group of 1 to 64 rows in one launch.
#include "twn/decode/launch.h"
#include "twn/decode/plan.h"

#include "common.h"
#include "group_arguments.h"
#include "workspace.h"

namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "twn_cuda::decode_group";

struct Form {
  decltype(&twn::decode_sizes_sm80) sizes;
  decltype(&twn::launch_decode_sm80) launch;
};

Form form_for(const twn::DeviceLimits& limits) {
  twn::require(limits.capability >= 80, kOp, ": the GPU must have compute capability 8.0 or later, got ", limits.capability / 10, ".",
               limits.capability % 10, ". Use another impl.");
#if defined(TWN_SM90)
  if (limits.capability >= 90) return {twn::decode_sizes_sm90, twn::launch_decode_sm90};
#endif
#if defined(TWN_SM80)
  return {twn::decode_sizes_sm80, twn::launch_decode_sm80};
#else
  twn::require(false, kOp, ": this build holds no code for compute capability ", limits.capability / 10, ".", limits.capability % 10,
               ". Rebuild with TORCH_CUDA_ARCH_LIST naming it.");
  return {};
#endif
}

Tensor decode_group(const Tensor& x, const std::optional<Tensor>& norm_weight, double eps, bool gated, const Tensors& weights,
                    const Tensors& biases, const Tensors& A_r, const Tensors& B_r, const Tensors& A_e, const Tensors& B_e,
                    const std::vector<double>& scaling_r, const std::vector<double>& scaling_e, const std::optional<Tensor>& routes,
                    int64_t present, bool swiglu, const std::optional<Tensor>& residual) {
  const auto [group, y] = twn::marshal(kOp, {x, norm_weight, eps, gated, weights, biases, A_r, B_r, A_e, B_e, scaling_r, scaling_e,
                                             routes, present, swiglu, residual});
  twn::require(group.tokens <= twn::kDecodeMaxTokens, kOp, ": x must have 1 to ", twn::kDecodeMaxTokens, " rows, got ", group.tokens, ". Run it in slices.");
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = twn::current_stream(device);
  const twn::DeviceLimits& limits = twn::device_limits(device);
  const Form form = form_for(limits);
  const twn::DecodeSizes sizes = form.sizes(group, limits);
  const twn::Workspace workspace = twn::acquire(x, stream, twn::Family::kDecode, sizes.bytes, sizes.sync_words);
  const char* failure = form.launch(group, limits, workspace.data, workspace.sync, workspace.report, stream);
  twn::require(failure == nullptr, kOp, ": the kernel did not start: ", failure == nullptr ? "" : failure);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(twn_cuda, m) {
  m.def(
      "decode_group(Tensor x, Tensor? norm_weight, float eps, bool gated, Tensor[] weights, Tensor[] biases, Tensor[] A_r, "
      "Tensor[] B_r, Tensor[] A_e, Tensor[] B_e, float[] scaling_r, float[] scaling_e, Tensor? routes, int present, bool swiglu, "
      "Tensor? residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(twn_cuda, CompositeExplicitAutograd, m) { m.impl("decode_group", TORCH_BOX(&decode_group)); }
