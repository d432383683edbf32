// How the blocks of one launch hand results to each other: tickets, tags, arrivals. No memset between launches.
//
// A launch owns a row of 32-bit words that were zero once, long ago. Between two launches every counter is back at zero
// by itself (it wraps when the last block has counted), and a tag says "done in this launch" by holding the launch's own
// number, so nothing is ever reset. Words are touched only after the launches before this one on the stream have ended.
//
// Why it cannot hang: work that others wait for is taken by ticket, in order, by blocks that run, and a block waits only
// for tickets that come before one that it has drawn itself: somebody who runs holds each of them, and is never behind
// it in a cycle. That needs no block to be resident beside any other, so every grid size is safe, also when two launches
// share the GPU. Waits are bounded all the same: what cannot happen ends in a report, not in a hang.
//
// `Memory` gives the atomic operations: of the device in device_memory.cuh, of the host in the tests.
#pragma once

#include "twn/host_device.h"

namespace twn {

// Words in front of the tags and arrivals of a launch.
enum SyncWord : int { kQueueWord = 0, kExitWord = 1, kEpochWord = 2, kFirstFreeWord = 4 };

template <typename Memory>
struct Flags {
  uint32_t* words;
  uint32_t tasks;   // tickets that mean work
  uint32_t blocks;  // of the grid
  uint32_t tag;     // this launch's own number; set by begin()

  // Every block, once, before anything else here.
  TWN_HD void begin() { tag = Memory::load_acquire(words + kEpochWord) + 1; }

  // The next task, or a number of `tasks` or more: then there is none, and the block must not ask again.
  TWN_HD uint32_t take_ticket() const { return Memory::increment_or_wrap(words + kQueueWord, tasks + blocks - 1); }

  // Says that what stands in memory before this call is done; `slot` counts from kFirstFreeWord.
  TWN_HD void publish(int slot) const { Memory::store_release(words + kFirstFreeWord + slot, tag); }

  TWN_HD bool is_published(int slot) const { return Memory::load_acquire(words + kFirstFreeWord + slot) == tag; }

  // False when the time was over; what was waited for must not be read then.
  TWN_HD bool wait(int slot) const {
    if (is_published(slot)) return true;
    const uint64_t start = Memory::nanoseconds();
    while (!is_published(slot)) {
      if (Memory::nanoseconds() - start > Memory::kPatienceNanoseconds) return false;
      Memory::pause();
    }
    return true;
  }

  // True for the last of `parts` blocks that arrive at `slot`: it sees what all of them wrote before.
  TWN_HD bool arrive_last(int slot, uint32_t parts) const {
    return Memory::increment_or_wrap(words + kFirstFreeWord + slot, parts - 1) == parts - 1;
  }

  // Every block, once, as its last act here: the last of all makes the words ready for the next launch.
  TWN_HD void end() const {
    if (Memory::increment_or_wrap(words + kExitWord, blocks - 1) == blocks - 1) {
      Memory::store_release(words + kEpochWord, tag);
    }
  }
};

}  // namespace twn
