// Every launcher of this folder: one function and one argument struct each, mirrored in src/backend/cuda/enabled/ffi.rs.
//
// Pointers are device pointers unless a comment says "host". Launchers are asynchronous on `stream` and return 0 or a
// cudaError_t. Formulas are those of the methods of the trait Backend that a launcher serves.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOEYARD_API __attribute__((visibility("default")))

// Codes are bytes: see moeyard_gemm_quantized.
typedef enum {
  MOEYARD_F32 = 0,
  MOEYARD_BF16 = 1,
  MOEYARD_I32 = 2,
  MOEYARD_F8 = 3,
  MOEYARD_I4X2 = 4
} MoeyardType;

// Row-major [rows, cols]; `stride` elements from one row to the next.
typedef struct {
  void* data;
  int64_t stride;
  int32_t rows, cols;
  int32_t type;
  int32_t reserved;
} MoeyardMatrix;

// ---- device.cu

// Number of devices according to the statically linked runtime, or -cudaError_t.
MOEYARD_API int moeyard_device_count(void);
// Name of a cudaError_t (host string, static).
MOEYARD_API const char* moeyard_error_name(int error);
// What is launched after this starts when all that was launched before is done, however early it may start otherwise.
MOEYARD_API int moeyard_settle(void* stream);

// ---- rows.cu

// dst[to(i)] = src[index ? index[i] : i], converted. `half` -1: to(i) = i. 0 or 1: rows are dealt in groups of eight into
// every other group of dst, starting with the first or the second: how gate and up matrices are interleaved.
typedef struct {
  MoeyardMatrix src, dst;
  const uint32_t* index;
  int32_t rows;
  int32_t half;
} MoeyardCopy;
MOEYARD_API int moeyard_copy(const MoeyardCopy* args, void* stream);

// dst[h * latent + l, d] = src[h * (nope + v) + d, l]: W_k of each head, transposed.
typedef struct {
  MoeyardMatrix src, dst;
  int32_t heads, nope, v, latent;
} MoeyardTransposeHeads;
MOEYARD_API int moeyard_transpose_heads(const MoeyardTransposeHeads* args, void* stream);

// out[i] = table[ids[i]] * scale
typedef struct {
  MoeyardMatrix table, out;
  const uint32_t* ids;
  float scale;
  int32_t reserved;
} MoeyardEmbed;
MOEYARD_API int moeyard_embed(const MoeyardEmbed* args, void* stream);

typedef enum { MOEYARD_ADD_SCALED = 0, MOEYARD_SCALE = 1, MOEYARD_CLAMP = 2, MOEYARD_SIGMOID_GATE = 3 } MoeyardMapKind;
// y += x * factor | y *= factor | y = clamp(y, +-factor) | y *= sigmoid(x[i, 0])
typedef struct {
  MoeyardMatrix x, y;
  float factor;
  int32_t kind;
} MoeyardMap;
MOEYARD_API int moeyard_map(const MoeyardMap* args, void* stream);

// ---- norm.cu

// x += addend * factor, then out = norm(x), and the same into `exact`. Without data there is no addend, no `exact`.
typedef struct {
  MoeyardMatrix x, out;  // may be the same
  MoeyardMatrix addend, exact;
  const float* weight;
  const float* bias;  // or null
  int32_t width;
  int32_t centred;  // subtract the mean: a layer norm
  float eps;
  float factor;
} MoeyardNorm;
MOEYARD_API int moeyard_norm(const MoeyardNorm* args, void* stream);

// out[i] = sum of squares of row i
typedef struct {
  MoeyardMatrix x, out;
} MoeyardSquareSum;
MOEYARD_API int moeyard_square_sum(const MoeyardSquareSum* args, void* stream);

// x[i] *= 1 / sqrt(sums[i] / width + eps) * weight
typedef struct {
  MoeyardMatrix sums, x;
  const float* weight;
  float width, eps;
} MoeyardScaleBySquareSum;
MOEYARD_API int moeyard_scale_by_square_sum(const MoeyardScaleBySquareSum* args, void* stream);

// ---- rope.cu

