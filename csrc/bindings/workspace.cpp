#include "workspace.h"

#include <list>
#include <mutex>
#include <vector>

#include "common.h"
#include "twn/runtime.h"

namespace twn {
namespace {

using torch::stable::Tensor;

struct Entry {
  int32_t device;
  void* stream;
  uint64_t capture;
  Family family;
  Tensor data, sync;
};

// Graphs that are being captured at one time; what an ended one used is its graph's pool's and may be let go here.
constexpr int kCaptures = 16;
// Grown in steps, so that a decoder's layers settle after the first.
constexpr int64_t kDataStep = int64_t{1} << 20;
constexpr int64_t kSyncStep = 4096;

int64_t stepped(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

Tensor bytes_like(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
}

Tensor zero_words_like(const Tensor& like, int64_t words) {
  return torch::stable::new_zeros(like, {words}, torch::headeronly::ScalarType::Int);
}

std::list<Entry>& entries() {
  static auto* all = new std::list<Entry>;  // never destroyed: at exit the allocator behind the tensors may be gone
  return *all;
}

Entry& entry_for(const Tensor& like, void* stream, Family family) {
  const int32_t device = like.get_device_index();
  const uint64_t capture = capture_of(stream);
  int captures = 0;
  for (auto entry = entries().begin(); entry != entries().end();) {
    if (entry->device == device && entry->stream == stream && entry->capture == capture && entry->family == family) {
      entries().splice(entries().begin(), entries(), entry);
      return entries().front();
    }
    captures += entry->capture != 0;
    entry = entry->capture != 0 && captures >= kCaptures ? entries().erase(entry) : std::next(entry);
  }
  entries().push_front({device, stream, capture, family, bytes_like(like, kDataStep), zero_words_like(like, kSyncStep)});
  return entries().front();
}

}  // namespace

Workspace acquire(const Tensor& like, void* stream, Family family, int64_t bytes, int64_t sync_words) {
  static auto* mutex = new std::mutex;
  const std::lock_guard<std::mutex> guard(*mutex);
  uint32_t* report = report_word(like.get_device_index());
  require(report != nullptr, "twn_cuda: no pinned host memory is left for the word that kernels report in; free some.");
  const uint32_t code = *static_cast<volatile uint32_t*>(report);
  require(code == 0, "twn_cuda: a kernel gave up waiting for other blocks of its own launch (code ", code,
          "), and what it returned is NaN. This is a defect of twn_kernels: report it with the output of `twn-kernels env`",
          " and the shapes of the call. Until then use another impl, in a new process.");
  Entry& entry = entry_for(like, stream, family);
  if (entry.data.numel() < bytes) entry.data = bytes_like(like, stepped(bytes, kDataStep));
  if (entry.sync.numel() < sync_words) entry.sync = zero_words_like(like, stepped(sync_words, kSyncStep));
  return {entry.data.data_ptr(), static_cast<uint32_t*>(entry.sync.data_ptr()), report};
}

}  // namespace twn
