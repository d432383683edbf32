// The library's definition and its probe, through torch's stable ABI: one binary for every torch >= 2.10.
#include "bindings/common.h"
#include "twn/launch.h"

namespace {

using torch::stable::Tensor;

// A copy made by our own kernel on the current stream: shows that the extension is built, loaded and able to launch.
Tensor probe(const Tensor& x) {
  twn::require(x.is_cuda(),
               "twn_cuda::probe: x must be on a CUDA device, so that a kernel can read it; got another device.",
               " Move it there with x.cuda().");
  twn::require(x.is_contiguous(), "twn_cuda::probe: x must be contiguous, got a strided view. Use x.contiguous().");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = twn::current_stream(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  const char* failure = twn::launch_copy(x.data_ptr(), out.data_ptr(), bytes, stream);
  twn::require(failure == nullptr, "twn_cuda::probe: the kernel did not start: ", failure == nullptr ? "" : failure);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(twn_cuda, m) { m.def("probe(Tensor x) -> Tensor"); }

// For every device, so that a tensor elsewhere meets our own message and not the dispatcher's list of keys.
STABLE_TORCH_LIBRARY_IMPL(twn_cuda, CompositeExplicitAutograd, m) { m.impl("probe", TORCH_BOX(&probe)); }
