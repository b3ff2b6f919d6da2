// Fibers, barriers and shared memory.
#include "machine.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>

emulated::Three threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

Block* block;
int thread;

namespace {

constexpr size_t STACK_BYTES = 64 << 10;

// Places that blocks have left.
std::vector<Block*> places;
std::vector<char*> stacks;
void* scheduler;  // its stack, while a fiber runs

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

void entry() {
  block->cluster->kernel.body();
  block->fibers[thread].ended = true;
  // Nobody waits for threads that have ended.
  --block->alive, --block->cluster->alive;
  if (block->all.arrived > 0) block->all.release(block->alive);
  if (block->cluster->all.arrived > 0) block->cluster->all.release(block->cluster->alive);
  yield();
  fail("a thread that had ended goes on");
}

void prepare(Fiber& fiber) {
  if (stacks.empty()) stacks.push_back(static_cast<char*>(aligned_alloc(64, STACK_BYTES)));
  char* stack = stacks.back();
  stacks.pop_back();
  auto** top = reinterpret_cast<void**>(stack + STACK_BYTES - 64);
  *--top = nullptr;  // no caller
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber = {top, stack, {}, false, 0, 0};
}

void resume(Fiber& fiber, int number) {
  thread = number;
  threadIdx = {unsigned(number), 0, 0};
  fiber.waits = {};
  exchange_stacks(&scheduler, fiber.top);
}

// Fair turns would hide that a barrier is missing: in random order warps sleep for a while, one of so many.
int turns_to_sleep(uint64_t one_of) {
  constexpr uint64_t MOST_TURNS = 64;
  return order == Order::RANDOM && drawn(one_of) == 0 ? 1 + int(drawn(MOST_TURNS)) : 0;
}
bool sleeps(int& turns) {
  constexpr uint64_t SELDOM = 64;
  if (turns == 0) turns = turns_to_sleep(SELDOM);
  return turns > 0 && turns-- > 0;
}

// Once each. Whether any ran, or sleeps.
bool run_threads(Block& own) {
  block = &own;
  blockIdx = own.index;
  gridDim = own.cluster->kernel.grid;
  blockDim = {unsigned(own.fibers.size()), 1, 1};
  bool ran = false, asleep[MOST_THREADS / WARP];
  for (size_t w = 0; w * WARP < own.fibers.size(); ++w) ran |= asleep[w] = sleeps(own.asleep[w]);
  int count = int(own.fibers.size()), first = order == Order::RANDOM ? int(drawn(count)) : 0;
  for (int i = 0; i < count; ++i) {
    int t = order == Order::REVERSED ? count - 1 - i : first + i < count ? first + i : first + i - count;
    Fiber& fiber = own.fibers[t];
    if (fiber.ended || asleep[t / WARP] || (fiber.waits.holds && !fiber.waits.holds(fiber.waits.of))) continue;
    ran = true;
    resume(fiber, t);
  }
  return ran;
}

void wait(Barrier& barrier, int expected, const char* what) {
  uint64_t generation = barrier.generation;
  barrier.arrive(expected);
  wait_until([&barrier, generation] { return barrier.generation != generation; }, what);
}

// What the environment says of a variable, or the first of what it may say.
template <class T> T chosen(const char* variable, const std::vector<std::pair<std::string, T>>& all) {
  const char* given = getenv(variable);
  if (!given) return all[0].second;
  for (auto& [name, value] : all)
    if (name == given) return value;
  fail("%s is '%s', which is not known", variable, given);
}

}  // namespace

const Order order = chosen<Order>(
    "EMULATED_ORDER", {{"in-turn", Order::IN_TURN}, {"reversed", Order::REVERSED}, {"early", Order::EARLY}, {"random", Order::RANDOM}});
const int capability = chosen<int>("EMULATED_CAPABILITY", {{"8.0", 8}, {"9.0", 9}});

uint64_t drawn(uint64_t end) {
  static std::minstd_rand numbers(1);
  return numbers() % end;
}

std::string Kernel::name() const {
  Dl_info library{};
  if (!dladdr(code, &library)) return "a kernel";
  char command[512], line[512] = "a kernel";
  snprintf(command, sizeof(command), "addr2line -f -s -C -e '%s' %zx", library.dli_fname,
           size_t(static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase)));
  if (FILE* answer = popen(command, "r")) {
    if (fgets(line, sizeof(line), answer)) line[strcspn(line, "\n")] = 0;
    pclose(answer);
  }
  return line;
}

