// Barriers of threads and copies.
#include "mbarrier.h"

#include "engines.h"
#include "shared.h"

namespace emulated {
namespace {

// Those who waited for what this thread has just said may be far ahead before it goes on.
void fall_behind() {
  constexpr uint64_t MOST_TURNS = 16;
  if (at_once()) return;
  for (uint64_t turns = drawn(MOST_TURNS); turns > 0; --turns) yield();
}

void do_land(PhaseBarrier& barrier, const Landing& landing) {
  landing.copy();
  barrier.receive(landing.bytes);
}

}  // namespace

PhaseBarrier& barrier_at(uint32_t address) { return shared_at<PhaseBarrier>(address); }
PhaseBarrier& barrier_of(unsigned rank, uint32_t address) { return *reinterpret_cast<PhaseBarrier*>(shared_of(rank) + address); }

void show_barriers() {
  auto& made = engines().threads[thread].barriers;
  for (PhaseBarrier* barrier : made) barrier->shown = 1;
  made.clear();
}

void PhaseBarrier::check(const char* what) const {
  if (made != MADE) fail("%s at a barrier that nobody has initialised", what);
}

void PhaseBarrier::init(int count) {
  if (count < 1 || count >= 1 << 15) fail("a barrier of %d arrivals", count);
  block->other_barriers = true;
  phase = 0, made = MADE, shown = 0, expected = missing = count, bytes = 0;
  engines().threads[thread].barriers.push_back(this);
}

void PhaseBarrier::turn() {
  if (missing || bytes) return;
  missing = expected;
  phase ^= 1;
}

void PhaseBarrier::arrive(int bytes_expected) {
  check("an arrival");
  bool own = shared_address(this) < MOST_SHARED;
  if (!own && !shown) fail("an arrival from another block at a barrier that no fence has shown after its initialisation");
  if (missing == 0) fail("more arrivals at a barrier than the %d that its phase has", int(expected));
  bytes += bytes_expected;
  --missing;
  turn();
  fall_behind();
}

void PhaseBarrier::receive(int count) {
  check("a copy");
  bytes -= count;
  turn();
}

void PhaseBarrier::wait(unsigned parity) {
  check("a wait");
  auto& landings = engines().landings[this];
  wait_until([&] {
    while (phase == parity && !landings.empty()) {
      Landing next = std::move(landings.front());
      landings.pop_front();
      do_land(*this, next);
    }
    return phase != parity;
  }, "a barrier in shared memory");
}

void land(unsigned rank, uint32_t barrier, int bytes, std::function<void()> copy) {
  PhaseBarrier& target = barrier_of(rank, barrier);
  if (target.made != PhaseBarrier::MADE || !target.shown) fail("a copy to a barrier that no fence has shown after its initialisation");
  Landing landing{bytes, std::move(copy)};
  if (at_once()) do_land(target, landing);
  else engines(*block->cluster->blocks[rank]).landings[&target].push_back(std::move(landing));
}

void named_barrier(int name, int threads, bool waits) {
  if (name < 1 || name > 15 || threads % WARP) fail("barrier %d of %d threads", name, threads);
  block->other_barriers = true;
  NamedBarrier& barrier = engines().barriers[name];
  if (barrier.arrived && barrier.expected != threads) fail("barrier %d of %d threads and of %d", name, barrier.expected, threads);
  barrier.expected = threads;
  long generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  if (waits) wait_until([&] { return barrier.generation != generation; }, "a named barrier");
  else fall_behind();
}

}  // namespace emulated
