// In place of CuTe's: copies of boxes.
#pragma once
#include "tensor_map.h"

namespace cute {

struct SM90_TMA_LOAD_MULTICAST_2D {
  static void copy(const void* map, uint64_t* barrier, uint16_t blocks, uint64_t, void* to, int column, int row) {
    emulated::copy_box(map, column, row, emulated::shared_address(to), emulated::shared_address(barrier), blocks);
  }
};
struct SM90_TMA_LOAD_2D {
  static void copy(const void* map, uint64_t* barrier, uint64_t hint, void* to, int column, int row) {
    SM90_TMA_LOAD_MULTICAST_2D::copy(map, barrier, 1u << emulated::block->rank, hint, to, column, row);
  }
  struct PREFETCH {
    static void copy(const void*, int, int) {}
  };
};

}  // namespace cute
