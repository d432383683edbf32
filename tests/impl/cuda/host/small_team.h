// The threads of a block, one after the other in one host thread: the same programs, in the same order of summation.
#pragma once

#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "host_memory.h"
#include "twn/small/gate.h"

namespace twn::small {

// No tag is ever seen, and no patience: every wait runs out.
struct DeafMemory : twn_host::HostMemory {
  static constexpr uint64_t kPatienceNanoseconds = 0;
  static uint32_t load_acquire(const uint32_t*) { return 0; }
};

template <typename Combine>
float across_lanes(float (&value)[kWarpLanes], const Combine& combine) {
  for (int offset = kWarpLanes / 2; offset > 0; offset /= 2) {
    float next[kWarpLanes];
    for (int lane = 0; lane < kWarpLanes; ++lane) next[lane] = combine(value[lane], value[lane ^ offset]);
    for (int lane = 0; lane < kWarpLanes; ++lane) value[lane] = next[lane];
  }
  return value[0];
}

inline float add(float a, float b) { return a + b; }

template <int kWarps>
struct HostTeam {
  static constexpr int kThreads = kWarps * kWarpLanes;

  void sync() const {}

  template <typename Function>
  void each(const Function& function) const {
    for (int thread = 0; thread < kThreads; ++thread) function(thread);
  }

  template <typename Function>
  void once(const Function& function) const {
    function();
  }

  template <typename Function>
  uint32_t agreed(const Function& function) const {
    return function();
  }

  template <typename Function>
  float sum(const Function& function) const {
    return across_block(function, add);
  }

  template <typename Function>
  float largest(const Function& function) const {
    return across_block(function, larger_or_nan);
  }

  template <typename Function>
  void units(int count, const Function& function) const {
    for (int warp = 0; warp < kWarps; ++warp) {
      for (int unit = warp; unit < count; unit += kWarps) function(unit);
    }
  }

  template <typename Function>
  void lanes(const Function& function) const {
    for (int lane = 0; lane < kWarpLanes; ++lane) function(lane);
  }

  template <int kCount, typename Function>
  void warp_sums(float (&sums)[kCount], const Function& function) const {
    float parts[kWarpLanes][kCount];
    for (int lane = 0; lane < kWarpLanes; ++lane) function(lane, parts[lane]);
    for (int i = 0; i < kCount; ++i) {
      float values[kWarpLanes];
      for (int lane = 0; lane < kWarpLanes; ++lane) values[lane] = parts[lane][i];
      sums[i] = across_lanes(values, add);
    }
  }

  void prefetch(const char*, int64_t) const {}

 private:
  template <typename Function, typename Combine>
  float across_block(const Function& function, const Combine& combine) const {
    float found = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      float values[kWarpLanes];
      for (int lane = 0; lane < kWarpLanes; ++lane) values[lane] = function(warp * kWarpLanes + lane);
      const float value = across_lanes(values, combine);
      found = warp == 0 ? value : combine(found, value);
    }
    return found;
  }
};

// The words and the buffers of one stream, for a planned gate; `blocks` threads stand for the blocks of a grid.
struct GateStream {
  std::vector<uint32_t> words = std::vector<uint32_t>(kGateSyncWords, 0);
  uint32_t report = 0;

  template <typename Memory = twn_host::HostMemory>
  void launch(Gate gate, int blocks) {
    const size_t size = static_cast<size_t>(gate.rows) * gate.pitch + 4;
    std::vector<float> buffers[2];
    for (int i = 0; i < 2; ++i) {
      buffers[i].assign(size, std::numeric_limits<float>::quiet_NaN());
      gate.buffers[i] = buffers[i].data();
      while (!is_aligned(gate.buffers[i])) ++gate.buffers[i];
    }
    std::vector<std::thread> threads;
    for (int block = 0; block < blocks; ++block) {
      threads.emplace_back([&] {
        HostTeam<kGateWarps> team;
        const Flags<Memory> flags{words.data(), gate.tasks, static_cast<uint32_t>(blocks), 0};
        const WarpTile tile = warp_tile(gate.rows);
        if (tile.features == 1) gate_block<1, 1>(team, gate, flags, &report);
        if (tile.features == 2) gate_block<2, 4>(team, gate, flags, &report);
        if (tile.features == 3) gate_block<3, 4>(team, gate, flags, &report);
      });
    }
    for (auto& thread : threads) thread.join();
  }
};

}  // namespace twn::small