typedef struct {
  MoeyardMatrix x, table;
  const uint32_t* rows;
  int32_t heads, head_stride, offset, dim, interleaved;
  int32_t reserved;
} MoeyardRope;
MOEYARD_API int moeyard_rope(const MoeyardRope* args, void* stream);

// Rotates the queries of rows of queries, keys and values; cache row `slots[i]` of `key` and `value` = the rotated keys and the values of
// row i. The keys in `qkv` are not rotated.
typedef struct {
  MoeyardMatrix qkv, table, key, value;
  const uint32_t* rows;
  const uint32_t* slots;
  int32_t heads;  // of queries and keys
  int32_t kv_heads, head_dim, offset, dim, interleaved;
} MoeyardRopeKv;
MOEYARD_API int moeyard_rope_kv(const MoeyardRopeKv* args, void* stream);

// ---- gemm_f32.cu, gemm_narrow.cu, gemm_bf16.cu, gemm_quantized.cu

// What happens to a gate and an up column before they are stored.
typedef enum { MOEYARD_NONE = 0, MOEYARD_SILU_MUL = 1, MOEYARD_CLAMPED_SWIGLU = 2 } MoeyardActivation;

// out[t, j] = sum_k x[t, k] * w[j, k] (+ bias[j]), k ascending in every configuration.
// Grouped: with `offsets` (slots + 1 entries) rows offsets[s]..offsets[s + 1] of x use weights[s].
// Batched: product b starts `*_batch` elements further in x, w and out.
// With an activation (not in f32), rows of w come as eight gates, eight ups, and out has n / 2 columns.
typedef struct {
  MoeyardMatrix x, out;
  const void* weight;          // of all rows, without `offsets`
  const float* bias;           // or null
  const void* const* weights;  // one per slot, with `offsets`
  const float* const* biases;  // one per slot, or null
  const int32_t* offsets;      // or null
  int64_t x_batch, w_batch, out_batch;
  int32_t slots, batches;
  int32_t n, k;
  int32_t ldw;     // elements from one row of w to the next
  int32_t w_type;
  int32_t row_tile;  // rows of x per tile: 64 (f32), 8, 16, 32, 64 or 128 (bf16, quantised)
  int32_t row_tiles; // over all slots
  int32_t activation;
  float limit, alpha;
  // Whether weights and offsets may be read before the kernel before has ended: nothing that could still run writes them. Then that kernel
  // lets this one start only when what ran before it is done.
  int32_t ahead;
} MoeyardGemm;
MOEYARD_API int moeyard_gemm_f32(const MoeyardGemm* args, void* stream);
// Few outputs of any number of rows, x and w in f32, without offsets, batches and activation. Sums over k in another order, which is the
// same for all rows.
MOEYARD_API int moeyard_gemm_narrow(const MoeyardGemm* args, void* stream);
// Needs bf16 x and w, k, ldw and strides that are multiples of 8, and 16-byte aligned data.
MOEYARD_API int moeyard_gemm_bf16(const MoeyardGemm* args, void* stream);
// What moeyard_gemm_bf16 computes of the weights that codes stand for (w_type F8 or I4X2), each rounded to bf16. `ldw` is the bytes
// from one row of weight tiles (codes.cuh) to the next. No batches.
MOEYARD_API int moeyard_gemm_quantized(const MoeyardGemm* args, void* stream);

// ---- cutlass-sys/src/grouped_gemm.cu

typedef enum { MOEYARD_WIDE = 0, MOEYARD_THIN = 1 } MoeyardClusterForm;
// What moeyard_gemm_bf16 computes, on compute capability 9.0, by pairs of blocks. `row_tile` is one to eight times 32 (wide), one to four
// times 16 (thin); with 0, what suits the offsets. `row_tiles` is not read. A group is a slot or a batch, 1024 at most; not both. With an
// activation, out is bf16 in steps of four.
typedef struct {
  MoeyardGemm product;
  void* working;  // memory, 128 bytes and 1152 per group, a multiple of 128
  int32_t form;
  int32_t reserved;
} MoeyardGroupedGemm;
MOEYARD_API int moeyard_gemm_grouped(const MoeyardGroupedGemm* args, void* stream);

