// Where things lie in shared memory and in registers: the 128-byte swizzle, operand descriptors, accumulator fragments.
//
// An operand tile is a column of rows of 128 bytes (64 elements of k). Within each 1024 bytes, the 16-byte piece c of
// row r stands at place c ^ (r % 8): bits 4-6 of an address are flipped by its bits 7-9. Bulk copies write so and the
// tensor cores read so, both by the address itself, hence stages begin at multiples of 1024 bytes. The epilogue uses
// the same rule.
#pragma once

#include "twn/prefill/plan.h"

namespace twn::prefill {

constexpr int kRowBytes = kBlockK * kElementBytes;
constexpr int kPieceBytes = 16;
constexpr int kPieceElements = kPieceBytes / kElementBytes;
constexpr int kAtomRows = 8;
constexpr int kAtomBytes = kAtomRows * kRowBytes;
constexpr int kWarpLanes = 32;
constexpr int kWarpRows = 16;  // of an accumulator fragment
constexpr int kWarpgroupWarps = 4;
constexpr int kWarpgroupLanes = kWarpgroupWarps * kWarpLanes;
constexpr int kSlotRegisters = kSlot / 2;  // of a lane, for 64 columns
constexpr int kRing = 2;  // tasks that a block knows of at once

// 64-bit operand descriptor of wgmma: start address, leading and stride byte offsets in units of 16 bytes, swizzle mode
// 1. The stride is that from eight rows to the next eight; the leading one is not used with this swizzle.
TWN_HD uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t kLeading = 1, kStride = kAtomBytes >> 4, kSwizzle128 = 1;
  return (address >> 4 & 0x3fff) | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}

// The operand `rows` further down (a multiple of 8) and `steps` of 16 k further right; no carry leaves the address
// field, since shared memory ends below 256 KiB.
TWN_HD uint64_t moved(uint64_t descriptor, int rows, int steps) {
  return descriptor + static_cast<uint64_t>((rows * kRowBytes + steps * kStepK * kElementBytes) >> 4);
}

// Place of register j of a lane (0 ... 127 of the warpgroup) in the 64-row accumulator of one instruction.
TWN_HD int fragment_row(int lane, int j) {
  return lane / kWarpLanes * kWarpRows + lane % kWarpLanes / 4 + (j / 2 % 2) * 8;
}
TWN_HD int fragment_column(int lane, int j) { return j / 4 * 8 + lane % 4 * 2 + j % 2; }

// Offset of the piece of 8 columns in a warp's staging of 16 rows by 64 columns.
TWN_HD uint32_t staged_piece(int row, int piece) {
  return static_cast<uint32_t>(row * kRowBytes + (piece ^ row % kAtomRows) * kPieceBytes);
}

// Shared memory of a block, as offsets from a multiple of 1024.
template <int BlockN, int Stages>
struct Tile {
  static constexpr int kBlockN = BlockN;
  static constexpr int kStages = Stages;
  static constexpr int kHalf = BlockN / 2;
  static constexpr int kSlots = BlockN / kSlot;
  static constexpr int kRegisters = BlockN / 2;  // of a lane, for the accumulator
  static constexpr uint32_t kInputBytes = kBlockM * kRowBytes;
  static constexpr uint32_t kHalfBytes = kHalf * kRowBytes;
  static constexpr uint32_t kSlotBytes = kSlot * kRowBytes;
  static constexpr uint32_t kStageBytes = kInputBytes + 2 * kHalfBytes;
  static constexpr uint32_t kStagingBytes = kWarpRows * kRowBytes;  // of a warp
  static constexpr uint32_t kStaging = Stages * kStageBytes;
  static constexpr uint32_t kBarriers = kStaging + kConsumers * kWarpgroupWarps * kStagingBytes;
  static constexpr int kBarrierCount = 2 * Stages + 2 * kRing + 1;
  static constexpr uint32_t kEntries = kBarriers + round_up(8 * kBarrierCount, 16);
  static constexpr uint32_t kEntryBytes = 16;
  static constexpr uint32_t kBytes = kEntries + kRing * kEntryBytes;

  static TWN_HD uint32_t input(int stage) { return stage * kStageBytes; }
  static TWN_HD uint32_t weights(int stage) { return stage * kStageBytes + kInputBytes; }
  static TWN_HD uint32_t full(int stage) { return kBarriers + 8 * stage; }
  static TWN_HD uint32_t empty(int stage) { return kBarriers + 8 * (Stages + stage); }
  static TWN_HD uint32_t told(int place) { return kBarriers + 8 * (2 * Stages + place); }
  static TWN_HD uint32_t heard(int place) { return kBarriers + 8 * (2 * Stages + kRing + place); }
  static TWN_HD uint32_t hungry() { return kBarriers + 8 * (2 * Stages + 2 * kRing); }
  static TWN_HD uint32_t entry(int place) { return kEntries + place * kEntryBytes; }
  static TWN_HD uint32_t staging(int warp) { return kStaging + warp * kStagingBytes; }
};

using WideTile = Tile<kWideN, 4>;
using NarrowTile = Tile<kNarrowN, 6>;

constexpr uint32_t kSharedLimit = 227 * 1024;  // of a block on sm_90
static_assert(WideTile::kBytes + kAtomBytes <= kSharedLimit && NarrowTile::kBytes + kAtomBytes <= kSharedLimit,
              "too large");
static_assert(WideTile::kStageBytes % kAtomBytes == 0 && NarrowTile::kStageBytes % kAtomBytes == 0,
              "swizzle goes by address");

}  // namespace twn::prefill
