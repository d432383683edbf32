// How a small kernel is put on a stream: from compute capability 9.0 on, it may begin while the launch before it ends.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twn::small {

// The kernel waits for the launch before by itself (wait_for_previous_launch), where its code is for 9.0 or later: what later
// cards compile of a build for 8.0 does not.
template <typename... Parameters, typename... Arguments>
const char* enqueue(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, const Arguments&... arguments) {
  cudaFuncAttributes code = {};
  cudaError_t error = cudaFuncGetAttributes(&code, kernel);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, not by the next launch
  return cudaGetErrorString(error);
}

}  // namespace twn::small
