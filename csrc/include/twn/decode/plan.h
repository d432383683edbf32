// The decode kernel's plan: which block does what, and where it leaves it. A pure function of the problem and the GPU.
//
// The output is cut into tiles of weight rows, a tile into units of kUnitFeatures; every block takes an equal run of all
// units (stream-K). A tile whose units lie with several blocks is put together by whichever of them comes last, always in
// the order of the features. In front of that, by ticket: the rows of z = norm(x) or silu(gate) * up, then the tasks of the
// shrink S = scaling * select(z A^T), each a tile of kRankTile ranks over a slice of the features.
#pragma once

#include "twn/group.h"

namespace twn {

constexpr int kDecodeThreads = 256;
constexpr int kDecodeMaxTokens = 64;
constexpr int kChunkFeatures = 32;  // two tensor-core steps: what a lane reads 16 bytes of, from a row of either operand
constexpr int kRankTile = 16;       // rows of A that one shrink task multiplies
constexpr int kMinSliceChunks = 8;  // below it, a shrink task is not worth its ticket

// Which form of the kernel runs: token columns that a tile pads to, weight rows of a tile, features of a unit.
struct DecodeShape {
  int tokens, rows, features;
};

// A tile of the output: `rows` weight rows from `first_row` on of a projection. With SwiGLU half of them are gate's, half
// the same ones of up.
struct TilePlace {
  int projection;
  int first_row;
};

// Units are fewer than 2^31: each is 16 KiB of weights.
struct UnitRange {
  int begin, end;
};

// `total` things in `parts` runs of equal length, the first `longer` of them one longer; counted out once on the host,
// so that a block knows its own without a division.
struct Shares {
  int length, longer;

  TWN_HD int begin(int part) const { return part * length + smaller(part, longer); }
  TWN_HD int part_of(int index) const {
    const int in_longer = longer * (length + 1);
    return index < in_longer ? index / (length + 1) : longer + (index - in_longer) / length;
  }
};

TWN_HD constexpr Shares shares(int total, int parts) { return {total / parts, total % parts}; }

// Whose units make a tile: blocks first ... first + count - 1.
struct TileParts {
  int first, count;
};

struct ShrinkTask {
  int tile;         // of all rank tiles
  int slice;
  int chunk_begin;  // of the features, in kChunkFeatures
  int chunk_end;
};

// One tile of ranks of one adapter of one projection.
struct RankTile {
  int projection, adapter;
  int first_rank;
  int column;  // of S
};

// Slots of flags.h. Tags and arrivals keep to their own, whatever the shapes of the launches that share the words.
constexpr int kRowTags = 0;                                        // z rows
constexpr int kShrinkTags = kRowTags + kDecodeMaxTokens;           // rank tiles
constexpr int kMaxRankTiles = kMaxProjections * kAdapters * kMaxRank / kRankTile;
constexpr int kShrinkArrivals = kShrinkTags + kMaxRankTiles;       // rank tiles
constexpr int kTileArrivals = kShrinkArrivals + kMaxRankTiles;     // output tiles

struct DecodePlan {
  Group group;
  DecodeShape shape;
  int blocks;
  int unit_steps;       // units of a tile
  int tiles;
  int tile_starts[kMaxProjections + 1];  // first tile of each projection
  int rank_tiles;
  int rank_tile_starts[kMaxProjections * kAdapters + 1];  // first rank tile of each block (projection, adapter)
  Shares unit_shares;   // of the blocks
  int slices;           // of a rank tile's features
  Shares chunk_shares;  // of the slices
  int s_pitch;          // columns of S
  int64_t z_offset, s_offset, shrink_offset, partial_offset, bytes;  // of the workspace
  int sync_words;

  TWN_HD int units() const { return tiles * unit_steps; }
  TWN_HD int front_tasks() const { return group.front == Front::kPlain ? 0 : group.tokens; }
  TWN_HD int tasks() const { return front_tasks() + rank_tiles * slices; }
  TWN_HD int half_rows() const { return group.swiglu ? shape.rows / 2 : shape.rows; }  // rows of one projection in a tile

  TWN_HD UnitRange units_of(int block) const { return {unit_shares.begin(block), unit_shares.begin(block + 1)}; }

  TWN_HD TileParts parts_of(int tile) const {
    const int begin = tile * unit_steps, first = unit_shares.part_of(begin);
    return {first, unit_shares.part_of(begin + unit_steps - 1) - first + 1};
  }

  // A block has two places for sums that it could not finish: of the tile that it begins in, and of the one it ends in.
  TWN_HD int partial_slot(int block, int tile) const {
    return 2 * block + (unit_shares.begin(block) >= tile * unit_steps ? 0 : 1);
  }

  TWN_HD int64_t partial_elements() const { return static_cast<int64_t>(shape.rows) * shape.tokens; }

  TWN_HD TilePlace place_of(int tile) const {
    int projection = 0;
    if (!group.swiglu) {
      while (projection + 1 < group.count && tile >= tile_starts[projection + 1]) ++projection;
    }
    return {projection, (tile - tile_starts[projection]) * half_rows()};
  }

