// The decode kernel for sm_80 and newer.
#include "twn/decode/copy_pipe.cuh"
#include "twn/decode/launch.cuh"

namespace twn {

DecodeSizes decode_sizes_sm80(const Group& group, const DeviceLimits& limits) {
  return decode_sizes<DecodeForms80>(group, limits);
}

const char* launch_decode_sm80(const Group& group, const DeviceLimits& limits, void* workspace, uint32_t* sync,
                               uint32_t* report, void* stream) {
  return launch_decode<DecodeForms80, CopyPipe>(group, limits, /*early=*/false, workspace, sync, report, stream);
}

}  // namespace twn
