// Norms: one block per vector.
#include "common.cuh"

using namespace moeyard;

namespace {

// Elements of a vector that a thread holds, if it is not longer than that.
constexpr int HELD = 8;

template <bool ALL_HELD> __global__ void norm(MoeyardNorm a) {
  int groups = a.x.cols / a.width;
  int64_t row = blockIdx.x / groups;
  int first = int(blockIdx.x % groups) * a.width;
  float held[HELD], weight[HELD], bias[HELD];
  to_cache(a.weight, a.width);
  start_in_turn();
  // body(element, its column in the vector, its weight, its bias)
  auto each = [&](auto body) {
    if constexpr (ALL_HELD) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        int c = threadIdx.x + i * blockDim.x;
        if (c < a.width) body(held[i], c, weight[i], bias[i]);
      }
    } else {
      for (int c = threadIdx.x; c < a.width; c += blockDim.x) {
        held[0] = load(a.x, row, first + c);
        body(held[0], c, a.weight[c], a.bias ? a.bias[c] : 0.0f);
      }
    }
  };
  if constexpr (ALL_HELD) {
    // Everything is asked for before anything is written, which loads would wait for.
    int start = first + int(threadIdx.x), step = blockDim.x, end = first + a.width;
    float addend[HELD];
    load_all(held, a.x, row, start, step, end);
    if (a.addend.data) load_all(addend, a.addend, row, start, step, end);
    load_all(weight, a.weight, threadIdx.x, step, a.width);
    if (a.bias) load_all(bias, a.bias, threadIdx.x, step, a.width);
    if (a.addend.data) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) held[i] += addend[i] * a.factor;
      each([&](float& x, int c, float, float) { store(a.x, row, first + c, x); });
    }
  } else if (a.addend.data) {
    each([&](float& x, int c, float, float) {
      x += load(a.addend, row, first + c) * a.factor;
      store(a.x, row, first + c, x);
    });
  }
  float mean = 0.0f;
  if (a.centred) {
    float sum = 0.0f;
    each([&](float& x, int, float, float) { sum += x; });
    mean = block_sum(sum) / float(a.width);
  }
  float squares = 0.0f;
  each([&](float& x, int, float, float) { squares += (x - mean) * (x - mean); });
  float inverse = 1.0f / sqrtf(block_sum(squares) / float(a.width) + a.eps);
  each([&](float& x, int c, float weight, float bias) {
    float y = (x - mean) * inverse * weight;
    if (a.bias) y += bias;
    store(a.out, row, first + c, y);
    if (a.exact.data) store(a.exact, row, first + c, y);
  });
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

// By the width alone: the number of threads is part of the order of the sum.
int threads_for(int width) { return width <= 256 ? 32 : width <= 1024 ? 128 : width <= 4096 ? 512 : 1024; }

}  // namespace

extern "C" int moeyard_norm(const MoeyardNorm* a, void* stream) {
  int64_t vectors = int64_t(a->x.rows) * (a->x.cols / a->width);
  if (vectors == 0) return 0;
  int threads = threads_for(a->width);
  auto* kernel = a->width <= threads * HELD ? norm<true> : norm<false>;
  return launch_early(kernel, dim3(unsigned(vectors)), threads, 0, stream, *a);
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
