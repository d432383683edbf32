// A row of z, made by one block: norm(x) or silu(gate) * up. All threads of the block call every function here.
#pragma once

#include "twn/decode/vectors.cuh"
#include "twn/group.h"

namespace twn {

template <typename T>
struct FrontRow {
  const Group& group;
  float* scratch;  // kWarps floats of shared memory

  // Rounded twice, where transformers rounds: x / rms, then its product with the weight.
  TWN_DEVICE void normalise(const T* x, T* z) {
    float wide[kVectorFeatures], sum = 0.0f;
    for (int f = threadIdx.x * kVectorFeatures; f < group.in_features; f += kDecodeThreads * kVectorFeatures) {
      widen(wide, x + f);
      for (int i = 0; i < kVectorFeatures; ++i) sum += wide[i] * wide[i];
    }
    const float scale = rsqrtf(block_sum(sum) / static_cast<float>(group.in_features) + group.eps);
    for (int f = threadIdx.x * kVectorFeatures; f < group.in_features; f += kDecodeThreads * kVectorFeatures) {
      float weight[kVectorFeatures];
      widen(wide, x + f);
      read_norm_weight(weight, f);
      for (int i = 0; i < kVectorFeatures; ++i) {
        wide[i] = weight[i] * Number<T>::wide_one(Number<T>::narrow_one(wide[i] * scale));
      }
      narrow(z + f, wide);
    }
  }

  TWN_DEVICE void gate(const T* x, T* z) {
    const int features = group.in_features;
    float wide[kVectorFeatures], up[kVectorFeatures];
    for (int f = threadIdx.x * kVectorFeatures; f < features; f += kDecodeThreads * kVectorFeatures) {
      widen(wide, x + f);
      widen(up, x + features + f);
      for (int i = 0; i < kVectorFeatures; ++i) wide[i] = silu(wide[i]) * up[i];
      narrow(z + f, wide);
    }
  }

 private:
  TWN_DEVICE void read_norm_weight(float (&weight)[kVectorFeatures], int feature) const {
    const T* alike = static_cast<const T*>(group.norm_weight) + feature;
    const float* wide = static_cast<const float*>(group.norm_weight) + feature;
    if (!group.norm_is_wide && aligned(alike, 0)) return widen(weight, alike);
    for (int i = 0; i < kVectorFeatures; ++i) weight[i] = group.norm_is_wide ? wide[i] : Number<T>::wide_one(alike[i]);
  }

  // In an order of its own, the same every time.
  TWN_DEVICE float block_sum(float value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < kWarps; ++i) sum += scratch[i];
    __syncthreads();
    return sum;
  }
};

}  // namespace twn
