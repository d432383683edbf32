#include "workspace.h"

#include "common.h"
#include "twn/runtime.h"

namespace twn {

Workspace acquire(const torch::stable::Tensor& like, void* stream, Family family, int64_t bytes, int64_t sync_words) {
  const int32_t device = like.get_device_index();
  uint32_t* report = report_word(device);
  require(report != nullptr, "twn_cuda: no pinned host memory is left for the word that kernels report in; free some.");
  const uint32_t code = *static_cast<volatile uint32_t*>(report);
  require(code == 0, "twn_cuda: a kernel gave up waiting for other blocks of its own launch (code ", code,
          "), and what it returned is NaN. This is a defect of twn_kernels: report it with the output of `twn-kernels env`",
          " and the shapes of the call. Until then use another impl, in a new process.");
  uint32_t* sync = launch_words(device, stream, family, sync_words);
  require(sync != nullptr, "twn_cuda: no device memory is left for ", sync_words, " words that the blocks of a launch meet at;",
          " free some, for example with torch.cuda.empty_cache().");
  torch::stable::Tensor owner = torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
  return {owner.data_ptr(), sync, report, owner};
}

}  // namespace twn
