// Weights and z into shared memory on sm_80 and newer: every thread copies 16 bytes at a time, asynchronously (cp.async).
#pragma once

#include "twn/decode/device.cuh"

namespace twn {

template <typename Layout>
class CopyPipe {
 public:
  TWN_DEVICE CopyPipe(const DecodePlan& plan, char* shared, char*, int stages)
      : plan_(plan), shared_(shared), stages_(stages), next_(plan, plan.units_of(blockIdx.x)) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(read_once_));
  }

  TWN_DEVICE static void wait_for_previous_kernels() {}  // the launch itself waited
  TWN_DEVICE static void fence_before_publish() {}

  // One group of copies a stage, also where there is no unit left: stages are told apart by counting groups.
  TWN_DEVICE void load_weights_ahead(UnitRange range) {
    UnitCursor unit(plan_, range);
    for (int stage = 0; stage < stages_; ++stage) {
      if (unit.left > 0) {
        copy_weights(stage, unit);
        unit.advance(plan_);
      }
      commit();
    }
  }

  template <typename T>
  TWN_DEVICE void load_inputs_ahead(const T* z, int64_t pitch) {
    for (int stage = 0; stage < stages_; ++stage) {
      if (next_.left > 0) {
        copy_inputs(stage, next_, z, pitch);
        next_.advance(plan_);
      }
      commit();
    }
  }

  // The oldest stage, filled. The weights of all stages and its z were the first groups; a refill is one group.
  TWN_DEVICE const char* wait(bool&) {
    wait_for_all_but(stages_ - 1);
    __syncthreads();
    return shared_ + stage_ * Layout::kStageBytes;
  }

  template <typename T>
  TWN_DEVICE void refill(const T* z, int64_t pitch) {
    if (next_.left > 0) {
      copy_weights(stage_, next_);
      copy_inputs(stage_, next_, z, pitch);
      next_.advance(plan_);
    }
    commit();
    stage_ = stage_ + 1 == stages_ ? 0 : stage_ + 1;
  }

 private:
  static constexpr int kRowVectors = Layout::kFeatures / kVectorFeatures;

  TWN_DEVICE static void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

  template <int Count>
  TWN_DEVICE static void wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Count) : "memory");
  }

  TWN_DEVICE static void wait_for_all_but(int count) {
    switch (count) {  // the instruction takes a constant
      case 0: return wait_group<0>();
      case 1: return wait_group<1>();
      case 2: return wait_group<2>();
      case 3: return wait_group<3>();
      case 4: return wait_group<4>();
      case 5: return wait_group<5>();
      case 6: return wait_group<6>();
      default: return wait_group<7>();
    }
  }

  TWN_DEVICE static void copy(char* target, const void* source) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
  }

  TWN_DEVICE void copy_once(char* target, const void* source) const {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "l"(read_once_)
                 : "memory");
  }

  TWN_DEVICE void copy_weights(int stage, const UnitCursor& unit) const {
    char* target = shared_ + stage * Layout::kStageBytes;
    const TilePlace tile = plan_.place_of(unit.tile);
    const int feature0 = unit.step * Layout::kFeatures;
    for (int i = threadIdx.x; i < Layout::kRows * kRowVectors; i += kDecodeThreads) {
      const int row = i / kRowVectors, feature = i % kRowVectors * kVectorFeatures;
      const TilePlace place = plan_.row_of(tile, row);
      const Projection& projection = plan_.group.projections[place.projection];
      if (place.first_row >= projection.out_features || feature0 + feature >= plan_.group.in_features) continue;
      copy_once(target + Layout::weight_offset(row, feature), static_cast<const uint16_t*>(projection.weight) +
                                                                   place.first_row * projection.pitch + feature0 + feature);
    }
  }

  template <typename T>
  TWN_DEVICE void copy_inputs(int stage, const UnitCursor& unit, const T* z, int64_t pitch) const {
    char* target = shared_ + stage * Layout::kStageBytes;
    const int feature0 = unit.step * Layout::kFeatures;
    for (int i = threadIdx.x; i < plan_.group.tokens * kRowVectors; i += kDecodeThreads) {
      const int token = i / kRowVectors, feature = i % kRowVectors * kVectorFeatures;
      if (feature0 + feature < plan_.group.in_features) {
        copy(target + Layout::input_offset(token, feature), z + token * pitch + feature0 + feature);
      }
    }
  }

  const DecodePlan& plan_;
  char* shared_;
  int stages_;
  UnitCursor next_;
  int stage_ = 0;
  uint64_t read_once_;
};

}  // namespace twn
