// What every binding needs: errors that a user can read, and the current stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

// Weak: a CPU build of torch does not have it, and the library must still load there and say what is missing.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace twn {

// STD_TORCH_CHECK puts the C++ function's name before the message; users should read only what is wrong and what to do.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
}

inline void* current_stream(int32_t device_index) {
  require(aoti_torch_get_current_cuda_stream != nullptr,
          "twn_cuda: this build of torch has no CUDA streams; install a CUDA build of torch.");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

}  // namespace twn