// ---- moe.cu

// out[i, d] = act(gate, up) of rows that hold eight gates, eight ups.
typedef struct {
  MoeyardMatrix in, out;
  int32_t activation;
  float limit, alpha;
  int32_t reserved;
} MoeyardGate;
MOEYARD_API int moeyard_gate(const MoeyardGate* args, void* stream);

typedef enum {
  MOEYARD_SOFTMAX = 0,
  MOEYARD_SIGMOID = 1,
  MOEYARD_SOFTMAX_OVER_CHOSEN = 2,
  MOEYARD_SPARSE_MIXER = 3
} MoeyardScore;
typedef enum { MOEYARD_NO_GROUPS = 0, MOEYARD_GROUP_MAX = 1, MOEYARD_GROUP_TOP2_SUM = 2 } MoeyardGroupScore;
typedef struct {
  MoeyardMatrix logits, ids, weights;
  const float* bias;  // or null
  int32_t score;
  int32_t group_score, groups, keep;
  int32_t renormalize;
  float renormalize_eps, scale, epsilon;
} MoeyardRoute;
MOEYARD_API int moeyard_route(const MoeyardRoute* args, void* stream);

typedef struct {
  MoeyardMatrix rows, weights, out;
  const uint32_t* index;
  int32_t parts;
  int32_t reserved;
} MoeyardCombine;
MOEYARD_API int moeyard_combine(const MoeyardCombine* args, void* stream);

// ---- sample.cu

// How the token of a row is drawn: src/backend/draw.rs.
typedef struct {
  uint64_t random;
  float temperature, top_p, min_p;
  uint32_t top_k;
} MoeyardDraw;
// out[i] = [token of x[i], elements that are not finite], with at most 2^24 columns of f32. Without `draws`, the tokens are the best ones.
typedef struct {
  MoeyardMatrix x, out;
  const MoeyardDraw* draws;  // or null
} MoeyardSample;
MOEYARD_API int moeyard_sample(const MoeyardSample* args, void* stream);

// ---- plan.cu

// Groups the choices of all tokens by slot, and their rows of x with them: grouped[r] = x[tokens[r]]. Row r of slot s, offsets[s] <= r < offsets[s + 1], is token tokens[r]; choice j of
// token t is in row rows[t * top_k + j]. Rows are in order of (slot, token, j).
#define MOEYARD_PLAN_CHUNK 1024
typedef struct {
  MoeyardMatrix ids;         // [tokens, top_k]
  MoeyardMatrix x, grouped;  // of one type
  const uint32_t* slot_of;  // by expert
  int32_t* offsets;         // slots + 1
  uint32_t* tokens;
  uint32_t* rows;
  int32_t* counts;  // working space, slots for every MOEYARD_PLAN_CHUNK choices; unused for one
  int32_t slots;    // at most 2048
  int32_t reserved;
} MoeyardPlan;
MOEYARD_API int moeyard_plan(const MoeyardPlan* args, void* stream);

// ---- world.cu

// What a rank computes of the rows of all ranks, `rows` of each, of which rank r has counts[r] that are not padding; at most 2048 choices.
// Expert e lives in slots replicas[starts[e]..starts[e + 1]], slot s on rank s / slots of those that hold whole experts, and its rows are
// shared out among them as the trait WorldPlan says. grouped[r] = x[row], r in order of (slot of this rank, row, j), offsets[s] <= r <
// offsets[s + 1] in slot s. homes[r] is the row among those returned where its result belongs, `index` where the results of this rank's
// own rows come back.
typedef struct {
  MoeyardMatrix ids;         // [ranks * rows, top_k]
  MoeyardMatrix x, grouped;  // of one type
  const uint32_t* counts;
  const uint32_t* starts;  // experts + 1
  const uint32_t* replicas;
  int32_t* offsets;  // slots + 1
  uint32_t* homes;
  int32_t* index;  // [own rows, top_k, expert_tp]
  int32_t experts;
  int32_t slots;  // of each rank
  int32_t rows, rank;
  int32_t expert_tp;  // ranks that share each expert
  int32_t reserved;
} MoeyardWorld;
MOEYARD_API int moeyard_world(const MoeyardWorld* args, void* stream);

