// Device code of the copy kernel. Torch-free: it compiles with nvcc alone, against any host program.
#pragma once

#include <cstdint>

namespace twn {

constexpr int kCopyThreads = 256;

// Copies `count` words with a grid-stride loop; 64-bit indices, so any tensor size is safe.
template <typename Word>
__global__ void __launch_bounds__(kCopyThreads)
    copy_kernel(const Word* __restrict__ source, Word* __restrict__ target, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    target[i] = source[i];
  }
}

}  // namespace twn
