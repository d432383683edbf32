// gate_scores: pool, MLP, sigmoid and threshold of a batch, one launch over the whole GPU.
#include "twn/device_memory.cuh"
#include "twn/runtime.h"
#include "twn/small/device_team.cuh"
#include "twn/small/enqueue.cuh"
#include "twn/small/launch.h"

namespace twn::small {
namespace {

using Team = BlockTeam<kGateWarps>;

// Two blocks of 128 registers a thread fill the registers of a processor.
constexpr int kBlocksPerProcessor = 2;

template <int F, int R>
__global__ void __launch_bounds__(kGateThreads, kBlocksPerProcessor)
    gate_kernel(const __grid_constant__ Gate gate, uint32_t* sync, uint32_t* report) {
  __shared__ Team::Shared shared;
  Team team{shared};
  wait_for_previous_launch();
  let_next_launch_begin();
  gate_block<F, R>(team, gate, Flags<DeviceMemory>{sync, gate.tasks, gridDim.x, 0}, report);
}

}  // namespace

const char* launch_gate(const Gate& gate, uint32_t* sync, uint32_t* report, int device, void* stream) {
  const int64_t room = static_cast<int64_t>(kBlocksPerProcessor) * device_limits(device).processors;
  const int64_t blocks = smaller<int64_t>(gate.tasks, larger<int64_t>(room, 1));
  const WarpTile tile = warp_tile(gate.rows);
  const auto kernel = tile.features == 1 ? gate_kernel<1, 1> : tile.features == 2 ? gate_kernel<2, 4> : gate_kernel<3, 4>;
  return enqueue(kernel, blocks, kGateThreads, stream, gate, sync, report);
}

}  // namespace twn::small