// returned[homes[r]] = computed[r] for r < offsets[slots].
typedef struct {
  MoeyardMatrix computed, returned;  // of one type
  const int32_t* offsets;
  const uint32_t* homes;
  int32_t slots;
  int32_t reserved;
} MoeyardReturn;
MOEYARD_API int moeyard_return(const MoeyardReturn* args, void* stream);

// ---- attention.cu, attention_bf16.cu, attention_sm90.cu, attention_decode.cu, attention_mla.cu

// cache row `slots[i]` of each part = row i
typedef struct {
  MoeyardMatrix source[2];
  MoeyardMatrix part[2];
  const uint32_t* slots;
} MoeyardKvWrite;
MOEYARD_API int moeyard_kv_write(const MoeyardKvWrite* args, void* stream);

// Consecutive rows of one sequence.
typedef struct {
  uint32_t row, rows;
  uint32_t position;     // of the first row
  uint32_t first_block;  // in the block table
  uint32_t base;         // first row of this sequence in parts that are not paged
} MoeyardSpan;

// Part of a key or value: `dim` columns of a row per position.
typedef struct {
  const void* data;
  int64_t stride;       // elements from one position to the next
  int32_t head_stride;  // elements from one KV head to the next; 0 when all share it
  int32_t dim;          // 0: absent
  int32_t paged;        // position -> row through the block table; else row = base + position
  int32_t reserved;
} MoeyardKvPart;

// Softmax attention of `spans`, one softmax per row and query head. A query and its key are the concatenation of two parts.
typedef struct {
  MoeyardMatrix query[2];  // by part; columns: heads at query_stride
  MoeyardMatrix out;       // heads of value.dim columns
  MoeyardKvPart key[2];
  MoeyardKvPart value;
  const MoeyardSpan* spans;
  const uint32_t* block_table;
  const float* sinks;  // or null
  int32_t query_stride[2];
  int32_t span_count;
  int32_t span_rows;  // most rows of a span
  int32_t block_size;
  int32_t heads, kv_heads;
  int32_t window;  // 0: none
  int32_t kv_type;
  float scale;
  // For single rows. Above 0, at least the chunks of 512 positions that a span meets, each walked by a block of its own; if more than
  // one, `partials` holds chunks * (value.dim + 2) floats per span and head. 0 (moeyard_attention_mla): a block walks all positions, and
  // `partials` holds 64 * value.dim floats per span and 64 heads.
  int32_t chunks;
  int32_t reserved;
  float* partials;
} MoeyardAttention;
MOEYARD_API int moeyard_attention(const MoeyardAttention* args, void* stream);
// The same on the tensor cores, over a bf16 cache. `scale` is positive, queries and the output are 16-byte aligned rows, and both parts of
// queries have one type. The kernels for rows of a sequence take spans in ascending order.
// A paged cache, one part of 64 or 128 columns per key; spans whose rows times query heads per KV head are at most 64.
MOEYARD_API int moeyard_attention_bf16(const MoeyardAttention* args, void* stream);
// On compute capability 9.0 only. As above, or keys of 128 columns that are not paged and 64 that are, with values of 128 that are not;
// spans whose rows times query heads per KV head are at most 128.
MOEYARD_API int moeyard_attention_sm90(const MoeyardAttention* args, void* stream);
// As moeyard_attention_bf16, for spans of one row; any number of query heads per KV head; keys and values of equal strides.
MOEYARD_API int moeyard_attention_decode(const MoeyardAttention* args, void* stream);
// On compute capability 9.0 only, for spans of one row: keys of 512 and 64 paged columns that all heads share, and the former as values.
MOEYARD_API int moeyard_attention_mla(const MoeyardAttention* args, void* stream);
// Bytes of shared memory that moeyard_attention needs per block: host function, no stream.
MOEYARD_API size_t moeyard_attention_shared_bytes(const MoeyardAttention* args);

#ifdef __cplusplus
}
#endif
