// What the units beside a block's threads know of it: the async proxy, the tensor cores' products in flight, barriers by name.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "mbarrier.h"
#include "wgmma.h"

namespace emulated {

// Registers of one lane that products add to. While there are products in flight they hold nonsense, and their values are here.
struct Accumulator {
  std::vector<float*> registers;
  std::vector<float> values;
  int in_flight = 0;
};

// What is kept of a thread.
struct ThreadEngines {
  std::vector<uint32_t> unshown;  // addresses that it has written since its last proxy fence
  // Products.
  bool ordered = false;  // a fence came after the last wait
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::vector<Accumulator> accumulators;
  uint32_t closed = 0;  // groups
  // Of the copy engine.
  std::vector<const void*> maps;        // that a kernel made and this thread acquired
  std::vector<PhaseBarrier*> barriers;  // that it initialised since its last fence
  int registers = 0;
};

constexpr int GROUP_THREADS = 128;
struct WarpgroupEngines {
  std::vector<int> closed;  // by group of products, threads that have closed it
  uint32_t computed = 0;    // groups
  int turns = 0;            // of threads that wait, until the next are computed
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  long generation = 0;
};

// A copy of so many bytes that is under way.
struct Landing {
  int bytes;
  std::function<void()> copy;
};

struct Engines {
  std::vector<uint16_t> writers;  // by 16 bytes of shared memory: 1 + thread, until that thread's proxy fence
  std::vector<ThreadEngines> threads;
  std::vector<WarpgroupEngines> warpgroups;
  std::array<NamedBarrier, 16> barriers;
  int spare_registers = 0;
  std::unordered_map<PhaseBarrier*, std::deque<Landing>> landings;  // in this block, by the barrier that they are told to
};

Engines& engines(Block& of = *block);

// Of what may happen now or later: whether now.
inline bool at_once() { return drawn(2); }

}  // namespace emulated
