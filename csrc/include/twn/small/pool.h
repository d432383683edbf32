// From the states of the queries to one vector a row: their mean or one of them, at L2 norm 1 where asked for.
//
// A block's program over a `Team`, which is its threads: of the device in device_team.cuh, of a host in the tests.
#pragma once

#include "twn/small/numbers.h"

namespace twn::small {

// A matrix of rows, each the mean over `count` vectors from the vector `first` on. Strides are in elements.
struct Pooled {
  const void* states = nullptr;  // [rows, vectors, width]
  Number number = Number::kFloat32;
  int64_t row_stride = 0;
  int64_t vector_stride = 0;
  int64_t stride = 1;
  int first = 0;
  int count = 1;
  int width = 0;
};

struct Pool {
  Pooled input;
  int rows = 0;
  bool normalize = false;
  float* out = nullptr;  // [rows, width], contiguous
};

TWN_HD int chunks_of(int width) { return ceil_div(width, kChunk); }

TWN_HD int chunk_size(int chunk, int width) { return smaller(kChunk, width - chunk * kChunk); }

// Summed in the order of the vectors, in fp32, then divided.
template <typename T>
TWN_HD void pool_chunk_of(const T*, const Pooled& in, int64_t row, int chunk, float (&mean)[kChunk]) {
  const int size = chunk_size(chunk, in.width);
  const T* source = static_cast<const T*>(in.states) + row * in.row_stride + in.first * in.vector_stride +
                    static_cast<int64_t>(chunk) * kChunk * in.stride;
  load_chunk<false>(source, in.stride, size, mean);
  if (in.count == 1) return;
  for (int vector = 1; vector < in.count; ++vector) {
    float next[kChunk];
    load_chunk<false>(source + vector * in.vector_stride, in.stride, size, next);
    TWN_UNROLL(kChunk)
    for (int i = 0; i < kChunk; ++i) mean[i] += next[i];
  }
  TWN_UNROLL(kChunk)
  for (int i = 0; i < kChunk; ++i) mean[i] /= static_cast<float>(in.count);
}

TWN_HD void pool_chunk(const Pooled& in, int64_t row, int chunk, float (&mean)[kChunk]) {
  with_number(in.number, [&](const auto* type) { pool_chunk_of(type, in, row, chunk, mean); });
}

// The largest element is divided out first, or the squares of large and of tiny rows would overflow and vanish.
template <typename Team>
TWN_HD void pool_row(Team& team, const Pool& pool, int64_t row) {
  const int width = pool.input.width, chunks = chunks_of(width);
  float* out = pool.out + row * width;
  const float largest = team.largest([&](int thread) {
    float found = 0.0f;
    for (int c = thread; c < chunks; c += Team::kThreads) {
      float mean[kChunk];
      pool_chunk(pool.input, row, c, mean);
      store_chunk(out + c * kChunk, chunk_size(c, width), mean);
      TWN_UNROLL(kChunk)
      for (int i = 0; i < kChunk; ++i) found = larger_or_nan(found, fabsf(mean[i]));
    }
    return found;
  });
  if (!pool.normalize) return;
  // From here on each thread reads what it wrote itself.
  const float squares = team.sum([&](int thread) {
    float found = 0.0f;
    for (int c = thread; c < chunks; c += Team::kThreads) {
      float x[kChunk];
      load_chunk<false>(out + c * kChunk, 1, chunk_size(c, width), x);
      TWN_UNROLL(kChunk)
      for (int i = 0; i < kChunk; ++i) found = fmaf(x[i] / largest, x[i] / largest, found);
    }
    return found;
  });
  const float norm = sqrtf(squares);
  team.each([&](int thread) {
    for (int c = thread; c < chunks; c += Team::kThreads) {
      float x[kChunk];
      load_chunk<false>(out + c * kChunk, 1, chunk_size(c, width), x);
      TWN_UNROLL(kChunk)
      for (int i = 0; i < kChunk; ++i) x[i] = largest == 0.0f ? 0.0f : x[i] / largest / norm;
      store_chunk(out + c * kChunk, chunk_size(c, width), x);
    }
  });
}

}  // namespace twn::small
