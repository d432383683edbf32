// What plan.h and layout.h of prefill promise, by brute force.
#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "check.h"
#include "twn/prefill/params.h"

using namespace twn;
using namespace twn::prefill;

namespace {

std::mt19937 draw;
int below(int n) { return static_cast<int>(draw() % n); }

Group random_group() {
  Group group;
  group.count = 1 + below(kMaxProjections);
  group.swiglu = group.count == 2 && below(2);
  group.tokens = 1 + below(below(4) ? 700 : 5000);
  group.in_features = 8 * (1 + below(60));
  int out = 1 + below(900);
  for (int i = 0; i < group.count; ++i) {
    Projection& projection = group.projections[i];
    projection.out_features = group.swiglu ? out : 1 + below(900);
    for (Adapter& adapter : projection.adapters) {
      if (below(4) == 0) continue;
      adapter.rank = 1 + below(kMaxRank);
      adapter.b_pitch = adapter.rank + below(3);
      adapter.b = reinterpret_cast<void*>(uintptr_t{16});
    }
  }
  group.present = below(4);
  return group;
}

// Every 128-row, 64-feature part of S of a present adapter is made by one shrink tile, and its tag is what readers ask
// for.
void check_shrinks(const Group& group, const Plan& plan) {
  std::map<std::tuple<int, int, int, int>, int> tags;  // tile row, projection, adapter, first rank
  std::set<int> seen_tags;
  for (uint32_t ticket = 0; ticket < plan.shrink_tasks; ++ticket) {
    const ShrinkTile tile = shrink_tile(plan, ticket);
    CHECK_THAT(tile.slots >= 1 && tile.slots <= plan.tile_slots(), "%d slots", tile.slots);
    CHECK_THAT(seen_tags.insert(tile.tag).second && tile.tag + kConsumers <= plan.tags(), "tag %d", tile.tag);
    for (int slot = tile.first_slot; slot < tile.first_slot + tile.slots; ++slot) {
      const SlotPlace place = slot_place(plan, tile.adapter, slot);
      CHECK_THAT((slot + 1) * kSlot <= plan.s_pitch(), "slot %d", slot);
      const auto key = std::make_tuple(tile.m_tile, place.projection, tile.adapter, place.first_rank);
      CHECK_THAT(tags.emplace(key, tile.tag).second, "a part is made twice");
      CHECK_THAT(tag_of(plan, tile.m_tile, tile.adapter, slot) == tile.tag, "a reader would wait for another tag");
    }
  }
  size_t expected = 0;
  std::set<int> columns;
  for (int i = 0; i < group.count; ++i) {
    for (int a = 0; a < kAdapters; ++a) {
      if (!(group.present >> a & 1)) continue;
      const int rank = group.projections[i].adapters[a].rank;
      for (int first = 0; first < rank; first += kSlot) {
        CHECK_THAT(columns.insert(plan.first_slot[i][a] + first / kSlot).second, "two parts share columns of S");
        for (int row = 0; row < plan.m_tiles; ++row, ++expected) {
          CHECK_THAT(tags.count(std::make_tuple(row, i, a, first)) == 1, "nobody makes a part");
        }
      }
    }
  }
  CHECK_THAT(expected == tags.size(), "%zu parts, %zu made", expected, tags.size());
}

// Every element of y belongs to one tile; each tile has the right rows of the right weights.
void check_outputs(const Group& group, const Plan& plan) {
  std::set<std::tuple<int, int, int>> tiles;  // tile row, projection, column
  for (uint32_t ticket = plan.shrink_tasks; ticket < plan.tasks(); ++ticket) {
    const OutputTile tile = output_tile(plan, ticket);
    CHECK_THAT(tile.m_tile >= 0 && tile.m_tile < plan.m_tiles, "tile row %d", tile.m_tile);
    CHECK_THAT(tiles.insert({tile.m_tile, tile.projection, tile.column}).second, "a tile is done twice");
    for (int half = 0; half < 2; ++half) {
      const int projection = half_projection(plan, tile, half), row = half_row(plan, tile, half);
      CHECK_THAT(projection == (plan.swiglu ? half : tile.projection), "projection of a half");
      CHECK_THAT(row == tile.column + (plan.swiglu ? 0 : half * plan.half()), "row of a half");
    }
  }
  size_t expected = 0;
  const int columns = plan.swiglu ? plan.half() : plan.block_n;
  for (int i = 0; i < (plan.swiglu ? 1 : group.count); ++i) {
    for (int column = 0; column < group.projections[i].out_features; column += columns) {
      for (int row = 0; row < plan.m_tiles; ++row, ++expected) {
        CHECK_THAT(tiles.count({row, i, column}) == 1, "nobody does tile row %d column %d of %d", row, column, i);
      }
    }
  }
  CHECK_THAT(expected == tiles.size(), "%zu tiles", tiles.size());
}

// Users of a tile, and its k-iterations behind the base range, against a walk over the rows.
void check_ranges(const Group& group, const Plan& plan) {
  std::vector<int8_t> routes(group.tokens);
  const int pattern = below(4);
  for (int row = 0; row < group.tokens; ++row) {
    routes[row] = static_cast<int8_t>(pattern == 0   ? below(4)
                                      : pattern == 1 ? 1 + row % 2
                                      : pattern == 2 ? row / 200 % 4
                                                     : 2 * below(2));
  }
  const bool routed = below(4) != 0;
  for (int m_tile = 0; m_tile < plan.m_tiles; ++m_tile) {
    int any = 0, all = group.present;
    for (int row = m_tile * kBlockM; row < std::min(group.tokens, (m_tile + 1) * kBlockM); ++row) {
      const int route = routed ? routes[row] & group.present : group.present;
      any |= route;
      all &= route;
    }
    // As 32 lanes reduce it.
    Users users{0, ~0};
    for (int lane = 0; lane < 32; ++lane) {
      const Users part = users_of(plan, routed ? routes.data() : nullptr, group.present, m_tile, lane, 32,
                                  [](Users own) { return own; });
      users = {users.any | part.any, users.all & part.all};
    }
    CHECK_THAT(users.any == any && users.all == all, "users %d %d, expected %d %d", users.any, users.all, any, all);
    const uint32_t ticket = plan.shrink_tasks + below(plan.output_tasks);
    OutputTile tile = output_tile(plan, ticket);
    tile.m_tile = m_tile;
    std::set<std::tuple<int, int, int>> found;
    visit_low_rank(plan, tile, users, [&](const LowRank& low) {
      CHECK_THAT(any >> low.adapter & 1, "an adapter that no row uses");
      CHECK_THAT(found.insert({low.projection, low.adapter, low.first_rank}).second, "an iteration twice");
      const int rank = group.projections[low.projection].adapters[low.adapter].rank;
      const int left = std::min(rank - low.first_rank, kSlot);
      CHECK_THAT(left > 0 && low.steps * kStepK >= left && (low.steps - 1) * kStepK < left, "%d steps", low.steps);
      CHECK_THAT(low.uniform == (all >> low.adapter & 1), "uniform");
      CHECK_THAT(low.s_column == (plan.first_slot[low.projection][low.adapter] + low.first_rank / kSlot) * kSlot,
                 "column");
      CHECK_THAT(low.halves == (plan.swiglu ? 1 : 2) && low.first_half == (plan.swiglu ? low.projection : 0), "halves");
      CHECK_THAT(plan.swiglu || low.projection == tile.projection, "another projection");
    });
    size_t expected = 0;
    for (int i = 0; i < group.count; ++i) {
      if (!plan.swiglu && i != tile.projection) continue;
      for (int a = 0; a < kAdapters; ++a) {
        if (any >> a & 1) expected += ceil_div(group.projections[i].adapters[a].rank, kSlot);
      }
    }
    CHECK_THAT(found.size() == expected, "%zu iterations, expected %zu", found.size(), expected);
  }
}

void check_workspace(const Group& group, const Plan& plan) {
  const WorkspaceLayout layout = workspace_layout(group, plan);
  std::vector<std::pair<int64_t, int64_t>> parts{{0, plan.tokens * plan.s_pitch() * kElementBytes}};
  Copy copies[kMaxProjections * kAdapters];
  int count = list_copies(group, plan, nullptr, copies);
  for (int i = 0; i < group.count; ++i) {
    for (int a = 0; a < kAdapters; ++a) {
      const Adapter& adapter = group.projections[i].adapters[a];
      const bool copied = (group.present >> a & 1) && adapter.rank > 0 && adapter.b_pitch % 8 != 0;
      CHECK_THAT((layout.b_offset[i][a] >= 0) == copied, "a copy");
      if (!copied) continue;
      const int64_t pitch = (adapter.rank + 7) / 8 * 8;
      parts.push_back({layout.b_offset[i][a], layout.b_offset[i][a] + 2 * pitch * group.projections[i].out_features});
      --count;
    }
  }
  CHECK_THAT(count == 0, "copies");
  for (size_t i = 1; i < parts.size(); ++i)
    CHECK_THAT(parts[i].first >= parts[i - 1].second && parts[i].first % 256 == 0, "parts meet");
  CHECK_THAT(layout.bytes >= parts.back().second, "the workspace is too small");
  const PrefillSizes sizes = prefill_sizes(group);
  CHECK_THAT(sizes.workspace_bytes >= layout.bytes && sizes.sync_words >= kFirstFreeWord + plan.tags(), "sizes");
}

// Conflicts of 32 lanes on 32 banks of 4 bytes, in phases of `lanes` lanes that read `words` words each.
template <typename Address>
void check_banks(const char* what, int words, Address address) {
  const int lanes = 32 / words;
  for (int first = 0; first < 32; first += lanes) {
    std::set<uint32_t> banks;
    for (int lane = first; lane < first + lanes; ++lane) {
      for (int word = 0; word < words; ++word) {
        CHECK_THAT(banks.insert((address(lane) / 4 + word) % 32).second, "%s: lane %d meets a bank twice", what, lane);
      }
    }
  }
}

void check_staging() {
  std::set<uint32_t> places;
  for (int row = 0; row < kWarpRows; ++row) {
    for (int piece = 0; piece < 8; ++piece) places.insert(staged_piece(row, piece));
  }
  CHECK_THAT(places.size() == 128 && *places.rbegin() == 2048 - 16, "pieces overlap or leave the staging");
  for (int j = 0; j < kSlotRegisters; j += 2) {
    check_banks("fragments", 1, [&](int lane) {
      const int column = fragment_column(lane, j);
      return staged_piece(fragment_row(lane, j) % kWarpRows, column / 8) + column % 8 * 2;
    });
  }
  for (int turn = 0; turn < 4; ++turn) {
    check_banks("pieces", 4, [&](int lane) { return staged_piece(turn * 4 + lane / 8, lane % 8); });
  }
}

void check_fragments() {
  for (int columns : {64, 128, 192, 256}) {
    std::vector<int> count(64 * columns, 0);
    for (int lane = 0; lane < kWarpgroupLanes; ++lane) {
      for (int j = 0; j < columns / 2; ++j) {
        CHECK_THAT(fragment_row(lane, j) / kWarpRows == lane / kWarpLanes, "a warp holds its own rows");
        CHECK_THAT(fragment_row(lane, j) == fragment_row(lane, j / 2 % 2 * 2), "two rows a lane");
        CHECK_THAT(j % 2 == 0 || fragment_column(lane, j) == fragment_column(lane, j - 1) + 1,
                   "registers come in pairs");
        ++count[fragment_row(lane, j) * columns + fragment_column(lane, j)];
      }
    }
    CHECK_THAT(std::count(count.begin(), count.end(), 1) == 64 * columns, "the fragment does not cover the tile once");
  }
}

void check_descriptors() {
  for (uint32_t address = 0; address < kSharedLimit; address += kAtomBytes) {
    const uint64_t made = operand_descriptor(address);
    CHECK_THAT((made & 0x3fff) == address >> 4 && (made >> 14 & 3) == 0, "address");
    CHECK_THAT((made >> 16 & 0x3fff) == 1 && (made >> 32 & 0x3fff) == 1024 >> 4 && made >> 62 == 1,
               "offsets and swizzle");
    CHECK_THAT((made >> 46 & 0xffff) == 0, "reserved bits and base offset");
    for (int rows = 0; rows < kWideN && address + rows * 128 < kSharedLimit; rows += 64) {
      for (int step = 0; step < 4; ++step) {
        const uint64_t further = moved(made, rows, step);
        CHECK_THAT((further & 0x3fff) << 4 == address + rows * 128 + step * 32 && further >> 14 == made >> 14, "moved");
      }
    }
  }
}

template <typename T>
void check_shared_memory() {
  std::vector<std::pair<uint32_t, uint32_t>> parts;
  for (int stage = 0; stage < T::kStages; ++stage) {
    parts.push_back({T::input(stage), kBlockM * 128});
    parts.push_back({T::weights(stage), T::kBlockN * 128});
    CHECK_THAT(T::input(stage) % 1024 == 0 && (T::weights(stage) + T::kHalfBytes) % 1024 == 0,
               "swizzled from its start");
  }
  for (int warp = 0; warp < kConsumers * kWarpgroupWarps; ++warp) parts.push_back({T::staging(warp), kWarpRows * 128});
  for (int stage = 0; stage < T::kStages; ++stage) parts.push_back({T::full(stage), 8});
  for (int stage = 0; stage < T::kStages; ++stage) parts.push_back({T::empty(stage), 8});
  for (int place = 0; place < kRing; ++place) parts.push_back({T::told(place), 8});
  for (int place = 0; place < kRing; ++place) parts.push_back({T::heard(place), 8});
  parts.push_back({T::hungry(), 8});
  for (int place = 0; place < kRing; ++place) parts.push_back({T::entry(place), 16});
  uint32_t end = 0;
  for (const auto& [start, bytes] : parts) {
    CHECK_THAT(start >= end && start % 8 == 0, "parts of shared memory meet at %u", start);
    end = start + bytes;
  }
  CHECK_THAT(end <= T::kBytes && T::kBytes + 1024 <= 227 * 1024, "%u bytes", T::kBytes);
  CHECK_THAT(T::kStageBytes == T::kInputBytes + 2 * T::kHalfBytes && T::kSlots * T::kSlotBytes == 2 * T::kHalfBytes,
             "bytes that are expected");
}

}  // namespace

int main() {
  int plans = 0;
  for (int round = 0; round < 400; ++round) {
    const Group group = random_group();
    CHECK_THAT(fits(group), "fits");
    for (int block_n : {kWideN, kNarrowN}) {
      const Plan plan = make_plan(group, block_n);
      check_shrinks(group, plan);
      check_outputs(group, plan);
      check_ranges(group, plan);
      check_workspace(group, plan);
      ++plans;
    }
  }
  check_staging();
  check_fragments();
  check_descriptors();
  check_shared_memory<WideTile>();
  check_shared_memory<NarrowTile>();
  std::printf("%d plans\n", plans);
}
