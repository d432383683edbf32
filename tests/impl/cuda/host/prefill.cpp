// The emulated prefill kernel for Python: one launch over tensors in memory.
#include "prefill_emulator.h"

extern "C" int group_bytes() { return sizeof(twn::Group); }

// `lost`: a tag that is never published, or -1; then `patience_ms` is how long it is waited for.
extern "C" int emulate_prefill(const twn::Group* group, int block_n, int processors, int resident, uint32_t* words,
                               int word_count, int lost, int patience_ms, uint32_t* report) {
  using twn_host::PrefillMemory;
  PrefillMemory::kPatienceNanoseconds = patience_ms * uint64_t{1'000'000};
  PrefillMemory::deaf_word = lost < 0 ? nullptr : words + twn::kFirstFreeWord + lost;
  twn_host::broken_rule = nullptr;
  return twn_host::launch_prefill(*group, block_n, processors, resident, words, word_count, report);
}

extern "C" const char* broken_rule() { return twn_host::broken_rule; }

extern "C" int chosen_block_n(const twn::Group* group, int processors) {
  return twn::prefill::choose_block_n(*group, processors);
}

extern "C" const char* refusal(const twn::Group* group) { return twn::prefill::why_unreadable(*group); }
