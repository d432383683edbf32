// The threads of a block, or of a warp, as the programs of the small kernels know them.
#pragma once

#include "twn/small/numbers.h"

namespace twn::small {

// Results of the launch before are complete and visible after this; until then only weights may be read.
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next launch may begin what does not depend on this one: it waits for this one's end by itself.
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// `combine` over the lanes, the same in each: a butterfly, so the order never changes.
template <typename Combine>
__device__ __forceinline__ float across_lanes(float value, const Combine& combine) {
#pragma unroll
  for (int offset = kWarpLanes / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};

struct Larger {
  __device__ float operator()(float a, float b) const { return larger_or_nan(a, b); }
};

struct WarpTeam {
  static constexpr int kThreads = kWarpLanes;

  template <typename Function>
  __device__ void each(const Function& function) const {
    function(static_cast<int>(threadIdx.x) % kWarpLanes);
  }

  template <typename Function>
  __device__ float sum(const Function& function) const {
    return across_lanes(function(static_cast<int>(threadIdx.x) % kWarpLanes), Add());
  }
};

template <int kWarps>
struct BlockTeam {
  static constexpr int kThreads = kWarps * kWarpLanes;

  struct Shared {
    float parts[kWarps];
    uint32_t agreed;
  };

  Shared& shared;

  __device__ void sync() const { __syncthreads(); }

  template <typename Function>
  __device__ void each(const Function& function) const {
    function(static_cast<int>(threadIdx.x));
  }

  template <typename Function>
  __device__ void once(const Function& function) const {
    if (threadIdx.x == 0) function();
  }

  // What thread 0 finds, for all: whatever it has acquired, they have.
  template <typename Function>
  __device__ uint32_t agreed(const Function& function) const {
    if (threadIdx.x == 0) shared.agreed = function();
    __syncthreads();
    const uint32_t value = shared.agreed;
    __syncthreads();
    return value;
  }

  template <typename Function>
  __device__ float sum(const Function& function) const {
    return across_block(function(static_cast<int>(threadIdx.x)), Add());
  }

  template <typename Function>
  __device__ float largest(const Function& function) const {
    return across_block(function(static_cast<int>(threadIdx.x)), Larger());
  }

  // Every warp takes every kWarps-th of `count` units.
  template <typename Function>
  __device__ void units(int count, const Function& function) const {
    for (int unit = static_cast<int>(threadIdx.x) / kWarpLanes; unit < count; unit += kWarps) function(unit);
  }

  template <typename Function>
  __device__ void lanes(const Function& function) const {
    function(static_cast<int>(threadIdx.x) % kWarpLanes);
  }

  template <int kCount, typename Function>
  __device__ void warp_sums(float (&sums)[kCount], const Function& function) const {
    function(static_cast<int>(threadIdx.x) % kWarpLanes, sums);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = across_lanes(sums[i], Add());
  }

  // Into the L2 cache; a hint, which reads nothing.
  __device__ void prefetch(const char* bytes, int64_t count) const {
    constexpr int kLine = 128;
    for (int64_t at = threadIdx.x * kLine; at < count; at += kThreads * kLine) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes + at));
    }
  }

 private:
  template <typename Combine>
  __device__ float across_block(float value, const Combine& combine) const {
    value = across_lanes(value, combine);
    __syncthreads();  // whoever still reads the parts of the sum before
    if (threadIdx.x % kWarpLanes == 0) shared.parts[threadIdx.x / kWarpLanes] = value;
    __syncthreads();
    value = shared.parts[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value = combine(value, shared.parts[warp]);
    return value;
  }
};

}  // namespace twn::small
