// Which forms of the decode kernel exist, and which one a launch takes: a pure function of tokens and shared memory.
//
// No form was measured yet. Each is the widest tile whose stages fit: more weight rows a tile read z fewer times from L2,
// deeper units make longer runs of memory, and two stages or more keep copies under way while a stage is multiplied.
#pragma once

#include "twn/decode/layout.h"

namespace twn {

// Layouts for one number of tokens, the widest first.
template <typename... Layouts>
struct Choice {};

struct DecodeForms80 {
  using Tokens8 = Choice<DecodeLayout<8, 64, 128>>;
  using Tokens16 = Choice<DecodeLayout<16, 64, 128>>;
  using Tokens32 = Choice<DecodeLayout<32, 64, 128>>;
  using Tokens64 = Choice<DecodeLayout<64, 64, 128>>;
};

// The second ones are for cards of compute capability 12.0, where a block has 99 KiB and not 227.
struct DecodeForms90 {
  using Tokens8 = Choice<DecodeLayout<8, 64, 256>>;
  using Tokens16 = Choice<DecodeLayout<16, 64, 256>>;
  using Tokens32 = Choice<DecodeLayout<32, 64, 256>, DecodeLayout<32, 64, 128>>;
  using Tokens64 = Choice<DecodeLayout<64, 128, 128>, DecodeLayout<64, 64, 128>>;
};

constexpr int kFewestStages = 2;
constexpr int kMostStages = 8;  // what copy_pipe.cuh can wait for

template <typename Layout>
struct FormOf {
  using Type = Layout;
  TWN_HD static constexpr DecodeShape shape() { return {Layout::kTokens, Layout::kRows, Layout::kFeatures}; }
  TWN_HD static constexpr int stages(int shared_bytes) { return smaller(Layout::stages_in(shared_bytes), kMostStages); }
};

// Calls `function(FormOf<Layout>())` with the first that has stages enough; with the last, whether it has or not.
template <typename Layout, typename... Narrower, typename Function>
auto with_first_that_fits(Choice<Layout, Narrower...>, int shared_bytes, Function&& function) {
  if constexpr (sizeof...(Narrower) > 0) {
    if (FormOf<Layout>::stages(shared_bytes) < kFewestStages) {
      return with_first_that_fits(Choice<Narrower...>(), shared_bytes, function);
    }
  }
  return function(FormOf<Layout>());
}

// For so many tokens, in blocks that may have `shared_bytes`.
template <typename Forms, typename Function>
auto with_form(int tokens, int shared_bytes, Function&& function) {
  if (tokens <= 8) return with_first_that_fits(typename Forms::Tokens8(), shared_bytes, function);
  if (tokens <= 16) return with_first_that_fits(typename Forms::Tokens16(), shared_bytes, function);
  if (tokens <= 32) return with_first_that_fits(typename Forms::Tokens32(), shared_bytes, function);
  return with_first_that_fits(typename Forms::Tokens64(), shared_bytes, function);
}

}  // namespace twn
