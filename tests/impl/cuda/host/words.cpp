// Which launches get which words, with a runtime that has streams, captures and graphs only in name.
#include "twn/words.h"

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "check.h"

using namespace twn;

namespace {

struct FakeRuntime {
  static inline std::map<void*, uint64_t> captures;
  static inline std::map<uint64_t, std::vector<std::function<void()>>> graphs;
  static inline std::vector<std::unique_ptr<uint32_t[]>> memory;
  static inline std::vector<std::pair<uint32_t*, void*>> cleared;
  static inline int64_t left = 1 << 20;

  static uint64_t capture_of(void* stream) { return captures.count(stream) ? captures[stream] : 0; }
  static uint32_t* allocate(int64_t words) {
    if (words > left) return nullptr;
    left -= words;
    memory.push_back(std::make_unique<uint32_t[]>(words));
    return memory.back().get();
  }
  static bool clear(uint32_t* words, int64_t count, void* stream) {
    std::fill_n(words, count, 0);
    cleared.push_back({words, stream});
    return true;
  }
  static void when_graph_is_gone(void* stream, void (*call)(void*), void* argument) {
    graphs[capture_of(stream)].push_back([=] { call(argument); });
  }
  static void destroy(uint64_t graph) {
    for (const auto& call : graphs[graph]) call();
    graphs.erase(graph);
  }
};

void* stream(int number) { return reinterpret_cast<void*>(static_cast<uintptr_t>(number)); }

size_t clears() { return FakeRuntime::cleared.size(); }

void check_streams() {
  Words<FakeRuntime> words;
  uint32_t* first = words.of(0, stream(1), Family::kDecode, 100);
  CHECK_THAT(clears() == 1 && FakeRuntime::cleared.back().second == stream(1), "%zu clears", clears());
  CHECK_THAT(words.of(0, stream(1), Family::kDecode, 4096) == first && clears() == 1, "a stream keeps its words");
  std::set<uint32_t*> all = {first, words.of(0, stream(2), Family::kDecode, 100), words.of(0, stream(1), Family::kGate, 100),
                             words.of(1, stream(1), Family::kDecode, 100)};
  CHECK_THAT(all.size() == 4 && clears() == 4, "streams, families and devices have words of their own");
  uint32_t* grown = words.of(0, stream(1), Family::kDecode, 5000);
  CHECK_THAT(all.count(grown) == 0 && clears() == 5, "words that launches in flight may read are not given to others");
  CHECK_THAT(words.of(0, stream(1), Family::kDecode, 100) == grown && clears() == 5, "what has grown stays");
  CHECK_THAT(all.count(words.of(0, stream(3), Family::kDecode, 100)) == 0, "outgrown words are not given to others");
}

void check_captures() {
  Words<FakeRuntime> words;
  uint32_t* eager = words.of(0, stream(1), Family::kDecode, 100);
  FakeRuntime::captures = {{stream(1), 7}, {stream(2), 7}};
  uint32_t* captured = words.of(0, stream(1), Family::kDecode, 100);
  uint32_t* beside = words.of(0, stream(2), Family::kDecode, 100);
  uint32_t* grown = words.of(0, stream(1), Family::kDecode, 5000);
  CHECK_THAT((std::set<uint32_t*>{eager, captured, beside, grown}).size() == 4, "words of a capture are no other's");
  const size_t before = clears();
  CHECK_THAT(words.of(0, stream(1), Family::kDecode, 100) == grown && clears() == before, "a graph clears once a stream");
  FakeRuntime::captures = {{stream(1), 8}};
  uint32_t* second = words.of(0, stream(1), Family::kDecode, 100);
  CHECK_THAT((std::set<uint32_t*>{eager, captured, beside, grown, second}).size() == 5, "graphs may run side by side");
  FakeRuntime::captures.clear();
  CHECK_THAT(words.of(0, stream(1), Family::kDecode, 100) == eager, "the stream itself has what it had");
  FakeRuntime::destroy(7);
  const int64_t left = FakeRuntime::left;
  std::set<uint32_t*> again;
  for (int s = 10; s < 13; ++s) again.insert(words.of(0, stream(s), Family::kDecode, 100));
  CHECK_THAT((again == std::set<uint32_t*>{captured, beside, grown}) && FakeRuntime::left == left, "words of a graph that is gone");
  CHECK_THAT(clears() == before + 1 + 3, "they are cleared for their next stream");
  CHECK_THAT(again.count(words.of(0, stream(13), Family::kDecode, 100)) == 0, "once");
  FakeRuntime::destroy(8);
}

void check_no_memory() {
  Words<FakeRuntime> words;
  FakeRuntime::left = 0;
  CHECK_THAT(words.of(0, stream(1), Family::kDecode, 100) == nullptr, "no memory");
  FakeRuntime::left = 1 << 20;
  CHECK_THAT(words.of(0, stream(1), Family::kDecode, 100) != nullptr, "memory again");
}

// A graph is destroyed on a thread of CUDA's while others ask.
void check_threads() {
  Words<FakeRuntime> words;
  FakeRuntime::captures = {{stream(1), 9}};
  for (int64_t count = 4096; count <= 65536; count *= 2) words.of(0, stream(1), Family::kDecode, count);
  FakeRuntime::captures.clear();
  std::thread destroyer([] { FakeRuntime::destroy(9); });
  std::set<uint32_t*> found;
  for (int s = 20; s < 30; ++s) found.insert(words.of(0, stream(s), Family::kDecode, 100));
  destroyer.join();
  CHECK_THAT(found.size() == 10, "%zu of 10", found.size());
}

}  // namespace

int main() {
  check_streams();
  check_captures();
  check_no_memory();
  check_threads();
  std::printf("held\n");
}
