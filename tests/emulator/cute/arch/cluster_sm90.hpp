// In place of CuTe's: blocks of a cluster.
#pragma once
#include "machine.h"

namespace cute {
inline uint32_t block_rank_in_cluster() { return emulated::block->rank; }
inline void cluster_sync() { emulated::wait_for_cluster(); }
}  // namespace cute
