// The program of one block, written once: `Ops` gives the instructions, of the device or of an emulation on the host.
//
// Four roles that meet at barriers in shared memory. One warp draws tickets and tells them (`schedule`). One thread
// issues the bulk copies of x and W, of x and A, and behind the k-boundary of S and B (`load`). Two warpgroups multiply
// 64 rows each and write the results (`multiply`). What one lane of a warpgroup does on its own stands in `ops.lanes`.
//
// No wait goes in a circle: see flags.h for tickets and tags. A tag that does not come in time makes its tile NaN.
#pragma once

#include "twn/prefill/layout.h"

#if defined(__CUDACC__)
#define TWN_BLOCK __device__ __forceinline__
#define TWN_UNROLLED _Pragma("unroll")
#define TWN_ROLLED _Pragma("unroll 1")
#else
#define TWN_BLOCK inline
#define TWN_UNROLLED
#define TWN_ROLLED
#endif

namespace twn::prefill {

constexpr uint32_t kLostTag = 0x50000001;  // in the report word: a shrink tile did not come
constexpr uint32_t kLostBarrier = 0x50000002;  // a barrier of a block did not complete
constexpr int kAhead = 4;  // iterations before the end of a base range, when the next ticket is drawn

template <typename Map>
struct Params {
  Map x, s;
  Map weights[kMaxProjections];
  Map a[kMaxProjections][kAdapters];
  Map b[kMaxProjections][kAdapters];
  Plan plan;
  const void* bias[kMaxProjections];
  float scaling[kMaxProjections][kAdapters];
  const int8_t* routes;
  int present;
  const void* residual;
  int64_t residual_pitch;
  bool residual_in_pieces;  // rows begin at multiples of 16 bytes
  void* s_data;
  void* y;
  int64_t y_pitch;
  bool y_in_pieces[kMaxProjections];
  uint32_t* sync;
  uint32_t* report;
};

// 16 bytes: 8 elements.
struct alignas(16) Piece {
  uint32_t words[4];
};

// 64 rows by 64 columns in global memory, `rows` and `columns` of them real.
struct Strip {
  uint16_t* data;
  int64_t pitch;
  int rows, columns;
  bool in_pieces;
};

struct Entry {
  uint32_t ticket, tag;
  Users users;
};

enum EntryWord : int { kTicketWord = 0, kTagWord = 4, kUsersWord = 8, kLostWord = 12 };  // bytes in an entry

// Where a role is in the ring of stages.
template <typename T>
struct Turn {
  int stage = 0;
  uint32_t phase = 0;

  TWN_BLOCK void advance() {
    if (++stage == T::kStages) stage = 0, phase ^= 1;
  }
  TWN_BLOCK int previous() const { return stage == 0 ? T::kStages - 1 : stage - 1; }
};

template <typename Ops, typename T>
struct Program {
  Ops& ops;
  const Params<typename Ops::Map>& p;

  template <int Registers>
  using Accumulator = typename Ops::template Accumulator<Registers>;
  using BlockFlags = Flags<typename Ops::Memory>;

  // By one thread, before the roles begin.
  TWN_BLOCK void prepare() {
    constexpr int kWarps = kConsumers * kWarpgroupWarps;
    for (int stage = 0; stage < T::kStages; ++stage) {
      ops.init(T::full(stage), 1);
      ops.init(T::empty(stage), kWarps);
    }
    for (int place = 0; place < kRing; ++place) {
      ops.init(T::told(place), 1);
      ops.init(T::heard(place), kWarps + 1);
    }
    ops.init(T::hungry(), 1);
  }

  TWN_BLOCK void schedule() {
    BlockFlags flags{p.sync, p.plan.tasks(), ops.blocks(), 0};
    flags.begin();
    for (uint32_t n = 0;; ++n) {
      const int place = n % kRing;
      // Drawn late, so that a block that is busy does not keep a tile from one that is not.
      if (n > 0) ops.wait(T::hungry(), (n - 1) & 1);
      ops.wait(T::heard(place), (n / kRing & 1) ^ 1);
      const uint32_t ticket = ops.first_lane([&] { return flags.take_ticket(); });
      const bool none = ticket >= flags.tasks;
      tell(place, {ticket, flags.tag,
                   none ? Users{}
                        : users_of(p.plan, p.routes, p.present, m_tile(ticket), ops.scheduler_lane(),
                                   Ops::kSchedulerLanes, [&](Users users) { return ops.reduce(users); })});
      if (none) {
        ops.wait(T::heard(place), n / kRing & 1);
        ops.first_lane([&] { return flags.end(), 0u; });
        return;
      }
    }
  }

