// What the bindings ask of the CUDA runtime. Implemented in kernels/runtime.cu, so that they compile without CUDA headers.
#pragma once

#include <cstdint>

#include "twn/words.h"

namespace twn {

struct DeviceLimits {
  int capability = 0;  // 90 for 9.0; 0 where the device could not be asked
  int processors = 0;
  int shared_bytes = 0;  // that one block may have
};

// Of a device; asked for once.
const DeviceLimits& device_limits(int device);

// As Words::of.
uint32_t* launch_words(int device, void* stream, Family family, int64_t count);

// A word of pinned host memory a device, zero until a kernel gives up waiting; see Flags::wait. nullptr: no memory.
uint32_t* report_word(int device);

}  // namespace twn
