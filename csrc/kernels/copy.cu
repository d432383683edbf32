// Launcher of the copy kernel, for every architecture.
#include <cuda_runtime.h>

#include <algorithm>

#include "twn/copy.cuh"
#include "twn/launch.h"

namespace twn {
namespace {

// Enough blocks to fill any current GPU; the grid-stride loop does the rest.
constexpr int64_t kMaxBlocks = 4096;

template <typename Word>
void enqueue(const void* source, void* target, int64_t bytes, cudaStream_t stream) {
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t blocks = std::min((count + kCopyThreads - 1) / kCopyThreads, kMaxBlocks);
  copy_kernel<Word><<<static_cast<unsigned>(blocks), kCopyThreads, 0, stream>>>(
      static_cast<const Word*>(source), static_cast<Word*>(target), count);
}

}  // namespace

const char* launch_copy(const void* source, void* target, int64_t bytes, void* stream) {
  if (bytes == 0) return nullptr;
  const auto addresses = reinterpret_cast<uintptr_t>(source) | reinterpret_cast<uintptr_t>(target);
  if ((addresses | static_cast<uintptr_t>(bytes)) % sizeof(uint4) == 0) {
    enqueue<uint4>(source, target, bytes, static_cast<cudaStream_t>(stream));
  } else {
    enqueue<unsigned char>(source, target, bytes, static_cast<cudaStream_t>(stream));
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace twn
