// The PTX in asm statements of kernels, by the definitions of the PTX ISA. build.py makes of asm volatile("text" : "=r"(x) : "r"(y)) a call
// ptx<"text">(x, y). A text that is not here does not compile.
#pragma once
#include <string_view>
#include <tuple>

#include "mbarrier.h"
#include "registers.h"
#include "tensor_map.h"
#include "warp.h"
#include "wgmma.h"

inline size_t __cvta_generic_to_shared(const void* p) { return emulated::shared_address(p); }

namespace emulated {

template <size_t LENGTH> struct Text {
  char letters[LENGTH];
  constexpr Text(const char (&text)[LENGTH]) { std::copy_n(text, LENGTH, letters); }
  constexpr std::string_view view() const { return {letters, LENGTH - 1}; }
};

// Base 2, of a float that is not denormal; else 0.
inline float power_of_two(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
// One unit in the last place off, which the definition allows.
inline float roughly_inverse(float x) { return nextafterf(1.0f / x, 0.0f); }

template <Text TEXT, class... Operands> inline void ptx(Operands&&... operands) {
  using std::get;
  constexpr std::string_view text = TEXT.view();
  std::tuple<Operands&...> o(operands...);
  if constexpr (text == "" || text == "prefetch.global.L2 [%0];") {
  } else if constexpr (text == "lop3.b32 %0, %1, %2, %3, 0xea;") {
    get<0>(o) = (get<1>(o) & get<2>(o)) | get<3>(o);
  } else if constexpr (text == "ex2.approx.ftz.f32 %0, %1;") {
    get<0>(o) = power_of_two(get<1>(o));
  } else if constexpr (text == "rcp.approx.ftz.f32 %0, %1;") {
    get<0>(o) = roughly_inverse(get<1>(o));

    // Shared memory.
  } else if constexpr (text == "ld.shared.u32 %0, [%1];") {
    get<0>(o) = shared_at<uint32_t>(get<1>(o));
  } else if constexpr (text == "ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];") {
    auto x = shared_at<uint4>(get<4>(o));
    get<0>(o) = x.x, get<1>(o) = x.y, get<2>(o) = x.z, get<3>(o) = x.w;
  } else if constexpr (text == "st.shared.b32 [%0], %1;") {
    store_shared<uint32_t>(get<0>(o), get<1>(o));
  } else if constexpr (text == "st.shared.v4.b32 [%0], {%1, %2, %3, %4};") {
    store_shared(get<0>(o), uint4{get<1>(o), get<2>(o), get<3>(o), get<4>(o)});
  } else if constexpr (text == "fence.proxy.async.shared::cta;") {
    show_writes();
  } else if constexpr (text == "cp.async.cg.shared.global [%0], [%1], 16, %2;") {
    copy_async(get<0>(o), get<1>(o), get<2>(o));
  } else if constexpr (text == "cp.async.commit_group;") {
    commit_copies();
  } else if constexpr (text == "cp.async.wait_group %0;") {
    copies().wait(get<0>(o));

    // Tensor cores.
  } else if constexpr (text == "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];") {
    load_matrices<false>(get<4>(o), get<0>(o), get<1>(o), get<2>(o), get<3>(o));
  } else if constexpr (text == "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];") {
    load_matrices<true>(get<4>(o), get<0>(o), get<1>(o), get<2>(o), get<3>(o));
  } else if constexpr (text == "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];") {
    load_matrices<false>(get<2>(o), get<0>(o), get<1>(o));
  } else if constexpr (text == "movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;") {
    get<0>(o) = transposed(get<1>(o));
  } else if constexpr (text ==
                       "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};") {
    multiply_add({&get<0>(o), &get<1>(o), &get<2>(o), &get<3>(o)}, {get<4>(o), get<5>(o), get<6>(o), get<7>(o), get<8>(o), get<9>(o)});
  } else if constexpr (text == "wgmma.fence.sync.aligned;") {
    order_registers();
  } else if constexpr (text == "wgmma.commit_group.sync.aligned;") {
    commit_products();
  } else if constexpr (text == "wgmma.wait_group.sync.aligned %0;") {
    wait_for_products(get<0>(o));
  } else if constexpr (text.find("wgmma.mma_async.sync.aligned.") != text.npos) {
    constexpr ProductText product(text);
    start_product(product.with(o, std::index_sequence_for<Operands...>{}));

    // Barriers.
  } else if constexpr (text == "mbarrier.init.shared::cta.b64 [%0], %1;") {
    barrier_at(get<0>(o)).init(get<1>(o));
  } else if constexpr (text == "mbarrier.arrive.shared::cta.b64 _, [%0];") {
    barrier_at(get<0>(o)).arrive();
  } else if constexpr (text == "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra.uni over; "
                               "bra.uni again; over: }") {
    barrier_at(get<0>(o)).wait(get<1>(o));
  } else if constexpr (text == "bar.sync %0, %1;") {
    named_barrier(get<0>(o), get<1>(o), true);
  } else if constexpr (text == "bar.arrive %0, %1;") {
    named_barrier(get<0>(o), get<1>(o), false);
  } else if constexpr (text == "setmaxnreg.dec.sync.aligned.u32 %0;") {
    fewer_registers(get<0>(o));
  } else if constexpr (text == "setmaxnreg.inc.sync.aligned.u32 %0;") {
    more_registers(get<0>(o));

    // Tensor maps.
  } else if constexpr (text == "tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 0, %1;") {
    map_at(get<0>(o)).extent[0] = get<1>(o);
  } else if constexpr (text == "tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, %1;") {
    map_at(get<0>(o)).extent[1] = get<1>(o);
  } else if constexpr (text == "tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%0], 0, %1;") {
    map_at(get<0>(o)).stride = get<1>(o);
  } else {
    static_assert(text.empty(), "the emulated GPU does not know these instructions");
  }
}

}  // namespace emulated
