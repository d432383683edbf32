// Eight 16-bit numbers in 16 bytes: whether they can be read so, and what they are in fp32.
#pragma once

#include "twn/decode/layout.h"
#include "twn/numbers.cuh"

namespace twn {

TWN_DEVICE bool aligned(const void* pointer, int64_t pitch) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(pitch * 2)) % 16 == 0;
}

// Of what other blocks wrote: from L2.
template <typename T>
TWN_DEVICE uint4 load_written(const T* source) {
  return __ldcg(reinterpret_cast<const uint4*>(source));
}

template <typename T>
TWN_DEVICE void widen(float (&wide)[kVectorFeatures], const T* source) {
  const uint4 vector = load_written(source);
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Number<T>::wide(words[i]);
    wide[2 * i] = pair.x;
    wide[2 * i + 1] = pair.y;
  }
}

template <typename T>
TWN_DEVICE void narrow(T* target, const float (&wide)[kVectorFeatures]) {
  *reinterpret_cast<uint4*>(target) = make_uint4(Number<T>::narrow(wide[0], wide[1]), Number<T>::narrow(wide[2], wide[3]),
                                                 Number<T>::narrow(wide[4], wide[5]), Number<T>::narrow(wide[6], wide[7]));
}

}  // namespace twn
