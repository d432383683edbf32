// A site group as the kernels see it: up to three linears that read one input, two adapters each. Plain data.
#pragma once

#include "twn/host_device.h"

namespace twn {

constexpr int kMaxProjections = 3;
constexpr int kAdapters = 2;  // 0 is `reasoning`, 1 is `embedding`: bit 1 << adapter of a route
constexpr int kMaxRank = 256;

enum class Dtype : int { kFloat16 = 0, kBFloat16 = 1 };
enum class Front : int { kPlain = 0, kNorm = 1, kGated = 2 };  // what stands between x and z, which the weights read

struct Adapter {
  const void* a = nullptr;  // [rank, in_features]
  const void* b = nullptr;  // [out_features, rank]
  int64_t a_pitch = 0;      // elements from row to row
  int64_t b_pitch = 0;
  int rank = 0;  // 0: this projection lacks the adapter
  float scaling = 0.0f;
};

struct Projection {
  const void* weight = nullptr;  // [out_features, in_features]
  int64_t pitch = 0;
  const void* bias = nullptr;  // [out_features], or none
  int out_features = 0;
  Adapter adapters[kAdapters];
};

// All of `dtype`, but for norm_weight where norm_is_wide (fp32). Pitches are in elements; last dimensions contiguous.
struct Group {
  Projection projections[kMaxProjections];
  int count = 0;
  const void* x = nullptr;  // [tokens, in_features]; [tokens, 2 in_features] where gated: gate, then up
  int64_t x_pitch = 0;
  int tokens = 0;
  int in_features = 0;
  Front front = Front::kPlain;
  const void* norm_weight = nullptr;  // [in_features]
  bool norm_is_wide = false;
  float eps = 0.0f;
  bool swiglu = false;             // of two projections: silu(y_0) * y_1 is the one output
  const void* residual = nullptr;  // [tokens, out_features of the only projection], or none
  int64_t residual_pitch = 0;
  const int8_t* routes = nullptr;  // [tokens]; none: every row uses what is in `present`
  int present = 0;                 // bitmask of the adapters that can occur
  void* y = nullptr;               // [tokens, sum of out_features], or [tokens, out_features] where swiglu
  int64_t y_pitch = 0;
  Dtype dtype = Dtype::kBFloat16;
};

}  // namespace twn
