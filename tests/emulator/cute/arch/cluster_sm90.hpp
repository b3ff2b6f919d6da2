// In place of CuTe's: blocks of a cluster.
#pragma once
#include "mbarrier.h"
#include "shared.h"

namespace cute {
inline uint32_t block_rank_in_cluster() { return emulated::block->rank; }
inline void cluster_sync() { emulated::wait_for_cluster(); }
// A store that the other block's barrier is told of.
inline void store_shared_remote(uint32_t value, uint32_t to, uint32_t barrier, uint32_t rank) {
  char* target = emulated::shared_of(rank);
  emulated::land(rank, barrier, sizeof value, [=] { memcpy(target + to, &value, sizeof value); });
}
}  // namespace cute
