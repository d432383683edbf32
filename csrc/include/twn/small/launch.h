// The host functions that start the small kernels. Torch-free; each returns nullptr, or CUDA's own words for the failure.
#pragma once

#include "twn/small/front.h"
#include "twn/small/gate.h"
#include "twn/small/pool.h"

namespace twn::small {

// On `stream` (a cudaStream_t) of the current device.
const char* launch_pool(const Pool& pool, void* stream);
const char* launch_front(const FrontRows& front, void* stream);

// `gate` has been planned; `sync` holds kGateSyncWords words as flags.h wants them, `report` is a pinned host word.
// `device` is the current one.
const char* launch_gate(const Gate& gate, uint32_t* sync, uint32_t* report, int device, void* stream);

}  // namespace twn::small
