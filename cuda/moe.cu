// Around the experts: router, gated activation, combine.
#include "common.cuh"

using namespace moeyard;

namespace {

__global__ void gate(MoeyardGate a) {
  start_in_turn();
  for (int d = blockIdx.y * blockDim.x + threadIdx.x; d < a.out.cols; d += gridDim.y * blockDim.x) {
    int64_t at = int64_t(d / 8) * 16 + d % 8;
    store(a.out, blockIdx.x, d,
          activate(load(a.in, blockIdx.x, at), load(a.in, blockIdx.x, at + 8), a.activation, a.limit, a.alpha));
  }
}

// Router: one warp per row, and more for the scores of groups. `score` and `choice` are arrays of `n` floats in shared memory, `taken` of n
// flags.

// Unsigned numbers in the order of floats, all above 0. NaN counts as -inf, -0 as 0.
__device__ inline unsigned in_order(float x) {
  unsigned bits = __float_as_uint(x == x ? x + 0.0f : -INFINITY);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Index of the largest of `x[first..first + n]` whose flag is not set; ties go to the lowest. Every NaN counts as -inf, so an index
// within bounds comes back whatever the input is. -1 when all are taken.
__device__ int best_of(const float* x, const unsigned char* taken, int first, int n) {
  unsigned best = 0, at = INT_MAX;
  for (int i = first + int(threadIdx.x % WARP); i < first + n; i += WARP) {
    unsigned v = taken[i] ? 0 : in_order(x[i]);
    if (v > best) best = v, at = i;
  }
  unsigned top = __reduce_max_sync(FULL, best);
  int found = int(__reduce_min_sync(FULL, best == top ? at : INT_MAX));
  __syncwarp();  // reductions order no memory, and what was read may be written next
  return top == 0 ? -1 : found;
}

// x -> softmax(x) over n, in place of `out`.
__device__ void softmax(const float* x, float* out, int n) {
  float max = -INFINITY;
  for (int i = threadIdx.x; i < n; i += WARP) max = fmaxf(max, x[i]);
  max = warp_max(max);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += WARP) sum += expf(x[i] - max);
  sum = warp_sum(sum);
  for (int i = threadIdx.x; i < n; i += WARP) out[i] = expf(x[i] - max) / sum;
}

// The scores of the groups, by the whole block: a group is a warp's.
__device__ void score_groups(const MoeyardRoute& a, const float* x, unsigned char* taken, float* group, int n) {
  int size = n / a.groups, lane = threadIdx.x % WARP;
  for (int g = threadIdx.x / WARP; g < a.groups; g += blockDim.x / WARP) {
    int first = best_of(x, taken, g * size, size);
    float sum = x[first];
    if (a.group_score == MOEYARD_GROUP_TOP2_SUM && size > 1) {
      if (lane == 0) taken[first] = 1;
      __syncwarp();
      sum += x[best_of(x, taken, g * size, size)];
      if (lane == 0) taken[first] = 0;
    }
    if (lane == 0) group[g] = sum;
  }
}

// Takes experts outside the best groups out of `choice`. From here on one warp works.
__device__ void keep_groups(const MoeyardRoute& a, float* choice, unsigned char* taken, const float* group, int n) {
  int size = n / a.groups;
  for (int kept = 0; kept < a.keep; ++kept) {  // `taken` serves as flags of groups, then is cleared
    int g = best_of(group, taken, 0, a.groups);
    if (threadIdx.x == 0) taken[g] = 1;
    __syncwarp();
  }
  float outside = a.group_score == MOEYARD_GROUP_MAX ? 0.0f : -INFINITY;
  for (int e = threadIdx.x; e < n; e += WARP)
    if (!taken[e / size]) choice[e] = outside;
  __syncwarp();
  for (int g = threadIdx.x; g < a.groups; g += WARP) taken[g] = 0;
  __syncwarp();
}

// Softmax at `at` over the logits near the maximum; those taken count as -inf.
__device__ float near_weight(const float* logits, const unsigned char* taken, int n, int at, float epsilon) {
  float max = logits[at], sum = 0.0f;
  for (int e = threadIdx.x; e < n; e += WARP) {
    float l = logits[e];
    bool far = (max - l) / fmaxf(fabsf(l), max) > 2.0f * epsilon;
    if (!far && !taken[e]) sum += expf(l - max);
  }
  return 1.0f / warp_sum(sum);
}

__global__ void route(MoeyardRoute a) {
  extern __shared__ float shared[];
  int n = a.logits.cols, k = a.ids.cols;
  float *logits = shared, *score = logits + n, *choice = score + n, *group = choice + n;
  unsigned char* taken = reinterpret_cast<unsigned char*>(group + n);
  start_in_turn();
  int64_t row = blockIdx.x;
  const float* from = static_cast<const float*>(a.logits.data) + row * a.logits.stride;
  for (int e = threadIdx.x; e < n; e += blockDim.x) {
    logits[e] = from[e];
    taken[e] = 0;
  }
  __syncthreads();
  bool by_logit = a.score == MOEYARD_SOFTMAX_OVER_CHOSEN || a.score == MOEYARD_SPARSE_MIXER;
  if (a.score == MOEYARD_SOFTMAX && threadIdx.x < WARP) softmax(logits, score, n);
  if (a.score == MOEYARD_SIGMOID)
    for (int e = threadIdx.x; e < n; e += blockDim.x) score[e] = sigmoid(logits[e]);
  __syncthreads();
  for (int e = threadIdx.x; e < n; e += blockDim.x)
    choice[e] = by_logit ? logits[e] : score[e] + (a.bias ? a.bias[e] : 0.0f);
  __syncthreads();
  if (a.group_score != MOEYARD_NO_GROUPS) {
    score_groups(a, a.group_score == MOEYARD_GROUP_MAX ? score : choice, taken, group, n);
    __syncthreads();
  }
  if (threadIdx.x >= WARP) return;
  if (a.group_score != MOEYARD_NO_GROUPS) keep_groups(a, choice, taken, group, n);

  int32_t* ids = static_cast<int32_t*>(a.ids.data) + row * a.ids.stride;
  float* weights = static_cast<float*>(a.weights.data) + row * a.weights.stride;
  float first = 0.0f, sum = 0.0f, *chosen = group;  // the groups' scores have served
  for (int j = 0; j < k; ++j) {
    int e = best_of(choice, taken, 0, n);
    float w;
    if (a.score == MOEYARD_SPARSE_MIXER) w = near_weight(logits, taken, n, e, a.epsilon);
    else if (a.score == MOEYARD_SOFTMAX_OVER_CHOSEN) {
      if (j == 0) first = logits[e];
      w = expf(logits[e] - first);
    } else w = score[e];
    sum += w;
    __syncwarp();
    if (threadIdx.x == 0) {
      taken[e] = 1;
      ids[j] = e;
      chosen[j] = w;
    }
    __syncwarp();
  }
  float divisor = 1.0f;
  if (a.score == MOEYARD_SOFTMAX_OVER_CHOSEN) divisor = sum;
  else if (a.score != MOEYARD_SPARSE_MIXER && a.renormalize) divisor = sum + a.renormalize_eps;
  for (int j = threadIdx.x; j < k; j += WARP) weights[j] = chosen[j] / divisor * a.scale;
}

__global__ void combine(MoeyardCombine a) {
  start_in_turn();
  int k = a.weights.cols;
  int64_t t = blockIdx.x;
  const uint32_t* index = a.index + t * k * a.parts;
  for (int d = blockIdx.y * blockDim.x + threadIdx.x; d < a.out.cols; d += gridDim.y * blockDim.x) {
    float sum = 0.0f;
    for (int j = 0; j < k; ++j) {
      float output = 0.0f;
      for (int x = 0; x < a.parts; ++x) output += load(a.rows, index[j * a.parts + x], d);
      sum += load(a.weights, t, j) * output;
    }
    store(a.out, t, d, sum);
  }
}

constexpr int WIDE = 8;     // columns of a thread, 16 bytes of bf16
constexpr int AT_ONCE = 8;  // rows that are under way at once

// The same sums of bf16 rows that lie in 16-byte steps.
__global__ void combine_wide(MoeyardCombine a) {
  start_in_turn();
  int k = a.weights.cols;
  int64_t t = blockIdx.x;
  int parts = a.parts, all = k * parts;
  const uint32_t* index = a.index + t * all;
  const float* weights = static_cast<const float*>(a.weights.data) + t * a.weights.stride;
  const bf16* rows = static_cast<const bf16*>(a.rows.data);
  for (int d = (blockIdx.y * blockDim.x + threadIdx.x) * WIDE; d < a.out.cols; d += gridDim.y * blockDim.x * WIDE) {
    float sum[WIDE] = {}, output[WIDE] = {};
    for (int first = 0; first < all; first += AT_ONCE) {
      uint4 part[AT_ONCE];
      float weight[AT_ONCE];
#pragma unroll
      for (int p = 0; p < AT_ONCE; ++p)
        if (first + p < all) {
          part[p] = *reinterpret_cast<const uint4*>(rows + index[first + p] * a.rows.stride + d);
          weight[p] = weights[parts == 1 ? first + p : (first + p) / parts];
        }
#pragma unroll
      for (int p = 0; p < AT_ONCE; ++p) {
        if (first + p >= all) break;
        const bf16* values = reinterpret_cast<const bf16*>(&part[p]);
#pragma unroll
        for (int i = 0; i < WIDE; ++i) output[i] += widen(values[i]);
        if (parts > 1 && (first + p + 1) % parts != 0) continue;
#pragma unroll
        for (int i = 0; i < WIDE; ++i) {
          sum[i] += weight[p] * output[i];
          output[i] = 0.0f;
        }
      }
    }
    float4* out = reinterpret_cast<float4*>(static_cast<float*>(a.out.data) + t * a.out.stride + d);
    out[0] = {sum[0], sum[1], sum[2], sum[3]};
    out[1] = {sum[4], sum[5], sum[6], sum[7]};
  }
}

dim3 row_grid(int rows, int cols) {
  int wanted = (cols + 1023) / 1024, room = 2048 / (rows < 2048 ? rows : 2048);
  return dim3(rows, wanted < room ? wanted : room < 1 ? 1 : room);
}

}  // namespace

