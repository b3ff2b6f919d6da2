// Which blocks are resident, and whose turn it is.
#include "grid.h"

#include <algorithm>
#include <list>

namespace emulated {

// A kernel that runs, or waits to.
struct Grid {
  const Kernel* kernel;
  Grid* before;
  uint64_t clusters;
  uint32_t number;
  uint64_t started = 0, ended = 0;  // clusters
  uint64_t open = 0;                // blocks that have let the next kernel start, or have ended
  bool waited = false;              // a thread has
  bool opens_late = false;          // the next kernel cannot start before a thread of this one has waited
  bool held;                        // where it lets the next kernel start
  bool reached = false;             // a thread has come there

  bool over() const { return ended == clusters; }
  bool lets_next_start() const { return open == clusters * kernel->cluster; }
  // The last kernel of those that have ended when this one starts as early as it can.
  uint32_t settled() const {
    if (!before) return number - 1;
    return before->opens_late ? before->number - 1 : before->settled();
  }
};

namespace {

constexpr int MOST_RESIDENT = 16 * 1024;  // threads
uint32_t numbers;                         // of kernels so far

class Chain {
 public:
  explicit Chain(const std::vector<const Kernel*>& kernels) {
    for (const Kernel* kernel : kernels) {
      uint64_t blocks = uint64_t(kernel->grid.x) * kernel->grid.y * kernel->grid.z;
      if (kernel->grid.x % kernel->cluster) fail("%s: %u blocks in clusters of %d", kernel->name().c_str(), kernel->grid.x, kernel->cluster);
      grids.push_back({.kernel = kernel, .before = nullptr, .clusters = blocks / kernel->cluster, .number = ++numbers, .held = order == Order::EARLY});
    }
    for (size_t i = 1; i < grids.size(); ++i) grids[i].before = &grids[i - 1];
    grids.back().held = false;  // no kernel comes next
  }

  void run() {
    while (!over()) {
      while (may_start()) start();
      if (!(order == Order::RANDOM ? run_any() : run_latest())) report();
    }
  }

 private:
  std::vector<Grid> grids;
  size_t next = 0;              // whose clusters start
  std::list<Cluster> resident;  // the latest last
  int threads = 0;
  uint64_t events = 0;  // that clusters may have waited for

  bool over() const { return next == grids.size() && resident.empty(); }

  bool may_start() {
    while (next < grids.size() && grids[next].started == grids[next].clusters) ++next;
    if (next == grids.size()) return false;
    if (resident.empty()) return true;
    const Grid& grid = grids[next];
    if (!overlapping() || grids.size() == 1 || threads + grid.kernel->threads * grid.kernel->cluster > MOST_RESIDENT) return false;
    bool allowed = !grid.before || grid.before->over() || grid.before->lets_next_start();
    return allowed && (order != Order::RANDOM || drawn(2));
  }

  void start() {
    Grid& grid = grids[next];
    uint64_t at = grid.started++;
    if (order == Order::REVERSED) at = grid.clusters - 1 - at;
    resident.emplace_back(&grid, *grid.kernel, at, Access{grid.number, grid.settled()});
    threads += resident.back().alive;
  }

  bool run(std::list<Cluster>::iterator cluster) {
    if (cluster->stuck_since == events) return false;
    bool ran = cluster->run(order == Order::RANDOM);
    if (cluster->alive == 0) end(cluster);
    else if (!ran || order != Order::RANDOM) cluster->stuck_since = events;
    return ran;
  }

  void end(std::list<Cluster>::iterator cluster) {
    Grid& grid = *cluster->grid;
    ++grid.ended;
    for (const Block* block : cluster->blocks) {
      if (block->lets_next_start) continue;
      ++grid.open;
      grid.opens_late |= std::ranges::any_of(block->fibers, [&](const Fiber& fiber) { return fiber.settled == grid.number - 1; });
    }
    threads -= grid.kernel->threads * grid.kernel->cluster;
    resident.erase(cluster);
    if (!grid.over()) return;
    ++events;
    if (grid.kernel->early && !grid.waited)
      fail("%s ends, and none of its threads has waited for its turn", grid.kernel->name().c_str());
  }

  // The latest kernel that can run, or can be let go.
  bool run_latest() {
    for (auto cluster = resident.end(); cluster != resident.begin();) {
      Grid& grid = *(--cluster)->grid;
      if (run(cluster)) return true;
      bool all_tried = cluster == resident.begin() || std::prev(cluster)->grid != &grid;
      if (!all_tried || !grid.held || !grid.reached) continue;
      grid.held = false;
      ++events;
      return true;
    }
    return false;
  }

  bool run_any() {
    uint64_t skipped = drawn(resident.size()), tried = 0;
    auto cluster = std::next(resident.begin(), skipped);
    for (; tried < resident.size(); ++tried, ++cluster) {
      if (cluster == resident.end()) cluster = resident.begin();
      if (run(cluster)) return true;
    }
    return false;
  }

  [[noreturn]] void report() const {
    for (const Cluster& cluster : resident) cluster.report();
    fail("threads wait for each other");
  }
};

}  // namespace

void run_kernels(const std::vector<const Kernel*>& chain) { Chain(chain).run(); }

void let_next_start() {
  Grid& grid = *block->cluster->grid;
  if (!block->lets_next_start) {
    block->lets_next_start = true;
    ++grid.open;
    grid.opens_late |= access.settled == grid.number - 1;
  }
  grid.reached = true;
  wait_until([&] { return !grid.held; }, "what may start early");
  if (order == Order::RANDOM && drawn(2)) yield();
}

void wait_for_turn() {
  Grid& grid = *block->cluster->grid;
  grid.waited = true;
  wait_until([&] { return !grid.before || grid.before->over(); }, "the kernel before theirs");
  block->fibers[thread].settled = access.settled = grid.number - 1;
}

}  // namespace emulated
