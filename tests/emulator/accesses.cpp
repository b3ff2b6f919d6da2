// Accesses, and who made the last ones.
#include "accesses.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <tuple>

#include "device_memory.h"
#include "grid.h"

namespace emulated {
namespace {

// Who accessed a byte, and when. Several threads that may have read it at the same time are one stamp.
struct Stamp {
  Number kernel;  // 0: nobody
  uint32_t block;
  accesses::Moment moment;
  uint32_t code;  // bytes from the start of this library
  uint16_t thread;
  bool atomic, several_lanes : 1, several_warps : 1, several_blocks : 1;

  bool operator==(const Stamp&) const = default;
};

// What happened last to a byte.
struct Cell {
  Stamp write, read;
};

// Of bytes that are as many as address space costs nothing: pages come to be where there are accesses.
Cell* cells_for(size_t bytes) {
  void* range = mmap(nullptr, bytes * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) fail("no addresses for what is known of %zu bytes", bytes);
  return static_cast<Cell*>(range);
}

Cell* of_memory() {
  static Cell* const cells = cells_for(ADDRESSES);
  return cells;
}
// Of the place in which a block has its shared memory.
Cell* of_shared(const Block& block) {
  static std::map<const char*, Cell*> places;
  static const char* last = nullptr;
  static Cell* cells = nullptr;
  if (block.shared != last) {
    Cell*& found = places[block.shared];
    if (!found) found = cells_for(MOST_SHARED);
    last = block.shared, cells = found;
  }
  return cells;
}

bool atomic_now, is_since;
accesses::Moment since;

// Where this library begins.
const char* const library = [] {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(accesses::now), &info);
  return static_cast<const char*>(info.dli_fbase);
}();

uint32_t number_of_block() {
  const Three &at = block->index, &grid = block->cluster->kernel.grid;
  return (at.z * grid.y + at.y) * grid.x + at.x;
}

// Whether all of an earlier access came before what the thread does now.
bool before(const Stamp& earlier, const Stamp& now) {
  if (earlier.kernel == 0) return true;
  if (earlier.kernel != now.kernel) return earlier.kernel <= block->fibers[thread].known;
  if (earlier.block != now.block || earlier.several_blocks) return false;
  if (earlier.thread == now.thread && !earlier.several_lanes && !earlier.several_warps) return true;
  const accesses::Moment& from = is_since ? since : now.moment;
  if (earlier.moment.block_epoch < from.block_epoch) return true;
  return earlier.thread / WARP == now.thread / WARP && !earlier.several_warps && earlier.moment.warp_epoch < from.warp_epoch;
}

int faults;
[[gnu::destructor]] void judge() {
  if (faults == 0) return;
  fprintf(stderr, "emulated GPU: %d faults among accesses to memory\n", faults);
  fflush(nullptr);
  _exit(86);
}

// A place in the sources.
std::string line_of(uint32_t code) {
  Dl_info info{};
  dladdr(library, &info);
  char command[1024], line[512] = "?";
  snprintf(command, sizeof(command), "addr2line -s -e '%s' %x", info.dli_fname, code);
  if (FILE* answer = popen(command, "r")) {
    if (fgets(line, sizeof(line), answer)) line[strcspn(line, " \n")] = 0;
    pclose(answer);
  }
  return line;
}

std::string who(const Stamp& stamp) {
  if (stamp.several_blocks) return "threads of several blocks";
  const char* what = stamp.several_warps ? "warps, one of them that of thread" : stamp.several_lanes ? "lanes, one of them thread" : "thread";
  return std::string(what) + " " + std::to_string(stamp.thread) + " of block " + std::to_string(stamp.block);
}

void race(const Stamp& earlier, bool wrote, const Stamp& now, bool writes, const char* where) {
  static std::set<std::tuple<uint32_t, bool, uint32_t, bool>> told;
  if (!told.insert({earlier.code, wrote, now.code, writes}).second) return;
  ++faults;
  int64_t kernels = int64_t(now.kernel) - earlier.kernel;
  std::string side = kernels > 0 ? "before" : "after", when = ", " + std::to_string(std::abs(kernels)) + " kernels " + side + ",";
  if (kernels == 0) when = "";
  if (std::abs(kernels) == 1) when = ", in the kernel " + side + ",";
  fprintf(stderr, "emulated GPU: race in %s: %s %s %s (%s), which%s %s %s (%s)\n", block->cluster->kernel.name().c_str(), who(now).c_str(),
          writes ? "writes" : "reads", where, line_of(now.code).c_str(), when.c_str(), who(earlier).c_str(), wrote ? "wrote" : "read",
          line_of(earlier.code).c_str());
}

void beside(const char* at, size_t bytes, bool write, uint32_t code, const char* what, const Piece& piece) {
  static std::set<uint32_t> told;
  if (!told.insert(code).second) return;
  ++faults;
  fprintf(stderr, "emulated GPU: %s: thread %d of block %u %s %zu bytes, %td behind the start of %s of %zu bytes (%s)\n",
          block->cluster->kernel.name().c_str(), thread, number_of_block(), write ? "writes" : "reads", bytes, at - piece.start, what, piece.bytes,
          line_of(code).c_str());
}

// One access to a byte. What has met another is not compared with a third.
void access(Cell& cell, const Stamp& now, bool write, const char* where) {
  Stamp& read = cell.read;
  if (write ? cell.write == now && read.kernel == 0 : read == now) return;
  auto clash = [&](const Stamp& earlier) { return !(earlier.atomic && now.atomic) && !before(earlier, now); };
  if (clash(cell.write)) race(cell.write, true, now, write, where), cell.write = {};
  if (write) {
    if (clash(read)) race(read, false, now, write, where);
    cell.write = now, read = {};
    return;
  }
  if (read.kernel > now.kernel) return;  // a later kernel has read it early: whoever writes it is to meet that one
  Stamp readers = now;
  if (read.kernel == now.kernel && !before(read, now)) {
    readers.several_blocks = read.several_blocks || read.block != now.block;
    readers.several_warps = read.several_warps || read.thread / WARP != now.thread / WARP;
    readers.several_lanes = read.several_lanes || read.thread != now.thread;
    readers.atomic = read.atomic && now.atomic;
  }
  read = readers;
}

inline void access(const void* address, size_t bytes, bool write, const void* caller) {
  if (!block) return;  // no kernel has run yet: launchers have hooks too, but nothing to do with the GPU's memory
  auto* at = static_cast<const char*>(address);
  auto offset = size_t(at - block->shared);
  bool shared = offset < MOST_SHARED;
  if (!shared && !in_memory(at)) return;  // a thread's own
  auto code = uint32_t(static_cast<const char*>(caller) - 1 - library);
  Piece piece = shared ? Piece{block->shared, block->shared_used, true} : piece_at(at);
  if (!piece.allocated || at + bytes > piece.start + piece.bytes)
    return beside(at, bytes, write, code, shared ? "shared memory" : piece.allocated ? "a block of memory" : "a gap between blocks of memory", piece);
  Stamp now = {number_of_kernel(), number_of_block(), accesses::now(), code, uint16_t(thread), atomic_now, false, false, false};
  if (shared && block->other_barriers) return;
  Cell* cells = shared ? of_shared(*block) + offset : of_memory() + (at - first_address);
  for (Cell* cell = cells; cell < cells + bytes; ++cell) {
    if (shared) {  // another block had the place before
      if (cell->write.kernel != now.kernel || cell->write.block != now.block) cell->write = {};
      if (cell->read.kernel != now.kernel || cell->read.block != now.block) cell->read = {};
    }
    access(*cell, now, write, shared ? "shared memory" : "memory");
  }
}

}  // namespace

