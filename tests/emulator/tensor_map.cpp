// The copy engine.
#include "tensor_map.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "accesses.h"
#include "engines.h"
#include "mbarrier.h"

namespace emulated {
namespace {

constexpr int ROW_BYTES = 128;
std::unordered_set<const void*> made_here;  // maps that kernels have put into global memory

}  // namespace

void publish(CUtensorMap* to, const CUtensorMap& map) {
  constexpr size_t PIECE = sizeof(CUtensorMap) / WARP;
  size_t own = thread % WARP * PIECE;
  accesses::write(reinterpret_cast<char*>(to) + own, PIECE);
  memcpy(reinterpret_cast<char*>(to) + own, reinterpret_cast<const char*>(&map) + own, PIECE);
  made_here.insert(to);
}

void acquire(const CUtensorMap* map) { engines().threads[thread].maps.push_back(map); }

void copy_box(const void* at, int column, int row, uint32_t to, uint32_t barrier, unsigned blocks) {
  if (made_here.contains(at) && !std::ranges::count(engines().threads[thread].maps, at))
    fail("a tensor map that a kernel made, and that this thread has not acquired");
  TensorMap map;
  accesses::read(at, sizeof map);
  memcpy(&map, at, sizeof map);
  if (map.made != TensorMap::MADE) fail("no tensor map at %p", at);
  if (to % ROW_BYTES) fail("a copy of a box to %u", to);
  // All of it is read from now on, whenever it lands.
  int64_t width = std::min<int64_t>(map.extent[0], column + ROW_BYTES / 2) - column, end = std::min<int64_t>(map.extent[1], row + map.box[1]);
  for (int64_t y = row; y < end && width > 0; ++y) accesses::read(static_cast<const char*>(map.data) + y * map.stride + column * 2, width * 2);
  for (unsigned rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    char* target = shared_of(rank);
    land(rank, barrier, map.box[1] * ROW_BYTES, [=] {
      for (uint32_t r = 0; r < map.box[1]; ++r)
        for (uint32_t piece = 0; piece < ROW_BYTES; piece += 16) {
          uint16_t eight[8];
          for (int i = 0; i < 8; ++i) {
            int64_t c = int64_t(column) + piece / 2 + i, y = int64_t(row) + r;
            bool inside = c >= 0 && c < map.extent[0] && y >= 0 && y < map.extent[1];
            eight[i] = inside ? reinterpret_cast<const uint16_t*>(static_cast<const char*>(map.data) + y * map.stride)[c] : 0;
          }
          uint32_t address = to + r * ROW_BYTES + piece;
          memcpy(target + (address ^ (address >> 7 & 7) << 4), eight, sizeof eight);
        }
    });
  }
}

}  // namespace emulated

// In rows of 128 bytes with the 128-byte swizzle, the only kind there is here.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* extents,
                                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  using emulated::TensorMap;
  bool known = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
               swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && box[0] * 2 == emulated::ROW_BYTES &&
               steps[0] == 1 && steps[1] == 1;
  bool right = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 &&
               strides[0] < 1ull << 40 && box[1] >= 1 && box[1] <= 256;
  for (int i = 0; i < 2; ++i) right &= extents[i] >= 1 && extents[i] <= 1ull << 32;
  if (!known || !right) return CUDA_ERROR_INVALID_VALUE;
  TensorMap made{TensorMap::MADE, data, {cuuint32_t(extents[0]), cuuint32_t(extents[1])}, strides[0], {box[0], box[1]}};
  *map = {};
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}