  TWN_BLOCK void load() {
    BlockFlags flags{p.sync, p.plan.tasks(), ops.blocks(), 0};
    Turn<T> turn;
    bool patient = true;
    for (uint32_t n = 0;; ++n) {
      const int place = n % kRing;
      const Entry entry = heard(place, n);
      flags.tag = entry.tag;
      if (entry.ticket < p.plan.shrink_tasks) {
        load_shrink(turn, entry);
      } else if (entry.ticket < flags.tasks) {
        load_output(turn, entry, flags, patient, place);
      }
      ops.arrive(T::heard(place));
      if (entry.ticket >= flags.tasks) return;
    }
  }

  TWN_BLOCK void multiply(int group) {
    BlockFlags flags{p.sync, p.plan.tasks(), ops.blocks(), 0};
    Turn<T> turn;
    for (uint32_t n = 0;; ++n) {
      const int place = n % kRing;
      const Entry entry = heard(place, n);
      flags.tag = entry.tag;
      if (entry.ticket < p.plan.shrink_tasks) {
        const ShrinkTile tile = shrink_tile(p.plan, entry.ticket);
        if (entry.users.any >> tile.adapter & 1) multiply_shrink(turn, tile, flags, group);
      } else if (entry.ticket < flags.tasks) {
        multiply_output(turn, entry, group, place);
      }
      ops.arrive_warps(T::heard(place));
      if (entry.ticket >= flags.tasks) return;
    }
  }

 private:
  TWN_BLOCK int m_tile(uint32_t ticket) const {
    const bool shrinks = ticket < p.plan.shrink_tasks;
    return shrinks ? shrink_tile(p.plan, ticket).m_tile : output_tile(p.plan, ticket).m_tile;
  }

  TWN_BLOCK void tell(int place, const Entry& entry) {
    if (ops.scheduler_lane() != 0) return;
    ops.store_word(T::entry(place) + kTicketWord, entry.ticket);
    ops.store_word(T::entry(place) + kTagWord, entry.tag);
    ops.store_word(T::entry(place) + kUsersWord, static_cast<uint32_t>(entry.users.any | entry.users.all << kAdapters));
    ops.store_word(T::entry(place) + kLostWord, 0);
    ops.arrive(T::told(place));
  }

  TWN_BLOCK Entry heard(int place, uint32_t n) {
    ops.wait(T::told(place), n / kRing & 1);
    constexpr int kMask = (1 << kAdapters) - 1;
    const int users = static_cast<int>(ops.load_word(T::entry(place) + kUsersWord));
    const uint32_t ticket = ops.broken() ? p.plan.tasks() : ops.load_word(T::entry(place) + kTicketWord);
    return {ticket, ops.load_word(T::entry(place) + kTagWord), {users & kMask, users >> kAdapters & kMask}};
  }

  // The next stage is free and expects `bytes`.
  TWN_BLOCK void claim(const Turn<T>& turn, uint32_t bytes) {
    ops.wait(T::empty(turn.stage), turn.phase ^ 1);
    ops.expect(T::full(turn.stage), bytes);
  }

  TWN_BLOCK void feel_hunger(int k) {
    if (k == larger(0, p.plan.k_iterations - kAhead)) ops.arrive(T::hungry());
  }

  TWN_BLOCK void load_shrink(Turn<T>& turn, const Entry& entry) {
    const ShrinkTile tile = shrink_tile(p.plan, entry.ticket);
    if (!(entry.users.any >> tile.adapter & 1)) {
      ops.arrive(T::hungry());
      return;
    }
    for (int k = 0; k < p.plan.k_iterations; ++k, turn.advance()) {
      const uint32_t full = T::full(turn.stage);
      claim(turn, T::kInputBytes + tile.slots * T::kSlotBytes);
      ops.load(p.x, T::input(turn.stage), k * kBlockK, tile.m_tile * kBlockM, full);
      for (int slot = 0; slot < tile.slots; ++slot) {
        const SlotPlace at = slot_place(p.plan, tile.adapter, tile.first_slot + slot);
        ops.load(p.a[at.projection][tile.adapter], T::weights(turn.stage) + slot * T::kSlotBytes, k * kBlockK,
                 at.first_rank, full);
      }
      feel_hunger(k);
    }
  }