namespace accesses {

Atomic::Atomic() { atomic_now = true; }
Atomic::~Atomic() { atomic_now = false; }
Moment now() { return {uint32_t(block->all.generation), block->fibers[thread].warp_epoch}; }
Since::Since(Moment moment) { is_since = true, since = moment; }
Since::~Since() { is_since = false; }

void read(const void* start, size_t bytes) {
  if (WATCHED) access(start, bytes, false, __builtin_return_address(0));
}

void write(void* start, size_t bytes) {
  if (WATCHED) access(start, bytes, true, __builtin_return_address(0));
}

void forget(const char* start, size_t bytes) {
  if (!WATCHED) return;
  constexpr uintptr_t PAGE = 4096;
  auto first = (reinterpret_cast<uintptr_t>(of_memory() + (start - first_address)) + PAGE - 1) / PAGE * PAGE;
  auto end = reinterpret_cast<uintptr_t>(of_memory() + (start + bytes - first_address)) / PAGE * PAGE;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

}  // namespace accesses
}  // namespace emulated

// What the compiler calls before each access of a kernel.
#define HOOK(name, ...) extern "C" __attribute__((visibility("hidden"))) void __tsan_##name(__VA_ARGS__)
#define HOOK_OF(name, bytes, write) \
  HOOK(name##bytes, void* at) { emulated::access(at, bytes, write, __builtin_return_address(0)); }
#define HOOKS_OF(bytes) \
  HOOK_OF(read, bytes, false) HOOK_OF(write, bytes, true) HOOK_OF(unaligned_read, bytes, false) HOOK_OF(unaligned_write, bytes, true)
HOOKS_OF(1)
HOOKS_OF(2)
HOOKS_OF(4)
HOOKS_OF(8)
HOOKS_OF(16)
HOOK(read_range, void* at, unsigned long bytes) { emulated::access(at, bytes, false, __builtin_return_address(0)); }
HOOK(write_range, void* at, unsigned long bytes) { emulated::access(at, bytes, true, __builtin_return_address(0)); }
HOOK(vptr_update, void**, void*) {}
HOOK(vptr_read, void**) {}
HOOK(init) {}
// Of a launcher: whether a variable that is made once has been made.
extern "C" __attribute__((visibility("hidden"))) char __tsan_atomic8_load(const char* at, int) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
