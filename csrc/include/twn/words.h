// Which launches share which words of flags.h: those of one stream and, within a capture, those of one stream of it.
//
// The words lie in memory of their own, which no allocator of torch's knows: a pool that graphs are captured into is
// checked for memory that nobody returned, and rolled back. What one graph used is used again when that graph is gone.
//
// `Runtime` gives the calls: of CUDA in kernels/runtime.cu, of the host in the tests.
#pragma once

#include <atomic>
#include <list>
#include <mutex>

#include "twn/host_device.h"

namespace twn {

// Each kernel family has words of its own: a tag of one may not be an arrival counter of another.
enum class Family : int { kDecode = 0, kPrefill = 1, kGate = 2 };

template <typename Runtime>
class Words {
 public:
  // `count` words or more for a launch on `stream` of `device`, the current one; nullptr where there is no memory for
  // them. They are zero before the first launch that has them, in a graph at the start of each of its runs.
  uint32_t* of(int device, void* stream, Family family, int64_t count) {
    const std::lock_guard<std::mutex> guard(lock_);
    const uint64_t capture = Runtime::capture_of(stream);
    for (auto at = entries_.begin(); at != entries_.end(); ++at) {
      const bool matches = at->device == device && at->stream == stream && at->capture == capture && at->family == family;
      if (!matches || at->count < count || at->is_free) continue;
      entries_.splice(entries_.begin(), entries_, at);
      return at->words;
    }
    Entry* entry = unused(device, count);
    if (entry == nullptr || !Runtime::clear(entry->words, entry->count, stream)) return nullptr;
    entry->stream = stream;
    entry->capture = capture;
    entry->family = family;
    entry->is_free = false;
    if (capture != 0) {
      Runtime::when_graph_is_gone(stream, [](void* gone) { static_cast<Entry*>(gone)->is_free = true; }, entry);
    }
    return entry->words;
  }

 private:
  static constexpr int64_t kLeast = 4096;  // most launches need fewer

  // Never erased: one that was outgrown may still be read by launches in flight, or by a graph.
  struct Entry {
    int device = 0;
    void* stream = nullptr;
    uint64_t capture = 0;
    Family family = Family::kDecode;
    uint32_t* words = nullptr;
    int64_t count = 0;
    std::atomic<bool> is_free{true};  // set by a thread of CUDA's, which may not wait for the lock
  };

  Entry* unused(int device, int64_t count) {
    for (auto at = entries_.begin(); at != entries_.end(); ++at) {
      if (!at->is_free || at->device != device || at->count < count) continue;
      entries_.splice(entries_.begin(), entries_, at);
      return &*at;
    }
    int64_t size = kLeast;
    while (size < count) size *= 2;
    uint32_t* words = Runtime::allocate(size);
    if (words == nullptr) return nullptr;
    Entry& entry = entries_.emplace_front();
    entry.device = device;
    entry.words = words;
    entry.count = size;
    return &entry;
  }

  std::mutex lock_;
  std::list<Entry> entries_;  // the latest used first
};

}  // namespace twn
