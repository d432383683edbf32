// The instructions behind block.h.
#pragma once

#include "twn/device_memory.cuh"
#include "twn/prefill/block.h"
#include "twn/prefill/tma.cuh"
#include "twn/prefill/wgmma.cuh"
#include "twn/small/numbers.h"

namespace twn::prefill {

// Longer than a tag is waited for: the loading thread waits for both, one after the other.
constexpr uint64_t kBarrierPatienceNanoseconds = 3 * DeviceMemory::kPatienceNanoseconds;

template <Dtype Type>
struct DeviceOps {
  using Map = CUtensorMap;
  using Memory = DeviceMemory;
  using Number = std::conditional_t<Type == Dtype::kFloat16, small::Half, small::BFloat>;
  static constexpr int kSchedulerLanes = kWarpLanes;

  template <int Registers>
  struct Accumulator {
    float values[Registers];
    __device__ __forceinline__ float& at(int, int j) { return values[j]; }

    // Without it the registers would count as live all the way from the block's previous tile.
    __device__ __forceinline__ void clear() {
#pragma unroll
      for (float& value : values) value = 0.0f;
    }

    // Behind a wait, which names no register: nothing that uses them may be moved in front of it.
    __device__ __forceinline__ void settle() {
#pragma unroll
      for (float& value : values) asm volatile("" : "+f"(value)::"memory");
    }
  };

  uint32_t base;  // of the block's shared memory, a multiple of 1024
  uint32_t* report_word;
  bool is_broken = false;

  __device__ __forceinline__ uint32_t blocks() const { return gridDim.x; }
  __device__ __forceinline__ int scheduler_lane() const { return static_cast<int>(threadIdx.x % kWarpLanes); }

  template <typename Function>
  __device__ __forceinline__ uint32_t first_lane(Function function) const {
    uint32_t value = 0;
    if (scheduler_lane() == 0) value = function();
    return __shfl_sync(~0u, value, 0);
  }

  __device__ __forceinline__ Users reduce(Users users) const {
    return {static_cast<int>(__reduce_or_sync(~0u, users.any)), static_cast<int>(__reduce_and_sync(~0u, users.all))};
  }

  __device__ __forceinline__ void init(uint32_t barrier, uint32_t count) const { barrier_init(base + barrier, count); }
  __device__ __forceinline__ void arrive(uint32_t barrier) const { barrier_arrive(base + barrier); }
  __device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) const {
    barrier_arrive_expect(base + barrier, bytes);
  }

  __device__ __forceinline__ void arrive_warps(uint32_t barrier) const {
    __syncwarp();
    if (threadIdx.x % kWarpLanes == 0) barrier_arrive(base + barrier);
  }

  // A block that waited for itself in vain does not wait again: its tiles are NaN, or never written, and it ends. (A
  // trap in its place would keep the compiler from giving the consumers the registers that they take.)
  __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
    if (barrier_try_wait(base + barrier, parity) || is_broken) return;
    const uint64_t start = Memory::nanoseconds();
    while (!barrier_try_wait(base + barrier, parity)) {
      if (Memory::nanoseconds() - start > kBarrierPatienceNanoseconds) {
        is_broken = true;
        report(kLostBarrier);
        return;
      }
    }
  }

  __device__ __forceinline__ bool broken() const { return is_broken; }

  __device__ __forceinline__ void report(uint32_t code) const { *static_cast<volatile uint32_t*>(report_word) = code; }

  __device__ __forceinline__ void load(const Map& map, uint32_t target, int column, int row, uint32_t barrier) const {
    bulk_load(&map, base + target, column, row, base + barrier);
  }

  __device__ __forceinline__ void fence_for_bulk_copies() const { fence_proxies(); }

  __device__ __forceinline__ void store_word(uint32_t place, uint32_t value) const {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(base + place), "r"(value) : "memory");
  }

  __device__ __forceinline__ uint32_t load_word(uint32_t place) const {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(base + place) : "memory");
    return value;
  }

  __device__ __forceinline__ void store_piece(uint32_t place, const Piece& value) const {
    const uint32_t* w = value.words;
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(base + place), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                 "r"(w[3])
                 : "memory");
  }

  __device__ __forceinline__ Piece load_piece(uint32_t place) const {
    Piece value;
    uint32_t* w = value.words;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(base + place)
                 : "memory");
    return value;
  }

  __device__ __forceinline__ uint64_t descriptor(uint32_t place) const { return operand_descriptor(base + place); }

  template <int N, int Registers>
  __device__ __forceinline__ void mma(Accumulator<Registers>& acc, uint64_t a, uint64_t b) const {
    static_assert(N / 2 <= Registers, "registers of the instruction");
    Wgmma<Type, N>::run(acc.values, a, b);
  }

  __device__ __forceinline__ void mma_fence() const { wgmma_fence(); }
  __device__ __forceinline__ void mma_commit() const { wgmma_commit(); }

  template <int Groups>
  __device__ __forceinline__ void mma_wait() const {
    wgmma_wait<Groups>();
  }

  template <typename Function>
  __device__ __forceinline__ void lanes(Function function) const {
    function(static_cast<int>(threadIdx.x % kWarpgroupLanes));
  }

  template <typename Function>
  __device__ __forceinline__ void leader(Function function) const {
    if (threadIdx.x % kWarpgroupLanes == 0) function();
  }

  __device__ __forceinline__ void sync_warps() const { __syncwarp(); }

  __device__ __forceinline__ void sync_warpgroup(int group) const {
    // Numbers of barriers are written out: one from a register would reserve all sixteen.
    if (group == 0) {
      asm volatile("bar.sync 1, %0;" ::"n"(kWarpgroupLanes) : "memory");
    } else {
      asm volatile("bar.sync 2, %0;" ::"n"(kWarpgroupLanes) : "memory");
    }
  }

  static __device__ __forceinline__ float widen(uint16_t bits) { return small::widen(Number{bits}); }

  // Two numbers, rounded to nearest; the left one in the lower half.
  static __device__ __forceinline__ uint32_t pack(float left, float right) {
    uint32_t pair;
    if constexpr (Type == Dtype::kFloat16) {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(right), "f"(left));
    } else {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(right), "f"(left));
    }
    return pair;
  }

  static __device__ __forceinline__ float silu(float value) { return __fdividef(value, 1.0f + __expf(-value)); }
  static __device__ __forceinline__ float nan() { return __int_as_float(0x7fc00000); }
};

}  // namespace twn::prefill
