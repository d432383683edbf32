// The decode kernel's stages on a CPU, with every copy done as late as the rules allow: when it is waited for.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "twn/decode/layout.h"

namespace twn_host {

using namespace twn;

// `Bulk`: a stage is waited for by the bytes that it was promised (sm_90), else by the groups of copies since (sm_80).
template <typename Layout, bool Bulk>
class HostPipe {
 public:
  HostPipe(const DecodePlan& plan, int block, int stages)
      : plan_(plan),
        stages_(stages),
        shared_(stages * Layout::kStageBytes, char(0xff)),
        next_(plan, plan.units_of(block)),
        promised_(stages, 0),
        promises_(stages) {}

  void load_weights_ahead(UnitRange range) {
    UnitCursor unit(plan_, range);
    for (int stage = 0; stage < stages_; ++stage) {
      if (unit.left > 0) {
        copy_weights(stage, unit);
        unit.advance(plan_);
      }
      groups_.emplace_back();
    }
  }

  void load_inputs_ahead(const uint16_t* z, int64_t pitch) {
    for (int stage = 0; stage < stages_; ++stage) {
      if (next_.left > 0) {
        copy_inputs(stage, next_, z, pitch);
        next_.advance(plan_);
      }
      groups_.emplace_back();
    }
  }

  const char* wait() {
    if (Bulk) {
      int bytes = 0;
      for (const Copy& copy : promises_[stage_]) bytes += copy.bytes;
      if (bytes != promised_[stage_]) std::abort();  // the device would wait for ever, or not long enough
      perform(promises_[stage_]);
      promises_[stage_].clear();
    } else {
      while (groups_.size() > static_cast<size_t>(stages_)) {  // the last one is still open
        perform(groups_.front());
        groups_.pop_front();
      }
    }
    return shared_.data() + stage_ * Layout::kStageBytes;
  }

  void refill(const uint16_t* z, int64_t pitch) {
    std::fill_n(shared_.begin() + stage_ * Layout::kStageBytes, Layout::kStageBytes, char(0xff));
    if (next_.left > 0) {
      copy_weights(stage_, next_);
      copy_inputs(stage_, next_, z, pitch);
      next_.advance(plan_);
    }
    groups_.emplace_back();
    stage_ = (stage_ + 1) % stages_;
  }

 private:
  struct Copy {
    int stage, offset;
    const uint16_t* source;
    int bytes;
  };

  void perform(const std::vector<Copy>& copies) {
    for (const Copy& copy : copies) std::memcpy(shared_.data() + copy.stage * Layout::kStageBytes + copy.offset, copy.source, copy.bytes);
  }

  void copy_weights(int stage, const UnitCursor& unit) {
    const TilePlace tile = plan_.place_of(unit.tile);
    promised_[stage] = 2 * plan_.features_in(unit.step) * (plan_.rows_in(tile) + plan_.group.tokens);
    for (int row = 0; row < Layout::kRows; ++row) {
      const TilePlace place = plan_.row_of(tile, row);
      const Projection& projection = plan_.group.projections[place.projection];
      if (place.first_row < projection.out_features) {
        copy_row(stage, Layout::weight_offset(row, 0), unit, static_cast<const uint16_t*>(projection.weight) + place.first_row * projection.pitch);
      }
    }
  }

  void copy_inputs(int stage, const UnitCursor& unit, const uint16_t* z, int64_t pitch) {
    for (int token = 0; token < plan_.group.tokens; ++token) copy_row(stage, Layout::input_offset(token, 0), unit, z + token * pitch);
  }

  void copy_row(int stage, int offset, const UnitCursor& unit, const uint16_t* row) {
    const int first = unit.step * Layout::kFeatures;
    const int count = std::min(Layout::kFeatures, plan_.group.in_features - first);
    const Copy copy{stage, offset, row + first, 2 * count};
    Bulk ? promises_[stage].push_back(copy) : groups_.back().push_back(copy);
  }

  const DecodePlan& plan_;
  int stages_;
  std::vector<char> shared_;
  UnitCursor next_;
  int stage_ = 0;
  std::deque<std::vector<Copy>> groups_{1};  // not yet done, oldest first
  std::vector<int> promised_;
  std::vector<std::vector<Copy>> promises_;
};

}  // namespace twn_host
