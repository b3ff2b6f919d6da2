// The engines of a block, from its first use of them to its end.
#include "engines.h"

namespace emulated {

Engines& engines(Block& of) {
  if (!of.engines) of.engines = std::make_shared<Engines>();
  size_t threads = of.fibers.size();
  if (of.engines->threads.empty()) {
    of.engines->threads.resize(threads);
    of.engines->warpgroups.resize((threads + GROUP_THREADS - 1) / GROUP_THREADS);
  }
  return *of.engines;
}

void end_engines(Block& of) {
  if (!of.engines || of.engines->threads.empty()) return;
  Engines& all = *of.engines;
  for (const auto& [barrier, left] : all.landings)
    if (!left.empty()) fail("a block ends while %zu copies to it are under way", left.size());
  for (const ThreadEngines& thread : all.threads) {
    if (!thread.groups.empty() || !thread.open.empty()) fail("a block ends before its products");
    for (uint32_t piece : thread.unshown) all.writers[piece] = 0;
  }
  all.landings.clear();
  all.threads.clear();
  all.warpgroups.clear();
  all.barriers = {};
  all.spare_registers = 0;
}

}  // namespace emulated
