// In place of CUTLASS's: registers of warpgroups.
#pragma once
#include "registers.h"

namespace cutlass::arch {
template <int COUNT> void warpgroup_reg_alloc() { emulated::more_registers(COUNT); }
template <int COUNT> void warpgroup_reg_dealloc() { emulated::fewer_registers(COUNT); }
}  // namespace cutlass::arch
