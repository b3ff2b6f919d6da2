// Matrices as the copy engine knows them, and its copies (PTX ISA: tensormap, cp.async.bulk.tensor): boxes of bf16 into rows of 128 bytes of
// shared memory, permuted by the 128-byte swizzle, with zeros for what lies outside.
#pragma once
#include <cuda.h>

#include "shared.h"

namespace emulated {

// What a CUtensorMap holds here: a row-major matrix of bf16.
struct TensorMap {
  static constexpr uint64_t MADE = 0x7465'6e73'6f72'6d61;
  uint64_t made;
  const void* data;
  uint32_t extent[2];  // columns, rows
  uint64_t stride;     // bytes from one row to the next
  uint32_t box[2];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// By its address in shared memory, which may be that of a static variable.
inline TensorMap& map_at(size_t address) { return *reinterpret_cast<TensorMap*>(block->shared + address); }

// A warp puts a map that it has made into global memory, from where a thread may use it when it has acquired it.
void publish(CUtensorMap* to, const CUtensorMap& map);
void acquire(const CUtensorMap* map);

// The box whose first element is (column, row) to the same place of the blocks of a mask, and to their barriers at the same place.
void copy_box(const void* map, int column, int row, uint32_t to, uint32_t barrier, unsigned blocks);

}  // namespace emulated
