// Registration, argument checks and the current stream, through torch's stable ABI: one binary for every torch >= 2.10.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

#include "twn/launch.h"

// Weak: a CPU build of torch does not have it, and the library must still load there and say what is missing.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::stable::Tensor;

// STD_TORCH_CHECK puts the C++ function's name before the message; users should read only what is wrong and what to do.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

void* current_stream(int32_t device_index) {
  require(aoti_torch_get_current_cuda_stream != nullptr,
          "twn_cuda: this build of torch has no CUDA streams; install a CUDA build of torch.");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

// A copy made by our own kernel on the current stream: shows that the extension is built, loaded and able to launch.
Tensor probe(const Tensor& x) {
  require(x.is_cuda(), "twn_cuda::probe: x must be on a CUDA device, so that a kernel can read it; got another device.",
          " Move it there with x.cuda().");
  require(x.is_contiguous(), "twn_cuda::probe: x must be contiguous, got a strided view. Use x.contiguous().");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = current_stream(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  const char* failure = twn::launch_copy(x.data_ptr(), out.data_ptr(), bytes, stream);
  require(failure == nullptr, "twn_cuda::probe: the kernel did not start: ", failure == nullptr ? "" : failure);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(twn_cuda, m) { m.def("probe(Tensor x) -> Tensor"); }

// For every device, so that a tensor elsewhere meets our own message and not the dispatcher's list of keys.
STABLE_TORCH_LIBRARY_IMPL(twn_cuda, CompositeExplicitAutograd, m) { m.impl("probe", TORCH_BOX(&probe)); }
