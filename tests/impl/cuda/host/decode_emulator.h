// The decode kernel on a CPU: the real block program, plan and layouts, with every thread's work done in a plain loop.
//
// A block is a host thread. Shared memory begins as NaN, as does the workspace, and rows and features beyond the tensors
// are never touched. What is emulated here and not shared with the device: the instructions (device.cuh and the pipes).
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <thread>
#include <vector>

#include "decode_pipe.h"
#include "host_memory.h"
#include "twn/decode/forms.h"
#include "twn/decode/program.h"
#include "twn/flags.h"

namespace twn_host {

using namespace twn;

struct Vector {
  uint16_t elements[kVectorFeatures] = {};
  uint32_t word(int i) const { return elements[2 * i] | static_cast<uint32_t>(elements[2 * i + 1]) << 16; }
};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// `Bulk`: as HostPipe has it.
template <typename Number, typename Layout, bool Bulk>
class DecodeHost {
 public:
  DecodeHost(const DecodePlan& plan, int block, int stages, char* workspace, uint32_t* sync)
      : plan_(plan),
        group_(plan.group),
        workspace_(workspace),
        flags_{sync, static_cast<uint32_t>(plan.tasks()), static_cast<uint32_t>(plan.blocks), 0},
        pipe_(plan, block, stages),
        current_(plan, plan.units_of(block)),
        acc_(kDecodeThreads * kSums, kNan),
        scratch_(Layout::kScratchBytes / sizeof(float), kNan) {
    const bool plain = plan.front_tasks() == 0;
    z_ = plain ? static_cast<const uint16_t*>(group_.x) : half(plan.z_offset);
    z_pitch_ = plain ? group_.x_pitch : group_.in_features;
  }

  bool failed() const { return failed_; }

  void load_weights_ahead(UnitRange range) { pipe_.load_weights_ahead(range); }
  void wait_for_previous_kernels() {}
  void load_inputs_ahead() { pipe_.load_inputs_ahead(z_, z_pitch_); }

  void begin() {
    flags_.begin();
    for (int token = 0; token < group_.tokens; ++token) {
      const int route = group_.present & (group_.routes == nullptr ? 3 : group_.routes[token]);
      for (int a = 0; a < kAdapters; ++a) users_[a] |= static_cast<uint64_t>(route >> a & 1) << token;
    }
  }
  bool uses(int adapter) const { return users_[adapter] != 0; }
  uint32_t take_ticket() { return flags_.take_ticket(); }
  void publish(int slot) { flags_.publish(slot); }
  void wait(int begin, int end) {
    for (int slot = begin; slot < end; ++slot) failed_ = !flags_.wait(slot) || failed_;
  }
  bool arrive_last(int slot, int parts) { return flags_.arrive_last(slot, parts); }
  void end() { flags_.end(); }

  void make_row(int token) {
    const uint16_t* x = static_cast<const uint16_t*>(group_.x) + token * group_.x_pitch;
    uint16_t* z = half(plan_.z_offset) + static_cast<int64_t>(token) * group_.in_features;
    float scale = 0;
    if (group_.front == Front::kNorm) {
      float sum = 0;
      for (int f = 0; f < group_.in_features; ++f) sum += Number::wide(x[f]) * Number::wide(x[f]);
      scale = 1.0f / std::sqrt(sum / group_.in_features + group_.eps);
    }
    for (int f = 0; f < group_.in_features; ++f) {
      const float value = Number::wide(x[f]);
      if (group_.front == Front::kNorm) {
        const float weight = group_.norm_is_wide ? static_cast<const float*>(group_.norm_weight)[f]
                                                 : Number::wide(static_cast<const uint16_t*>(group_.norm_weight)[f]);
        z[f] = Number::narrow(weight * Number::wide(Number::narrow(value * scale)));
      } else {
        z[f] = Number::narrow(value / (1.0f + std::exp(-value)) * Number::wide(x[group_.in_features + f]));
      }
    }
  }