  TWN_BLOCK void load_output(Turn<T>& turn, const Entry& entry, const BlockFlags& flags, bool& patient, int place) {
    const OutputTile tile = output_tile(p.plan, entry.ticket);
    const int first_row = tile.m_tile * kBlockM;
    for (int k = 0; k < p.plan.k_iterations; ++k, turn.advance()) {
      const uint32_t full = T::full(turn.stage);
      claim(turn, T::kStageBytes);
      ops.load(p.x, T::input(turn.stage), k * kBlockK, first_row, full);
      for (int half = 0; half < 2; ++half) {
        ops.load(p.weights[half_projection(p.plan, tile, half)], T::weights(turn.stage) + half * T::kHalfBytes,
                 k * kBlockK, half_row(p.plan, tile, half), full);
      }
      feel_hunger(k);
    }
    visit_low_rank(p.plan, tile, entry.users, [&](const LowRank& low) {
      for (int group = 0; group < kConsumers; ++group) {
        // After one that was waited for in vain, the others are only looked at.
        if (patient ? flags.wait(low.tag + group) : flags.is_published(low.tag + group)) continue;
        patient = false;
        ops.report(kLostTag);
        ops.store_word(T::entry(place) + kLostWord, 1);
      }
      ops.fence_for_bulk_copies();  // S was written by stores, of other blocks
      const uint32_t full = T::full(turn.stage);
      claim(turn, T::kInputBytes + low.halves * T::kHalfBytes);
      ops.load(p.s, T::input(turn.stage), low.s_column, first_row, full);
      for (int half = low.first_half; half < low.first_half + low.halves; ++half) {
        ops.load(p.b[low.projection][low.adapter], T::weights(turn.stage) + half * T::kHalfBytes, low.first_rank,
                 half_row(p.plan, tile, half), full);
      }
      turn.advance();
    });
  }

  // acc = the x tile's rows of this warpgroup @ [N, in_features]^T; each stage is given back one iteration later.
  template <int N, int Registers>
  TWN_BLOCK void multiply_base(Turn<T>& turn, Accumulator<Registers>& acc, int group) {
    acc.clear();
    for (int k = 0; k < p.plan.k_iterations; ++k, turn.advance()) {
      ops.wait(T::full(turn.stage), turn.phase);
      const uint64_t a = moved(ops.descriptor(T::input(turn.stage)), group * kConsumerRows, 0);
      const uint64_t b = ops.descriptor(T::weights(turn.stage));
      ops.mma_fence();
      TWN_UNROLLED
      for (int step = 0; step < kBlockK / kStepK; ++step) {
        ops.template mma<N>(acc, moved(a, 0, step), moved(b, 0, step));
      }
      ops.mma_commit();
      ops.template mma_wait<1>();
      if (k > 0) ops.arrive_warps(T::empty(turn.previous()));
    }
    ops.template mma_wait<0>();
    acc.settle();
    ops.arrive_warps(T::empty(turn.previous()));
  }

  template <int Slots>
  TWN_BLOCK void shrink(Turn<T>& turn, const ShrinkTile& tile, int group) {
    Accumulator<Slots * kSlotRegisters> acc;
    multiply_base<Slots * kSlot>(turn, acc, group);
    TWN_UNROLLED
    for (int slot = 0; slot < Slots; ++slot) store_shrink(acc, slot * kSlotRegisters, tile, slot, group);
  }

  TWN_BLOCK void multiply_shrink(Turn<T>& turn, const ShrinkTile& tile, const BlockFlags& flags, int group) {
    if (tile.slots == 1) shrink<1>(turn, tile, group);
    if (tile.slots == 2) shrink<2>(turn, tile, group);
    if constexpr (T::kSlots > 2) {
      if (tile.slots == 3) shrink<3>(turn, tile, group);
      if (tile.slots == 4) shrink<4>(turn, tile, group);
    }
    ops.fence_for_bulk_copies();  // other blocks read S by bulk copies
    ops.sync_warpgroup(group);
    ops.leader([&] { flags.publish(tile.tag + group); });
  }

