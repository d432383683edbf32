// The decode kernel for sm_90 and newer: bulk copies, and a start before the kernel in front has ended.
#include "twn/decode/bulk_pipe.cuh"
#include "twn/decode/launch.cuh"

namespace twn {

DecodeSizes decode_sizes_sm90(const Group& group, const DeviceLimits& limits) {
  return decode_sizes<DecodeForms90>(group, limits);
}

const char* launch_decode_sm90(const Group& group, const DeviceLimits& limits, void* workspace, uint32_t* sync,
                               uint32_t* report, void* stream) {
  return launch_decode<DecodeForms90, BulkPipe>(group, limits, /*early=*/true, workspace, sync, report, stream);
}

}  // namespace twn
