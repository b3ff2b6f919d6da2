// Products of warpgroups.
#include "wgmma.h"

#include <cstring>
#include <span>

#include "engines.h"
#include "warp.h"

namespace emulated {
namespace {

constexpr uint32_t NONSENSE = 0x7fbad000;  // a NaN
constexpr int ROWS = 64, DEPTH = 16;

ThreadEngines& own() { return engines().threads[thread]; }

bool is_nonsense(const float* x) { return std::bit_cast<uint32_t>(*x) == NONSENSE; }

void check_untouched(const Accumulator& accumulator) {
  for (const float* x : accumulator.registers)
    if (!is_nonsense(x)) fail("thread %d wrote a register that a product in flight adds to", thread);
}

Accumulator& accumulator_of(ThreadEngines& lane, const Product& product) {
  for (Accumulator& accumulator : lane.accumulators)
    if (accumulator.registers[0] == product.d[0]) return accumulator;
  return lane.accumulators.emplace_back();
}

// A matrix in shared memory, as its descriptor tells it: rows of an operand by k, both up to what one product takes.
struct Matrix {
  uint64_t descriptor;
  bool transposed;

  double operator()(int row, int k) const {
    auto field = [&](int first, int bits) { return uint32_t(descriptor >> first) & ((1u << bits) - 1); };
    uint32_t start = field(0, 14) << 4, leading = field(16, 14) << 4, stride = field(32, 14) << 4;
    if (field(62, 2) != 1 || field(49, 3) != 0) fail("a descriptor %016lx that is not of a 128-byte swizzle", descriptor);
    // Atoms of eight rows of 128 bytes: along k, or transposed along the operand's rows.
    uint32_t offset = transposed ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128 : row / 8 * stride + row % 8 * 128 + k * 2;
    uint32_t address = start + offset;
    address ^= (address >> 7 & 7) << 4;
    if (k % 8 == 0 || transposed && row % 8 == 0) check_shown(address);
    return half_of_word(shared_at<uint16_t>(address), 0);
  }
};

void check_same(bool same) {
  if (!same) fail("threads of the warpgroup of thread %d take part in different products", thread);
}

// One product, for all threads of a warpgroup.
void compute(ThreadEngines* threads, const Product* const (&of)[GROUP_THREADS]) {
  const Product& product = *of[0];
  float* values[GROUP_THREADS];
  for (int t = 0; t < GROUP_THREADS; ++t) {
    const Product& other = *of[t];
    check_same(other.n == product.n && other.adds == product.adds && other.a == product.a && other.b == product.b &&
               other.a_in_registers == product.a_in_registers && other.a_transposed == product.a_transposed &&
               other.b_transposed == product.b_transposed);
    values[t] = accumulator_of(threads[t], other).values.data();
  }
  static double b[DEPTH][Product::MOST_COLUMNS], sum[Product::MOST_COLUMNS];
  for (int column = 0; column < product.n; ++column)
    for (int k = 0; k < DEPTH; ++k) b[k][column] = Matrix{product.b, product.b_transposed}(column, k);
  for (int row = 0; row < ROWS; ++row) {
    // A warp has 16 rows, a lane two of them and two columns of each eight.
    int within = row % 16, warp = row / 16 * WARP;
    auto value = [&](int column) -> float& {
      return values[warp + within % 8 * 4 + column % 8 / 2][column / 8 * 4 + within / 8 * 2 + column % 2];
    };
    for (int column = 0; column < product.n; ++column) sum[column] = product.adds ? value(column) : 0.0;
    for (int k = 0; k < DEPTH; ++k) {
      double a = product.a_in_registers ? half_of_word(*of[warp + lane_of(within, k)]->a_registers[word_of(within, k)], k % 2)
                                        : Matrix{product.a, product.a_transposed}(row, k);
      for (int column = 0; column < product.n; ++column) sum[column] += a * b[k][column];
    }
    for (int column = 0; column < product.n; ++column) value(column) = float(sum[column]);
  }
}

struct Group {
  WarpgroupEngines& all;
  ThreadEngines* threads;
};
Group own_group() {
  Engines& all = engines();
  return {all.warpgroups[thread / GROUP_THREADS], &all.threads[thread / GROUP_THREADS * GROUP_THREADS]};
}

// The groups of products up to number `last`, which every thread has closed.
void compute_groups(Group group, uint32_t last) {
  for (uint32_t& done = group.all.computed; done < last; ++done) {
    // What is left with a thread are its last groups.
    auto products_of = [&](int t) -> const std::vector<Product>& {
      const auto& left = group.threads[t].groups;
      return left[left.size() - (group.threads[t].closed - done)];
    };
    size_t count = products_of(0).size();
    for (int t = 1; t < GROUP_THREADS; ++t) check_same(products_of(t).size() == count);
    for (size_t p = 0; p < count; ++p) {
      const Product* of[GROUP_THREADS];
      for (int t = 0; t < GROUP_THREADS; ++t) of[t] = &products_of(t)[p];
      compute(group.threads, of);
    }
  }
}

}  // namespace

void order_registers() { own().ordered = true; }

void start_product(const Product& product) {
  ThreadEngines& lane = own();
  Accumulator& accumulator = accumulator_of(lane, product);
  if (accumulator.in_flight) {
    if (!std::ranges::equal(accumulator.registers, std::span(product.d, product.n / 2)))
      fail("thread %d adds to registers of a product in flight, and to others or in another order", thread);
    check_untouched(accumulator);
  } else {
    if (!lane.ordered) fail("thread %d starts a product, and no wgmma.fence orders it after the use of its registers", thread);
    accumulator.registers.assign(product.d, product.d + product.n / 2);
    accumulator.values.resize(product.n / 2);
    for (int i = 0; i < product.n / 2; ++i) {
      accumulator.values[i] = *product.d[i];
      *product.d[i] = std::bit_cast<float>(NONSENSE);
    }
  }
  ++accumulator.in_flight;
  lane.open.push_back(product);
}

void commit_products() {
  ThreadEngines& lane = own();
  lane.groups.push_back(std::move(lane.open));
  lane.open.clear();
  Group group = own_group();
  uint32_t number = ++lane.closed;
  if (group.all.closed.size() < number) group.all.closed.push_back(0);
  if (++group.all.closed[number - 1] == GROUP_THREADS && at_once()) compute_groups(group, number);
}

void wait_for_products(size_t most_groups_left) {
  ThreadEngines& lane = own();
  if (lane.groups.size() > most_groups_left) {
    Group group = own_group();
    uint32_t last = lane.closed - most_groups_left;
    wait_until([&] { return group.all.closed[last - 1] == GROUP_THREADS; }, "their warpgroup's products");
    // They take their time.
    constexpr int MOST_TURNS = 64 * GROUP_THREADS;
    if (group.all.computed < last && group.all.turns == 0 && !at_once()) group.all.turns = drawn(MOST_TURNS);
    while (group.all.computed < last && group.all.turns > 0) {
      --group.all.turns;
      yield();
    }
    compute_groups(group, last);
  }
  lane.ordered = false;
  for (; lane.groups.size() > most_groups_left; lane.groups.erase(lane.groups.begin()))
    for (const Product& product : lane.groups.front()) {
      Accumulator& accumulator = accumulator_of(lane, product);
      if (--accumulator.in_flight) continue;
      check_untouched(accumulator);
      for (size_t i = 0; i < accumulator.registers.size(); ++i) *accumulator.registers[i] = accumulator.values[i];
    }
  std::erase_if(lane.accumulators, [](const Accumulator& accumulator) { return !accumulator.in_flight; });
}

}  // namespace emulated
