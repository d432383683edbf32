// front: RMSNorm or silu(gate) * up of any number of rows, one launch.
#include "twn/small/device_team.cuh"
#include "twn/small/enqueue.cuh"
#include "twn/small/launch.h"

namespace twn::small {
namespace {

constexpr int kWarps = 8;
using Block = BlockTeam<kWarps>;

// A short row keeps one warp busy and no more: then each warp of a block takes a row, and no row waits for another.
constexpr int kShortChunks = 4 * kWarpLanes;

template <typename T>
__global__ void __launch_bounds__(Block::kThreads) long_rows_kernel(const __grid_constant__ FrontRows front) {
  __shared__ Block::Shared shared;
  Block team{shared};
  wait_for_previous_launch();
  let_next_launch_begin();
  normalise_row<T>(team, front, blockIdx.x);
}

template <typename T>
__global__ void __launch_bounds__(Block::kThreads) short_rows_kernel(const __grid_constant__ FrontRows front) {
  WarpTeam team;
  wait_for_previous_launch();
  let_next_launch_begin();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes;
  if (row < front.rows) normalise_row<T>(team, front, row);
}

// A chunk a thread; `chunks` a row.
template <typename T>
__global__ void __launch_bounds__(Block::kThreads) gated_kernel(const __grid_constant__ FrontRows front, int chunks) {
  wait_for_previous_launch();
  let_next_launch_begin();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * Block::kThreads + threadIdx.x;
  if (at < front.rows * chunks) gated_chunk<T>(front, at / chunks, static_cast<int>(at % chunks));
}

template <typename T>
const char* launch(const FrontRows& front, void* stream) {
  const int chunks = chunks_of(front.features);
  if (front.norm_weight == nullptr) {
    const int64_t blocks = ceil_div<int64_t>(front.rows * chunks, Block::kThreads);
    return enqueue(gated_kernel<T>, blocks, Block::kThreads, stream, front, chunks);
  }
  if (chunks <= kShortChunks) {
    return enqueue(short_rows_kernel<T>, ceil_div<int64_t>(front.rows, kWarps), Block::kThreads, stream, front);
  }
  return enqueue(long_rows_kernel<T>, front.rows, Block::kThreads, stream, front);
}

}  // namespace

const char* launch_front(const FrontRows& front, void* stream) {
  return front.number == Number::kFloat16 ? launch<Half>(front, stream) : launch<BFloat>(front, stream);
}

}  // namespace twn::small
