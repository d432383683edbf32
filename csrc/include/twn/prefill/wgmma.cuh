// wgmma: 64 rows of a in shared memory times N rows of b in shared memory, both with k innermost, 16 k at a time, fp32
// sums.
//
// The instruction is asynchronous: registers of `d` may not be touched between it and wgmma_wait.
#pragma once

#include <cstdint>

#include "twn/group.h"

namespace twn::prefill {

// Orders earlier writes of accumulator registers before the next instruction.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `Groups` of the committed groups still run.
template <int Groups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}

// d[0 ... N / 2 - 1] += a b^T.
template <Dtype Type, int N>
struct Wgmma;

// The operands are: registers, then the two descriptors, whose numbers follow. The predicate says: add to d.
#define TWN_WGMMA(TYPE, N, REGISTERS, A, B, ...)                                                                 \
  asm volatile(                                                                                                  \
      "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                             \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, %" #A ", %" #B          \
      ", add, 1, 1, 0, 0;\n}\n"                                                                                  \
      : __VA_ARGS__                                                                                              \
      : "l"(a), "l"(b))

// Register lists of the instruction, as its text and as its operands.
#define TWN_D(i) "+f"(d[i])

#define TWN_TEXT_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TWN_LIST_64 \
  TWN_D(0), TWN_D(1), TWN_D(2), TWN_D(3), TWN_D(4), TWN_D(5), TWN_D(6), TWN_D(7), TWN_D(8), TWN_D(9), \
  TWN_D(10), TWN_D(11), TWN_D(12), TWN_D(13), TWN_D(14), TWN_D(15), TWN_D(16), TWN_D(17), TWN_D(18), \
  TWN_D(19), TWN_D(20), TWN_D(21), TWN_D(22), TWN_D(23), TWN_D(24), TWN_D(25), TWN_D(26), TWN_D(27), \
  TWN_D(28), TWN_D(29), TWN_D(30), TWN_D(31)
#define TWN_TEXT_128 \
  TWN_TEXT_64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TWN_LIST_128 \
  TWN_LIST_64, \
  TWN_D(32), TWN_D(33), TWN_D(34), TWN_D(35), TWN_D(36), TWN_D(37), TWN_D(38), TWN_D(39), TWN_D(40), \
  TWN_D(41), TWN_D(42), TWN_D(43), TWN_D(44), TWN_D(45), TWN_D(46), TWN_D(47), TWN_D(48), TWN_D(49), \
  TWN_D(50), TWN_D(51), TWN_D(52), TWN_D(53), TWN_D(54), TWN_D(55), TWN_D(56), TWN_D(57), TWN_D(58), \
  TWN_D(59), TWN_D(60), TWN_D(61), TWN_D(62), TWN_D(63)
#define TWN_TEXT_192 \
  TWN_TEXT_128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TWN_LIST_192 \
  TWN_LIST_128, \
  TWN_D(64), TWN_D(65), TWN_D(66), TWN_D(67), TWN_D(68), TWN_D(69), TWN_D(70), TWN_D(71), TWN_D(72), \
  TWN_D(73), TWN_D(74), TWN_D(75), TWN_D(76), TWN_D(77), TWN_D(78), TWN_D(79), TWN_D(80), TWN_D(81), \
  TWN_D(82), TWN_D(83), TWN_D(84), TWN_D(85), TWN_D(86), TWN_D(87), TWN_D(88), TWN_D(89), TWN_D(90), \
  TWN_D(91), TWN_D(92), TWN_D(93), TWN_D(94), TWN_D(95)
#define TWN_TEXT_256 \
  TWN_TEXT_192 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TWN_LIST_256 \
  TWN_LIST_192, \
  TWN_D(96), TWN_D(97), TWN_D(98), TWN_D(99), TWN_D(100), TWN_D(101), TWN_D(102), TWN_D(103), TWN_D(104), \
  TWN_D(105), TWN_D(106), TWN_D(107), TWN_D(108), TWN_D(109), TWN_D(110), TWN_D(111), TWN_D(112), TWN_D(113), \
  TWN_D(114), TWN_D(115), TWN_D(116), TWN_D(117), TWN_D(118), TWN_D(119), TWN_D(120), TWN_D(121), TWN_D(122), \
  TWN_D(123), TWN_D(124), TWN_D(125), TWN_D(126), TWN_D(127)

template <>
struct Wgmma<Dtype::kBFloat16, 64> {
  static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b) {
    TWN_WGMMA("bf16", 64, TWN_TEXT_64, 32, 33, TWN_LIST_64);
  }
};

template <>
struct Wgmma<Dtype::kFloat16, 64> {
  static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b) {
    TWN_WGMMA("f16", 64, TWN_TEXT_64, 32, 33, TWN_LIST_64);
  }
};

template <>
struct Wgmma<Dtype::kBFloat16, 128> {
  static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b) {
    TWN_WGMMA("bf16", 128, TWN_TEXT_128, 64, 65, TWN_LIST_128);
  }
};

template <>
struct Wgmma<Dtype::kFloat16, 128> {
  static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b) {
    TWN_WGMMA("f16", 128, TWN_TEXT_128, 64, 65, TWN_LIST_128);
  }
};

template <>
struct Wgmma<Dtype::kBFloat16, 192> {
  static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b) {
    TWN_WGMMA("bf16", 192, TWN_TEXT_192, 96, 97, TWN_LIST_192);
  }
};

template <>
struct Wgmma<Dtype::kFloat16, 192> {
  static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b) {
    TWN_WGMMA("f16", 192, TWN_TEXT_192, 96, 97, TWN_LIST_192);
  }
};

template <>
struct Wgmma<Dtype::kBFloat16, 256> {
  static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b) {
    TWN_WGMMA("bf16", 256, TWN_TEXT_256, 128, 129, TWN_LIST_256);
  }
};

template <>
struct Wgmma<Dtype::kFloat16, 256> {
  static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b) {
    TWN_WGMMA("f16", 256, TWN_TEXT_256, 128, 129, TWN_LIST_256);
  }
};

#undef TWN_WGMMA
#undef TWN_D
#undef TWN_TEXT_64
#undef TWN_LIST_64
#undef TWN_TEXT_128
#undef TWN_LIST_128
#undef TWN_TEXT_192
#undef TWN_LIST_192
#undef TWN_TEXT_256
#undef TWN_LIST_256

}  // namespace twn::prefill
