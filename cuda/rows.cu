// Rows that move: copies with conversion, gathers, embedding, elementwise updates.
#include "common.cuh"

using namespace moeyard;

namespace {

constexpr int THREADS = 256;

__host__ __device__ int bytes_of(int type) {
  return type == MOEYARD_BF16 ? 2 : type == MOEYARD_F8 || type == MOEYARD_I4X2 ? 1 : 4;
}

__device__ int64_t target_row(int64_t i, int half) { return half < 0 ? i : i / 8 * 16 + half * 8 + i % 8; }

__global__ void copy_bits(MoeyardCopy a, int words) {  // rows of 16-byte words
  start_in_turn();
  int64_t from = a.index ? a.index[blockIdx.x] : blockIdx.x, to = target_row(blockIdx.x, a.half);
  int bytes = bytes_of(a.src.type);
  const uint4* src = reinterpret_cast<const uint4*>(static_cast<const char*>(a.src.data) + from * a.src.stride * bytes);
  uint4* dst = reinterpret_cast<uint4*>(static_cast<char*>(a.dst.data) + to * a.dst.stride * bytes);
  for (int c = blockIdx.y * THREADS + threadIdx.x; c < words; c += gridDim.y * THREADS) dst[c] = src[c];
}

__global__ void copy_elements(MoeyardCopy a) {
  start_in_turn();
  int64_t from = a.index ? a.index[blockIdx.x] : blockIdx.x, to = target_row(blockIdx.x, a.half);
  for (int c = blockIdx.y * THREADS + threadIdx.x; c < a.src.cols; c += gridDim.y * THREADS) {
    if (bytes_of(a.src.type) == 1)
      static_cast<char*>(a.dst.data)[to * a.dst.stride + c] = static_cast<const char*>(a.src.data)[from * a.src.stride + c];
    else if (a.src.type == MOEYARD_I32)
      static_cast<int32_t*>(a.dst.data)[to * a.dst.stride + c] =
          static_cast<const int32_t*>(a.src.data)[from * a.src.stride + c];
    else
      store(a.dst, to, c, load(a.src, from, c));
  }
}

__global__ void transpose_heads(MoeyardTransposeHeads a) {
  // One block per (head, latent row of 32); threads walk the columns.
  int64_t row = blockIdx.x;  // of dst
  int head = int(row / a.latent), l = int(row % a.latent);
  for (int d = threadIdx.x; d < a.nope; d += blockDim.x)
    store(a.dst, row, d, load(a.src, int64_t(head) * (a.nope + a.v) + d, l));
}

__global__ void embed(MoeyardEmbed a) {
  start_in_turn();
  int64_t from = a.ids[blockIdx.x];
  constexpr int AHEAD = 8;
  for (int first = threadIdx.x; first < a.table.cols; first += AHEAD * THREADS) {
    float x[AHEAD];
    load_all(x, a.table, from, first, THREADS, a.table.cols);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (int c = first + i * THREADS; c < a.table.cols) store(a.out, blockIdx.x, c, x[i] * a.scale);
  }
}

__global__ void map(MoeyardMap a) {
  start_in_turn();
  for (int c = blockIdx.y * THREADS + threadIdx.x; c < a.y.cols; c += gridDim.y * THREADS) {
    float y = load(a.y, blockIdx.x, c);
    switch (a.kind) {
      case MOEYARD_ADD_SCALED: y += load(a.x, blockIdx.x, c) * a.factor; break;
      case MOEYARD_SCALE: y *= a.factor; break;
      // A NaN stays one, as in Rust's clamp.
      case MOEYARD_CLAMP: y = y < -a.factor ? -a.factor : y > a.factor ? a.factor : y; break;
      case MOEYARD_SIGMOID_GATE: y *= sigmoid(load(a.x, blockIdx.x, 0)); break;
    }
    store(a.y, blockIdx.x, c, y);
  }
}

// Few long rows are spread over several blocks each.
dim3 grid_of(int rows, int cols) {
  int wanted = (cols + THREADS * 4 - 1) / (THREADS * 4), room = 2048 / (rows < 2048 ? rows : 2048);
  return dim3(rows, wanted < 1 ? 1 : wanted < room ? wanted : room < 1 ? 1 : room);
}

bool in_words(const MoeyardMatrix& m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * bytes_of(m.type) % 16 == 0;
}

}  // namespace

extern "C" int moeyard_copy(const MoeyardCopy* a, void* stream) {
  if (a->rows == 0 || a->src.cols == 0) return 0;
  int64_t bytes = int64_t(a->src.cols) * bytes_of(a->src.type);
  if (a->src.type == a->dst.type && bytes % 16 == 0 && in_words(a->src) && in_words(a->dst))
    return launch_early(copy_bits, grid_of(a->rows, int(bytes / 16)), THREADS, 0, stream, *a, int(bytes / 16));
  return launch_early(copy_elements, grid_of(a->rows, a->src.cols), THREADS, 0, stream, *a);
}

extern "C" int moeyard_transpose_heads(const MoeyardTransposeHeads* a, void* stream) {
  if (a->heads * a->latent == 0) return 0;
  transpose_heads<<<a->heads * a->latent, 128, 0, stream_of(stream)>>>(*a);
  return launched();
}

extern "C" int moeyard_embed(const MoeyardEmbed* a, void* stream) {
  if (a->out.rows == 0) return 0;
  return launch_early(embed, dim3(a->out.rows), THREADS, 0, stream, *a);
}

extern "C" int moeyard_map(const MoeyardMap* a, void* stream) {
  if (a->y.rows == 0 || a->y.cols == 0) return 0;
  return launch_early(map, grid_of(a->y.rows, a->y.cols), THREADS, 0, stream, *a);
}
