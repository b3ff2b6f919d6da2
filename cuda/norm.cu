// Norms and the rotary embedding: one block per vector.
#include "common.cuh"

using namespace moeyard;

namespace {

__global__ void norm(MoeyardNorm a) {
  int groups = a.x.cols / a.width;
  int64_t row = blockIdx.x / groups;
  int first = int(blockIdx.x % groups) * a.width;
  float mean = 0.0f;
  if (a.centred) {
    float sum = 0.0f;
    for (int c = threadIdx.x; c < a.width; c += blockDim.x) sum += load(a.x, row, first + c);
    mean = block_sum(sum) / float(a.width);
  }
  float squares = 0.0f;
  for (int c = threadIdx.x; c < a.width; c += blockDim.x) {
    float x = load(a.x, row, first + c) - mean;
    squares += x * x;
  }
  float inverse = 1.0f / sqrtf(block_sum(squares) / float(a.width) + a.eps);
  for (int c = threadIdx.x; c < a.width; c += blockDim.x) {
    float x = (load(a.x, row, first + c) - mean) * inverse * a.weight[c];
    store(a.out, row, first + c, a.bias ? x + a.bias[c] : x);
  }
}

__global__ void square_sum(MoeyardSquareSum a) {
  float sum = 0.0f;
  for (int c = threadIdx.x; c < a.x.cols; c += blockDim.x) {
    float x = load(a.x, blockIdx.x, c);
    sum += x * x;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) store(a.out, blockIdx.x, 0, sum);
}

__global__ void scale_by_square_sum(MoeyardScaleBySquareSum a) {
  float inverse = 1.0f / sqrtf(load(a.sums, blockIdx.x, 0) / a.width + a.eps);
  for (int c = threadIdx.x; c < a.x.cols; c += blockDim.x)
    store(a.x, blockIdx.x, c, load(a.x, blockIdx.x, c) * inverse * a.weight[c]);
}

__global__ void rope(MoeyardRope a) {
  int half = a.dim / 2;
  const float* angles = static_cast<const float*>(a.table.data) + int64_t(a.rows[blockIdx.x]) * a.table.stride;
  for (int i = threadIdx.x; i < a.heads * half; i += blockDim.x) {
    int head = i / half, p = i % half;
    int start = head * a.head_stride + a.offset;
    int first = start + (a.interleaved ? 2 * p : p), second = a.interleaved ? first + 1 : first + half;
    float x = load(a.x, blockIdx.x, first), y = load(a.x, blockIdx.x, second);
    float c = angles[p], s = angles[half + p];
    store(a.x, blockIdx.x, first, x * c - y * s);
    store(a.x, blockIdx.x, second, y * c + x * s);
  }
}

// By the width alone: the number of threads is part of the order of the sum.
int threads_for(int width) { return width <= 256 ? 32 : width <= 1024 ? 128 : width <= 4096 ? 256 : 512; }

}  // namespace

extern "C" int moeyard_norm(const MoeyardNorm* a, void* stream) {
  int64_t vectors = int64_t(a->x.rows) * (a->x.cols / a->width);
  if (vectors == 0) return 0;
  norm<<<unsigned(vectors), threads_for(a->width), 0, stream_of(stream)>>>(*a);
  return launched();
}

extern "C" int moeyard_square_sum(const MoeyardSquareSum* a, void* stream) {
  if (a->x.rows == 0) return 0;
  square_sum<<<a->x.rows, threads_for(a->x.cols), 0, stream_of(stream)>>>(*a);
  return launched();
}

extern "C" int moeyard_scale_by_square_sum(const MoeyardScaleBySquareSum* a, void* stream) {
  if (a->x.rows == 0) return 0;
  scale_by_square_sum<<<a->x.rows, 256, 0, stream_of(stream)>>>(*a);
  return launched();
}

extern "C" int moeyard_rope(const MoeyardRope* a, void* stream) {
  if (a->x.rows == 0 || a->heads == 0 || a->dim == 0) return 0;
  rope<<<a->x.rows, 256, 0, stream_of(stream)>>>(*a);
  return launched();
}
