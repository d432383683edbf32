// Prefill on Hopper: one persistent launch for a site group. The program of a block stands in twn/prefill/block.h.
#include <cuda.h>
#include <cuda_runtime.h>

#include "twn/prefill/device_ops.cuh"
#include "twn/prefill/launch.h"
#include "twn/prefill/params.h"

namespace twn::prefill {
namespace {

constexpr int kThreads = (1 + kConsumers) * kWarpgroupLanes;
constexpr int kLoaderRegisters = 56, kConsumerRegisters = 224;
static_assert(kLoaderRegisters + 2 * kConsumerRegisters == 3 * 168,
              "what the warpgroups take is what the block was given");
constexpr int kCopyThreads = 256, kCopyBlocks = 64;

struct Copies {
  Copy list[kMaxProjections * kAdapters];
};

__global__ void __launch_bounds__(kCopyThreads) copy_kernel(const Copies copies) {
  const Copy& copy = copies.list[blockIdx.y];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < copy.rows * copy.rank;
       i += stride) {
    copy_element(copy, i);
  }
}

__device__ __forceinline__ void prefetch_maps(const Params<CUtensorMap>& p) {
  prefetch_map(&p.x);
  for (int i = 0; i < p.plan.count; ++i) prefetch_map(&p.weights[i]);
}

template <Dtype Type, typename T>
__global__ void __launch_bounds__(kThreads, 1) prefill_kernel(const __grid_constant__ Params<CUtensorMap> p) {
  extern __shared__ uint8_t shared[];
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  DeviceOps<Type> ops{round_up<uint32_t>(start, kAtomBytes), p.report};
  Program<DeviceOps<Type>, T> program{ops, p};
  if (threadIdx.x == 0) {
    prefetch_maps(p);
    program.prepare();
    barrier_init_fence();
  }
  __syncthreads();
  let_next_launch_begin();
  wait_for_earlier_launches();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / kWarpLanes), 0);
  if (warp < kWarpgroupWarps) {
    give_registers<kLoaderRegisters>();
    if (warp == 0 && threadIdx.x == 0) program.load();
    if (warp == 1) program.schedule();
  } else {
    take_registers<kConsumerRegisters>();
    program.multiply(warp / kWarpgroupWarps - 1);
  }
}

const char* words(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's own function, found at run time: nothing here is linked against the driver.
EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    cudaGetLastError();
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return found;
}

const char* encode(CUtensorMap& map, const Matrix& matrix, Dtype dtype) {
  const auto type = dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t pitches[] = {static_cast<cuuint64_t>(matrix.pitch) * kElementBytes};
  const cuuint32_t box[] = {kBlockK, static_cast<cuuint32_t>(matrix.box_rows)}, steps[] = {1, 1};
  const CUresult result = encode_tiled()(&map, type, 2, const_cast<void*>(matrix.data), sizes, pitches, box, steps,
                                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refused the description of a matrix for bulk copies";
}

template <Dtype Type, typename T>
const char* start(const Params<CUtensorMap>& p, int blocks, cudaStream_t stream) {
  constexpr int kShared = static_cast<int>(T::kBytes) + kAtomBytes;
  auto* kernel = prefill_kernel<Type, T>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return words(error);
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = 1;
  return words(cudaLaunchKernelEx(&config, kernel, p));
}

template <typename T>
const char* start_for(Dtype dtype, const Params<CUtensorMap>& p, int blocks, cudaStream_t stream) {
  return dtype == Dtype::kFloat16 ? start<Dtype::kFloat16, T>(p, blocks, stream)
                                  : start<Dtype::kBFloat16, T>(p, blocks, stream);
}

}  // namespace
}  // namespace twn::prefill

namespace twn {

const char* launch_prefill_sm90a(const Group& group, void* workspace, uint32_t* sync, uint32_t* report, int processors,
                                 void* stream) {
  using namespace prefill;
  if (const char* reason = why_unreadable(group)) return reason;
  if (encode_tiled() == nullptr)
    return "the driver is older than CUDA 12.0 and describes no bulk copies; install a newer one";
  const Plan plan = make_plan(group, choose_block_n(group, processors));
  Params<CUtensorMap> p{};
  const char* failure = fill_params(p, group, plan, workspace, [&](CUtensorMap& map, const Matrix& matrix) {
    return encode(map, matrix, group.dtype);
  });
  if (failure != nullptr) return failure;
  p.sync = sync;
  p.report = report;
  const auto queue = static_cast<cudaStream_t>(stream);
  Copies copies{};
  const int count = list_copies(group, plan, workspace, copies.list);
  if (count > 0) {
    // An ordinary launch: it waits for what is in front of it, and the product waits for it.
    copy_kernel<<<dim3(kCopyBlocks, count), kCopyThreads, 0, queue>>>(copies);
    failure = words(cudaGetLastError());
    if (failure != nullptr) return failure;
  }
  const int blocks = static_cast<int>(smaller<int64_t>(processors, plan.tasks()));
  return plan.block_n == kWideN ? start_for<WideTile>(group.dtype, p, blocks, queue)
                                : start_for<NarrowTile>(group.dtype, p, blocks, queue);
}

}  // namespace twn
