// Host functions of the decode kernel: how much memory a launch needs, and the launch. Torch-free.
#pragma once

#include "twn/group.h"
#include "twn/runtime.h"

namespace twn {

struct DecodeSizes {
  int64_t bytes;
  int sync_words;
};

// What bindings/workspace.h must give a launch of `group`, of 1 ... kDecodeMaxTokens tokens.
DecodeSizes decode_sizes_sm80(const Group& group, const DeviceLimits& limits);
DecodeSizes decode_sizes_sm90(const Group& group, const DeviceLimits& limits);

// Enqueues the kernel on `stream`. Returns nullptr, or what kept it from starting. From sm_90 on it reads base weights before
// the kernel in front of it has ended, and may miss what that one writes to them.
const char* launch_decode_sm80(const Group& group, const DeviceLimits& limits, void* workspace, uint32_t* sync,
                               uint32_t* report, void* stream);
const char* launch_decode_sm90(const Group& group, const DeviceLimits& limits, void* workspace, uint32_t* sync,
                               uint32_t* report, void* stream);

}  // namespace twn
