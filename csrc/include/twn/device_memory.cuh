// The device's side of flags.h: acquire and release at the scope of the GPU, and a clock to bound every wait by.
#pragma once

#include "twn/host_device.h"

namespace twn {

struct DeviceMemory {
  // Far beyond any launch, under a sanitizer too; see Flags::wait.
  static constexpr uint64_t kPatienceNanoseconds = 20'000'000'000;

  TWN_DEVICE static uint32_t load_acquire(const uint32_t* word) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
  }

  TWN_DEVICE static void store_release(uint32_t* word, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
  }

  // Returns the old value; counts 0 ... last, then 0 again.
  TWN_DEVICE static uint32_t increment_or_wrap(uint32_t* word, uint32_t last) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(word), "r"(last) : "memory");
    return old;
  }

  TWN_DEVICE static uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }

  TWN_DEVICE static void pause() { __nanosleep(32); }
};

}  // namespace twn
