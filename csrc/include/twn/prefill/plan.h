// What the blocks of one prefill launch do, and in which order: tiles, tickets, k-ranges. Plain data, the same on the
// host.
//
// The output is cut into tiles of 128 rows of x by BLOCK_N rows of weights, which are two halves: neighbours of one
// projection, or the same rows of gate and of up. S is cut into slots of 64 columns: 64 rows of one adapter's A. Up to
// BLOCK_N / 64 slots of one adapter, of any projections, make a shrink tile, so that a tile of x is read once for all
// of them. Tickets name the shrink tiles first, then the output tiles; who holds an output tile waits for earlier
// tickets only.
#pragma once

#include "twn/flags.h"
#include "twn/group.h"

namespace twn::prefill {

constexpr int kBlockM = 128;  // rows of x in a tile: 64 for each of the two warpgroups that multiply
constexpr int kBlockK = 64;   // 128 bytes, the width of the swizzle
constexpr int kSlot = 64;     // columns of S that belong together
constexpr int kStepK = 16;    // k of one instruction
constexpr int kConsumers = 2;
constexpr int kConsumerRows = kBlockM / kConsumers;
constexpr int kElementBytes = 2;
constexpr int kWideN = 256;
constexpr int kNarrowN = 128;
constexpr int kAlignBytes = 16;  // of addresses and pitches that bulk copies take
constexpr int kAlignElements = kAlignBytes / kElementBytes;

// Tile rows that share a strip of weight tiles. 132 blocks then touch about 16 x 8 wide tiles at once, which reads the
// fewest bytes from L2 and HBM. A lead: not measured.
constexpr int kRasterRows = 16;

// How much longer a narrow tile takes than half a wide one: it reads 4/3 of the bytes for each product. A lead: not
// measured.
constexpr int kNarrowPercent = 115;

struct Plan {
  int tokens, in_features, count;
  bool swiglu;
  int block_n;
  int m_tiles;
  int k_iterations;
  int n_tiles;                                 // of all projections
  int first_n_tile[kMaxProjections + 1];       // of each, and one past the last; gate and up share theirs
  int out_features[kMaxProjections];
  int64_t y_column[kMaxProjections];           // first column of a projection in y
  int rank[kMaxProjections][kAdapters];        // 0 where the adapter lacks or cannot occur
  int first_slot[kMaxProjections][kAdapters];
  int slots[kAdapters];                        // slots of the first adapter come before those of the second
  int shrink_tiles[kAdapters];                 // of one tile row
  uint32_t shrink_tasks, output_tasks;

