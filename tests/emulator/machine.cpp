// Fibers, barriers and shared memory.
#include "machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

emulated::Three threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

int thread;
char* shared;
Shown shown[MOST_THREADS];
Copies copies[MOST_THREADS];

namespace {

constexpr size_t STACK_BYTES = 64 << 10;

struct Fiber {
  void* top;  // of its stack, while it waits
  char* stack;
  bool done;
};
Fiber fibers[MOST_THREADS];
void* scheduler;
const std::function<void()>* body;

struct Barrier {
  int arrived = 0;
  long generation = 0;
};
Barrier of_block, of_warp[MOST_THREADS / WARP];
int alive;
bool progress;

// Callee-saved registers of x86-64 go to the stack, and the stack is exchanged.
extern "C" void exchange_stacks(void** from, void* to);
asm(R"(
.text
.globl exchange_stacks
.hidden exchange_stacks
exchange_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void yield() {
  int own = thread;
  exchange_stacks(&fibers[own].top, scheduler);
}

void release(Barrier& barrier, int expected) {
  if (barrier.arrived < expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
}

void wait(Barrier& barrier, int expected) {
  long generation = barrier.generation;
  ++barrier.arrived;
  progress = true;
  release(barrier, expected);
  while (barrier.generation == generation) yield();
}

void entry() {
  (*body)();
  fibers[thread].done = true;
  --alive;
  progress = true;
  // Nobody waits for threads that have ended.
  if (of_block.arrived > 0) release(of_block, alive);
  yield();
  fail("a thread that had ended goes on");
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = static_cast<char*>(aligned_alloc(64, STACK_BYTES));
  fiber.done = false;
  auto** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES - 64);
  *--top = nullptr;  // no caller
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.top = top;
}

}  // namespace

void wait_for_block() { wait(of_block, alive); }
void wait_for_warp() { wait(of_warp[thread / WARP], WARP); }

void run_block(int count, const std::function<void()>& work) {
  if (count < 1 || count > MOST_THREADS) fail("a block of %d threads", count);
  body = &work;
  alive = count;
  blockDim = {unsigned(count), 1, 1};
  of_block = {};
  for (Barrier& barrier : of_warp) barrier = {};
  for (int t = 0; t < count; ++t) {
    prepare(fibers[t]);
    copies[t] = {};
  }
  while (alive > 0) {
    progress = false;
    for (int t = 0; t < count; ++t) {
      if (fibers[t].done) continue;
      thread = t;
      threadIdx = {unsigned(t), 0, 0};
      exchange_stacks(&scheduler, fibers[t].top);
    }
    if (!progress) fail("%d threads of a block wait for each other", alive);
  }
}

void set_shared(size_t bytes) {
  constexpr size_t MOST = 163 << 10;  // of compute capability 8.0
  if (bytes > MOST) fail("%zu bytes of shared memory", bytes);
  if (!shared) shared = static_cast<char*>(aligned_alloc(1024, MOST + 1024));
  memset(shared, 0xff, bytes);
}

void Copies::wait(size_t most_left) {
  while (groups.size() > most_left) {
    for (auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("emulated GPU: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  abort();
}

}  // namespace emulated