  // Bits of the adapters that a row of x uses.
  TWN_BLOCK int route_of(int row) const {
    if (row >= p.plan.tokens) return 0;
    return p.routes == nullptr ? p.present : p.routes[row] & p.present;
  }

  TWN_BLOCK int first_row(int m_tile, int group) const { return m_tile * kBlockM + group * kConsumerRows; }

  // S of one slot: scaled, zero where a row does not use the adapter, rounded once. Beyond the rank it comes out as
  // zero, since rows that A does not have read as zeros.
  template <int Registers>
  TWN_BLOCK void store_shrink(Accumulator<Registers>& acc, int first, const ShrinkTile& tile, int slot, int group) {
    const SlotPlace at = slot_place(p.plan, tile.adapter, tile.first_slot + slot);
    const float scaling = p.scaling[at.projection][tile.adapter];
    const int row = first_row(tile.m_tile, group);
    const int64_t pitch = p.plan.s_pitch();
    uint16_t* data = static_cast<uint16_t*>(p.s_data) + row * pitch + (tile.first_slot + slot) * kSlot;
    store(group, Strip{nullptr, 0, 0, 0, false}, Strip{data, pitch, p.plan.tokens - row, kSlot, true}, [&](int lane) {
      const bool upper = route_of(row + fragment_row(lane, 0)) >> tile.adapter & 1;
      const bool lower = route_of(row + fragment_row(lane, 2)) >> tile.adapter & 1;
      return [=, &acc](int j) { return (j / 2 % 2 ? lower : upper) ? scaling * acc.at(lane, first + j) : 0.0f; };
    });
  }

  TWN_BLOCK void multiply_output(Turn<T>& turn, const Entry& entry, int group, int place) {
    const OutputTile tile = output_tile(p.plan, entry.ticket);
    Accumulator<T::kRegisters> acc;
    multiply_base<T::kBlockN>(turn, acc, group);
    visit_low_rank(p.plan, tile, entry.users, [&](const LowRank& low) {
      ops.wait(T::full(turn.stage), turn.phase);
      const uint64_t s = moved(ops.descriptor(T::input(turn.stage)), group * kConsumerRows, 0);
      const uint64_t b = ops.descriptor(T::weights(turn.stage));
      // Not into the upper half's registers: given those, the compiler runs all products of the kernel one after the
      // other.
      if (low.uniform && low.first_half == 0) {
        add_low_rank(acc, low, s, b);
      } else {
        add_selected(acc, low, s, b, first_row(tile.m_tile, group));
      }
      ops.arrive_warps(T::empty(turn.stage));
      turn.advance();
    });
    const bool lost = ops.load_word(T::entry(place) + kLostWord) != 0 || ops.broken();
    p.plan.swiglu ? store_gated(acc, tile, group, lost) : store_plain(acc, tile, group, lost);
  }

  TWN_BLOCK void add_low_rank(Accumulator<T::kRegisters>& acc, const LowRank& low, uint64_t s, uint64_t b) {
    if (low.halves == 2) {
      multiply_steps<T::kBlockN>(acc, low.steps, s, b);
    } else {
      multiply_steps<T::kHalf>(acc, low.steps, s, b);
    }
  }

  // A whole stage of products at once; of fewer one at a time, which the other warpgroup fills: the compiler must see
  // that none is in flight where a loop may end.
  template <int N, int Registers>
  TWN_BLOCK void multiply_steps(Accumulator<Registers>& acc, int steps, uint64_t a, uint64_t b) {
    constexpr int kSteps = kBlockK / kStepK;
    if (steps == kSteps) {
      ops.mma_fence();
      TWN_UNROLLED
      for (int step = 0; step < kSteps; ++step) ops.template mma<N>(acc, moved(a, 0, step), moved(b, 0, step));
      ops.mma_commit();
      ops.template mma_wait<0>();
      acc.settle();
    } else {
      TWN_ROLLED
      for (int step = 0; step < steps; ++step) {
        ops.mma_fence();
        ops.template mma<N>(acc, moved(a, 0, step), moved(b, 0, step));
        ops.mma_commit();
        ops.template mma_wait<0>();
        acc.settle();
      }
    }
  }

