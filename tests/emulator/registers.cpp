// Registers of a block.
#include "registers.h"

#include "engines.h"

namespace emulated {
namespace {

// Of this thread. Before it says otherwise it has its share of a multiprocessor, which launch bounds leave to one block.
int& own(int count) {
  constexpr int OF_MULTIPROCESSOR = 64 * 1024, STEP = 8, FEWEST = 24, MOST = 256;
  if (count < FEWEST || count > MOST || count % STEP) fail("%d registers of a thread", count);
  int& registers = engines().threads[thread].registers;
  if (registers == 0) registers = OF_MULTIPROCESSOR / int(block->fibers.size()) / STEP * STEP;
  return registers;
}

}  // namespace

void fewer_registers(int count) {
  int& registers = own(count);
  if (registers < count) fail("%d registers of a thread become %d, which is not fewer", registers, count);
  engines().spare_registers += registers - count;
  registers = count;
}

void more_registers(int count) {
  int& registers = own(count);
  if (registers > count) fail("%d registers of a thread become %d, which is not more", registers, count);
  int& spare = engines().spare_registers;
  wait_until([&] { return spare >= count - registers; }, "registers");
  spare -= count - registers;
  registers = count;
}

}  // namespace emulated
