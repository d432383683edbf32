// pool_queries: one block a row, one launch.
#include "twn/small/device_team.cuh"
#include "twn/small/enqueue.cuh"
#include "twn/small/launch.h"

namespace twn::small {
namespace {

constexpr int kWarps = 8;
using Team = BlockTeam<kWarps>;

__global__ void __launch_bounds__(Team::kThreads) pool_kernel(const __grid_constant__ Pool pool) {
  __shared__ Team::Shared shared;
  Team team{shared};
  wait_for_previous_launch();
  let_next_launch_begin();
  pool_row(team, pool, blockIdx.x);
}

}  // namespace

const char* launch_pool(const Pool& pool, void* stream) {
  return enqueue(pool_kernel, pool.rows, Team::kThreads, stream, pool);
}

}  // namespace twn::small
