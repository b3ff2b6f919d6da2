// A GPU whose threads are fibers of one CPU thread: each runs until it waits for others. What threads may only do by way of a barrier
// therefore goes wrong here without one, mostly. Blocks are resident with memory of their own; which of them run when, grid.h says.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace emulated {

// Kernels are numbered as they begin; 0 is before the first.
using Number = uint32_t;

constexpr int WARP = 32, MOST_THREADS = 1024;
constexpr size_t MOST_SHARED = 227 << 10;  // bytes of a block's shared memory, of compute capability 9.0

struct Three {
  unsigned x, y, z;
};

// A kernel as it was launched.
struct Kernel {
  const void* code;
  Three grid;
  int threads;                 // of a block
  size_t shared_bytes;         // of dynamic shared memory
  int cluster;                 // blocks side by side that are resident together
  bool early;                  // it may start before the kernel before it has ended
  std::function<void()> body;  // of each thread

  std::string name() const;
};

// Where threads meet: those who wait go on when as many as are expected have come.
struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
  void arrive(int expected) {
    ++arrived;
    release(expected);
  }
  void release(int expected) {
    if (arrived < expected) return;
    arrived = 0;
    ++generation;
  }
};

// What a thread waits for.
struct Condition {
  bool (*holds)(const void*);
  const void* of;
  const char* what;
};

struct Fiber {
  void* top;  // of its stack, while it waits
  char* stack;
  Condition waits;  // without `holds`: for its turn to run
  bool ended;
  Number known;         // it knows that all kernels up to this one have ended
  uint32_t warp_epoch;  // how often its warp has met
};

// What a lane of a warp shows the others between two waits.
struct Shown {
  uint64_t value;
  uint32_t words[7];
};

// Copies that a thread has asked for, in groups. Each that is left is made when the thread waits for its group, the latest moment there is.
struct Copies {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;
  void wait(size_t most_left);
};

struct Cluster;
struct Grid;
struct Engines;

// A resident block.
struct Block {
  Cluster* cluster;
  unsigned rank;  // in its cluster
  Three index;
  char* shared;  // dynamic shared memory, then variables; aligned to 1024 bytes; what nobody has written is 0xff, which makes NaN
  size_t shared_used;
  std::vector<std::pair<const void*, char*>> variables;
  std::vector<Fiber> fibers;
  std::vector<Shown> shown;    // by thread
  std::vector<Copies> copies;  // by thread
  Barrier all, warps[MOST_THREADS / WARP];
  std::shared_ptr<Engines> engines;  // see engines.h
  int asleep[MOST_THREADS / WARP];   // turns left, by warp
  Number known, known_by_warp[MOST_THREADS / WARP];  // what one of those who met knew
  int alive;  // threads that have not ended
  bool lets_next_start;
  bool other_barriers;  // than the one of all its threads and those of warps

  // The place of a __shared__ variable, which `name` tells from others.
  char* variable(const void* name, size_t bytes, size_t alignment);
};

// Blocks that are resident together.
struct Cluster {
  Grid* grid;
  const Kernel& kernel;
  std::vector<Block*> blocks;  // by rank
  Barrier all;
  int alive;            // threads of all blocks
  uint64_t stuck_since = ~uint64_t(0);  // the affair of grid.cpp

  // Number `number` of a grid's clusters.
  Cluster(Grid* grid, const Kernel& kernel, uint64_t number);
  ~Cluster();
  // Lets threads run until all of them wait, or once each. Whether any ran.
  bool run(bool once);
  // Prints who waits for what.
  void report() const;
};

// The thread that runs now: its block, and its number there.
extern Block* block;
extern int thread;

// Let other threads run: for a turn, or until something holds, which whoever runs next may be asked.
void yield();
void wait_until(Condition);
template <class F> void wait_until(const F& holds, const char* what) {
  if (!holds()) wait_until({[](const void* f) { return bool((*static_cast<const F*>(f))()); }, &holds, what});
}
void wait_for_warp();
// The same, after which each has seen what the others did.
void meet_warp();
void wait_for_block();
void wait_for_cluster();
// What is left of a block that has ended is a fault.
void end_engines(Block&);

inline Shown* lanes() { return &block->shown[thread / WARP * WARP]; }
inline Copies& copies() { return block->copies[thread]; }

// What every lane shows, seen by all of them.
template <class T> [[gnu::always_inline]] inline std::array<T, WARP> from_all(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::array<T, WARP> all;
  Shown* shown = lanes();
  __builtin_memcpy(&shown[thread % WARP].value, &value, sizeof(T));
  wait_for_warp();
  for (int lane = 0; lane < WARP; ++lane) __builtin_memcpy(&all[lane], &shown[lane].value, sizeof(T));
  wait_for_warp();
  return all;
}

// A block's own T, of a type for each __shared__ declaration.
template <class T> T& in_shared() {
  static char name;
  return *reinterpret_cast<T*>(block->variable(&name, sizeof(T), alignof(T)));
}

// In which order blocks and threads get their turns: see grid.h.
enum class Order { IN_TURN, REVERSED, EARLY, RANDOM };
extern const Order order;          // EMULATED_ORDER
extern const int capability;       // 8 or 9, for compute capability 8.0 or 9.0: EMULATED_CAPABILITY
int multiprocessors();             // EMULATED_MULTIPROCESSORS, 132 if it is not set: grids are chosen by it; with 0, none is a small one
inline size_t most_shared() { return capability == 9 ? MOST_SHARED : 163 << 10; }
// A number below `end`: the same numbers in every run.
uint64_t drawn(uint64_t end);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulated

// Where the thread that runs now stands.
extern emulated::Three threadIdx, blockIdx, blockDim, gridDim;
