// Proofs by exhaustion over many shapes: the decode plan covers everything once, the layouts collide nowhere.
#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "host_memory.h"
#include "twn/decode/forms.h"
#include "twn/flags.h"

using namespace twn;

namespace {

Group group_of(std::mt19937& random, int tokens) {
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  Group group;
  group.tokens = tokens;
  group.in_features = 8 * draw(1, 200);
  group.count = draw(1, 3);
  group.front = static_cast<Front>(draw(0, 2));
  group.present = draw(0, 3);
  for (int i = 0; i < group.count; ++i) {
    group.projections[i].out_features = draw(1, 700);
    for (Adapter& adapter : group.projections[i].adapters) adapter.rank = draw(0, 2) == 0 ? 0 : draw(1, kMaxRank);
  }
  if (group.count == 2 && draw(0, 1)) {
    group.swiglu = true;
    group.projections[1].out_features = group.projections[0].out_features;
  }
  return group;
}

void check_units(const DecodePlan& plan) {
  std::vector<int> owner(plan.units(), -1);
  int least = plan.units(), most = 0;
  for (int block = 0; block < plan.blocks; ++block) {
    const UnitRange range = plan.units_of(block);
    least = std::min(least, range.end - range.begin);
    most = std::max(most, range.end - range.begin);
    for (int unit = range.begin; unit < range.end; ++unit) {
      CHECK_THAT(owner[unit] == -1, "unit %d of %d and %d", unit, owner[unit], block);
      owner[unit] = block;
      CHECK_THAT(plan.unit_shares.part_of(unit) == block, "%d", plan.unit_shares.part_of(unit));
    }
    UnitCursor cursor(plan, range);
    for (int unit = range.begin; unit < range.end; ++unit, cursor.advance(plan)) {
      CHECK_THAT(cursor.tile == unit / plan.unit_steps && cursor.step == unit % plan.unit_steps && cursor.left == range.end - unit, "cursor");
    }
  }
  CHECK_THAT(std::count(owner.begin(), owner.end(), -1) == 0 && least >= 1 && most - least <= 1, "shares %d to %d", least, most);
  std::set<std::pair<int, int>> slots;
  for (int tile = 0; tile < plan.tiles; ++tile) {
    std::set<int> owners(owner.begin() + tile * plan.unit_steps, owner.begin() + (tile + 1) * plan.unit_steps);
    const TileParts parts = plan.parts_of(tile);
    CHECK_THAT(parts.count == static_cast<int>(owners.size()) && parts.first == *owners.begin(), "%d from %d", parts.count, parts.first);
    for (int block : owners) {
      const int slot = plan.partial_slot(block, tile);
      CHECK_THAT(slot / 2 == block, "%d", slot);
      if (parts.count > 1) CHECK_THAT(slots.insert({slot, 0}).second, "slot %d twice", slot);
    }
  }
}

void check_outputs(const DecodePlan& plan) {
  const Group& group = plan.group;
  std::vector<std::vector<int>> written(group.count);
  int64_t columns = 0;
  for (int i = 0; i < group.count; ++i) {
    written[i].assign(group.projections[i].out_features, 0);
    columns += group.projections[i].out_features;
  }
  if (group.swiglu) columns = group.projections[0].out_features;
  std::vector<int> stored(columns, 0);
  for (int tile = 0; tile < plan.tiles; ++tile) {
    const TilePlace place = plan.place_of(tile);
    for (int row = 0; row < plan.shape.rows; ++row) {
      const TilePlace at = plan.row_of(place, row);
      CHECK_THAT(at.projection < group.count && plan.row_of(place, row / 16 * 16).projection == at.projection, "a product of two projections");
      if (at.first_row < group.projections[at.projection].out_features) ++written[at.projection][at.first_row];
    }
    for (int row = 0; row < plan.half_rows(); ++row) {
      if (place.first_row + row < group.projections[place.projection].out_features) ++stored[plan.output_column(place) + row];
    }
  }
  for (const auto& rows : written) CHECK_THAT(std::all_of(rows.begin(), rows.end(), [](int n) { return n == 1; }), "a weight row");
  CHECK_THAT(std::all_of(stored.begin(), stored.end(), [](int n) { return n == 1; }), "a column of y");
}

void check_shrink(const DecodePlan& plan) {
  const int chunks = ceil_div(plan.group.in_features, kChunkFeatures);
  std::vector<std::vector<int>> covered(plan.rank_tiles, std::vector<int>(chunks, 0));
  for (int task = 0; task < plan.rank_tiles * plan.slices; ++task) {
    const ShrinkTask at = plan.shrink_task(task);
    for (int chunk = at.chunk_begin; chunk < at.chunk_end; ++chunk) ++covered[at.tile][chunk];
  }
  for (const auto& tile : covered) CHECK_THAT(std::all_of(tile.begin(), tile.end(), [](int n) { return n == 1; }), "a chunk");
  std::vector<int> columns(plan.s_pitch, 0);
  int found = 0;
  for (int i = 0; i < plan.group.count; ++i) {
    for (int a = 0; a < kAdapters; ++a) {
      const int rank = plan.group.present >> a & 1 ? plan.group.projections[i].adapters[a].rank : 0;
      CHECK_THAT((plan.rank_tile_end(i, a) - plan.rank_tile_begin(i, a)) == ceil_div(rank, kRankTile), "tiles of rank %d", rank);
      for (int tile = plan.rank_tile_begin(i, a); tile < plan.rank_tile_end(i, a); ++tile, ++found) {
        const RankTile at = plan.rank_tile(tile);
        CHECK_THAT(at.projection == i && at.adapter == a && at.first_rank < rank, "tile %d", tile);
        for (int column = at.column; column < at.column + kRankTile; ++column) ++columns.at(column);
      }
    }
  }
  CHECK_THAT(found == plan.rank_tiles && found <= kMaxRankTiles, "%d of %d", found, plan.rank_tiles);
  CHECK_THAT(std::all_of(columns.begin(), columns.end(), [](int n) { return n == 1; }), "a column of S");
}

void check_memory(const DecodePlan& plan) {
  const int64_t shrink = plan.slices > 1 ? 4 * plan.rank_tiles * plan.slices * plan.shrink_elements() : 0;
  const std::vector<std::pair<int64_t, int64_t>> parts = {
      {plan.z_offset, plan.front_tasks() ? int64_t{2} * plan.group.tokens * plan.group.in_features : 0},
      {plan.s_offset, int64_t{2} * plan.group.tokens * plan.s_pitch},
      {plan.shrink_offset, shrink},
      {plan.partial_offset, 4 * 2 * plan.blocks * plan.partial_elements()}};
  int64_t end = 0;
  for (const auto& [offset, bytes] : parts) {
    CHECK_THAT(offset >= end && offset % 256 == 0, "parts meet");
    end = offset + bytes;
  }
  CHECK_THAT(end <= plan.bytes && plan.bytes - end < 256, "%ld of %ld", static_cast<long>(end), static_cast<long>(plan.bytes));
  CHECK_THAT(plan.sync_words == kFirstFreeWord + kTileArrivals + plan.tiles, "%d words", plan.sync_words);
  CHECK_THAT(kRowTags + kDecodeMaxTokens <= kShrinkTags && kShrinkTags + kMaxRankTiles <= kShrinkArrivals &&
                 kShrinkArrivals + kMaxRankTiles <= kTileArrivals, "slots meet");
}

// Every lane's 16 bytes of a phase of eight lanes must lie on banks of their own.
template <typename Offset>
void check_phases(const char* what, Offset&& offset) {
  for (int phase = 0; phase < 4; ++phase) {
    std::set<int> banks;
    for (int lane = 8 * phase; lane < 8 * phase + 8; ++lane) {
      CHECK_THAT(offset(lane) % 16 == 0, "%s is not aligned", what);
      for (int word = 0; word < 4; ++word) banks.insert((offset(lane) / 4 + word) % 32);
    }
    CHECK_THAT(banks.size() == 32, "%s: %zu banks", what, banks.size());
  }
}

// Each row is one thread's, and no warp has more than its share.
void check_copies(int rows) {
  std::vector<int> owners(rows, 0), shares(kWarps, 0);
  for (int thread = 0; thread < kDecodeThreads; ++thread) {
    if (copied_row(thread) >= rows) continue;
    ++owners.at(copied_row(thread));
    ++shares[thread / 32];
  }
  CHECK_THAT(std::all_of(owners.begin(), owners.end(), [](int n) { return n == 1; }), "a row of %d", rows);
  CHECK_THAT(*std::max_element(shares.begin(), shares.end()) == ceil_div(rows, kWarps), "shares of %d rows", rows);
}

template <typename Layout>
void check_layout(int shared_bytes) {
  for (int row = 0; row < Layout::kRows; row += 8) {
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      check_phases("weights", [&](int lane) {
        return Layout::weight_offset(row + fragment_row(lane), chunk * kChunkFeatures + fragment_feature(lane));
      });
    }
  }
  for (int token = 0; token < Layout::kTokens; token += 8) {
    check_phases("z", [&](int lane) { return Layout::input_offset(token + fragment_row(lane), fragment_feature(lane)); });
  }
  std::set<int> bytes;  // of a stage: no two vectors share one
  for (int row = 0; row < Layout::kRows + Layout::kTokens; ++row) {
    for (int feature = 0; feature < Layout::kFeatures; feature += kVectorFeatures) {
      const int offset = row < Layout::kRows ? Layout::weight_offset(row, feature) : Layout::input_offset(row - Layout::kRows, feature);
      CHECK_THAT(bytes.insert(offset).second && offset + 16 <= Layout::kStageBytes, "vector at %d", offset);
    }
  }
  constexpr int kQuads = Layout::kRowTiles * Layout::kTokenTiles;
  std::set<int> floats;
  for (int quad = 0; quad < kQuads; ++quad) {
    for (int thread = 0; thread < kRowGroups * 32; ++thread) {
      CHECK_THAT(floats.insert(Layout::handed_over(thread, quad)).second, "handed over twice");
    }
    for (int warp = 0; warp < kRowGroups; ++warp) {
      check_phases("sums", [&](int lane) { return 4 * Layout::handed_over(warp * 32 + lane, quad); });
    }
  }
  CHECK_THAT(4 * (*floats.rbegin() + 4) <= Layout::kScratchBytes, "scratch");
  for (int i = 0; i < 4; ++i) {  // a register of all lanes goes to 32 banks
    std::set<int> banks;
    for (int lane = 0; lane < 32; ++lane) banks.insert(Layout::out_index(accumulator_token(lane, i), accumulator_row(lane, i)) % 32);
    CHECK_THAT(banks.size() == 32, "output tile: %zu banks", banks.size());
  }
  CHECK_THAT(4 * (Layout::out_index(Layout::kTokens - 1, Layout::kRows - 1) + 1) <= Layout::kScratchBytes, "output tile");
  CHECK_THAT(4 * (shrink_index<Layout::kTokens>(kWarps / 2 - 1, kRankTile - 1, Layout::kTokens - 1) + 1) <= Layout::kScratchBytes, "shrink");
  for (int tokens = 1; tokens <= Layout::kTokens; ++tokens) check_copies(tokens);
  check_copies(Layout::kRows);
  const int stages = FormOf<Layout>::stages(shared_bytes);
  CHECK_THAT(stages >= kFewestStages && Layout::shared_bytes(stages) <= shared_bytes, "%d stages", stages);
}

