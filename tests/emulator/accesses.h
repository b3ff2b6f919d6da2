// Whether kernels that can overlap touch the same memory, which is found whatever they happen to do here. In a watched build every load and
// store of a kernel calls a function of accesses.cpp (g++ -fsanitize=thread puts the calls in; the functions are not its runtime's), and so
// does whoever reads or writes for a kernel. Of every four bytes of the GPU's memory it is noted which kernel of those that came furthest has
// written and read them. A thread may touch nothing that another kernel writes, and write nothing that it reads, unless that one is settled:
// it ended before the thread's own kernel could start, or the thread has waited for its turn. (Of other streams' kernels nothing is said.)
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulated {

// The GPU's memory.
constexpr size_t MEMORY = size_t(8) << 30;
char* memory();

// Who runs: the number of a kernel, which rises from one to the next, and the number up to which all are settled for this thread.
struct Access {
  uint32_t kernel, settled;
};
extern Access access;

void reads(const void* from, size_t bytes);
void writes(void* to, size_t bytes);

}  // namespace emulated