  TWN_HD uint32_t tasks() const { return shrink_tasks + output_tasks; }
  TWN_HD int row_shrink_tiles() const { return shrink_tiles[0] + shrink_tiles[1]; }
  TWN_HD int tile_slots() const { return block_n / kSlot; }
  TWN_HD int half() const { return block_n / 2; }
  TWN_HD int64_t s_pitch() const { return static_cast<int64_t>(slots[0] + slots[1]) * kSlot; }
  TWN_HD int chunks(int projection, int adapter) const { return ceil_div(rank[projection][adapter], kSlot); }
  // Each warpgroup publishes its own rows of a shrink tile.
  TWN_HD int64_t tags() const { return static_cast<int64_t>(shrink_tasks) * kConsumers; }
};

struct ShrinkTile {
  int m_tile, adapter;
  int first_slot, slots;
  int tag;  // of the first warpgroup; the other's is the next
};

struct OutputTile {
  int m_tile, projection;  // with SwiGLU the first of two
  int column;              // of the projection
};

// Which adapters a row of the tile uses, and which every row of it uses: two bitmasks.
struct Users {
  int any, all;
};

// 64 rows of A: columns `first_rank` ... of the adapter's part of S.
struct SlotPlace {
  int projection, first_rank;
};

// One k-iteration behind the base range: 64 columns of S against as many of B.
struct LowRank {
  int projection, adapter;
  int first_rank;
  int steps;     // instructions of 16 columns; what is beyond the rank is zero
  int s_column;
  int tag;
  bool uniform;  // every row of the tile uses the adapter
  int first_half, halves;  // of the tile that it adds to
};

inline int n_tiles_of(const Group& group, int block_n) {
  if (group.swiglu) return ceil_div(group.projections[0].out_features, block_n / 2);
  int tiles = 0;
  for (int i = 0; i < group.count; ++i) tiles += ceil_div(group.projections[i].out_features, block_n);
  return tiles;
}

// Wide tiles read less, narrow ones fill the processors where there are few: whichever ends first.
inline int choose_block_n(const Group& group, int processors) {
  const int64_t rows = ceil_div(group.tokens, kBlockM);
  const int64_t wide = ceil_div<int64_t>(rows * n_tiles_of(group, kWideN), processors) * 2 * 100;
  const int64_t narrow = ceil_div<int64_t>(rows * n_tiles_of(group, kNarrowN), processors) * kNarrowPercent;
  return narrow < wide ? kNarrowN : kWideN;
}

inline Plan make_plan(const Group& group, int block_n) {
  Plan plan{};
  plan.tokens = group.tokens;
  plan.in_features = group.in_features;
  plan.count = group.count;
  plan.swiglu = group.swiglu;
  plan.block_n = block_n;
  plan.m_tiles = ceil_div(group.tokens, kBlockM);
  plan.k_iterations = ceil_div(group.in_features, kBlockK);
  plan.n_tiles = n_tiles_of(group, block_n);
  for (int i = 0; i < group.count; ++i) {
    plan.out_features[i] = group.projections[i].out_features;
    const int tiles = ceil_div(plan.out_features[i], block_n);
    plan.first_n_tile[i + 1] = group.swiglu ? plan.n_tiles : plan.first_n_tile[i] + tiles;
    if (i > 0 && !group.swiglu) plan.y_column[i] = plan.y_column[i - 1] + plan.out_features[i - 1];
  }
  for (int adapter = 0, slot = 0; adapter < kAdapters; ++adapter) {
    for (int i = 0; i < group.count; ++i) {
      const bool occurs = group.present >> adapter & 1;
      plan.rank[i][adapter] = occurs ? group.projections[i].adapters[adapter].rank : 0;
      plan.first_slot[i][adapter] = slot;
      slot += plan.chunks(i, adapter);
      plan.slots[adapter] += plan.chunks(i, adapter);
    }
    plan.shrink_tiles[adapter] = ceil_div(plan.slots[adapter], plan.tile_slots());
  }
  plan.shrink_tasks = static_cast<uint32_t>(plan.m_tiles) * plan.row_shrink_tiles();
  plan.output_tasks = static_cast<uint32_t>(plan.m_tiles) * plan.n_tiles;
  return plan;
}

// Tickets are 32 bits, and so are the tags' places; beyond that a launch is refused.
inline bool fits(const Group& group) {
  const int64_t rows = ceil_div(group.tokens, kBlockM);
  const int64_t slots = kMaxProjections * kAdapters * (kMaxRank / kSlot);
  return rows * (n_tiles_of(group, kNarrowN) + slots) * kConsumers < int64_t{1} << 30;
}

// Of a ticket below plan.shrink_tasks.
TWN_HD ShrinkTile shrink_tile(const Plan& plan, uint32_t ticket) {
  const int row_tiles = plan.row_shrink_tiles();
  const int m_tile = static_cast<int>(ticket) / row_tiles;
  const int tile = static_cast<int>(ticket) - m_tile * row_tiles;
  const int adapter = tile >= plan.shrink_tiles[0] ? 1 : 0;
  const int first = (adapter ? tile - plan.shrink_tiles[0] : tile) * plan.tile_slots();
  return {m_tile, adapter, (adapter ? plan.slots[0] : 0) + first,
          smaller(plan.tile_slots(), plan.slots[adapter] - first), static_cast<int>(ticket) * kConsumers};
}

// The tag of the first warpgroup for a slot of an adapter in a tile row: what shrink_tile says of its tile.
TWN_HD int tag_of(const Plan& plan, int m_tile, int adapter, int slot) {
  const int tile =
      adapter ? plan.shrink_tiles[0] + (slot - plan.slots[0]) / plan.tile_slots() : slot / plan.tile_slots();
  return (m_tile * plan.row_shrink_tiles() + tile) * kConsumers;
}

TWN_HD SlotPlace slot_place(const Plan& plan, int adapter, int slot) {
  int projection = 0;
  while (slot >= plan.first_slot[projection][adapter] + plan.chunks(projection, adapter)) ++projection;
  return {projection, (slot - plan.first_slot[projection][adapter]) * kSlot};
}

// Of a ticket from plan.shrink_tasks on: strips of kRasterRows tile rows, each strip one tile column after the other.
TWN_HD OutputTile output_tile(const Plan& plan, uint32_t ticket) {
  const uint32_t task = ticket - plan.shrink_tasks;
  const uint32_t strip_tasks = static_cast<uint32_t>(kRasterRows) * plan.n_tiles;
  const int strip = static_cast<int>(task / strip_tasks);
  const int height = smaller(kRasterRows, plan.m_tiles - strip * kRasterRows);
  const int place = static_cast<int>(task - strip * strip_tasks);
  const int n_tile = place / height;
  int projection = 0;
  if (!plan.swiglu) {
    while (n_tile >= plan.first_n_tile[projection + 1]) ++projection;
  }
  const int columns = plan.swiglu ? plan.half() : plan.block_n;
  return {strip * kRasterRows + place % height, projection, (n_tile - plan.first_n_tile[projection]) * columns};
}

// Which projection the half of an output tile belongs to, and its first row in that projection's weight.
TWN_HD int half_projection(const Plan& plan, const OutputTile& tile, int half) {
  return plan.swiglu ? half : tile.projection;
}

TWN_HD int half_row(const Plan& plan, const OutputTile& tile, int half) {
  return plan.swiglu ? tile.column : tile.column + half * plan.half();
}

// The adapters that rows of the tile use: all of those that are present, where there are no routes.
template <typename Reduce>
TWN_HD Users users_of(const Plan& plan, const int8_t* routes, int present, int m_tile, int lane, int lanes,
                      Reduce reduce) {
  Users users{0, present};
  if (routes == nullptr) {
    users.any = present;
  } else {
    const int first = m_tile * kBlockM;
    for (int row = lane; row < kBlockM && first + row < plan.tokens; row += lanes) {
      users.any |= routes[first + row] & present;
      users.all &= routes[first + row];
    }
    users = reduce(users);
  }
  return users;
}

// Calls visit(LowRank) for every k-iteration behind the base range of an output tile, in order: none where no row of
// the tile uses an adapter. Those who load and those who multiply both walk through here.
template <typename Visit>
TWN_HD void visit_low_rank(const Plan& plan, const OutputTile& tile, Users users, Visit visit) {
  for (int adapter = 0; adapter < kAdapters; ++adapter) {
    if (!(users.any >> adapter & 1)) continue;
    for (int part = 0; part < (plan.swiglu ? 2 : 1); ++part) {
      const int projection = plan.swiglu ? part : tile.projection;
      const int rank = plan.rank[projection][adapter];
      for (int first = 0; first < rank; first += kSlot) {
        const int slot = plan.first_slot[projection][adapter] + first / kSlot;
        visit(LowRank{projection, adapter, first, ceil_div(smaller(kSlot, rank - first), kStepK), slot * kSlot,
                      tag_of(plan, tile.m_tile, adapter, slot), (users.all >> adapter & 1) != 0, part,
                      plan.swiglu ? 1 : 2});
      }
    }
  }
}

// B is read by bulk copies, which want rows that begin at multiples of 16 bytes; others are copied to such rows first.
inline bool needs_copy(const Adapter& adapter) {
  return adapter.b_pitch % kAlignElements != 0 || reinterpret_cast<uintptr_t>(adapter.b) % kAlignBytes != 0;
}

// Of the workspace: S, then the copies of B.
struct WorkspaceLayout {
  int64_t b_offset[kMaxProjections][kAdapters];  // -1: read where it is
  int64_t bytes;
};

inline int64_t copied_pitch(int rank) { return round_up<int64_t>(rank, kAlignElements); }

inline WorkspaceLayout workspace_layout(const Group& group, const Plan& plan) {
  constexpr int64_t kAlign = 256;
  WorkspaceLayout layout{};
  layout.bytes = round_up(plan.tokens * plan.s_pitch() * kElementBytes, kAlign);
  for (int i = 0; i < plan.count; ++i) {
    for (int adapter = 0; adapter < kAdapters; ++adapter) {
      layout.b_offset[i][adapter] = -1;
      const int rank = plan.rank[i][adapter];
      if (rank == 0 || !needs_copy(group.projections[i].adapters[adapter])) continue;
      layout.b_offset[i][adapter] = layout.bytes;
      layout.bytes += round_up(plan.out_features[i] * copied_pitch(rank) * kElementBytes, kAlign);
    }
  }
  return layout;
}

}  // namespace twn::prefill

namespace twn {

struct PrefillSizes {
  int64_t workspace_bytes, sync_words;
};

// Enough for either width of tiles: narrow ones hold fewer slots, so they have no fewer tags.
inline PrefillSizes prefill_sizes(const Group& group) {
  const prefill::Plan plan = prefill::make_plan(group, prefill::kNarrowN);
  return {prefill::workspace_layout(group, plan).bytes, kFirstFreeWord + plan.tags()};
}

}  // namespace twn
