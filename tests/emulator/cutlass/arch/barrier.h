// In place of CUTLASS's: barriers in shared memory of a cluster's blocks.
#pragma once
#include "mbarrier.h"
#include "shared.h"

namespace cutlass::arch {

struct ClusterBarrier {
  uint64_t barrier_;
  void init(int count) const { here().init(count); }
  void wait(uint32_t phase) const { here().wait(phase); }
  void arrive(uint32_t block) const { emulated::barrier_of(block, emulated::shared_address(this)).arrive(); }

 protected:
  emulated::PhaseBarrier& here() const { return emulated::barrier_at(emulated::shared_address(this)); }
};
struct ClusterTransactionBarrier : ClusterBarrier {
  void arrive_and_expect_tx(uint32_t bytes) const { here().arrive(bytes); }
};
inline void fence_barrier_init() { emulated::show_barriers(); }

}  // namespace cutlass::arch
