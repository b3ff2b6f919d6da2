// Shared memory by its addresses, as instructions name it. Tensor cores and the copy engine read and write it by another way than threads do, the
// async proxy: what a thread has written they see after that thread's fence.
#pragma once
#include "machine.h"

namespace emulated {

// Also of what is not in dynamic shared memory: then it is an address in 64 bits only.
inline size_t shared_address(const void* p) { return size_t(static_cast<const char*>(p) - block->shared); }

// Of a block of this cluster.
inline char* shared_of(unsigned rank) {
  const auto& blocks = block->cluster->blocks;
  if (rank >= blocks.size() || !blocks[rank]->alive) fail("block %u of a cluster is used, and there is none or it has ended", rank);
  return blocks[rank]->shared;
}

template <class T> T& shared_at(size_t address) {
  if (address % alignof(T)) fail("an access to %zu bytes of shared memory at %zu", sizeof(T), address);
  return *reinterpret_cast<T*>(block->shared + address);
}

// A write by this thread, within 16 bytes that begin at a multiple of 16.
void note_write(uint32_t address);
// fence.proxy.async: what this thread has written.
void show_writes();
// A read of those 16 bytes by the async proxy.
void check_shown(uint32_t address);

template <class T> void store_shared(uint32_t address, T x) {
  shared_at<T>(address) = x;
  note_write(address);
}

}  // namespace emulated