// Each element of a 16 x 8 product is one lane's, and the operands' order of features is one and the same permutation.
void check_fragments() {
  std::set<std::pair<int, int>> places;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) places.insert({accumulator_row(lane, i), accumulator_token(lane, i)});
  }
  CHECK_THAT(places.size() == 16 * 8, "%zu places", places.size());
  std::mt19937 random(1);
  std::uniform_int_distribution<int> small(-8, 8);
  float left[16][kChunkFeatures], right[8][kChunkFeatures];
  for (auto& row : left) for (float& value : row) value = static_cast<float>(small(random));
  for (auto& row : right) for (float& value : row) value = static_cast<float>(small(random));
  using Number = twn_host::BFloat16;
  float acc[32][4] = {};
  for (int step = 0; step < 2; ++step) {
    twn_host::Fragments in;
    for (int lane = 0; lane < 32; ++lane) {
      const auto pair = [&](const float* row, int word) {
        const float* at = row + fragment_feature(lane) + 2 * (2 * step + word);
        return Number::narrow(at[0]) | static_cast<uint32_t>(Number::narrow(at[1])) << 16;
      };
      for (int r = 0; r < 4; ++r) in.a[lane][r] = pair(left[fragment_row(lane) + 8 * (r % 2)], r / 2);
      for (int r = 0; r < 2; ++r) in.b[lane][r] = pair(right[fragment_row(lane)], r);
    }
    twn_host::multiply<Number>(acc, in);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      float expected = 0;
      for (int k = 0; k < kChunkFeatures; ++k) expected += left[accumulator_row(lane, i)][k] * right[accumulator_token(lane, i)][k];
      CHECK_THAT(acc[lane][i] == expected, "%g, not %g", acc[lane][i], expected);
    }
  }
}

}  // namespace

