// Questions to the CUDA runtime, and memory from it, so that neither disturbs a capture.
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "twn/runtime.h"

namespace twn {
namespace {

std::mutex& lock() {
  static std::mutex* mutex = new std::mutex;  // never destroyed: kernels may outlive static destructors
  return *mutex;
}

DeviceLimits ask(int device) {
  int major = 0, minor = 0;
  DeviceLimits limits;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.capability = 10 * major + minor;
  return limits;
}

// A question or an allocation that fails must leave no error behind for the next launch to find.
bool succeeded(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess;
}

// An allocation is no part of a graph, but without this a capture would refuse it.
template <typename Allocate>
bool outside_captures(const Allocate& allocate) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const bool done = succeeded(allocate());
  cudaThreadExchangeStreamCaptureMode(&mode);
  return done;
}

struct CudaRuntime {
  static uint64_t capture_of(void* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    if (!succeeded(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id))) return 0;
    return status == cudaStreamCaptureStatusNone ? 0 : id;
  }

  static uint32_t* allocate(int64_t words) {
    void* memory = nullptr;
    outside_captures([&] { return cudaMalloc(&memory, words * sizeof(uint32_t)); });
    return static_cast<uint32_t*>(memory);
  }

  static bool clear(uint32_t* words, int64_t count, void* stream) {
    return succeeded(cudaMemsetAsync(words, 0, count * sizeof(uint32_t), static_cast<cudaStream_t>(stream)));
  }

  // Of the capture that `stream` is in. Where CUDA does not take the call, it is never made.
  static void when_graph_is_gone(void* stream, void (*call)(void*), void* argument) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaGraph_t graph = nullptr;
    const auto queue = static_cast<cudaStream_t>(stream);
    if (!succeeded(cudaStreamGetCaptureInfo(queue, &status, nullptr, &graph)) || graph == nullptr) return;
    cudaUserObject_t object = nullptr;
    if (!succeeded(cudaUserObjectCreate(&object, argument, call, 1, cudaUserObjectNoDestructorSync))) return;
    succeeded(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
  }
};

}  // namespace

const DeviceLimits& device_limits(int device) {
  const std::lock_guard<std::mutex> guard(lock());
  static auto* known = new std::map<int, DeviceLimits>;
  const auto found = known->find(device);
  return found != known->end() ? found->second : known->emplace(device, ask(device)).first->second;
}

uint32_t* launch_words(int device, void* stream, Family family, int64_t count) {
  static auto* words = new Words<CudaRuntime>;
  return words->of(device, stream, family, count);
}

uint32_t* report_word(int device) {
  const std::lock_guard<std::mutex> guard(lock());
  static auto* words = new std::map<int, uint32_t*>;
  const auto found = words->find(device);
  if (found != words->end()) return found->second;
  void* word = nullptr;
  if (!outside_captures([&] { return cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocMapped | cudaHostAllocPortable); })) {
    return nullptr;
  }
  *static_cast<volatile uint32_t*>(word) = 0;
  return words->emplace(device, static_cast<uint32_t*>(word)).first->second;
}

}  // namespace twn
