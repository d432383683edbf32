// The host's side of flags.h, 16-bit numbers, and the tensor-core product as the PTX manual lays it out.
#pragma once

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>

namespace twn_host {

struct HostMemory {
  static constexpr uint64_t kPatienceNanoseconds = 20'000'000'000;
  static uint32_t load_acquire(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
  static void store_release(uint32_t* word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
  static uint32_t increment_or_wrap(uint32_t* word, uint32_t last) {
    uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(word, &old, old >= last ? 0 : old + 1, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
    }
    return old;
  }
  static uint64_t nanoseconds() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  static void pause() { std::this_thread::yield(); }
};

// Bit patterns of 16-bit numbers, rounded to nearest even as the device rounds.
struct BFloat16 {
  static float wide(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  static uint16_t narrow(float value) {
    if (std::isnan(value)) return 0x7fff;
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
};

struct Float16 {
  static float wide(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
  }
  static uint16_t narrow(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
};

// Registers of a warp for mma.m16n8k16: lane by lane, two numbers in each 32-bit register.
struct Fragments {
  uint32_t a[32][4], b[32][2];
};

// acc += A B, with the places of the manual: a register's pair lies in row (lane / 4) + 8 (register % 2), columns
// 2 (lane % 4) + 8 (register / 2) of A; b register's pair in rows 2 (lane % 4) + 8 register of B, column lane / 4;
// accumulator i in row (lane / 4) + 8 (i / 2), column 2 (lane % 4) + i % 2.
template <typename Number>
void multiply(float (*acc)[4], const Fragments& in) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      for (int half = 0; half < 2; ++half) {
        a[lane / 4 + 8 * (r % 2)][2 * (lane % 4) + 8 * (r / 2) + half] = Number::wide(in.a[lane][r] >> (16 * half) & 0xffff);
      }
    }
    for (int r = 0; r < 2; ++r) {
      for (int half = 0; half < 2; ++half) {
        b[2 * (lane % 4) + 8 * r + half][lane / 4] = Number::wide(in.b[lane][r] >> (16 * half) & 0xffff);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = acc[lane][i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      acc[lane][i] = sum;
    }
  }
}

}  // namespace twn_host
