// The prefill kernel on a CPU: the program of a block as it is in csrc, over instructions made of plain loops.
//
// Every role of a block is a host thread, a warpgroup too: what its lanes do runs lane by lane. Shared memory and the
// workspace begin as NaN. A product is made as late as the rules allow, when it is waited for, so that a stage that is
// given back too early is read too late. Besides the numbers, this fails a program that reads another lane's word of
// the staging without a barrier, or leaves out a fence. How the hardware swizzles, reads descriptors and lays out
// accumulators stands here on its own, as the PTX manual has it.
#pragma once

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "host_memory.h"
#include "twn/prefill/params.h"

namespace twn_host {

using namespace twn;
using namespace twn::prefill;

// The first rule that the program broke: said when the launch is over, since a test may not be ended from here.
inline std::atomic<const char*> broken_rule{nullptr};

inline void demand(bool holds, const char* rule) {
  const char* none = nullptr;
  if (!holds) broken_rule.compare_exchange_strong(none, rule);
}

// Of the role that runs in this thread.
inline thread_local bool stored = false;    // ordinary stores that no fence has followed
inline thread_local bool acquired = false;  // a tag was read that no fence has followed

struct PrefillMemory : HostMemory {
  static inline uint64_t kPatienceNanoseconds = 20'000'000'000;
  static inline uint32_t* deaf_word = nullptr;  // publishing here is lost, for tests of what happens then

  static uint32_t load_acquire(const uint32_t* word) {
    acquired = true;
    return HostMemory::load_acquire(word);
  }
  static void store_release(uint32_t* word, uint32_t value) {
    demand(!stored, "a fence stands between stores and the tag that publishes them to bulk copies");
    if (word != deaf_word) HostMemory::store_release(word, value);
  }
};

// A tensor map.
struct HostMap {
  Matrix matrix;
  bool is_s;
};

class HostBarrier {
 public:
  void init(uint32_t count) { count_ = pending_ = count; }

  void arrive(uint32_t arrivals, int64_t promised) {
    const std::lock_guard<std::mutex> guard(mutex_);
    demand(pending_ >= arrivals, "a barrier has no more arrivals than it expects");
    bytes_ += promised;
    pending_ -= arrivals;
    complete();
  }
  void copied(int64_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    bytes_ -= bytes;
    complete();
  }
  bool wait(uint32_t parity, uint64_t nanoseconds) {
    std::unique_lock<std::mutex> guard(mutex_);
    const auto over = [&] { return (phase_ & 1) != parity; };
    return changed_.wait_for(guard, std::chrono::nanoseconds(nanoseconds), over) && ++waits_;
  }
  bool waited_for_each_phase() const { return waits_ == phase_; }

 private:
  void complete() {
    if (pending_ != 0 || bytes_ != 0) return;
    pending_ = count_;
    ++phase_;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  uint32_t count_ = 0, pending_ = 0, phase_ = 0, waits_ = 0;
  int64_t bytes_ = 0;
};

constexpr uint32_t kBase = 3 * kAtomBytes;  // of the block's shared memory, as the device may place it

template <typename T>
struct HostBlock {
  std::vector<uint8_t> shared = std::vector<uint8_t>(kBase + T::kBytes, 0xff);
  HostBarrier barriers[T::kBarrierCount];
};

// Bits 4-6 of an address, flipped by bits 7-9.
inline uint32_t hardware_swizzle(uint32_t address) { return address ^ (address & 0x380) >> 3; }

template <typename Number, typename T>
struct HostOps {
  using Map = HostMap;
  using Memory = PrefillMemory;
  static constexpr int kSchedulerLanes = 1;

  template <int Registers>
  struct Accumulator {
    std::vector<float> values =
        std::vector<float>(kWarpgroupLanes * Registers, std::numeric_limits<float>::quiet_NaN());
    float& at(int lane, int j) { return values[lane * Registers + j]; }
    void clear() { std::fill(values.begin(), values.end(), 0.0f); }
    void settle() {}
  };

  struct Product {
    float* values;
    int registers, columns;
    uint64_t a, b;
  };

  // Who touched a word of the staging since the last barrier of its warp.
  struct Touch {
    uint64_t written = 0, read = 0;
    int writer = -1, reader = -1;
  };

  HostBlock<T>& block;
  uint32_t block_count;
  uint32_t* report_word;
  bool is_broken = false;
  bool fenced = false;
  std::deque<std::vector<Product>> groups = {};
  std::vector<Product> open_group = {};
  std::vector<Touch> touches = std::vector<Touch>((T::kBarriers - T::kStaging) / 4);
  uint64_t epoch = 1;
  int current_lane = -1;

  uint32_t blocks() const { return block_count; }
  int scheduler_lane() const { return 0; }
  template <typename Function>
  uint32_t first_lane(Function function) const {
    return function();
  }
  Users reduce(Users users) const { return users; }

