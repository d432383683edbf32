// The host functions that start a kernel: what bindings.cpp calls and what csrc/kernels implements. Torch-free.
#pragma once

#include <cstdint>

namespace twn {

// Enqueues a copy of `bytes` bytes on `stream` (a cudaStream_t). Returns nullptr, or CUDA's own words for the failure.
const char* launch_copy(const void* source, void* target, int64_t bytes, void* stream);

}  // namespace twn
