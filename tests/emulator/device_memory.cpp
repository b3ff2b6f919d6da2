// Blocks of memory, and the margins between them.
#include "device_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <map>

#include "accesses.h"
#include "machine.h"

namespace emulated {

char* const first_address = [] {
  void* range = mmap(nullptr, ADDRESSES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) fail("%zu bytes of addresses are refused", ADDRESSES);
  return static_cast<char*>(range);
}();

namespace {

// Between two blocks, and never given: an access that misses a block by less lands there.
constexpr size_t MARGIN = 1024;
constexpr unsigned char UNWRITTEN = 0xff;
std::map<const char*, size_t> blocks;  // bytes by start
size_t next = MARGIN, taken;
Piece last{};  // that was asked for

constexpr size_t PAGE = 4096;
size_t up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

char* allocate(size_t bytes) {
  if (bytes > MEMORY - taken) return nullptr;
  // Whole pages, which can be given back.
  size_t whole = up(bytes + MARGIN, PAGE);
  if (next + whole > ADDRESSES) fail("more than %zu bytes were allocated in all", ADDRESSES);
  char* start = first_address + up(next, PAGE);
  next = size_t(start - first_address) + whole;
  memset(start, UNWRITTEN, bytes + MARGIN);
  blocks[start] = bytes;
  last = {};
  taken += bytes;
  return start;
}

void release(char* start) {
  size_t bytes = blocks.at(start);
  for (size_t i = bytes; i < bytes + MARGIN; ++i)
    if (static_cast<unsigned char>(start[i]) != UNWRITTEN) fail("%zu bytes of memory, and byte %zu written", bytes, i);
  blocks.erase(start);
  last = {};
  taken -= bytes;
  accesses::forget(start, bytes);
  madvise(start, up(bytes + MARGIN, PAGE), MADV_DONTNEED);
}

size_t memory_left() { return MEMORY - taken; }

Piece piece_at(const void* address) {
  auto* at = static_cast<const char*>(address);
  if (last.start && size_t(at - last.start) < last.bytes) return last;
  auto above = blocks.upper_bound(at);
  const char *start = first_address, *end = above == blocks.end() ? first_address + ADDRESSES : above->first;
  last = {start, size_t(end - start), false};
  if (above != blocks.begin()) {
    auto [below, bytes] = *std::prev(above);
    if (at < below + bytes) last = {below, bytes, true};
    else last = {below + bytes, size_t(end - below - bytes), false};
  }
  return last;
}

}  // namespace emulated
