// Which forms of the decode kernel exist, and which one a launch takes: a pure function of tokens and shared memory.
//
// No form was measured yet. Each is the widest tile whose stages fit: more weight rows a tile read z fewer times from L2,
// deeper units make longer runs of memory, and two stages or more keep copies under way while a stage is multiplied.
#pragma once

#include "twn/decode/layout.h"

namespace twn {

struct DecodeForms80 {
  using Tokens8 = DecodeLayout<8, 64, 128>;
  using Tokens16 = DecodeLayout<16, 64, 128>;
  using Tokens32 = DecodeLayout<32, 64, 128>;
  using Tokens64 = DecodeLayout<64, 64, 128>;
};

struct DecodeForms90 {
  using Tokens8 = DecodeLayout<8, 64, 256>;
  using Tokens16 = DecodeLayout<16, 64, 256>;
  using Tokens32 = DecodeLayout<32, 64, 256>;
  using Tokens64 = DecodeLayout<64, 128, 128>;
};

constexpr int kMostStages = 8;  // what copy_pipe.cuh can wait for

template <typename Layout>
struct FormOf {
  using Type = Layout;
  TWN_HD static constexpr DecodeShape shape() { return {Layout::kTokens, Layout::kRows, Layout::kFeatures}; }
  TWN_HD static constexpr int stages(int shared_bytes) { return smaller(Layout::stages_in(shared_bytes), kMostStages); }
};

// Calls `function(FormOf<Layout>())` with the form for so many tokens.
template <typename Forms, typename Function>
auto with_form(int tokens, Function&& function) {
  if (tokens <= 8) return function(FormOf<typename Forms::Tokens8>());
  if (tokens <= 16) return function(FormOf<typename Forms::Tokens16>());
  if (tokens <= 32) return function(FormOf<typename Forms::Tokens32>());
  return function(FormOf<typename Forms::Tokens64>());
}

}  // namespace twn
