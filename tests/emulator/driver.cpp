// The functions of the NVIDIA driver that moeyard calls, over the emulated GPU. Streams are queues that run only when somebody waits for
// them, so what is not ordered by an event or a wait comes out of order. Kernels overlap within a stream, with no copy, event or end of a
// graph between them.
#include <cuda.h>
#include <cuda_runtime.h>

#include <condition_variable>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "api.h"
#include "device_memory.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_READY = 600;

// Held by whoever gives work or does it.
std::recursive_mutex machine;
std::condition_variable_any changed;

struct Stream;
struct Work {
  std::function<void()> run;
  std::shared_ptr<const emulated::Kernel> kernel;  // or this
  Stream* other = nullptr;  // to wait for instead, until `until` of it is done
  uint64_t until = 0;
};
using Graph = std::deque<Work>;
struct Stream {
  Graph waiting;
  uint64_t done = 0, given = 0;
  Graph* captured = nullptr;
  std::thread::id worker;  // who is at it
};
struct Event {
  Stream* stream = nullptr;
  uint64_t until = 0;
};
std::set<Stream*> streams;

void give(Stream* stream, Work work) {
  if (stream->captured) {
    stream->captured->push_back(std::move(work));
    return;
  }
  stream->waiting.push_back(std::move(work));
  ++stream->given;
  changed.notify_all();
}

// The kernel that comes next, and those after it that may overlap. Returns their number.
uint64_t run_kernels(Graph& waiting) {
  std::vector<std::shared_ptr<const emulated::Kernel>> kept;
  std::vector<const emulated::Kernel*> chain;
  do {
    kept.push_back(std::move(waiting.front().kernel));
    chain.push_back(kept.back().get());
    waiting.pop_front();
  } while (!waiting.empty() && waiting.front().kernel && waiting.front().kernel->early);
  emulated::run_kernels(chain);
  return chain.size();
}

// Does a stream's work up to a point, and what that waits for. Called with the machine held once.
void finish(Stream* stream, uint64_t until) {
  while (stream->done < until) {
    if (stream->worker == std::this_thread::get_id()) emulated::fail("streams wait for each other");
    if (stream->worker != std::thread::id()) {
      changed.wait(machine);
      continue;
    }
    if (stream->waiting.empty()) emulated::fail("a wait for what nobody has given");
    stream->worker = std::this_thread::get_id();
    if (stream->waiting.front().kernel) {
      stream->done += run_kernels(stream->waiting);
    } else {
      Work work = std::move(stream->waiting.front());
      stream->waiting.pop_front();
      if (work.other) finish(work.other, work.until);
      else work.run();
      ++stream->done;
    }
    stream->worker = {};
    changed.notify_all();
  }
}

// Nothing, which ends a chain of kernels that overlap.
void separate(Stream* stream) { give(stream, {[] {}}); }

void finish_all() {
  for (Stream* stream : std::set<Stream*>(streams)) {
    if (stream->captured) emulated::fail("a wait while a stream is captured");
    finish(stream, stream->given);
  }
}

auto held() { return std::lock_guard(machine); }
Stream* stream_of(void* stream) { return static_cast<Stream*>(stream); }

int copy_later(void* stream, std::function<void()> copy) {
  auto lock = held();
  give(stream_of(stream), {std::move(copy)});
  return SUCCESS;
}

}  // namespace

void emulated::enqueue(void* stream, Kernel kernel) {
  auto lock = held();
  give(stream_of(stream), {.kernel = std::make_shared<const Kernel>(std::move(kernel))});
}

int cudaGetDeviceCount(int* count) {
  *count = 1;
  return SUCCESS;
}

int cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, int, cudaDriverEntryPointQueryResult*) {
  *function = reinterpret_cast<void*>(cuTensorMapEncodeTiled);
  return SUCCESS;
}

using Address = unsigned long long;

API int cuInit(unsigned) { return SUCCESS; }
API int cuDeviceGetCount(int* count) { return cudaGetDeviceCount(count); }
API int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return SUCCESS;
}
API int cuDeviceGetName(char* name, int bytes, int) {
  snprintf(name, bytes, "an emulated GPU");
  return SUCCESS;
}
API int cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = emulated::MEMORY;
  return SUCCESS;
}
API int cuDeviceGetAttribute(int* value, int which, int) {
  constexpr int COMPUTE_CAPABILITY_MAJOR = 75;
  *value = which == COMPUTE_CAPABILITY_MAJOR ? emulated::capability : 0;
  return SUCCESS;
}
API int cuDeviceGetP2PAttribute(int* value, int, int, int) { return *value = 0; }
API int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(uintptr_t(device) + 1);
  return SUCCESS;
}
API int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API int cuCtxSetCurrent(void*) { return SUCCESS; }
API int cuCtxGetCurrent(void** context) { return cuDevicePrimaryCtxRetain(context, 0); }
API int cuCtxSynchronize() {
  auto lock = held();
  finish_all();
  return SUCCESS;
}

