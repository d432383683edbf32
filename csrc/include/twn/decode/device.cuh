// The decode program's instructions on a device: tensor-core products from shared memory, reductions, the epilogue.
//
// How weights and z come into shared memory is the Pipe's: copy_pipe.cuh (sm_80) or bulk_pipe.cuh (sm_90). All threads of
// the block call every function here.
#pragma once

#include <type_traits>

#include "twn/decode/fronts.cuh"
#include "twn/decode/layout.h"
#include "twn/decode/program.h"
#include "twn/device_memory.cuh"
#include "twn/flags.h"
#include "twn/numbers.cuh"

namespace twn {

constexpr uint32_t kDecodeGaveUp = 0x44450001;  // what `report` says; its upper half names the kernel

template <typename T, typename Layout, template <typename> class PipeOf>
class DecodeDevice {
 public:
  using Pipe = PipeOf<Layout>;

  TWN_DEVICE DecodeDevice(const DecodePlan& plan, char* shared, int stages, char* workspace, uint32_t* sync, uint32_t* report)
      : plan_(plan),
        scratch_(reinterpret_cast<float*>(shared + stages * Layout::kStageBytes)),
        pipe_(plan, shared, reinterpret_cast<char*>(scratch_) + Layout::kScratchBytes, stages),
        workspace_(workspace),
        flags_{sync, static_cast<uint32_t>(plan.tasks()), gridDim.x, 0},
        report_(report),
        z_(plan.front_tasks() == 0 ? static_cast<const T*>(plan.group.x) : reinterpret_cast<const T*>(workspace + plan.z_offset)),
        z_pitch_(plan.front_tasks() == 0 ? plan.group.x_pitch : plan.group.in_features),
        current_(plan, plan.units_of(blockIdx.x)) {}

  TWN_DEVICE void load_weights_ahead(UnitRange range) { pipe_.load_weights_ahead(range); }
  TWN_DEVICE void wait_for_previous_kernels() { Pipe::wait_for_previous_kernels(); }
  TWN_DEVICE void load_inputs_ahead() { pipe_.load_inputs_ahead(z_, z_pitch_); }