  // Where only some rows use the adapter: its term is made apart, 64 columns at a time, and added to those rows alone,
  // so that a NaN of B stays with them. S is zero in the others, but zero times NaN is NaN.
  TWN_BLOCK void add_selected(Accumulator<T::kRegisters>& acc, const LowRank& low, uint64_t s, uint64_t b, int row) {
    constexpr int kHalfChunks = T::kHalf / kSlot;
    TWN_UNROLLED
    for (int chunk = 0; chunk < T::kSlots; ++chunk) {
      const int half = chunk / kHalfChunks;
      if (half < low.first_half || half >= low.first_half + low.halves) continue;
      Accumulator<kSlotRegisters> term;
      term.clear();
      multiply_steps<kSlot>(term, low.steps, s, moved(b, chunk * kSlot, 0));
      ops.lanes([&](int lane) {
        const bool upper = route_of(row + fragment_row(lane, 0)) >> low.adapter & 1;
        const bool lower = route_of(row + fragment_row(lane, 2)) >> low.adapter & 1;
        TWN_UNROLLED
        for (int j = 0; j < kSlotRegisters; ++j) {
          float& sum = acc.at(lane, chunk * kSlotRegisters + j);
          sum += (j / 2 % 2 ? lower : upper) ? term.at(lane, j) : 0.0f;
        }
      });
    }
  }

  TWN_BLOCK static const uint16_t* from(const void* data, int64_t offset) {
    return data == nullptr ? nullptr : static_cast<const uint16_t*>(data) + offset;
  }

  TWN_BLOCK static float bias_at(const uint16_t* bias, int column, int columns) {
    return bias == nullptr || column >= columns ? 0.0f : Ops::widen(bias[column]);
  }

  TWN_BLOCK Strip y_strip(int projection, int row, int column) const {
    uint16_t* data = static_cast<uint16_t*>(p.y) + row * p.y_pitch + p.plan.y_column[projection] + column;
    return {data, p.y_pitch, p.plan.tokens - row, p.plan.out_features[projection] - column, p.y_in_pieces[projection]};
  }

  TWN_BLOCK void store_plain(Accumulator<T::kRegisters>& acc, const OutputTile& tile, int group, bool lost) {
    const int row = first_row(tile.m_tile, group);
    TWN_UNROLLED
    for (int chunk = 0; chunk < T::kSlots; ++chunk) {
      const Strip y = y_strip(tile.projection, row, tile.column + chunk * kSlot);
      if (y.columns <= 0) continue;
      const uint16_t* bias = from(p.bias[tile.projection], tile.column + chunk * kSlot);
      store(group, residual_strip(y, row, tile.column + chunk * kSlot), y, [&](int lane) {
        return [=, &acc](int j) {
          const float value =
              acc.at(lane, chunk * kSlotRegisters + j) + bias_at(bias, fragment_column(lane, j), y.columns);
          return lost ? Ops::nan() : value;
        };
      });
    }
  }

  // silu(gate) * up: the halves of the tile. Neither is rounded before.
  TWN_BLOCK void store_gated(Accumulator<T::kRegisters>& acc, const OutputTile& tile, int group, bool lost) {
    const int row = first_row(tile.m_tile, group);
    TWN_UNROLLED
    for (int chunk = 0; chunk < T::kHalf / kSlot; ++chunk) {
      const int column = tile.column + chunk * kSlot;
      const Strip y = y_strip(0, row, column);
      if (y.columns <= 0) continue;
      const uint16_t *gate_bias = from(p.bias[0], column), *up_bias = from(p.bias[1], column);
      store(group, Strip{nullptr, 0, 0, 0, false}, y, [&](int lane) {
        return [=, &acc](int j) {
          const int place = chunk * kSlotRegisters + j, in_strip = fragment_column(lane, j);
          const float gate = acc.at(lane, place) + bias_at(gate_bias, in_strip, y.columns);
          const float up = acc.at(lane, T::kRegisters / 2 + place) + bias_at(up_bias, in_strip, y.columns);
          return lost ? Ops::nan() : Ops::silu(gate) * up;
        };
      });
    }
  }