API int cuStreamCreate(void** stream, unsigned) {
  auto lock = held();
  *stream = *streams.insert(new Stream).first;
  return SUCCESS;
}
API int cuStreamSynchronize(void* stream) {
  auto lock = held();
  finish(stream_of(stream), stream_of(stream)->given);
  return SUCCESS;
}
API int cuStreamDestroy_v2(void* stream) {
  auto lock = held();
  finish(stream_of(stream), stream_of(stream)->given);
  streams.erase(stream_of(stream));  // events may still name it
  return SUCCESS;
}

API int cuEventCreate(void** event, unsigned) {
  *event = new Event;
  return SUCCESS;
}
API int cuEventDestroy_v2(void* event) {
  delete static_cast<Event*>(event);
  return SUCCESS;
}
API int cuEventRecord(void* event, void* stream) {
  auto lock = held();
  if (stream_of(stream)->captured) emulated::fail("an event recorded while its stream is captured");
  separate(stream_of(stream));
  *static_cast<Event*>(event) = {stream_of(stream), stream_of(stream)->given};
  return SUCCESS;
}
API int cuEventQuery(void* event) {
  auto lock = held();
  auto [stream, until] = *static_cast<Event*>(event);
  if (!stream || stream->done >= until) return SUCCESS;
  // Not at once, but in the end.
  if (rand() % 4) return NOT_READY;
  finish(stream, until);
  return SUCCESS;
}
API int cuStreamWaitEvent(void* stream, void* event, unsigned) {
  auto lock = held();
  if (stream_of(stream)->captured) emulated::fail("a wait for an event while the stream is captured");
  auto [other, until] = *static_cast<Event*>(event);
  if (other && other != stream) give(stream_of(stream), {.other = other, .until = until});
  return SUCCESS;
}

API int cuStreamBeginCapture_v2(void* stream, int) {
  auto lock = held();
  stream_of(stream)->captured = new Graph;
  return SUCCESS;
}
API int cuStreamEndCapture(void* stream, void** graph) {
  auto lock = held();
  *graph = std::exchange(stream_of(stream)->captured, nullptr);
  return SUCCESS;
}
API int cuGraphInstantiateWithFlags(void** instance, void* graph, unsigned long long) {
  *instance = graph;
  return SUCCESS;
}
API int cuGraphLaunch(void* instance, void* stream) {
  auto lock = held();
  separate(stream_of(stream));
  for (const Work& work : *static_cast<Graph*>(instance)) give(stream_of(stream), work);
  separate(stream_of(stream));
  return SUCCESS;
}
// A graph and its instance are one here; it is kept.
API int cuGraphExecDestroy(void*) { return SUCCESS; }
API int cuGraphDestroy(void*) { return SUCCESS; }

API int cuMemHostAlloc(void** block, size_t bytes, unsigned) {
  auto lock = held();
  *block = emulated::allocate(bytes);
  return *block ? SUCCESS : OUT_OF_MEMORY;
}
API int cuMemAlloc_v2(Address* address, size_t bytes) { return cuMemHostAlloc(reinterpret_cast<void**>(address), bytes, 0); }
API int cuMemFreeHost(void* block) {
  auto lock = held();
  finish_all();
  emulated::release(static_cast<char*>(block));
  return SUCCESS;
}
API int cuMemFree_v2(Address address) { return cuMemFreeHost(reinterpret_cast<void*>(address)); }
API int cuMemGetInfo_v2(size_t* left, size_t* all) {
  auto lock = held();
  *left = emulated::memory_left();
  *all = emulated::MEMORY;
  return SUCCESS;
}
API int cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void* stream) {
  return copy_later(stream, [=] { memset(reinterpret_cast<void*>(to), value, bytes); });
}
API int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
  return copy_later(stream, [=] { memcpy(reinterpret_cast<void*>(to), from, bytes); });
}
API int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
  return copy_later(stream, [=] { memcpy(to, reinterpret_cast<void*>(from), bytes); });
}

API int cuGetErrorName(int error, const char** name) {
  *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_EMULATED";
  return SUCCESS;
}
API int cuGetErrorString(int, const char** text) {
  *text = "an error of the emulated GPU";
  return SUCCESS;
}
