// Element types of the small kernels, and eight elements at a time: read as fp32 whatever they are, rounded to nearest.
//
// On a host the conversions are spelled out, so that tests there see the bits that the instructions give.
#pragma once

#include <cmath>
#include <cstring>

#include "twn/host_device.h"

#if defined(__CUDACC__)
#define TWN_PRAGMA(text) _Pragma(#text)
#define TWN_UNROLL(count) TWN_PRAGMA(unroll)
#define TWN_UNROLL_BY(count) TWN_PRAGMA(unroll(count))
#else
#define TWN_UNROLL(count)
#define TWN_UNROLL_BY(count)
#endif

namespace twn::small {

enum class Number : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Half {
  uint16_t bits;
};

struct BFloat {
  uint16_t bits;
};

constexpr int kChunk = 8;  // elements a thread reads at a time: 16 bytes of a 16-bit type
constexpr int kWarpLanes = 32;
constexpr int kWarpChunk = kChunk * kWarpLanes;

TWN_HD float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

TWN_HD uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

TWN_HD float not_a_number() { return from_bits(0x7fc00000u); }

TWN_HD float widen(float value) { return value; }

TWN_HD float widen(BFloat value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

TWN_HD float widen(Half value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31u, fraction = value.bits & 1023u;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return from_bits(sign | to_bits(static_cast<float>(fraction) * 0x1p-24f));
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

TWN_HD void narrow(float value, float& out) { out = value; }

TWN_HD void narrow(float value, BFloat& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = to_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

TWN_HD void narrow(float value, Half& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t sign = to_bits(value) >> 16 & 0x8000u;
  const float size = fabsf(value);
  if (!(size <= 3.402823466e38f)) {
    out.bits = static_cast<uint16_t>(sign | (std::isnan(value) ? 0x7fffu : 0x7c00u));
    return;
  }
  int exponent = 0;
  frexpf(size, &exponent);  // size = m 2^exponent with m in [1/2, 1)
  const float step = ldexpf(1.0f, (exponent < -13 ? -13 : exponent) - 11);  // between neighbours; of subnormals below
  const float rounded = nearbyintf(size / step) * step;
  if (rounded >= 65520.0f) {
    out.bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (rounded < 0x1p-14f) {
    out.bits = static_cast<uint16_t>(sign | static_cast<uint32_t>(rounded * 0x1p24f));
  } else {
    const uint32_t bits = to_bits(rounded);
    out.bits = static_cast<uint16_t>(sign | ((bits >> 23) - 112) << 10 | (bits >> 13 & 1023u));
  }
#endif
}

// The nearest value of type T, as fp32: where torch rounds in between.
template <typename T>
TWN_HD float rounded_to(float value) {
  T narrowed;
  narrow(value, narrowed);
  return widen(narrowed);
}

struct alignas(16) Words {
  uint32_t word[4];
};

TWN_HD bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(Words) == 0; }

// kConstant: a weight, which neither this launch nor the one before it writes. What the one before wrote may not be read
// through the constant path, even after waiting for its end.
template <bool kConstant>
TWN_HD Words load_words(const void* address) {
#if defined(__CUDA_ARCH__)
  const uint4 found = kConstant ? __ldg(static_cast<const uint4*>(address)) : *static_cast<const uint4*>(address);
  return {{found.x, found.y, found.z, found.w}};
#else
  Words words;
  memcpy(&words, address, sizeof words);
  return words;
#endif
}

TWN_HD void store_words(const Words& words, void* address) {
#if defined(__CUDA_ARCH__)
  *static_cast<uint4*>(address) = make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
#else
  memcpy(address, &words, sizeof words);
#endif
}

template <bool kConstant>
TWN_HD void load_aligned(const float* source, float (&chunk)[kChunk]) {
  TWN_UNROLL(2)
  for (int half = 0; half < 2; ++half) {
    const Words words = load_words<kConstant>(source + 4 * half);
    TWN_UNROLL(4)
    for (int i = 0; i < 4; ++i) chunk[4 * half + i] = from_bits(words.word[i]);
  }
}

template <bool kConstant, typename T>
TWN_HD void load_aligned(const T* source, float (&chunk)[kChunk]) {
  static_assert(sizeof(T) == 2, "a 16-bit type");
  const Words words = load_words<kConstant>(source);
  TWN_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    chunk[2 * i] = widen(T{static_cast<uint16_t>(words.word[i])});
    chunk[2 * i + 1] = widen(T{static_cast<uint16_t>(words.word[i] >> 16)});
  }
}

// `count` elements of the chunk that starts at `source`, anywhere in memory; the rest of the chunk is 0.
template <bool kConstant, typename T>
TWN_HD void load_chunk(const T* source, int64_t stride, int count, float (&chunk)[kChunk]) {
  if (count == kChunk && stride == 1 && is_aligned(source)) {
    load_aligned<kConstant>(source, chunk);
    return;
  }
  TWN_UNROLL(kChunk)
  for (int i = 0; i < kChunk; ++i) chunk[i] = i < count ? widen(source[i * stride]) : 0.0f;
}

template <typename T>
TWN_HD void store_chunk(T* target, int count, const float (&chunk)[kChunk]) {
  alignas(16) T narrowed[kChunk];
  TWN_UNROLL(kChunk)
  for (int i = 0; i < kChunk; ++i) narrow(chunk[i], narrowed[i]);
  if (count == kChunk && is_aligned(target)) {
    constexpr int kPieces = kChunk * sizeof(T) / sizeof(Words);
    TWN_UNROLL(kPieces)
    for (int i = 0; i < kPieces; ++i) {
      Words words;
      memcpy(&words, narrowed + i * (kChunk / kPieces), sizeof words);
      store_words(words, target + i * (kChunk / kPieces));
    }
    return;
  }
  TWN_UNROLL(kChunk)
  for (int i = 0; i < kChunk; ++i) {
    if (i < count) target[i] = narrowed[i];
  }
}

// Calls `function` with a null pointer of the type that `number` names.
template <typename Function>
TWN_HD void with_number(Number number, const Function& function) {
  switch (number) {
    case Number::kFloat32: return function(static_cast<const float*>(nullptr));
    case Number::kFloat16: return function(static_cast<const Half*>(nullptr));
    case Number::kBFloat16: return function(static_cast<const BFloat*>(nullptr));
  }
}

// The larger of two, and NaN where one is: as torch's amax.
TWN_HD float larger_or_nan(float a, float b) { return a != a || a > b ? a : b; }

}  // namespace twn::small