  HostBarrier& barrier(uint32_t place) { return block.barriers[(place - T::kBarriers) / 8]; }
  void init(uint32_t place, uint32_t count) { barrier(place).init(count); }
  void arrive(uint32_t place) { barrier(place).arrive(1, 0); }
  void arrive_warps(uint32_t place) { barrier(place).arrive(kWarpgroupWarps, 0); }
  void expect(uint32_t place, uint32_t bytes) { barrier(place).arrive(1, bytes); }
  void wait(uint32_t place, uint32_t parity) {
    const bool hopeless = is_broken || broken_rule != nullptr;
    const uint64_t patience = hopeless ? 1'000'000 : 3 * Memory::kPatienceNanoseconds;
    if (barrier(place).wait(parity, patience) || is_broken) return;
    is_broken = true;
    report(kLostBarrier);
  }
  bool broken() const { return is_broken; }
  void report(uint32_t code) const { __atomic_store_n(report_word, code, __ATOMIC_RELAXED); }

  void load(const Map& map, uint32_t target, int column, int row, uint32_t place) {
    const Matrix& m = map.matrix;
    demand(bulk_readable(m.data, m.pitch) && m.rows > 0, "a bulk copy reads rows that begin at 16 bytes");
    demand((kBase + target) % kAtomBytes == 0 && column >= 0 && row >= 0, "a bulk copy writes from 1024 bytes on");
    demand(!map.is_s || !acquired, "a fence stands between a tag and the bulk copies of what it published");
    for (int r = 0; r < m.box_rows; ++r) {
      for (int c = 0; c < kBlockK; ++c) {
        const bool inside = row + r < m.rows && column + c < m.columns;
        const uint16_t value = inside ? static_cast<const uint16_t*>(m.data)[(row + r) * m.pitch + column + c] : 0;
        std::memcpy(&block.shared[hardware_swizzle(kBase + target + r * kRowBytes + c * kElementBytes)], &value, 2);
      }
    }
    barrier(place).copied(static_cast<int64_t>(m.box_rows) * kRowBytes);
  }

  void fence_for_bulk_copies() { stored = acquired = false; }

  Touch* touch(uint32_t place) {
    const bool staged = current_lane >= 0 && place >= T::kStaging && place < T::kBarriers;
    return staged ? &touches[(place - T::kStaging) / 4] : nullptr;
  }
  void touch_to_write(uint32_t place) {
    Touch* word = touch(place);
    if (word == nullptr) return;
    demand(word->written != epoch || word->writer == current_lane, "one lane writes a word");
    demand(word->read != epoch || word->reader == current_lane, "no lane writes what another still reads");
    word->written = epoch, word->writer = current_lane;
  }
  void touch_to_read(uint32_t place) {
    Touch* word = touch(place);
    if (word == nullptr) return;
    demand(word->written != epoch || word->writer == current_lane,
           "a barrier stands between a lane's word and its readers");
    word->read = epoch, word->reader = current_lane;
  }

  void store_word(uint32_t place, uint32_t value) {
    touch_to_write(place);
    std::memcpy(&block.shared[kBase + place], &value, 4);
  }
  uint32_t load_word(uint32_t place) {
    touch_to_read(place);
    uint32_t value;
    std::memcpy(&value, &block.shared[kBase + place], 4);
    return value;
  }
  void store_piece(uint32_t place, const Piece& value) {
    for (int i = 0; i < 4; ++i) store_word(place + 4 * i, value.words[i]);
  }
  Piece load_piece(uint32_t place) {
    Piece value;
    for (int i = 0; i < 4; ++i) value.words[i] = load_word(place + 4 * i);
    return value;
  }

  uint64_t descriptor(uint32_t place) const { return operand_descriptor(kBase + place); }

  template <int N, int Registers>
  void mma(Accumulator<Registers>& acc, uint64_t a, uint64_t b) {
    static_assert(N / 2 <= Registers && N % 8 == 0 && N <= 256, "registers of the instruction");
    demand(fenced, "a fence stands before a group of products");
    open_group.push_back({acc.values.data(), Registers, N, a, b});
  }
  void mma_fence() { fenced = true; }
  void mma_commit() {
    fenced = false;
    groups.push_back(std::move(open_group));
    open_group.clear();
  }
  template <int Groups>
  void mma_wait() {
    for (; groups.size() > Groups; groups.pop_front()) {
      for (const Product& product : groups.front()) run(product);
    }
  }

  // Rows of an operand of 16 k: eight of them in 1024 bytes, the next eight a stride further.
  std::vector<float> operand(uint64_t descriptor, int rows) const {
    demand(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0,
           "operands are swizzled by 128 bytes from 1024 bytes on");
    const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    std::vector<float> values(rows * kStepK);
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < kStepK; ++k) {
        const uint32_t address = hardware_swizzle(start + row / 8 * stride + row % 8 * 128 + k * 2);
        uint16_t bits;
        std::memcpy(&bits, &block.shared[address], 2);
        values[row * kStepK + k] = Number::wide(bits);
      }
    }
    return values;
  }

