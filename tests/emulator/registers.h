// How many registers threads have (PTX ISA: setmaxnreg): what some warps of a block give back, others can get.
#pragma once

namespace emulated {

void fewer_registers(int count);
void more_registers(int count);  // waits until the block has them

}  // namespace emulated
