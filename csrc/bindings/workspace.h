// Memory that the blocks of a launch pass among each other: scratch, and words that were zero once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "twn/words.h"

namespace twn {

struct Workspace {
  void* data;        // at least `bytes`, 256-byte aligned, content undefined
  uint32_t* sync;    // at least `sync_words`, as flags.h wants them
  uint32_t* report;  // pinned host word for waits that ran out
  torch::stable::Tensor owner;  // of `data`: when it goes, what follows on the stream may have that memory
};

// For one launch on `stream`, the current one of `like`'s device, which is the current one. Throws where an earlier wait
// ran out.
Workspace acquire(const torch::stable::Tensor& like, void* stream, Family family, int64_t bytes, int64_t sync_words);

}  // namespace twn