  void run(const Product& product) {
    const std::vector<float> a = operand(product.a, 64), b = operand(product.b, product.columns);
    for (int lane = 0; lane < 128; ++lane) {
      for (int j = 0; j < product.columns / 2; ++j) {
        const int row = 16 * (lane / 32) + lane % 32 / 4 + (j & 2 ? 8 : 0),
                  column = 8 * (j / 4) + 2 * (lane % 4) + (j & 1);
        float& sum = product.values[lane * product.registers + j];
        for (int k = 0; k < kStepK; ++k) sum += a[row * kStepK + k] * b[column * kStepK + k];
      }
    }
  }

  template <typename Function>
  void lanes(Function function) {
    demand(groups.empty() && open_group.empty(), "no register is used while products run");
    stored = true;
    for (current_lane = 0; current_lane < kWarpgroupLanes; ++current_lane) function(current_lane);
    current_lane = -1;
  }
  template <typename Function>
  void leader(Function function) {
    function();
  }
  void sync_warps() { ++epoch; }
  void sync_warpgroup(int) { ++epoch; }

  static float widen(uint16_t bits) { return Number::wide(bits); }
  static uint32_t pack(float left, float right) {
    return Number::narrow(left) | static_cast<uint32_t>(Number::narrow(right)) << 16;
  }
  static float silu(float value) { return value / (1.0f + std::exp(-value)); }
  static float nan() { return std::numeric_limits<float>::quiet_NaN(); }
};

template <typename Number, typename T>
void run_block(const Params<HostMap>& p, uint32_t blocks) {
  using Ops = HostOps<Number, T>;
  auto block = std::make_unique<HostBlock<T>>();
  const auto role = [&](auto body) {
    return std::thread([&block, &p, blocks, body] {
      Ops ops{*block, blocks, p.report};
      body(Program<Ops, T>{ops, p});
      demand(ops.groups.empty() && ops.open_group.empty(), "every product is waited for");
    });
  };
  role([](auto program) { program.prepare(); }).join();
  std::vector<std::thread> roles;
  roles.push_back(role([](auto program) { program.schedule(); }));
  roles.push_back(role([](auto program) { program.load(); }));
  for (int group = 0; group < kConsumers; ++group)
    roles.push_back(role([group](auto program) { program.multiply(group); }));
  for (std::thread& thread : roles) thread.join();
  const HostBarrier& hungry = block->barriers[(T::hungry() - T::kBarriers) / 8];
  demand(hungry.waited_for_each_phase(), "a ticket is drawn when the tile before it is all but loaded, no sooner");
}

// A launch of which `resident` blocks run at a time.
template <typename Number, typename T>
void run_grid(const Params<HostMap>& p, int processors, int resident) {
  const uint32_t blocks = smaller<uint32_t>(processors, p.plan.tasks());
  std::atomic<uint32_t> next{0};
  std::vector<std::thread> places;
  for (int i = 0; i < resident; ++i) {
    places.emplace_back([&] {
      while (next++ < blocks) run_block<Number, T>(p, blocks);
    });
  }
  for (std::thread& thread : places) thread.join();
}

// `block_n` of 0: as the launcher chooses. Returns 0; 2: `words` are too few; 3: the launcher
// would refuse; 4: a rule was broken.
inline int launch_prefill(const Group& group, int block_n, int processors, int resident, uint32_t* words,
                          int64_t word_count, uint32_t* report) {
  if (why_unreadable(group) != nullptr) return 3;
  const PrefillSizes sizes = prefill_sizes(group);
  if (sizes.sync_words > word_count) return 2;
  std::vector<Piece> workspace(sizes.workspace_bytes / sizeof(Piece) + 1);  // vectors of it are aligned
  std::memset(workspace.data(), 0xff, workspace.size() * sizeof(Piece));
  const Plan plan = make_plan(group, block_n == 0 ? choose_block_n(group, processors) : block_n);
  demand(workspace_layout(group, plan).bytes <= sizes.workspace_bytes, "the workspace is large enough");
  demand(kFirstFreeWord + plan.tags() <= sizes.sync_words, "there are enough words");
  Params<HostMap> p{};
  fill_params(p, group, plan, workspace.data(), [&](HostMap& map, const Matrix& matrix) -> const char* {
    map = {matrix, matrix.data == workspace.data()};
    return nullptr;
  });
  p.sync = words;
  p.report = report;
  Copy copies[kMaxProjections * kAdapters];
  for (int i = 0, count = list_copies(group, plan, workspace.data(), copies); i < count; ++i) {
    for (int64_t element = 0; element < copies[i].rows * copies[i].rank; ++element) copy_element(copies[i], element);
  }
  const bool half = group.dtype == Dtype::kFloat16;
  if (plan.block_n == kWideN) {
    half ? run_grid<Float16, WideTile>(p, processors, resident) : run_grid<BFloat16, WideTile>(p, processors, resident);
  } else {
    half ? run_grid<Float16, NarrowTile>(p, processors, resident)
         : run_grid<BFloat16, NarrowTile>(p, processors, resident);
  }
  return broken_rule == nullptr ? 0 : 4;
}

}  // namespace twn_host
