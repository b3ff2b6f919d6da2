// The paged KV cache and softmax attention for every shape, in f32 arithmetic: grouped queries, both forms of MLA, windows,
// sinks, any head width. Queries and weights are rounded to the cache's type; the weights are summed as rounded.
//
// A block works on eight (row, query head) pairs that share a KV head, one warp each, and walks the positions in tiles of 32
// whose borders are multiples of 32: what a pair sums, and in which order, depends on its own position alone.
#include "common.cuh"

using namespace moeyard;

namespace {

constexpr int UNITS = 8, THREADS = UNITS * WARP, TILE = WARP;

__global__ void kv_write(MoeyardKvWrite a) {
  start_in_turn();
  int64_t to = a.slots[blockIdx.x];
  for (int part = 0; part < 2; ++part)
    for (int c = threadIdx.x; c < a.source[part].cols; c += blockDim.x)
      store(a.part[part], to, c, load(a.source[part], blockIdx.x, c));
}

__device__ int64_t row_of(const MoeyardAttention& a, const MoeyardSpan& span, const MoeyardKvPart& part, int position) {
  if (!part.paged) return int64_t(span.base) + position;
  return int64_t(a.block_table[span.first_block + position / a.block_size]) * a.block_size + position % a.block_size;
}

// Copies columns of `part` for the tile's positions to shared rows `stride` apart; positions from `end` on become 0.
template <class T>
__device__ void fetch(const MoeyardAttention& a, const MoeyardSpan& span, const MoeyardKvPart& part, int kv_head, int start,
                      int end, float* to, int stride) {
  int lane = threadIdx.x % WARP;
  for (int t = threadIdx.x / WARP; t < TILE; t += UNITS) {
    int position = start + t;
    const T* from = static_cast<const T*>(part.data) + int64_t(kv_head) * part.head_stride;
    if (position < end) from += row_of(a, span, part, position) * part.stride;
    for (int c = lane; c < part.dim; c += WARP) to[t * stride + c] = position < end ? widen(from[c]) : 0.0f;
  }
}

__host__ __device__ inline int key_width(const MoeyardAttention& a) { return a.key[0].dim + a.key[1].dim; }
__host__ __device__ inline int key_stride(const MoeyardAttention& a) { return key_width(a) | 1; }
// Absorbed MLA: the value is the first part of the key.
__host__ __device__ inline bool value_is_key(const MoeyardAttention& a) {
  return a.value.data == a.key[0].data && a.value.dim == a.key[0].dim && a.value.head_stride == a.key[0].head_stride;
}

template <class T, int VALUES>  // VALUES: columns of the output per lane
__global__ void __launch_bounds__(THREADS) attention(MoeyardAttention a) {
  extern __shared__ float shared[];
  const MoeyardSpan span = a.spans[blockIdx.x];
  int kv_head = blockIdx.y, group = a.heads / a.kv_heads;
  int units = int(span.rows) * group, first_unit = blockIdx.z * UNITS;
  if (first_unit >= units) return;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int unit = min(first_unit + warp, units - 1), last_unit = min(first_unit + UNITS, units) - 1;
  int head = kv_head * group + unit % group;
  int64_t row = span.row + unit / group;
  int position = int(span.position) + unit / group;

  int width = key_width(a), stride = key_stride(a), in_key = value_is_key(a), v_stride = in_key ? stride : a.value.dim;
  float *queries = shared, *keys = queries + UNITS * width, *values = in_key ? keys : keys + TILE * stride;
  float* query = queries + warp * width;
  for (int part = 0, at = 0; part < 2; at += a.key[part++].dim)
    for (int c = lane; c < a.key[part].dim; c += WARP)
      query[at + c] = widen(narrow<T>(load(a.query[part], row, int64_t(head) * a.query_stride[part] + c)));

  float max = -INFINITY, sum = 0.0f, out[VALUES] = {};
  if (a.sinks) {
    max = a.sinks[head];
    sum = 1.0f;
  }
  int oldest = a.window ? position - a.window + 1 : 0;  // of this pair
  int first_seen = a.window ? ::max(0, int(span.position) + first_unit / group - a.window + 1) : 0;
  int end = int(span.position) + last_unit / group + 1;
  for (int start = first_seen / TILE * TILE; start < end; start += TILE) {
    __syncthreads();
    fetch<T>(a, span, a.key[0], kv_head, start, end, keys, stride);
    fetch<T>(a, span, a.key[1], kv_head, start, end, keys + a.key[0].dim, stride);
    if (!in_key) fetch<T>(a, span, a.value, kv_head, start, end, values, v_stride);
    __syncthreads();
    int seen = start + lane;
    float score = 0.0f;
    for (int c = 0; c < width; ++c) score = fmaf(query[c], keys[lane * stride + c], score);
    score = seen <= position && seen >= oldest ? score * a.scale : -INFINITY;
    float top = fmaxf(max, warp_max(score));
    if (top == -INFINITY) continue;  // the pair sees nothing of this tile, nor of those before
    float weight = widen(narrow<T>(expf(score - top))), keep = expf(max - top);
    sum = sum * keep + warp_sum(weight);
    max = top;
    for (int i = 0; i < VALUES; ++i) out[i] *= keep;
    for (int t = 0; t < TILE; ++t) {
      float p = __shfl_sync(FULL, weight, t);
      const float* v = values + t * v_stride + lane;
      for (int i = 0; i < VALUES; ++i)
        if (lane + i * WARP < a.value.dim) out[i] = fmaf(p, v[i * WARP], out[i]);
    }
  }
  if (first_unit + warp >= units) return;
  for (int i = 0; i < VALUES; ++i)
    if (lane + i * WARP < a.value.dim) store(a.out, row, int64_t(head) * a.value.dim + lane + i * WARP, out[i] / sum);
}

template <class T> int launch(const MoeyardAttention& a, void* stream) {
  size_t bytes = moeyard_attention_shared_bytes(&a);
  int group = a.heads / a.kv_heads;
  dim3 grid(a.span_count, a.kv_heads, (a.span_rows * group + UNITS - 1) / UNITS);
  void (*kernel)(MoeyardAttention) = a.value.dim <= 64    ? attention<T, 2>
                                     : a.value.dim <= 128 ? attention<T, 4>
                                     : a.value.dim <= 256 ? attention<T, 8>
                                                          : attention<T, 16>;
  if (cudaError_t error = allow(kernel, bytes)) return int(error);
  kernel<<<grid, THREADS, bytes, stream_of(stream)>>>(a);
  return launched();
}

}  // namespace

extern "C" int moeyard_kv_write(const MoeyardKvWrite* a, void* stream) {
  if (a->source[0].rows == 0) return 0;
  return launch_early(kv_write, dim3(a->source[0].rows), 128, 0, stream, *a);
}

extern "C" size_t moeyard_attention_shared_bytes(const MoeyardAttention* a) {
  int values = value_is_key(*a) ? 0 : TILE * a->value.dim;
  return sizeof(float) * (size_t(UNITS) * key_width(*a) + size_t(TILE) * key_stride(*a) + values);
}

extern "C" int moeyard_attention(const MoeyardAttention* a, void* stream) {
  if (a->span_count == 0) return 0;
  return a->kv_type == MOEYARD_BF16 ? launch<bf16>(*a, stream) : launch<float>(*a, stream);
}
