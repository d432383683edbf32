// The emulated decode kernel for Python: one launch over tensors in memory.
#include <cstdlib>

#include "decode_emulator.h"

using namespace twn_host;

namespace {

template <typename Number, typename Forms, bool Bulk>
int run(const Group& group, int shared_bytes, int processors, int resident, int stages, uint32_t* sync, int sync_words) {
  return with_form<Forms>(group.tokens, shared_bytes, [&](auto form) {
    using Layout = typename decltype(form)::Type;
    const DecodePlan plan = decode_plan(group, form.shape(), processors);
    if (plan.sync_words > sync_words) return 2;
    std::vector<int> order(plan.blocks);
    for (int i = 0; i < plan.blocks; ++i) order[i] = i;
    char* workspace = static_cast<char*>(std::aligned_alloc(256, round_up<int64_t>(larger<int64_t>(plan.bytes, 1), 256)));
    std::memset(workspace, 0xff, plan.bytes);
    const bool held = launch<DecodeHost<Number, Layout, Bulk>>(plan, stages, order, smaller(resident, plan.blocks), workspace, sync);
    std::free(workspace);
    return held ? 0 : 1;
  });
}

}  // namespace

extern "C" int group_bytes() { return sizeof(Group); }

// 0: done; 1: a wait ran out; 2: too few words. `arch` is 80, 90 or 120: whose forms.
extern "C" int emulate_decode(const Group* group, int arch, int processors, int resident, int stages, uint32_t* sync, int sync_words) {
  const bool half = group->dtype == Dtype::kFloat16;
  const int shared_bytes = (arch == 90 ? 227 : 99) * 1024;
  if (arch >= 90) {
    return half ? run<Float16, DecodeForms90, true>(*group, shared_bytes, processors, resident, stages, sync, sync_words)
                : run<BFloat16, DecodeForms90, true>(*group, shared_bytes, processors, resident, stages, sync, sync_words);
  }
  return half ? run<Float16, DecodeForms80, false>(*group, shared_bytes, processors, resident, stages, sync, sync_words)
              : run<BFloat16, DecodeForms80, false>(*group, shared_bytes, processors, resident, stages, sync, sync_words);
}
