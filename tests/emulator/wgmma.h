// The tensor cores of compute capability 9.0 (PTX ISA: wgmma). A warpgroup starts products, closes groups of them, and waits for groups. They
// are computed when their group is closed or, as often, when it is waited for: until then their registers hold nonsense, and what they read,
// in registers and in shared memory, must stay. A product belongs to the warpgroup as a whole: it is done for all its threads at once.
#pragma once
#include <string_view>
#include <tuple>
#include <utility>

#include "machine.h"

namespace emulated {

// d[64, n] (+)= a[64, 16] b[16, n], as a lane takes part in it. Matrices in shared memory are told by descriptors.
struct Product {
  static constexpr int MOST_COLUMNS = 256;
  int n;
  bool adds;
  bool a_in_registers, a_transposed, b_transposed;
  const uint32_t* a_registers[4];
  uint64_t a, b;
  float* d[MOST_COLUMNS / 2];
};

void order_registers();  // wgmma.fence
void start_product(const Product&);
void commit_products();
void wait_for_products(size_t most_groups_left);

// Which operands of an asm statement are what, and what the text itself says.
struct ProductText {
  int n = 0;
  bool a_in_registers = false, a_transposed = false, b_transposed = false;
  int adds_operand = -1;  // where a predicate says it
  bool adds = false;
  int d[Product::MOST_COLUMNS / 2]{}, a[4]{}, b = 0;

  consteval explicit ProductText(std::string_view text) {
    constexpr std::string_view SHAPE = "wgmma.mma_async.sync.aligned.m64n", TYPES = "k16.f32.bf16.bf16 ", PREDICATE = "setp.ne.b32 p, %";
    if (size_t at = text.find(PREDICATE); at != text.npos) {
      left = text.substr(at + PREDICATE.size());
      adds_operand = number();
      expect(", 0; ");
    }
    left = text.substr(text.find(SHAPE) + SHAPE.size());
    n = number();
    expect(TYPES);
    operands(d, n / 2);
    expect(", ");
    a_in_registers = left.starts_with("{");
    if (a_in_registers) operands(a, 4);
    else a[0] = operand();
    expect(", ");
    b = operand();
    expect(", ");
    if (left.starts_with("p")) expect("p");
    else adds = number(), adds_operand = -1;
    expect(", 1, 1, ");  // neither operand is negated
    if (!a_in_registers) a_transposed = number(), expect(", ");
    b_transposed = number();
    expect(";");
  }

  template <class Operands, size_t... I> Product with(Operands& o, std::index_sequence<I...>) const {
    const void* at[] = {&std::get<I>(o)...};
    Product product{n, adds, a_in_registers, a_transposed, b_transposed, {}, 0, *static_cast<const uint64_t*>(at[b]), {}};
    if (adds_operand >= 0) product.adds = *static_cast<const int*>(at[adds_operand]) != 0;
    for (int i = 0; i < n / 2; ++i) product.d[i] = static_cast<float*>(const_cast<void*>(at[d[i]]));
    if (!a_in_registers) product.a = *static_cast<const uint64_t*>(at[a[0]]);
    else
      for (int i = 0; i < 4; ++i) product.a_registers[i] = static_cast<const uint32_t*>(at[a[i]]);
    return product;
  }

 private:
  std::string_view left{};

  consteval void expect(std::string_view what) {
    if (!left.starts_with(what)) throw "a product in other words";
    left.remove_prefix(what.size());
  }
  consteval int number() {
    int value = 0;
    if (left.empty() || left[0] < '0' || left[0] > '9') throw "a number";
    for (; !left.empty() && left[0] >= '0' && left[0] <= '9'; left.remove_prefix(1)) value = value * 10 + left[0] - '0';
    return value;
  }
  consteval int operand() {
    expect("%");
    return number();
  }
  consteval void operands(int* to, int count) {
    for (int i = 0; i < count; ++i) {
      expect(i ? ", " : "{");
      to[i] = operand();
    }
    expect("}");
  }
};

}  // namespace emulated
