// A GPU whose threads are fibers of one CPU thread. Blocks run one after the other; the threads of a block run in turn, each until it waits
// for others. What threads may only do by way of a barrier therefore goes wrong here without one, mostly; kernels that overlap do not exist.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace emulated {

constexpr int WARP = 32, MOST_THREADS = 1024;

struct Three {
  unsigned x, y, z;
};

// The thread of its block that runs now.
extern int thread;

// Dynamic shared memory of the block, of a size that a launch sets; bytes that nobody has written are 0xff, which makes NaN.
extern char* shared;
void set_shared(size_t bytes);

// Runs `body` as every thread of a block.
void run_block(int threads, const std::function<void()>& body);
void wait_for_block();
void wait_for_warp();

// What the lanes of a warp show each other between two waits.
struct Shown {
  uint64_t value;
  uint32_t words[7];
};
extern Shown shown[MOST_THREADS];
inline Shown& of_lane(int lane) { return shown[thread / WARP * WARP + lane]; }

// What every lane shows, seen by all of them.
template <class T> std::array<T, WARP> from_all(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::array<T, WARP> all;
  __builtin_memcpy(&of_lane(thread % WARP).value, &value, sizeof(T));
  wait_for_warp();
  for (int lane = 0; lane < WARP; ++lane) __builtin_memcpy(&all[lane], &of_lane(lane).value, sizeof(T));
  wait_for_warp();
  return all;
}

// Copies that a thread has asked for, in groups. Each is made when the thread waits for its group, the latest moment there is.
struct Copies {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;
  void wait(size_t most_left);
};
extern Copies copies[MOST_THREADS];

// Work of a stream, which runs when somebody waits for it.
void enqueue(void* stream, std::function<void()> work);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulated

// Where the thread that runs now stands.
extern emulated::Three threadIdx, blockIdx, blockDim, gridDim;
