// What stands in front of a site group's linears: z = RMSNorm(x), or silu(gate) * up of x = [gate, up].
//
// fp32 arithmetic, rounded where transformers rounds: the normalised row once, its product with the weight once more.
#pragma once

#include "twn/group.h"
#include "twn/small/pool.h"

namespace twn::small {

// All of one 16-bit type, but for norm_weight where norm_is_wide (fp32).
struct FrontRows {
  const void* x = nullptr;  // [rows, features]; [rows, 2 features] where gated: gate, then up
  int64_t pitch = 0;        // elements from row to row
  int64_t rows = 0;
  int features = 0;
  Number number = Number::kBFloat16;
  const void* norm_weight = nullptr;  // [features]; none: gated
  bool norm_is_wide = false;
  float eps = 0.0f;
  void* z = nullptr;  // [rows, features], contiguous
};

TWN_HD float inverse_root(float value) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(value);
#else
  return 1.0f / sqrtf(value);
#endif
}

// `scale` is 1 / RMS of the row.
template <typename T>
TWN_HD void normalised_chunk(const FrontRows& front, int64_t row, int chunk, float scale) {
  const int size = chunk_size(chunk, front.features);
  float x[kChunk], weight[kChunk];
  load_chunk<false>(static_cast<const T*>(front.x) + row * front.pitch + chunk * kChunk, 1, size, x);
  if (front.norm_is_wide) {
    load_chunk<true>(static_cast<const float*>(front.norm_weight) + chunk * kChunk, 1, size, weight);
  } else {
    load_chunk<true>(static_cast<const T*>(front.norm_weight) + chunk * kChunk, 1, size, weight);
  }
  TWN_UNROLL(kChunk)
  for (int i = 0; i < kChunk; ++i) x[i] = weight[i] * rounded_to<T>(x[i] * scale);
  store_chunk(static_cast<T*>(front.z) + row * front.features + chunk * kChunk, size, x);
}

template <typename T, typename Team>
TWN_HD void normalise_row(Team& team, const FrontRows& front, int64_t row) {
  const int chunks = chunks_of(front.features);
  const float squares = team.sum([&](int thread) {
    float found = 0.0f;
    for (int c = thread; c < chunks; c += Team::kThreads) {
      float x[kChunk];
      const T* source = static_cast<const T*>(front.x) + row * front.pitch + c * kChunk;
      load_chunk<false>(source, 1, chunk_size(c, front.features), x);
      TWN_UNROLL(kChunk)
      for (int i = 0; i < kChunk; ++i) found = fmaf(x[i], x[i], found);
    }
    return found;
  });
  const float scale = inverse_root(squares / static_cast<float>(front.features) + front.eps);
  team.each([&](int thread) {
    for (int c = thread; c < chunks; c += Team::kThreads) normalised_chunk<T>(front, row, c, scale);
  });
}

template <typename T>
TWN_HD void gated_chunk(const FrontRows& front, int64_t row, int chunk) {
  const int size = chunk_size(chunk, front.features);
  const T* source = static_cast<const T*>(front.x) + row * front.pitch + chunk * kChunk;
  float gate[kChunk], up[kChunk];
  load_chunk<false>(source, 1, size, gate);
  load_chunk<false>(source + front.features, 1, size, up);
  TWN_UNROLL(kChunk)
  for (int i = 0; i < kChunk; ++i) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
  store_chunk(static_cast<T*>(front.z) + row * front.features + chunk * kChunk, size, gate);
}

}  // namespace twn::small
