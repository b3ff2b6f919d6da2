// Which blocks are resident, and whose turn it is.
#include "grid.h"

#include <list>

namespace emulated {

// A kernel that runs, or waits to.
struct Grid {
  const Kernel* kernel;
  Grid* before;
  uint64_t clusters;
  uint64_t started = 0, ended = 0;  // clusters
  uint64_t open = 0;                // blocks that have let the next kernel start, or have ended
  bool waited = false;              // a thread has
  bool held;                        // where it lets the next kernel start
  bool reached = false;             // a thread has come there
  Number number = 0;
  Number passes_on = 0;  // up to where kernels have ended, as a block knew that let the next one start: it starts when all have

  bool over() const { return ended == clusters; }
  bool lets_next_start() const { return open == clusters * kernel->cluster; }
};

namespace {

constexpr int MOST_RESIDENT = 16 * 1024;  // threads

class Chain {
 public:
  explicit Chain(const std::vector<const Kernel*>& kernels) {
    for (const Kernel* kernel : kernels) {
      uint64_t blocks = uint64_t(kernel->grid.x) * kernel->grid.y * kernel->grid.z;
      if (kernel->grid.x % kernel->cluster) fail("%s: %u blocks in clusters of %d", kernel->name().c_str(), kernel->grid.x, kernel->cluster);
      grids.push_back({.kernel = kernel, .before = nullptr, .clusters = blocks / kernel->cluster, .held = order == Order::EARLY});
    }
    for (size_t i = 1; i < grids.size(); ++i) grids[i].before = &grids[i - 1];
    grids.back().held = false;  // no kernel comes next
    static Number begun = 0;
    for (Grid& grid : grids) grid.number = ++begun;
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
    uint64_t number = grid.started++;
    resident.emplace_back(&grid, *grid.kernel, order == Order::REVERSED ? grid.clusters - 1 - number : number);
    threads += resident.back().alive;
    // Of kernels that do not start early, all before have ended. What the kernel before did is not known of others, whether or not it has ended.
    Number known = grid.before ? grid.before->passes_on : grid.number - 1;
    for (Block* block : resident.back().blocks)
      for (Fiber& fiber : block->fibers) fiber.known = known;
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
      for (const Fiber& fiber : block->fibers) grid.passes_on = std::max(grid.passes_on, fiber.known);
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

Number number_of_kernel() { return block->cluster->grid->number; }

void let_next_start() {
  Grid& grid = *block->cluster->grid;
  if (!block->lets_next_start) {
    block->lets_next_start = true;
    ++grid.open;
    grid.passes_on = std::max(grid.passes_on, block->fibers[thread].known);
  }
  grid.reached = true;
  wait_until([&] { return !grid.held; }, "what may start early");
  if (order == Order::RANDOM && drawn(2)) yield();
}

void wait_for_turn() {
  Grid& grid = *block->cluster->grid;
  grid.waited = true;
  wait_until([&] { return !grid.before || grid.before->over(); }, "the kernel before theirs");
  block->fibers[thread].known = grid.number - 1;
}

}  // namespace emulated
