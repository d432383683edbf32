// How prefill is started. Implemented in kernels/prefill_sm90a.cu, for cards of compute capability 9.0 alone.
#pragma once

#include "twn/prefill/plan.h"

namespace twn {

// Enqueues `group` (front: plain) on `stream`; `workspace` and `sync` as prefill_sizes(group) wants them, `report` a
// host word that a kernel writes where it gave up waiting. Never waits for the device. Returns nullptr, or what is
// wrong.
const char* launch_prefill_sm90a(const Group& group, void* workspace, uint32_t* sync, uint32_t* report, int processors,
                                 void* stream);

}  // namespace twn