int multiprocessors() {
  static const int number = [] {
    const char* given = getenv("EMULATED_MULTIPROCESSORS");
    char* end = nullptr;
    long asked_for = given ? strtol(given, &end, 10) : 132;
    if (given && (end == given || *end || asked_for < 0 || asked_for > 1024)) fail("EMULATED_MULTIPROCESSORS is '%s', not 0 to 1024", given);
    return int(asked_for);
  }();
  return number;
}

char* Block::variable(const void* name, size_t bytes, size_t alignment) {
  for (auto [other, place] : variables)
    if (other == name) return place;
  shared_used = (shared_used + alignment - 1) / alignment * alignment;
  char* place = shared + shared_used;
  shared_used += bytes;
  if (shared_used > most_shared()) fail("%zu bytes of shared memory, with variables", shared_used);
  memset(place, 0xff, bytes);
  variables.push_back({name, place});
  return place;
}

Cluster::Cluster(Grid* grid, const Kernel& kernel, uint64_t number) : grid(grid), kernel(kernel) {
  if (kernel.threads < 1 || kernel.threads > MOST_THREADS) fail("a block of %d threads", kernel.threads);
  if (kernel.shared_bytes > most_shared()) fail("%zu bytes of shared memory", kernel.shared_bytes);
  alive = kernel.threads * kernel.cluster;
  for (int rank = 0; rank < kernel.cluster; ++rank) {
    if (places.empty()) {
      places.push_back(new Block);
      places.back()->shared = static_cast<char*>(aligned_alloc(1024, MOST_SHARED + 1024));
    }
    Block* own = places.back();
    places.pop_back();
    uint64_t at = number * kernel.cluster + rank, row = at / kernel.grid.x;
    own->cluster = this;
    own->rank = rank;
    own->index = {unsigned(at % kernel.grid.x), unsigned(row % kernel.grid.y), unsigned(row / kernel.grid.y)};
    own->shared_used = kernel.shared_bytes;
    memset(own->shared, 0xff, kernel.shared_bytes);
    own->variables.clear();
    own->fibers.resize(kernel.threads);
    for (Fiber& fiber : own->fibers) prepare(fiber);
    own->shown.resize(kernel.threads + WARP);
    own->copies.assign(kernel.threads, {});
    own->all = {};
    constexpr uint64_t AT_FIRST = 4;
    for (int& turns : own->asleep) turns = turns_to_sleep(AT_FIRST);
    std::ranges::fill(own->warps, Barrier());
    own->alive = kernel.threads;
    own->known = 0;
    std::ranges::fill(own->known_by_warp, 0);
    own->lets_next_start = own->other_barriers = false;
    blocks.push_back(own);
  }
}

Cluster::~Cluster() {
  for (Block* own : blocks) {
    end_engines(*own);
    for (Fiber& fiber : own->fibers) stacks.push_back(fiber.stack);
    places.push_back(own);
  }
}

bool Cluster::run(bool once) {
  bool ran = false, again = true;
  while (again && alive > 0) {
    again = false;
    for (size_t i = 0; i < blocks.size(); ++i) again |= run_threads(*blocks[order == Order::REVERSED ? blocks.size() - 1 - i : i]);
    ran |= again;
    if (once) break;
  }
  return ran;
}

void Cluster::report() const {
  for (const Block* own : blocks) {
    std::map<std::string, std::vector<size_t>> waiting;
    for (size_t t = 0; t < own->fibers.size(); ++t)
      if (!own->fibers[t].ended) waiting[own->fibers[t].waits.what].push_back(t);
    for (auto& [what, who] : waiting)
      fprintf(stderr, "emulated GPU: %s, block (%u, %u, %u): thread %zu and %zu more wait for %s\n", kernel.name().c_str(), own->index.x,
              own->index.y, own->index.z, who[0], who.size() - 1, what.c_str());
  }
}

void yield() { exchange_stacks(&block->fibers[thread].top, scheduler); }
void wait_until(Condition condition) {
  block->fibers[thread].waits = condition;
  yield();
}
void wait_for_warp() { wait(block->warps[thread / WARP], WARP, "their warp"); }
void meet_warp() {
  Number& known = block->known_by_warp[thread / WARP];
  known = std::max(known, block->fibers[thread].known);
  wait_for_warp();
  ++block->fibers[thread].warp_epoch;
  block->fibers[thread].known = std::max(block->fibers[thread].known, known);
}
void wait_for_block() {
  block->known = std::max(block->known, block->fibers[thread].known);
  wait(block->all, block->alive, "their block");
  block->fibers[thread].known = std::max(block->fibers[thread].known, block->known);
}
void wait_for_cluster() { wait(block->cluster->all, block->cluster->alive, "their cluster"); }

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