  TWN_DEVICE void begin() {
    flags_.begin();  // every thread reads the launch's number, which no block changes before all have left
    const Group& group = plan_.group;
    uint64_t masks[kAdapters] = {};
    for (int half = 0; half < 2; ++half) {
      const int token = half * 32 + lane();
      int route = 0;
      if (token < group.tokens) route = group.present & (group.routes == nullptr ? 3 : group.routes[token]);
      for (int a = 0; a < kAdapters; ++a) {
        masks[a] |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, route >> a & 1)) << (half * 32);
      }
    }
    users_r_ = masks[0];
    users_e_ = masks[1];
  }

  TWN_DEVICE bool uses(int adapter) const { return users(adapter) != 0; }

  TWN_DEVICE uint32_t take_ticket() {
    uint32_t* word = reinterpret_cast<uint32_t*>(scratch_);
    if (threadIdx.x == 0) *word = flags_.take_ticket();
    __syncthreads();
    const uint32_t ticket = *word;
    __syncthreads();
    return ticket;
  }

  TWN_DEVICE void publish(int slot) {
    Pipe::fence_before_publish();
    __syncthreads();
    if (threadIdx.x == 0) flags_.publish(slot);
  }

  TWN_DEVICE void wait(int begin, int end) {
    bool held = true;
    for (int slot = begin + threadIdx.x; slot < end; slot += kDecodeThreads) held = held && flags_.wait(slot);
    if (!__syncthreads_and(held)) give_up();
  }

  TWN_DEVICE bool arrive_last(int slot, int parts) {
    uint32_t* word = reinterpret_cast<uint32_t*>(scratch_);
    __syncthreads();
    if (threadIdx.x == 0) *word = flags_.arrive_last(slot, parts);
    __syncthreads();
    const bool last = *word != 0;
    __syncthreads();
    return last;
  }

  TWN_DEVICE void end() {
    __syncthreads();
    if (threadIdx.x == 0) flags_.end();
  }

  // ---- z = norm(x) or silu(gate) * up, one row ----

  TWN_DEVICE void make_row(int token) {
    const Group& group = plan_.group;
    const T* x = static_cast<const T*>(group.x) + token * group.x_pitch;
    T* z = reinterpret_cast<T*>(workspace_ + plan_.z_offset) + static_cast<int64_t>(token) * group.in_features;
    FrontRow<T> row{group, scratch_};
    group.front == Front::kNorm ? row.normalise(x, z) : row.gate(x, z);
  }

  // ---- the shrink: a tile of ranks over a slice of the features ----

  TWN_DEVICE void shrink(ShrinkTask task, RankTile tile) {
    const Adapter& adapter = plan_.group.projections[tile.projection].adapters[tile.adapter];
    float sums[Layout::kTokenTiles][4] = {};
    if (aligned(adapter.a, adapter.a_pitch)) {
      add_shrink<true>(sums, adapter, task, tile.first_rank);
    } else {
      add_shrink<false>(sums, adapter, task, tile.first_rank);
    }
    // the upper four warps hand their sums to the lower four, whose sums are read together
    if (warp() >= kWarps / 2) write_shrink(sums, warp() - kWarps / 2);
    __syncthreads();
    if (warp() < kWarps / 2) {
#pragma unroll
      for (int tt = 0; tt < Layout::kTokenTiles; ++tt) {
        for (int i = 0; i < 4; ++i) sums[tt][i] += scratch_[shrink_place(warp(), tt, i)];
      }
      write_shrink(sums, warp());
    }
    __syncthreads();
  }

  TWN_DEVICE void store_shrink_slice(ShrinkTask task) {
    float* slice = shrink_slice(task.tile, task.slice);
    for (int i = threadIdx.x; i < plan_.shrink_elements(); i += kDecodeThreads) __stcg(slice + i, shrunk(i));
  }

  TWN_DEVICE void store_shrink(int number, RankTile tile) {
    const Adapter& adapter = plan_.group.projections[tile.projection].adapters[tile.adapter];
    T* s = reinterpret_cast<T*>(workspace_ + plan_.s_offset) + tile.column;
    for (int i = threadIdx.x; i < plan_.shrink_elements(); i += kDecodeThreads) {
      const int rank = i / Layout::kTokens, token = i % Layout::kTokens;
      if (token >= plan_.group.tokens) continue;
      float sum = 0.0f;
      if (plan_.slices == 1) {
        sum = shrunk(i);
      } else {
        for (int slice = 0; slice < plan_.slices; ++slice) sum += __ldcg(shrink_slice(number, slice) + i);
      }
      const bool used = (users(tile.adapter) >> token & 1) && tile.first_rank + rank < adapter.rank;
      const float value = !used ? 0.0f : failed_ ? nan() : adapter.scaling * sum;
      s[static_cast<int64_t>(token) * plan_.s_pitch + rank] = Number<T>::narrow_one(value);
    }
  }

  // ---- the base product ----

  TWN_DEVICE void clear() {
#pragma unroll
    for (int rt = 0; rt < Layout::kRowTiles; ++rt) {
#pragma unroll
      for (int tt = 0; tt < Layout::kTokenTiles; ++tt) {
        for (int i = 0; i < 4; ++i) acc_[rt][tt][i] = 0.0f;
      }
    }
  }

  TWN_DEVICE void multiply_unit() {
    bool expired = false;
    const char* stage = pipe_.wait(expired);
    if (expired) give_up();
    const int left = plan_.group.in_features - current_.step * Layout::kFeatures;
    const int row = warp_row_group(warp()) * Layout::kWarpRows + fragment_row(lane());
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; chunk += kChunkGroups) {
      const int feature = (chunk + warp_chunk_group(warp())) * kChunkFeatures + fragment_feature(lane());
      const bool in = feature < left;
      uint4 rows[Layout::kRowTiles][2];
#pragma unroll
      for (int rt = 0; rt < Layout::kRowTiles; ++rt) {
        for (int half = 0; half < 2; ++half) {
          rows[rt][half] = in ? shared_vector(stage + Layout::weight_offset(row + rt * 16 + half * 8, feature)) : zeros();
        }
      }
#pragma unroll
      for (int tt = 0; tt < Layout::kTokenTiles; ++tt) {
        const uint4 z = in ? shared_vector(stage + Layout::input_offset(tt * 8 + fragment_row(lane()), feature)) : zeros();
#pragma unroll
        for (int rt = 0; rt < Layout::kRowTiles; ++rt) multiply_chunk(acc_[rt][tt], rows[rt], z);
      }
    }
    current_.advance(plan_);
    __syncthreads();  // all have read the stage
    pipe_.refill(z_, z_pitch_);
  }

  TWN_DEVICE void join_chunk_groups() {
    static_assert(kChunkGroups == 2, "one group hands over to the other");
    if (warp_chunk_group(warp()) == 1) each_quad([&](int quad, float (&sum)[4]) { *handed_over(quad) = as_float4(sum); });
    __syncthreads();
    if (leads()) each_quad([&](int quad, float (&sum)[4]) { add(sum, *handed_over(quad)); });
    __syncthreads();
  }

  TWN_DEVICE void store_partial(int slot) {
    if (!leads()) return;
    each_quad([&](int quad, float (&sum)[4]) {
      if (failed_) sum[0] = sum[1] = sum[2] = sum[3] = nan();
      __stcg(partial(slot, quad), as_float4(sum));
    });
  }

  // In the order of the features; loads are under way together, of as many parts as registers allow.
  TWN_DEVICE void sum_partials(TileParts parts, int tile) {
    if (!leads()) return;
    clear();
    constexpr int kAtOnce = Layout::kRowTiles * Layout::kTokenTiles <= 8 ? 4 : 2;
    for (int first = 0; first < parts.count; first += kAtOnce) {
      int slots[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        slots[i] = plan_.partial_slot(parts.first + smaller(first + i, parts.count - 1), tile);  // the last one again
      }
      each_quad([&](int quad, float (&sum)[4]) {
        float4 found[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) found[i] = __ldcg(partial(slots[i], quad));
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i < parts.count) add(sum, found[i]);
        }
      });
    }
  }

  // Into L2, long before they are used at the end of the tile: one request for 128 bytes.
  TWN_DEVICE void ask_for_rows_of_b(TilePlace place, int number) {
    constexpr int kLine = 64;  // elements
    for (int row = threadIdx.x / 4; row < Layout::kRows; row += kDecodeThreads / 4) {
      const TilePlace at = plan_.row_of(place, row);
      const Projection& projection = plan_.group.projections[at.projection];
      const Adapter& adapter = projection.adapters[number];
      if (at.first_row >= projection.out_features) continue;
      const T* b = static_cast<const T*>(adapter.b) + at.first_row * adapter.b_pitch;
      for (int rank = threadIdx.x % 4 * kLine; rank < adapter.rank; rank += 4 * kLine) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(b + rank));
      }
    }
  }

  // ---- the adapters' terms: acc += select(S B^T), row by row of the batch ----

  TWN_DEVICE void expand(TilePlace place, int number) {
    if (!leads()) return;
#pragma unroll
    for (int rt = 0; rt < Layout::kRowTiles; ++rt) {
      const TilePlace first = plan_.row_of(place, warp_row_group(warp()) * Layout::kWarpRows + rt * 16);
      const Projection& projection = plan_.group.projections[first.projection];
      const Adapter& adapter = projection.adapters[number];
      if (adapter.rank == 0) continue;
      const T* s = reinterpret_cast<const T*>(workspace_ + plan_.s_offset) +
                   plan_.rank_tile_begin(first.projection, number) * kRankTile;
      const int out = first.first_row + fragment_row(lane());
      float terms[Layout::kTokenTiles][4] = {};
      if (aligned(adapter.b, adapter.b_pitch) && adapter.rank % kVectorFeatures == 0) {
        add_terms<true>(terms, number, adapter, s, out, projection.out_features);
      } else {
        add_terms<false>(terms, number, adapter, s, out, projection.out_features);
      }
#pragma unroll
      for (int tt = 0; tt < Layout::kTokenTiles; ++tt) {
        for (int i = 0; i < 4; ++i) {
          // a select, not a product with 0: a NaN of B must stay with the rows that use it
          if (users(number) >> (tt * 8 + accumulator_token(lane(), i)) & 1) acc_[rt][tt][i] += terms[tt][i];
        }
      }
    }
  }

  // ---- bias, SwiGLU, residual, the one rounding ----

  TWN_DEVICE void store_tile(TilePlace place) {
    if (leads()) {
#pragma unroll
      for (int rt = 0; rt < Layout::kRowTiles; ++rt) {
#pragma unroll
        for (int tt = 0; tt < Layout::kTokenTiles; ++tt) {
          for (int i = 0; i < 4; ++i) {
            const int row = warp_row_group(warp()) * Layout::kWarpRows + rt * 16 + accumulator_row(lane(), i);
            scratch_[Layout::out_index(tt * 8 + accumulator_token(lane(), i), row)] = failed_ ? nan() : acc_[rt][tt][i];
          }
        }
      }
    }
    __syncthreads();
    const Group& group = plan_.group;
    const int vectors = plan_.half_rows() / kVectorFeatures;
    const int64_t column = plan_.output_column(place);
    for (int i = threadIdx.x; i < group.tokens * vectors; i += kDecodeThreads) {
      const int token = i / vectors, row = i % vectors * kVectorFeatures;
      const int left = group.projections[place.projection].out_features - place.first_row - row;
      if (left > 0) store_vector(place, token, row, column + row, smaller(left, kVectorFeatures));
    }
    __syncthreads();
  }

 private:
  // What this thread still computes is written as NaN, and the host says so at the next launch.
  TWN_DEVICE void give_up() {
    failed_ = true;
    *static_cast<volatile uint32_t*>(report_) = kDecodeGaveUp;
    __threadfence_system();
  }

  TWN_DEVICE uint64_t users(int adapter) const { return adapter == 0 ? users_r_ : users_e_; }
  TWN_DEVICE static int lane() { return threadIdx.x % 32; }
  TWN_DEVICE static int warp() { return threadIdx.x / 32; }
  TWN_DEVICE static uint4 zeros() { return make_uint4(0, 0, 0, 0); }
  TWN_DEVICE static float nan() { return __int_as_float(0x7fffffff); }
  TWN_DEVICE static bool leads() { return warp_chunk_group(warp()) == 0; }
  TWN_DEVICE static float4 as_float4(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }
  TWN_DEVICE static uint4 shared_vector(const char* address) { return *reinterpret_cast<const uint4*>(address); }

  TWN_DEVICE static void add(float (&sum)[4], float4 more) {
    sum[0] += more.x;
    sum[1] += more.y;
    sum[2] += more.z;
    sum[3] += more.w;
  }

  TWN_DEVICE static void multiply_chunk(float (&sum)[4], const uint4 (&rows)[2], uint4 z) {
    multiply<T>(sum, rows[0].x, rows[1].x, rows[0].y, rows[1].y, z.x, z.y);
    multiply<T>(sum, rows[0].z, rows[1].z, rows[0].w, rows[1].w, z.z, z.w);
  }

  // Chunks whose loads are under way at once: as many as registers allow.
  static constexpr int kChunksAhead = Layout::kTokenTiles <= 2 ? 4 : Layout::kTokenTiles <= 4 ? 2 : 1;

  // Eight elements of a row of which `left` lie in it; the others are 0, as all are where the row is not `in`. `Words`: they
  // begin at 16 bytes, and all or none lie in the row, so that it takes no branch, which loads would wait for one by one.
  template <bool Words>
  TWN_DEVICE static uint4 load_vector(const T* source, bool in, int left) {
    if constexpr (Words) {
      return in && left > 0 ? __ldg(reinterpret_cast<const uint4*>(source)) : zeros();
    } else {
      uint4 found = zeros();
      uint16_t* elements = reinterpret_cast<uint16_t*>(&found);
#pragma unroll
      for (int i = 0; i < kVectorFeatures; ++i) {
        if (in && i < left) elements[i] = __ldg(reinterpret_cast<const uint16_t*>(source) + i);
      }
      return found;
    }
  }

  template <typename Function>
  TWN_DEVICE void each_quad(Function&& function) {
#pragma unroll
    for (int rt = 0; rt < Layout::kRowTiles; ++rt) {
#pragma unroll
      for (int tt = 0; tt < Layout::kTokenTiles; ++tt) function(rt * Layout::kTokenTiles + tt, acc_[rt][tt]);
    }
  }

  TWN_DEVICE float4* handed_over(int quad) {
    return reinterpret_cast<float4*>(scratch_ + Layout::handed_over(threadIdx.x % (kDecodeThreads / kChunkGroups), quad));
  }

  TWN_DEVICE float4* partial(int slot, int quad) {
    float* sums = reinterpret_cast<float*>(workspace_ + plan_.partial_offset) + slot * plan_.partial_elements();
    return reinterpret_cast<float4*>(sums + Layout::handed_over(threadIdx.x, quad));
  }

  TWN_DEVICE float* shrink_slice(int tile, int slice) {
    return reinterpret_cast<float*>(workspace_ + plan_.shrink_offset) +
           (static_cast<int64_t>(tile) * plan_.slices + slice) * plan_.shrink_elements();
  }

  TWN_DEVICE int shrink_place(int slot, int tt, int i) const {
    return shrink_index<Layout::kTokens>(slot, accumulator_row(lane(), i), tt * 8 + accumulator_token(lane(), i));
  }

  TWN_DEVICE void write_shrink(const float (&sums)[Layout::kTokenTiles][4], int slot) {
#pragma unroll
    for (int tt = 0; tt < Layout::kTokenTiles; ++tt) {
      for (int i = 0; i < 4; ++i) scratch_[shrink_place(slot, tt, i)] = sums[tt][i];
    }
  }

  // An element of the block's own slice: the sums of its four warps, in order.
  TWN_DEVICE float shrunk(int index) const {
    float sum = failed_ ? nan() : 0.0f;
    for (int slot = 0; slot < kWarps / 2; ++slot) sum += scratch_[slot * kRankTile * Layout::kTokens + index];
    return sum;
  }

  // sums += left right^T over `count` chunks: left(half, i) has what the lane reads of chunk i in two rows of the left
  // operand, right(token, i) in a row of the batch. All loads of kChunksAhead chunks stand before the first product.
  template <typename Left, typename Right>
  TWN_DEVICE static void add_chunks(float (&sums)[Layout::kTokenTiles][4], int count, const Left& left, const Right& right) {
    for (int begin = 0; begin < count; begin += kChunksAhead) {
      uint4 rows[kChunksAhead][2], columns[kChunksAhead][Layout::kTokenTiles];
#pragma unroll
      for (int ahead = 0; ahead < kChunksAhead; ++ahead) {
        for (int half = 0; half < 2; ++half) rows[ahead][half] = left(half, begin + ahead);
#pragma unroll
        for (int tt = 0; tt < Layout::kTokenTiles; ++tt) columns[ahead][tt] = right(tt * 8 + fragment_row(lane()), begin + ahead);
      }
#pragma unroll
      for (int ahead = 0; ahead < kChunksAhead; ++ahead) {
#pragma unroll
        for (int tt = 0; tt < Layout::kTokenTiles; ++tt) multiply_chunk(sums[tt], rows[ahead], columns[ahead][tt]);
      }
    }
  }

  // A warp's share of a shrink task: z A^T over every kWarps-th chunk.
  template <bool Words>
  TWN_DEVICE void add_shrink(float (&sums)[Layout::kTokenTiles][4], const Adapter& adapter, ShrinkTask task, int first_rank) {
    const T* a = static_cast<const T*>(adapter.a);
    const int first = task.chunk_begin + warp(), end = smaller(task.chunk_end * kChunkFeatures, plan_.group.in_features);
    const auto feature_of = [&](int i) { return (first + i * kWarps) * kChunkFeatures + fragment_feature(lane()); };
    const auto left = [&](int half, int i) {
      const int rank = first_rank + half * 8 + fragment_row(lane()), feature = feature_of(i);
      return load_vector<Words>(a + rank * adapter.a_pitch + feature, rank < adapter.rank, end - feature);
    };
    const auto right = [&](int token, int i) {
      const int feature = feature_of(i);
      return token < plan_.group.tokens && feature < end ? load_written(z_ + token * z_pitch_ + feature) : zeros();
    };
    add_chunks(sums, ceil_div(task.chunk_end - first, kWarps), left, right);
  }

  // What rows `out` and `out` + 8 of B give every row of the batch.
  template <bool Words>
  TWN_DEVICE void add_terms(float (&terms)[Layout::kTokenTiles][4], int number, const Adapter& adapter, const T* s, int out,
                            int outputs) const {
    const T* b = static_cast<const T*>(adapter.b);
    const auto rank_of = [&](int i) { return i * kChunkFeatures + fragment_feature(lane()); };
    const auto left = [&](int half, int i) {
      const int n = out + half * 8, rank = rank_of(i);
      return load_vector<Words>(b + n * adapter.b_pitch + rank, n < outputs, adapter.rank - rank);
    };
    const auto right = [&](int token, int i) {
      const bool in = (users(number) >> token & 1) && rank_of(i) < adapter.rank;
      return in ? load_written(s + static_cast<int64_t>(token) * plan_.s_pitch + rank_of(i)) : zeros();
    };
    add_chunks(terms, ceil_div(adapter.rank, kChunkFeatures), left, right);
  }

  TWN_DEVICE void store_vector(TilePlace place, int token, int row, int64_t column, int count) {
    float value[kVectorFeatures], up[kVectorFeatures];
    read_out(value, place, token, row);
    if (plan_.group.swiglu) {
      read_out(up, place, token, row + plan_.half_rows());
      for (int i = 0; i < kVectorFeatures; ++i) value[i] = silu(value[i]) * up[i];
    }
    if (plan_.group.residual != nullptr) {
      add_elements(value, static_cast<const T*>(plan_.group.residual) + token * plan_.group.residual_pitch + column, count);
    }
    T* target = static_cast<T*>(plan_.group.y) + token * plan_.group.y_pitch + column;
    if (count == kVectorFeatures && reinterpret_cast<uintptr_t>(target) % 16 == 0) {
      uint4 packed;
      packed.x = Number<T>::narrow(value[0], value[1]);
      packed.y = Number<T>::narrow(value[2], value[3]);
      packed.z = Number<T>::narrow(value[4], value[5]);
      packed.w = Number<T>::narrow(value[6], value[7]);
      *reinterpret_cast<uint4*>(target) = packed;
    } else {
      for (int i = 0; i < count; ++i) target[i] = Number<T>::narrow_one(value[i]);
    }
  }

  // Eight sums of a row of the tile, with the bias.
  TWN_DEVICE void read_out(float (&value)[kVectorFeatures], TilePlace place, int token, int row) const {
    const float4* sums = reinterpret_cast<const float4*>(scratch_ + Layout::out_index(token, row));
    reinterpret_cast<float4*>(value)[0] = sums[0];
    reinterpret_cast<float4*>(value)[1] = sums[1];
    const TilePlace first = plan_.row_of(place, row);
    const Projection& projection = plan_.group.projections[first.projection];
    if (projection.bias == nullptr) return;
    add_elements(value, static_cast<const T*>(projection.bias) + first.first_row, projection.out_features - first.first_row);
  }

  // The first `count` of eight elements at most, from memory in one piece.
  TWN_DEVICE static void add_elements(float (&value)[kVectorFeatures], const T* source, int count) {
    if (count >= kVectorFeatures && aligned(source, 0)) {
      float more[kVectorFeatures];
      widen(more, source);
      for (int i = 0; i < kVectorFeatures; ++i) value[i] += more[i];
    } else {
      for (int i = 0; i < kVectorFeatures; ++i) {
        if (i < count) value[i] += Number<T>::wide_one(source[i]);
      }
    }
  }

  const DecodePlan& plan_;
  float* scratch_;
  Pipe pipe_;
  char* workspace_;
  Flags<DeviceMemory> flags_;
  uint32_t* report_;
  const T* z_;
  int64_t z_pitch_;
  UnitCursor current_;
  uint64_t users_r_ = 0, users_e_ = 0;  // bit t: row t uses the adapter
  bool failed_ = false;
  float acc_[Layout::kRowTiles][Layout::kTokenTiles][4];
};

}  // namespace twn