  void shrink(ShrinkTask task, RankTile tile) {
    const Adapter& adapter = group_.projections[tile.projection].adapters[tile.adapter];
    std::vector<float> sums(kDecodeThreads * Layout::kTokenTiles * 4, 0.0f);
    for (int warp = 0; warp < kWarps; ++warp) {
      for (int chunk = task.chunk_begin + warp; chunk < task.chunk_end; chunk += kWarps) {
        for (int tt = 0; tt < Layout::kTokenTiles; ++tt) {
          multiply_chunk(&sums[(warp * Layout::kTokenTiles + tt) * 128], [&](int lane, int upper) {
            const int rank = tile.first_rank + upper * 8 + fragment_row(lane);
            return rank < adapter.rank ? load(adapter.a, adapter.a_pitch, rank, feature_of(chunk, lane), group_.in_features) : Vector{};
          }, [&](int lane) {
            const int token = tt * 8 + fragment_row(lane);
            return token < group_.tokens ? load(z_, z_pitch_, token, feature_of(chunk, lane), group_.in_features) : Vector{};
          });
        }
      }
    }
    for (int warp = kWarps - 1; warp >= 0; --warp) {
      for (int tt = 0; tt < Layout::kTokenTiles; ++tt) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int slot = warp % (kWarps / 2);
            float& place = scratch_[shrink_index<Layout::kTokens>(slot, accumulator_row(lane, i), tt * 8 + accumulator_token(lane, i))];
            const float own = sums[(warp * Layout::kTokenTiles + tt) * 128 + lane * 4 + i];
            place = warp >= kWarps / 2 ? own : own + place;
          }
        }
      }
    }
  }

  void store_shrink_slice(ShrinkTask task) {
    for (int i = 0; i < plan_.shrink_elements(); ++i) slice(task.tile, task.slice)[i] = shrunk(i);
  }

  void store_shrink(int number, RankTile tile) {
    const Adapter& adapter = group_.projections[tile.projection].adapters[tile.adapter];
    for (int i = 0; i < plan_.shrink_elements(); ++i) {
      const int rank = i / Layout::kTokens, token = i % Layout::kTokens;
      if (token >= group_.tokens) continue;
      float sum = plan_.slices == 1 ? shrunk(i) : 0.0f;
      for (int s = 0; plan_.slices > 1 && s < plan_.slices; ++s) sum += slice(number, s)[i];
      const bool used = (users_[tile.adapter] >> token & 1) && tile.first_rank + rank < adapter.rank;
      half(plan_.s_offset)[static_cast<int64_t>(token) * plan_.s_pitch + tile.column + rank] =
          Number::narrow(!used ? 0.0f : adapter.scaling * sum);
    }
  }

  void clear() { std::fill(acc_.begin(), acc_.end(), 0.0f); }

  void multiply_unit() {
    const char* stage = pipe_.wait();
    const int left = group_.in_features - current_.step * Layout::kFeatures;
    for (int warp = 0; warp < kWarps; ++warp) {
      const int row = warp_row_group(warp) * Layout::kWarpRows;
      for (int chunk = warp_chunk_group(warp); chunk < Layout::kChunks; chunk += kChunkGroups) {
        const auto read = [&](int offset, int lane) {
          Vector found;
          if (feature_of(chunk, lane) < left) std::memcpy(found.elements, stage + offset, 16);
          return found;
        };
        for (int rt = 0; rt < Layout::kRowTiles; ++rt) {
          for (int tt = 0; tt < Layout::kTokenTiles; ++tt) {
            multiply_chunk(sums(warp, rt, tt), [&](int lane, int upper) {
              return read(Layout::weight_offset(row + rt * 16 + upper * 8 + fragment_row(lane), feature_of(chunk, lane)), lane);
            }, [&](int lane) { return read(Layout::input_offset(tt * 8 + fragment_row(lane), feature_of(chunk, lane)), lane); });
          }
        }
      }
    }
    current_.advance(plan_);
    pipe_.refill(z_, z_pitch_);
  }

  void join_chunk_groups() {
    each_leader_sum([&](int thread, int quad, float*) {
      std::memcpy(&scratch_[Layout::handed_over(thread, quad)], sum_of(thread + kLeaders, quad), 16);
    });
    each_leader_sum([&](int thread, int quad, float* sum) {
      for (int i = 0; i < 4; ++i) sum[i] += scratch_[Layout::handed_over(thread, quad) + i];
    });
  }
  void store_partial(int slot) {
    each_leader_sum([&](int thread, int quad, float* sum) { std::memcpy(partial(slot, thread, quad), sum, 16); });
  }
  void sum_partials(TileParts parts, int tile) {
    clear();
    for (int part = 0; part < parts.count; ++part) {
      const int slot = plan_.partial_slot(parts.first + part, tile);
      each_leader_sum([&](int thread, int quad, float* sum) {
        for (int i = 0; i < 4; ++i) sum[i] += partial(slot, thread, quad)[i];
      });
    }
  }

  void ask_for_rows_of_b(TilePlace, int) {}

  void expand(TilePlace place, int number) {
    for (int warp = 0; warp < kRowGroups; ++warp) {
      for (int rt = 0; rt < Layout::kRowTiles; ++rt) {
        const TilePlace first = plan_.row_of(place, warp_row_group(warp) * Layout::kWarpRows + rt * 16);
        const Projection& projection = group_.projections[first.projection];
        const Adapter& adapter = projection.adapters[number];
        const uint16_t* s = half(plan_.s_offset) + plan_.rank_tile_begin(first.projection, number) * kRankTile;
        for (int tt = 0; adapter.rank != 0 && tt < Layout::kTokenTiles; ++tt) {
          float term[32][4] = {};
          for (int chunk = 0; chunk * kChunkFeatures < adapter.rank; ++chunk) {
            multiply_chunk(&term[0][0], [&](int lane, int upper) {
              const int n = first.first_row + upper * 8 + fragment_row(lane);
              return n < projection.out_features ? load(adapter.b, adapter.b_pitch, n, feature_of(chunk, lane), adapter.rank) : Vector{};
            }, [&](int lane) {
              const int token = tt * 8 + fragment_row(lane), rank = feature_of(chunk, lane);
              return token < group_.tokens && rank < adapter.rank ? load(s, plan_.s_pitch, token, rank, plan_.s_pitch) : Vector{};
            });
          }
          for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
              if (users_[number] >> (tt * 8 + accumulator_token(lane, i)) & 1) sums(warp, rt, tt)[lane * 4 + i] += term[lane][i];
            }
          }
        }
      }
    }
  }

  void store_tile(TilePlace place) {
    for (int warp = 0; warp < kRowGroups; ++warp) {
      for (int rt = 0; rt < Layout::kRowTiles; ++rt) {
        for (int tt = 0; tt < Layout::kTokenTiles; ++tt) {
          for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
              const int row = warp_row_group(warp) * Layout::kWarpRows + rt * 16 + accumulator_row(lane, i);
              scratch_[Layout::out_index(tt * 8 + accumulator_token(lane, i), row)] = sums(warp, rt, tt)[lane * 4 + i];
            }
          }
        }
      }
    }
    const int outputs = group_.projections[place.projection].out_features;
    for (int token = 0; token < group_.tokens; ++token) {
      for (int row = 0; row < plan_.half_rows() && place.first_row + row < outputs; ++row) {
        const int64_t column = plan_.output_column(place) + row;
        float value = finished(place, token, row);
        if (group_.swiglu) value = value / (1.0f + std::exp(-value)) * finished(place, token, row + plan_.half_rows());
        if (group_.residual != nullptr) {
          value += Number::wide(static_cast<const uint16_t*>(group_.residual)[token * group_.residual_pitch + column]);
        }
        static_cast<uint16_t*>(group_.y)[token * group_.y_pitch + column] = Number::narrow(value);
      }
    }
  }

 private:
  static constexpr int kLeaders = kDecodeThreads / kChunkGroups;
  static constexpr int kQuads = Layout::kRowTiles * Layout::kTokenTiles;
  static constexpr int kSums = kQuads * 4;

  static int feature_of(int chunk, int lane) { return chunk * kChunkFeatures + fragment_feature(lane); }

  uint16_t* half(int64_t offset) { return reinterpret_cast<uint16_t*>(workspace_ + offset); }

  static Vector load(const void* base, int64_t pitch, int64_t row, int first, int columns) {
    Vector found;
    for (int i = 0; i < kVectorFeatures && first + i < columns; ++i) {
      found.elements[i] = static_cast<const uint16_t*>(base)[row * pitch + first + i];
    }
    return found;
  }

  // Accumulators of a warp's product: 32 lanes of 4, gathered from and scattered to the threads' own.
  template <typename Left, typename Right>
  void multiply_chunk(float* acc, Left&& left, Right&& right) {
    Fragments step[2];
    for (int lane = 0; lane < 32; ++lane) {
      const Vector lower = left(lane, 0), upper = left(lane, 1), z = right(lane);
      for (int s = 0; s < 2; ++s) {
        const uint32_t a[4] = {lower.word(2 * s), upper.word(2 * s), lower.word(2 * s + 1), upper.word(2 * s + 1)};
        std::memcpy(step[s].a[lane], a, sizeof a);
        step[s].b[lane][0] = z.word(2 * s);
        step[s].b[lane][1] = z.word(2 * s + 1);
      }
    }
    for (const Fragments& one : step) multiply<Number>(reinterpret_cast<float(*)[4]>(acc), one);
  }

  // The 128 sums of one product of a warp lie together, four a lane.
  float* sums(int warp, int rt, int tt) { return sum_of(warp * 32, rt * Layout::kTokenTiles + tt); }
  float* sum_of(int thread, int quad) { return &acc_[(thread / 32 * kQuads + quad) * 128 + thread % 32 * 4]; }

  template <typename Function>
  void each_leader_sum(Function&& function) {
    for (int thread = 0; thread < kLeaders; ++thread) {
      for (int quad = 0; quad < kQuads; ++quad) function(thread, quad, sum_of(thread, quad));
    }
  }

  float* partial(int slot, int thread, int quad) {
    return reinterpret_cast<float*>(workspace_ + plan_.partial_offset) + slot * plan_.partial_elements() +
           Layout::handed_over(thread, quad);
  }
  float* slice(int tile, int number) {
    return reinterpret_cast<float*>(workspace_ + plan_.shrink_offset) +
           (static_cast<int64_t>(tile) * plan_.slices + number) * plan_.shrink_elements();
  }
  float shrunk(int index) const {
    float sum = 0;
    for (int slot = 0; slot < kWarps / 2; ++slot) sum += scratch_[slot * kRankTile * Layout::kTokens + index];
    return sum;
  }

  float finished(TilePlace place, int token, int row) {
    const TilePlace at = plan_.row_of(place, row);
    const void* bias = group_.projections[at.projection].bias;
    return scratch_[Layout::out_index(token, row)] +
           (bias == nullptr ? 0.0f : Number::wide(static_cast<const uint16_t*>(bias)[at.first_row]));
  }

  const DecodePlan& plan_;
  const Group& group_;
  char* workspace_;
  Flags<HostMemory> flags_;
  HostPipe<Layout, Bulk> pipe_;
  UnitCursor current_;
  std::vector<float> acc_, scratch_;
  const uint16_t* z_;
  int64_t z_pitch_;
  uint64_t users_[kAdapters] = {};
  bool failed_ = false;
};

// Runs every block of a launch, at most `resident` at a time in the order of `order` (a GPU promises no more than that).
// False where a wait ran out.
template <typename Host>
bool launch(const DecodePlan& plan, int stages, const std::vector<int>& order, int resident, char* workspace, uint32_t* sync) {
  std::atomic<int> next{0};
  std::atomic<bool> held{true};
  const auto work = [&] {
    for (int i = next++; i < plan.blocks; i = next++) {
      Host ops(plan, order[i], stages, workspace, sync);
      decode_program(ops, plan, order[i]);
      if (ops.failed()) held = false;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < resident; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  return held;
}

}  // namespace twn_host
