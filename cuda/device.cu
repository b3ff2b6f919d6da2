// What the statically linked runtime knows of the machine, and a mark in a stream.
#include "common.cuh"

namespace {
__global__ void nothing() {}
}  // namespace

extern "C" int moeyard_settle(void* stream) {
  nothing<<<1, 1, 0, moeyard::stream_of(stream)>>>();
  return moeyard::launched();
}

extern "C" int moeyard_device_count(void) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  return error ? -int(error) : count;
}

extern "C" const char* moeyard_error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }

// The same numbers stand in src/backend/cuda/enabled/ffi.rs.
static_assert(sizeof(MoeyardMatrix) == 32);
static_assert(sizeof(MoeyardCopy) == 80);
static_assert(sizeof(MoeyardTransposeHeads) == 80);
static_assert(sizeof(MoeyardEmbed) == 80);
static_assert(sizeof(MoeyardMap) == 72);
static_assert(sizeof(MoeyardNorm) == 160);
static_assert(sizeof(MoeyardSquareSum) == 64);
static_assert(sizeof(MoeyardScaleBySquareSum) == 80);
static_assert(sizeof(MoeyardRope) == 96);
static_assert(sizeof(MoeyardGemm) == 176);
static_assert(sizeof(MoeyardGroupedGemm) == 192);
static_assert(sizeof(MoeyardGate) == 80);
static_assert(sizeof(MoeyardRoute) == 136);
static_assert(sizeof(MoeyardDraw) == 24);
static_assert(sizeof(MoeyardSample) == 72);
static_assert(sizeof(MoeyardCombine) == 112);
static_assert(sizeof(MoeyardPlan) == 144);
static_assert(sizeof(MoeyardWorld) == 168);
static_assert(sizeof(MoeyardReturn) == 88);
static_assert(sizeof(MoeyardRopeKv) == 168);
static_assert(sizeof(MoeyardKvWrite) == 136);
static_assert(sizeof(MoeyardSpan) == 20);
static_assert(sizeof(MoeyardKvPart) == 32);
static_assert(sizeof(MoeyardAttention) == 272);
