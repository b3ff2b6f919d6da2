// Kernels of a stream, which overlap where they were launched to (CUDA's programmatic dependent launch, as PTX ISA has it under
// griddepcontrol): such a kernel may start when every block of the kernel before it has said so or has ended, and learns by waiting that
// the one before has ended. By moeyard's rule some thread of each waits, so that all before have ended then; one that does not is a fault.
//
// EMULATED_ORDER says who runs:
//   in-turn   one cluster after the other, threads from the first to the last; no kernel overlaps another
//   reversed  the same from the last to the first
//   early     what a kernel does before it waits, it does while none of those before it has gone further than it must: kernels are held where
//             they let the next one start, and go on from the last to the first
//   random    anything that is allowed, the same in every run
#pragma once
#include "machine.h"

namespace emulated {

// Whether kernels overlap.
inline bool overlapping() { return order == Order::EARLY || order == Order::RANDOM; }

// Runs kernels that follow each other, each but the first launched to start early.
void run_kernels(const std::vector<const Kernel*>& chain);

// Work of a stream, which runs when somebody waits for it.
void enqueue(void* stream, Kernel kernel);

// Of the kernel that the running thread belongs to.
Number number_of_kernel();

// What threads say.
void let_next_start();
void wait_for_turn();

}  // namespace emulated