  TWN_BLOCK Strip residual_strip(const Strip& y, int row, int column) const {
    uint16_t* data = nullptr;  // only read
    if (p.residual != nullptr)
      data = static_cast<uint16_t*>(const_cast<void*>(p.residual)) + row * p.residual_pitch + column;
    return {data, p.residual_pitch, y.rows, y.columns, p.residual_in_pieces};
  }

  // Writes values(lane)(register) of 64 rows by 64 columns, plus `added` where it is there. A warp turns its own 16
  // rows into pieces of 16 bytes in its staging; pieces lie where neither the fragments' words nor the pieces meet on a
  // bank.
  template <typename Values>
  TWN_BLOCK void store(int group, const Strip& added, const Strip& target, const Values& values) {
    const auto staging = [&](int lane) { return T::staging(group * kWarpgroupWarps + lane / kWarpLanes); };
    constexpr int kRowPieces = kRowBytes / kPieceBytes, kTurns = kWarpRows * kRowPieces / kWarpLanes;
    if (added.data != nullptr) {
      ops.lanes([&](int lane) {
        TWN_UNROLLED
        for (int turn = 0; turn < kTurns; ++turn) {
          const int row = (turn * kWarpLanes + lane % kWarpLanes) / kRowPieces, piece = lane % kRowPieces;
          stage_piece(added, lane / kWarpLanes * kWarpRows + row, piece, staging(lane) + staged_piece(row, piece));
        }
      });
      ops.sync_warps();
    }
    ops.lanes([&](int lane) {
      const auto value = values(lane);
      TWN_UNROLLED
      for (int j = 0; j < kSlotRegisters; j += 2) {
        const int row = fragment_row(lane, j) % kWarpRows, column = fragment_column(lane, j);
        const uint32_t place =
            staging(lane) + staged_piece(row, column / kPieceElements) + column % kPieceElements * kElementBytes;
        float left = value(j), right = value(j + 1);
        if (added.data != nullptr) {
          const uint32_t pair = ops.load_word(place);
          left += Ops::widen(static_cast<uint16_t>(pair & 0xffff));
          right += Ops::widen(static_cast<uint16_t>(pair >> 16));
        }
        ops.store_word(place, Ops::pack(left, right));
      }
    });
    ops.sync_warps();
    ops.lanes([&](int lane) {
      TWN_UNROLLED
      for (int turn = 0; turn < kTurns; ++turn) {
        const int row = (turn * kWarpLanes + lane % kWarpLanes) / kRowPieces, piece = lane % kRowPieces;
        write_piece(target, lane / kWarpLanes * kWarpRows + row, piece, staging(lane) + staged_piece(row, piece));
      }
    });
    ops.sync_warps();
  }

  // A piece of a strip to its place in the staging, zeros for what the strip does not have.
  TWN_BLOCK void stage_piece(const Strip& strip, int row, int piece, uint32_t place) {
    const int columns = row < strip.rows ? strip.columns - piece * kPieceElements : 0;
    const uint16_t* data = strip.data + row * strip.pitch + piece * kPieceElements;
    if (strip.in_pieces && columns >= kPieceElements) {
      ops.store_piece(place, *reinterpret_cast<const Piece*>(data));
    } else {
      TWN_ROLLED
      for (int i = 0; i < kPieceElements; i += 2) {
        const uint32_t left = i < columns ? data[i] : 0, right = i + 1 < columns ? data[i + 1] : 0;
        ops.store_word(place + i * kElementBytes, left | right << 16);
      }
    }
  }

  TWN_BLOCK void write_piece(const Strip& strip, int row, int piece, uint32_t place) {
    const int columns = row < strip.rows ? strip.columns - piece * kPieceElements : 0;
    uint16_t* data = strip.data + row * strip.pitch + piece * kPieceElements;
    if (strip.in_pieces && columns >= kPieceElements) {
      *reinterpret_cast<Piece*>(data) = ops.load_piece(place);
    } else {
      TWN_ROLLED
      for (int i = 0; i < smaller(columns, kPieceElements); ++i) {
        data[i] = static_cast<uint16_t>(ops.load_word(place + i / 2 * 4) >> i % 2 * 16);
      }
    }
  }
};

}  // namespace twn::prefill
