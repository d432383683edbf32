// What lets one header serve nvcc and a plain host compiler: everything that is no instruction is tested on a CPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TWN_HD __host__ __device__ __forceinline__
#define TWN_DEVICE __device__ __forceinline__
#else
#define TWN_HD inline
#endif

namespace twn {

template <typename Integer>
TWN_HD constexpr Integer ceil_div(Integer value, Integer divisor) {
  return (value + divisor - 1) / divisor;
}

template <typename Integer>
TWN_HD constexpr Integer round_up(Integer value, Integer multiple) {
  return ceil_div(value, multiple) * multiple;
}

template <typename Number>
TWN_HD constexpr Number smaller(Number a, Number b) {
  return b < a ? b : a;
}

template <typename Number>
TWN_HD constexpr Number larger(Number a, Number b) {
  return a < b ? b : a;
}

}  // namespace twn
