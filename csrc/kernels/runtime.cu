// Questions to the CUDA runtime, answered so that none of them disturbs a capture.
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

}  // namespace

const DeviceLimits& device_limits(int device) {
  const std::lock_guard<std::mutex> guard(lock());
  static auto* known = new std::map<int, DeviceLimits>;
  const auto found = known->find(device);
  return found != known->end() ? found->second : known->emplace(device, ask(device)).first->second;
}

uint64_t capture_of(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id);
  if (error != cudaSuccess) cudaGetLastError();  // a question must leave no error behind for the next launch to find
  return error == cudaSuccess && status != cudaStreamCaptureStatusNone ? id : 0;
}

uint32_t* report_word(int device) {
  const std::lock_guard<std::mutex> guard(lock());
  static auto* words = new std::map<int, uint32_t*>;
  const auto found = words->find(device);
  if (found != words->end()) return found->second;
  // An allocation is no part of a graph, but without this a capture would refuse it.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  void* word = nullptr;
  const cudaError_t error = cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocMapped | cudaHostAllocPortable);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  *static_cast<volatile uint32_t*>(word) = 0;
  return words->emplace(device, static_cast<uint32_t*>(word)).first->second;
}

}  // namespace twn
