// Where the decode kernel keeps things: shared memory, and which lane of a warp holds what of a tensor-core product.
//
// Both operands are read 16 bytes at a time: lane l takes features 8 (l % 4) ... + 7 of a chunk of 32, in row l / 4 of the
// operand. Fed to two products of 16 features, that pairs the features of both operands in another order than they lie in
// memory, but in the same one, so the sum is the same set of products. No ldmatrix and no swizzle is needed: rows that are
// 64 bytes longer than a multiple of 128 put the eight lanes of a phase on 32 different banks.
#pragma once

#include "twn/decode/plan.h"

namespace twn {

constexpr int kVectorFeatures = 8;  // of 16 bits in 16 bytes
constexpr int kRowPadBytes = 64;
constexpr int kWarps = kDecodeThreads / 32;
constexpr int kRowGroups = 4;                   // warps side by side in the rows of a tile
constexpr int kChunkGroups = kWarps / kRowGroups;  // warps that share rows and take turns in the chunks of a unit

// The row of a stage that a thread copies as a whole, where one is: neighbours lie with different warps.
TWN_HD int copied_row(int thread) { return thread % 32 * kWarps + thread / 32; }

// Of one form of the kernel, at compile time.
template <int Tokens, int Rows, int Features>
struct DecodeLayout {
  static constexpr int kTokens = Tokens, kRows = Rows, kFeatures = Features;
  static constexpr int kTokenTiles = Tokens / 8;           // n8 of the product
  static constexpr int kWarpRows = Rows / kRowGroups;
  static constexpr int kRowTiles = kWarpRows / 16;         // m16 of the product, a warp
  static constexpr int kChunks = Features / kChunkFeatures;  // of a unit
  static constexpr int kPitch = Features * 2 + kRowPadBytes;
  static constexpr int kStageBytes = (Rows + Tokens) * kPitch;
  static constexpr int kInputOffset = Rows * kPitch;       // of z in a stage
  static constexpr int kOutPitch = Rows + 4;               // floats; puts the tokens of a fragment on different banks
  static constexpr int kScratchBytes = Tokens * kOutPitch * 4;
  static constexpr int kBarrierBytes = 128;                // one of 8 bytes a stage

  static_assert(Tokens % 8 == 0 && kWarpRows % 16 == 0 && Features % (kChunkFeatures * kChunkGroups) == 0, "tile");
  static_assert(Rows <= kDecodeThreads && Tokens <= kDecodeThreads, "a thread copies one row at most");
  static_assert(kPitch % 128 == 64, "rows of a phase must begin 64 bytes apart on the banks");
  static_assert(kScratchBytes >= 4 * kRowTiles * kTokenTiles * 32 * kRowGroups * 4, "sums of the other chunk group");
  static_assert(kScratchBytes >= 4 * kRankTile * Tokens * 4, "sums of four warps of a shrink task");

  TWN_HD static constexpr int shared_bytes(int stages) { return stages * kStageBytes + kScratchBytes + kBarrierBytes; }
  TWN_HD static constexpr int stages_in(int bytes) {
    return smaller((bytes - kScratchBytes - kBarrierBytes) / kStageBytes, kBarrierBytes / 8);
  }

  // Bytes from the start of a stage: 16 bytes of a weight row, or of a row of z.
  TWN_HD static int weight_offset(int row, int feature) { return row * kPitch + feature * 2; }
  TWN_HD static int input_offset(int token, int feature) { return kInputOffset + token * kPitch + feature * 2; }

  // Floats from the start of the scratch, for what the other chunk group hands over: 16 bytes a thread and step.
  TWN_HD static int handed_over(int thread_of_group, int quad) { return (quad * (kRowGroups * 32) + thread_of_group) * 4; }

  TWN_HD static int out_index(int token, int row) { return token * kOutPitch + row; }
};

// Rows of the left operand (weights or A) and of the right one (z or S) that a lane reads; 16 bytes from `feature` on.
TWN_HD int fragment_row(int lane) { return lane / 4; }
TWN_HD int fragment_feature(int lane) { return lane % 4 * kVectorFeatures; }

// Place of accumulator register 0 ... 3 in the 16 x 8 product: row of the left operand, row (token) of the right one.
TWN_HD int accumulator_row(int lane, int index) { return lane / 4 + (index / 2) * 8; }
TWN_HD int accumulator_token(int lane, int index) { return lane % 4 * 2 + index % 2; }

// Chunks of a unit that a chunk group takes: its own number, then every kChunkGroups-th.
TWN_HD int warp_row_group(int warp) { return warp % kRowGroups; }
TWN_HD int warp_chunk_group(int warp) { return warp / kRowGroups; }

// Floats from the start of the scratch for the sums of four warps of a shrink task.
template <int Tokens>
TWN_HD int shrink_index(int slot, int rank, int token) {
  return (slot * kRankTile + rank) * Tokens + token;
}

}  // namespace twn
