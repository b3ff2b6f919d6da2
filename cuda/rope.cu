// The rotary embedding, alone and on the way to the cache.
#include "common.cuh"

using namespace moeyard;

namespace {

constexpr int THREADS = 256;

struct Pair {
  int head, first, second;  // columns within the row
  float x, y;               // rotated
};

// Pair number i of a row's heads, `stride` apart.
__device__ inline Pair rotated(const MoeyardMatrix& m, int64_t row, const float* angles, int i, int stride, int offset, int dim,
                               int interleaved) {
  int half = dim / 2, head = i / half, p = i % half, start = head * stride + offset;
  int first = start + (interleaved ? 2 * p : p), second = interleaved ? first + 1 : first + half;
  float x = load(m, row, first), y = load(m, row, second);
  float c = angles[p], s = angles[half + p];
  return {head, first, second, x * c - y * s, y * c + x * s};
}

__device__ inline const float* angles_of(const MoeyardMatrix& table, uint32_t row) {
  return static_cast<const float*>(table.data) + int64_t(row) * table.stride;
}

__global__ void rope(MoeyardRope a) {
  start_in_turn();
  const float* angles = angles_of(a.table, a.rows[blockIdx.x]);
  for (int i = blockIdx.y * THREADS + threadIdx.x; i < a.heads * (a.dim / 2); i += gridDim.y * THREADS) {
    Pair pair = rotated(a.x, blockIdx.x, angles, i, a.head_stride, a.offset, a.dim, a.interleaved);
    store(a.x, blockIdx.x, pair.first, pair.x);
    store(a.x, blockIdx.x, pair.second, pair.y);
  }
}

__global__ void rope_kv(MoeyardRopeKv a) {
  // The host wrote the rows, before any kernel that could still run.
  const float* angles = angles_of(a.table, a.rows[blockIdx.x]);
  int64_t row = blockIdx.x, to = a.slots[row];
  to_cache(angles, a.dim);
  start_in_turn();
  int start = blockIdx.y * THREADS + threadIdx.x, step = gridDim.y * THREADS;
  int queries = a.heads - a.kv_heads, k = queries * a.head_dim, v = a.heads * a.head_dim;
  for (int i = start; i < a.heads * (a.dim / 2); i += step) {
    Pair pair = rotated(a.qkv, row, angles, i, a.head_dim, a.offset, a.dim, a.interleaved);
    bool query = pair.head < queries;
    store(query ? a.qkv : a.key, query ? row : to, pair.first - (query ? 0 : k), pair.x);
    store(query ? a.qkv : a.key, query ? row : to, pair.second - (query ? 0 : k), pair.y);
  }
  // What does not rotate of a key.
  int rest = a.head_dim - a.dim;
  for (int i = start; i < a.kv_heads * rest; i += step) {
    int d = i % rest, c = i / rest * a.head_dim + (d < a.offset ? d : d + a.dim);
    store(a.key, to, c, load(a.qkv, row, k + c));
  }
  for (int c = start; c < a.kv_heads * a.head_dim; c += step) store(a.value, to, c, load(a.qkv, row, v + c));
}

// Few rows are spread over several blocks each.
dim3 grid_of(int rows, int work) {
  int wanted = (work + THREADS - 1) / THREADS, room = 1024 / (rows < 1024 ? rows : 1024);
  return dim3(rows, wanted < 1 ? 1 : wanted < room ? wanted : room < 1 ? 1 : room);
}

}  // namespace

extern "C" int moeyard_rope(const MoeyardRope* a, void* stream) {
  if (a->x.rows == 0 || a->heads == 0 || a->dim == 0) return 0;
  return launch_early(rope, grid_of(a->x.rows, a->heads * (a->dim / 2)), THREADS, 0, stream, *a);
}

extern "C" int moeyard_rope_kv(const MoeyardRopeKv* a, void* stream) {
  if (a->qkv.rows == 0) return 0;
  int work = a->heads * (a->dim / 2) + a->kv_heads * a->head_dim;
  return launch_early(rope_kv, grid_of(a->qkv.rows, work), THREADS, 0, stream, *a);
}
