// Weights and z into shared memory on sm_90: one bulk copy a row, counted in by a barrier a stage.
//
// All warps issue, each a few rows (copied_row): the lanes of one warp issue their copies one after the other.
#pragma once

#include "twn/decode/device.cuh"

namespace twn {

template <typename Layout>
class BulkPipe {
 public:
  TWN_DEVICE BulkPipe(const DecodePlan& plan, char* shared, char* barriers, int stages)
      : plan_(plan),
        shared_(shared),
        barriers_(static_cast<uint32_t>(__cvta_generic_to_shared(barriers))),
        stages_(stages),
        next_(plan, plan.units_of(blockIdx.x)) {
    asm volatile("griddepcontrol.launch_dependents;");  // they wait for the end of this grid before they read
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(read_once_));
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < stages; ++stage) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier(stage)));
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }

  // Weights depend on no kernel, so their copies are under way before this.
  TWN_DEVICE static void wait_for_previous_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

  // What plain stores wrote is read by bulk copies of other blocks. Of global memory alone: a fence of all memory waits for
  // every access of the thread to reach the whole GPU.
  TWN_DEVICE static void fence_before_publish() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

  TWN_DEVICE void load_weights_ahead(UnitRange range) {
    UnitCursor unit(plan_, range);
    for (int stage = 0; stage < stages_ && unit.left > 0; ++stage) {
      copy_weights(stage, unit);
      unit.advance(plan_);
    }
  }

  template <typename T>
  TWN_DEVICE void load_inputs_ahead(const T* z, int64_t pitch) {
    asm volatile("fence.proxy.async.global;" ::: "memory");
    for (int stage = 0; stage < stages_ && next_.left > 0; ++stage) {
      copy_inputs(stage, next_, z, pitch);
      next_.advance(plan_);
    }
  }

  // Its bytes are on their way or there; `expired` is set where they never came, which no valid address can cause.
  TWN_DEVICE const char* wait(bool& expired) {
    if (!is_full()) {
      const uint64_t start = DeviceMemory::nanoseconds();
      while (!expired && !is_full()) expired = DeviceMemory::nanoseconds() - start > DeviceMemory::kPatienceNanoseconds;
    }
    return shared_ + stage_ * Layout::kStageBytes;
  }

  template <typename T>
  TWN_DEVICE void refill(const T* z, int64_t pitch) {
    if (next_.left > 0) {
      copy_weights(stage_, next_);
      copy_inputs(stage_, next_, z, pitch);
      next_.advance(plan_);
    }
    if (++stage_ == stages_) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  TWN_DEVICE uint32_t barrier(int stage) const { return barriers_ + stage * 8; }

  TWN_DEVICE uint32_t target(int stage, int offset) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_ + stage * Layout::kStageBytes + offset));
  }

  // Whether the current stage is; sleeps up to a millisecond before it says no.
  TWN_DEVICE bool is_full() const {
    uint32_t full;
    asm volatile(
        "{\n.reg .pred complete;\nmbarrier.try_wait.parity.shared.b64 complete, [%1], %2, 1000000;\n"
        "selp.u32 %0, 1, 0, complete;\n}"
        : "=r"(full)
        : "r"(barrier(stage_)), "r"(parity_)
        : "memory");
    return full != 0;
  }

  // One thread says how many bytes the stage waits for, those of z among them. Others may be early with theirs: the stage
  // is not full before that thread has arrived.
  TWN_DEVICE void copy_weights(int stage, const UnitCursor& unit) const {
    const TilePlace tile = plan_.place_of(unit.tile);
    const int bytes = 2 * plan_.features_in(unit.step);
    if (threadIdx.x == 0) {
      const uint32_t expected = static_cast<uint32_t>((plan_.rows_in(tile) + plan_.group.tokens) * bytes);
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier(stage)), "r"(expected) : "memory");
    }
    const int row = copied_row(threadIdx.x);
    if (row >= Layout::kRows) return;
    const TilePlace place = plan_.row_of(tile, row);
    const Projection& projection = plan_.group.projections[place.projection];
    if (place.first_row >= projection.out_features) return;
    const uint16_t* source = static_cast<const uint16_t*>(projection.weight) + place.first_row * projection.pitch;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            target(stage, Layout::weight_offset(row, 0))),
        "l"(source + unit.step * Layout::kFeatures), "r"(bytes), "r"(barrier(stage)), "l"(read_once_)
        : "memory");
  }

  template <typename T>
  TWN_DEVICE void copy_inputs(int stage, const UnitCursor& unit, const T* z, int64_t pitch) const {
    const int token = copied_row(threadIdx.x);
    if (token >= plan_.group.tokens) return;
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     target(stage, Layout::input_offset(token, 0))),
                 "l"(z + token * pitch + unit.step * Layout::kFeatures), "r"(2 * plan_.features_in(unit.step)), "r"(barrier(stage))
                 : "memory");
  }

  const DecodePlan& plan_;
  char* shared_;
  uint32_t barriers_;
  int stages_;
  UnitCursor next_;
  int stage_ = 0;
  uint32_t parity_ = 0;
  uint64_t read_once_;
};

}  // namespace twn
