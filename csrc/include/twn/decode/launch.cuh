// The kernel itself and its launch, for one set of forms and one pipe; instantiated once an architecture.
#pragma once

#include <cuda_runtime.h>

#include "twn/decode/device.cuh"
#include "twn/decode/forms.h"
#include "twn/decode/launch.h"

namespace twn {

template <typename T, typename Layout, template <typename> class PipeOf>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_kernel(const __grid_constant__ DecodePlan plan, int stages, char* workspace, uint32_t* sync, uint32_t* report) {
  extern __shared__ __align__(128) char shared[];
  DecodeDevice<T, Layout, PipeOf> ops(plan, shared, stages, workspace, sync, report);
  decode_program(ops, plan, blockIdx.x);
}

template <typename Forms>
DecodeSizes decode_sizes(const Group& group, const DeviceLimits& limits) {
  return with_form<Forms>(group.tokens, limits.shared_bytes, [&](auto form) {
    const DecodePlan plan = decode_plan(group, form.shape(), limits.processors);
    return DecodeSizes{plan.bytes, plan.sync_words};
  });
}

template <typename T, typename Layout, template <typename> class PipeOf>
const char* start(const DecodePlan& plan, int stages, bool early, char* workspace, uint32_t* sync, uint32_t* report,
                  cudaStream_t stream) {
  const auto kernel = decode_kernel<T, Layout, PipeOf>;
  const int shared = Layout::shared_bytes(stages);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, plan, stages, workspace, sync, report);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, not by the next launch
  return cudaGetErrorString(error);
}

// `early`: the kernel may begin before the one in front has ended, since it waits for that end itself.
template <typename Forms, template <typename> class PipeOf>
const char* launch_decode(const Group& group, const DeviceLimits& limits, bool early, void* workspace, uint32_t* sync,
                          uint32_t* report, void* stream) {
  if (group.tokens < 1 || group.tokens > kDecodeMaxTokens) return "the decode kernel takes 1 to 64 rows";
  return with_form<Forms>(group.tokens, limits.shared_bytes, [&](auto form) -> const char* {
    using Layout = typename decltype(form)::Type;
    const DecodePlan plan = decode_plan(group, form.shape(), limits.processors);
    const int stages = form.stages(limits.shared_bytes);
    if (stages < kFewestStages) return "a block of this GPU has too little shared memory for two stages of weights";
    const auto run = group.dtype == Dtype::kFloat16 ? start<__half, Layout, PipeOf> : start<__nv_bfloat16, Layout, PipeOf>;
    return run(plan, stages, early, static_cast<char*>(workspace), sync, report, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace twn