  // Which projection a row of a tile belongs to, and which of its rows it is (perhaps beyond its last).
  TWN_HD TilePlace row_of(TilePlace tile, int row) const {
    const bool second = group.swiglu && row >= half_rows();
    return {tile.projection + second, tile.first_row + (second ? row - half_rows() : row)};
  }

  // Rows of a tile that exist, and features of a unit that do: the others are neither read nor written.
  TWN_HD int rows_in(TilePlace tile) const {
    const int rows = smaller(half_rows(), group.projections[tile.projection].out_features - tile.first_row);
    return group.swiglu ? 2 * rows : rows;
  }
  TWN_HD int features_in(int step) const { return smaller(shape.features, group.in_features - step * shape.features); }

  // First column of y that a tile writes.
  TWN_HD int64_t output_column(TilePlace tile) const {
    int64_t column = tile.first_row;
    for (int i = 0; i < tile.projection; ++i) column += group.projections[i].out_features;
    return column;
  }

  TWN_HD ShrinkTask shrink_task(int task) const {
    const int tile = task / slices, slice = task % slices;
    return {tile, slice, chunk_shares.begin(slice), chunk_shares.begin(slice + 1)};
  }

  TWN_HD RankTile rank_tile(int tile) const {
    int block = 0;
    while (tile >= rank_tile_starts[block + 1]) ++block;
    return {block / kAdapters, block % kAdapters, (tile - rank_tile_starts[block]) * kRankTile, tile * kRankTile};
  }

  // Rank tiles of an adapter of a projection: begin and end.
  TWN_HD int rank_tile_begin(int projection, int adapter) const { return rank_tile_starts[projection * kAdapters + adapter]; }
  TWN_HD int rank_tile_end(int projection, int adapter) const { return rank_tile_starts[projection * kAdapters + adapter + 1]; }

  TWN_HD int64_t shrink_elements() const { return static_cast<int64_t>(kRankTile) * shape.tokens; }
};

// Walks the units of a block.
struct UnitCursor {
  int tile, step, left;

  TWN_HD UnitCursor(const DecodePlan& plan, UnitRange range)
      : tile(range.begin / plan.unit_steps), step(range.begin % plan.unit_steps), left(range.end - range.begin) {}

  TWN_HD void advance(const DecodePlan& plan) {
    --left;
    if (++step == plan.unit_steps) {
      step = 0;
      ++tile;
    }
  }
};

// The plan of `group` (1 ... kDecodeMaxTokens tokens) in a form for `processors` processors, one block each.
inline DecodePlan decode_plan(const Group& group, DecodeShape shape, int processors) {
  DecodePlan plan{};
  plan.group = group;
  plan.shape = shape;
  plan.unit_steps = ceil_div(group.in_features, shape.features);
  const int owners = group.swiglu ? 1 : group.count;
  for (int i = 0; i < owners; ++i) {
    plan.tile_starts[i + 1] = plan.tile_starts[i] + ceil_div(group.projections[i].out_features, plan.half_rows());
  }
  plan.tiles = plan.tile_starts[owners];
  for (int i = 0; i < kMaxProjections * kAdapters; ++i) {
    const int adapter = i % kAdapters;
    const bool runs = i / kAdapters < group.count && (group.present >> adapter & 1);
    const int rank = runs ? group.projections[i / kAdapters].adapters[adapter].rank : 0;
    plan.rank_tile_starts[i + 1] = plan.rank_tile_starts[i] + ceil_div(rank, kRankTile);
  }
  plan.rank_tiles = plan.rank_tile_starts[kMaxProjections * kAdapters];
  plan.s_pitch = plan.rank_tiles * kRankTile;
  const int chunks = ceil_div(group.in_features, kChunkFeatures);
  const int most = larger(1, chunks / kMinSliceChunks);
  plan.slices = plan.rank_tiles == 0 ? 1 : smaller(most, larger(1, processors / plan.rank_tiles));
  plan.chunk_shares = shares(chunks, plan.slices);
  plan.blocks = smaller(processors, plan.units());
  plan.unit_shares = shares(plan.units(), plan.blocks);

  constexpr int64_t kAlign = 256, kHalf = 2, kFloat = 4;
  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const int64_t begin = end;
    end = round_up(end + bytes, kAlign);
    return begin;
  };
  plan.z_offset = take(plan.front_tasks() == 0 ? 0 : kHalf * group.tokens * group.in_features);
  plan.s_offset = take(kHalf * group.tokens * plan.s_pitch);
  plan.shrink_offset = take(plan.slices == 1 ? 0 : kFloat * plan.rank_tiles * plan.slices * plan.shrink_elements());
  plan.partial_offset = take(kFloat * 2 * plan.blocks * plan.partial_elements());
  plan.bytes = end;
  plan.sync_words = 4 + kTileArrivals + plan.tiles;
  return plan;
}

}  // namespace twn
