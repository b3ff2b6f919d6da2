// The GPU's memory: blocks of it lie apart in one range of addresses.
#pragma once
#include <cstddef>

namespace emulated {

constexpr size_t MEMORY = size_t(8) << 30;

// Null when there is not enough left. What nobody has written is 0xff, which makes NaN.
char* allocate(size_t bytes);
// Fails where a byte beside the block was written.
void release(char* start);
size_t memory_left();

// A block of memory, or what lies between two.
struct Piece {
  const char* start;
  size_t bytes;
  bool allocated;
};
Piece piece_at(const void* address);

// All addresses that memory can have. None is used twice, so what was released stays nobody's.
constexpr size_t ADDRESSES = size_t(1) << 38;
extern char* const first_address;
inline bool in_memory(const void* address) { return size_t(static_cast<const char*>(address) - first_address) < ADDRESSES; }

}  // namespace emulated
