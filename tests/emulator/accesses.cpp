// Who touched what.
#include "accesses.h"

#include <sys/mman.h>

#include <algorithm>

#include "machine.h"

namespace emulated {

Access access;

namespace {

constexpr size_t GRAIN = 4;

// By the kernel with the highest number.
struct Touched {
  uint32_t writer, reader;
};

template <class T> T* reserve(size_t bytes) {
  void* room = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) fail("no room for %zu bytes", bytes);
  return static_cast<T*>(room);
}

char* const start = reserve<char>(MEMORY);
Touched* const touched = reserve<Touched>(MEMORY / GRAIN * sizeof(Touched));

[[noreturn, gnu::noinline]] void conflict(const char* own, const char* others, size_t grain, uint32_t other) {
  fail("%s, block (%u, %u, %u), thread %d %s memory at %p that the kernel %u %s it %s: neither has waited for the other",
       block->cluster->kernel.name().c_str(), block->index.x, block->index.y, block->index.z, thread, own, start + grain * GRAIN,
       other < access.kernel ? access.kernel - other : other - access.kernel, other < access.kernel ? "before" : "after", others);
}

// Whether it is another kernel that can run now.
inline bool at_large(uint32_t kernel) { return kernel > access.settled && kernel != access.kernel; }

}  // namespace

char* memory() { return start; }

void reads(const void* from, size_t bytes) {
  size_t at = static_cast<const char*>(from) - start;
  if (at >= MEMORY) return;
  for (size_t grain = at / GRAIN; grain <= (at + bytes - 1) / GRAIN; ++grain) {
    if (at_large(touched[grain].writer)) conflict("reads", "writes", grain, touched[grain].writer);
    touched[grain].reader = std::max(touched[grain].reader, access.kernel);
  }
}

void writes(void* to, size_t bytes) {
  size_t at = static_cast<char*>(to) - start;
  if (at >= MEMORY) return;
  for (size_t grain = at / GRAIN; grain <= (at + bytes - 1) / GRAIN; ++grain) {
    if (at_large(touched[grain].writer)) conflict("writes", "writes", grain, touched[grain].writer);
    if (at_large(touched[grain].reader)) conflict("writes", "reads", grain, touched[grain].reader);
    touched[grain].writer = std::max(touched[grain].writer, access.kernel);
  }
}

}  // namespace emulated

// What g++ calls.
#define OF_SIZE(bytes)                                                                     \
  extern "C" void __tsan_read##bytes(void* at) { emulated::reads(at, bytes); }             \
  extern "C" void __tsan_write##bytes(void* at) { emulated::writes(at, bytes); }           \
  extern "C" void __tsan_unaligned_read##bytes(void* at) { emulated::reads(at, bytes); }   \
  extern "C" void __tsan_unaligned_write##bytes(void* at) { emulated::writes(at, bytes); }
OF_SIZE(1)
OF_SIZE(2)
OF_SIZE(4)
OF_SIZE(8)
OF_SIZE(16)
extern "C" void __tsan_read_range(void* at, size_t bytes) { emulated::reads(at, bytes); }
extern "C" void __tsan_write_range(void* at, size_t bytes) { emulated::writes(at, bytes); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
// Of the guards of a launcher's static variables.
extern "C" char __tsan_atomic8_load(const volatile char* at, int order) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
