// Every access of a kernel to the GPU's memory and to the shared memory of its blocks, where kernels were compiled to tell of them (build.py
// --watched: with the compiler's hooks for a thread sanitizer, whose runtime this is in place of). Two accesses to the same byte, one of them a
// write, are a race unless something says which comes first:
//   the same thread; a barrier of the block, or of the warp, between them (a shuffle orders nothing); both atomic
//   the end of a kernel, for whoever has learnt of it: kernels that do not start early know that all before them have ended; threads of others
//   know what the kernel before knew when it let them start, until they have waited for their turn, or met a thread that has
// No schedule is needed for a race to be seen: it is one even if nothing went wrong. (Nothing is said of kernels on several streams, nor of the shared
// memory of blocks that have barriers of other kinds.) An access beside a block of memory, or beyond the shared memory of the thread's block, is a
// fault as well. All faults are told, once for each pair of places in the sources; the program that met any ends with exit code 86.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulated::accesses {

// Accesses while one lives are atomic.
struct Atomic {
  Atomic();
  ~Atomic();
};

// A moment in the life of a thread.
struct Moment {
  uint32_t block_epoch, warp_epoch;
  bool operator==(const Moment&) const = default;
};
Moment now();
// Accesses of the thread while one lives may be made at any time since then: those of an asynchronous copy.
struct Since {
  explicit Since(Moment);
  ~Since();
};

// By a unit that this thread puts to work, from now on, or by what has no hooks.
void read(const void* start, size_t bytes);
void write(void* start, size_t bytes);

// Nobody has accessed these bytes of the GPU's memory.
void forget(const char* start, size_t bytes);

}  // namespace emulated::accesses
