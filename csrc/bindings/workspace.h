// Memory that kernels of one stream pass among their blocks: scratch, and words that were zero once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace twn {

// Each kernel family has words of its own: a tag of one may not be an arrival counter of another.
enum class Family : int { kDecode = 0, kPrefill = 1, kGate = 2 };

struct Workspace {
  void* data;        // at least `bytes`, 256-byte aligned, content undefined
  uint32_t* sync;    // at least `sync_words`, as flags.h wants them
  uint32_t* report;  // pinned host word for waits that ran out
};

// For one launch on `stream`, the current one of `like`'s device. Launches on one stream share it, since they follow each
// other; a capture gets its own, which its graph zeroes once at its start. Throws where an earlier wait ran out.
Workspace acquire(const torch::stable::Tensor& like, void* stream, Family family, int64_t bytes, int64_t sync_words);

}  // namespace twn
