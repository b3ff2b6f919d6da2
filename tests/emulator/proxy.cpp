// Which writes to shared memory the async proxy may see.
#include "engines.h"
#include "shared.h"

namespace emulated {

void note_write(uint32_t address) {
  Engines& all = engines();
  uint32_t piece = address / 16;
  if (piece >= all.writers.size()) all.writers.resize(piece + 4096);
  auto own = uint16_t(thread + 1);
  if (all.writers[piece] == own) return;
  all.writers[piece] = own;
  all.threads[thread].unshown.push_back(piece);
}

void show_writes() {
  Engines& all = engines();
  for (uint32_t piece : all.threads[thread].unshown)
    if (all.writers[piece] == thread + 1) all.writers[piece] = 0;
  all.threads[thread].unshown.clear();
}

void check_shown(uint32_t address) {
  const auto& writers = engines().writers;
  if (address / 16 < writers.size() && writers[address / 16])
    fail("shared memory at %u is read by the async proxy, and thread %d wrote it without a proxy fence", address, writers[address / 16] - 1);
}

}  // namespace emulated