// What a block may have: the least of any card from sm_80 on (8.6, 8.9, 12.0), and that of sm_90.
constexpr int kSmallest = 99 * 1024, kHopper = 227 * 1024;

int main() {
  std::mt19937 random(7);
  int plans = 0;
  for (int round = 0; round < 400; ++round) {
    for (const int tokens : {1, 8, 9, 16, 17, 32, 33, 64}) {
      const Group group = group_of(random, tokens);
      const int processors = std::uniform_int_distribution<int>(1, 150)(random);
      const auto check = [&](auto form) {
        const DecodePlan plan = decode_plan(group, form.shape(), processors);
        CHECK_THAT(plan.shape.tokens >= tokens && plan.blocks <= processors, "form");
        check_units(plan);
        check_outputs(plan);
        check_shrink(plan);
        check_memory(plan);
        ++plans;
      };
      with_form<DecodeForms80>(tokens, kSmallest, check);
      with_form<DecodeForms90>(tokens, kHopper, check);
      with_form<DecodeForms90>(tokens, kSmallest, check);
    }
  }
  std::set<std::string> layouts;
  for (const int tokens : {8, 16, 32, 64}) {
    for (const int bytes : {kSmallest, kHopper}) {
      const auto check = [&](auto form) {
        using Layout = typename decltype(form)::Type;
        check_layout<Layout>(bytes);
        layouts.insert(std::to_string(Layout::kTokens) + " " + std::to_string(Layout::kRows) + " " + std::to_string(Layout::kFeatures));
      };
      with_form<DecodeForms80>(tokens, bytes, check);
      with_form<DecodeForms90>(tokens, bytes, check);
    }
  }
  check_fragments();
  std::printf("%d plans, %zu layouts\n", plans, layouts.size());
}
