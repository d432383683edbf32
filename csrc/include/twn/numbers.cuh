// 16-bit numbers on the device: conversions in pairs, and the tensor-core product of 16 x 8 x 16 in either type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "twn/host_device.h"

namespace twn {

template <typename T>
struct Number;

template <>
struct Number<__half> {
  TWN_DEVICE static float2 wide(uint32_t pair) {
    __half2 value;
    memcpy(&value, &pair, 4);
    return __half22float2(value);
  }
  TWN_DEVICE static uint32_t narrow(float first, float second) {
    const __half2 value = __floats2half2_rn(first, second);
    uint32_t pair;
    memcpy(&pair, &value, 4);
    return pair;
  }
  TWN_DEVICE static float wide_one(__half value) { return __half2float(value); }
  TWN_DEVICE static __half narrow_one(float value) { return __float2half_rn(value); }
};

template <>
struct Number<__nv_bfloat16> {
  TWN_DEVICE static float2 wide(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
  TWN_DEVICE static uint32_t narrow(float first, float second) {
    const __nv_bfloat162 value = __floats2bfloat162_rn(first, second);
    uint32_t pair;
    memcpy(&pair, &value, 4);
    return pair;
  }
  TWN_DEVICE static float wide_one(__nv_bfloat16 value) { return __bfloat162float(value); }
  TWN_DEVICE static __nv_bfloat16 narrow_one(float value) { return __float2bfloat16_rn(value); }
};

TWN_DEVICE float silu(float value) { return __fdividef(value, 1.0f + __expf(-value)); }

// acc [16 x 8] += left [16 x 16] right [8 x 16]^T; who holds what: decode/layout.h.
template <typename T>
TWN_DEVICE void multiply(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  if constexpr (std::is_same<T, __half>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

}  // namespace twn
