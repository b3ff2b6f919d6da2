// In place of CuTe's: tensor maps that a kernel changes.
#pragma once
#include "tensor_map.h"

namespace cute {

using TmaDescriptor = CUtensorMap;
namespace TMA {
enum class CacheHintSm90 : uint64_t { EVICT_NORMAL = 0x1000000000000000 };
}

inline void tma_descriptor_replace_addr_in_shared_mem(TmaDescriptor& map, const void* data) {
  reinterpret_cast<emulated::TensorMap&>(map).data = data;
}
inline void tma_descriptor_cp_fence_release(const TmaDescriptor* to, TmaDescriptor& map) {
  emulated::publish(const_cast<TmaDescriptor*>(to), map);
}
inline void tma_descriptor_fence_acquire(const TmaDescriptor* map) { emulated::acquire(map); }

}  // namespace cute
