// Barriers in shared memory, of threads and of copies (PTX ISA: mbarrier), and barriers by name (bar.sync, bar.arrive). A copy that ends at a
// barrier lands when it is asked for or, as often, when a thread waits for that barrier.
#pragma once
#include <functional>

#include "machine.h"

namespace emulated {

// Eight bytes of shared memory. A phase ends when all threads have arrived and all bytes have come.
struct PhaseBarrier {
  static constexpr unsigned MADE = 0x5b;
  uint64_t phase : 1, made : 7, shown : 1, expected : 15, missing : 16;
  int64_t bytes : 24;  // still to come; what comes before it is expected makes this negative

  void init(int count);
  void arrive(int bytes_expected = 0);
  void receive(int count);  // bytes
  // Until the current phase is not the one of this parity.
  void wait(unsigned parity);

 private:
  void check(const char* what) const;
  void turn();
};
static_assert(sizeof(PhaseBarrier) == 8);

// In this block, or in another one of its cluster, to which a barrier is shown by the fence that follows its initialisation.
PhaseBarrier& barrier_at(uint32_t address);
PhaseBarrier& barrier_of(unsigned rank, uint32_t address);
void show_barriers();

// A copy of so many bytes to the block of this rank, which its barrier is told.
void land(unsigned rank, uint32_t barrier, int bytes, std::function<void()> copy);

// Waits until `threads` have come, or only says that this one has.
void named_barrier(int name, int threads, bool waits);

}  // namespace emulated