extern "C" int moeyard_gate(const MoeyardGate* a, void* stream) {
  if (a->out.rows == 0 || a->out.cols == 0) return 0;
  return launch_early(gate, row_grid(a->out.rows, a->out.cols), 256, 0, stream, *a);
}

extern "C" int moeyard_route(const MoeyardRoute* a, void* stream) {
  if (a->logits.rows == 0) return 0;
  size_t bytes = size_t(a->logits.cols) * (4 * sizeof(float) + 1);
  if (cudaError_t error = allow(route, bytes)) return int(error);
  int warps = a->group_score == MOEYARD_NO_GROUPS ? 1 : a->groups < 8 ? a->groups : 8;
  return launch_early(route, dim3(a->logits.rows), warps * WARP, bytes, stream, *a);
}

extern "C" int moeyard_combine(const MoeyardCombine* a, void* stream) {
  if (a->out.rows == 0 || a->out.cols == 0) return 0;
  auto in_words = [](const MoeyardMatrix& m, int64_t elements) {
    return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % elements == 0;
  };
  bool wide = a->rows.type == MOEYARD_BF16 && a->out.cols % WIDE == 0 && in_words(a->rows, 8) && in_words(a->out, 4);
  if (!wide) return launch_early(combine, row_grid(a->out.rows, a->out.cols), 256, 0, stream, *a);
  // A column block of 64 threads for few tokens, more of them beside each other for many.
  int columns = a->out.cols / WIDE;
  if (a->out.rows >= 64) return launch_early(combine_wide, dim3(a->out.rows, (columns + 255) / 256), 256, 0, stream, *a);
  return launch_early(combine_wide, dim3(a->out.rows, (columns + 63) / 64), 64, 0, stream, *a);
}
