// Choosing tokens from rows of logits: src/backend/draw.rs says which. Sums of weights are sums of integers, so each of them here has
// the same value as any other way to add them up.
#include "common.cuh"

using namespace moeyard;

namespace {

using Units = unsigned long long;  // of weight: the best token has 2^39

constexpr int THREADS = 1024, WARPS = THREADS / WARP;  // of a row
constexpr int AHEAD = 8;                               // elements that a thread has under way
constexpr int LEVELS = 3, BINS = 2048;                 // a key is found by its upper 11 bits, 11 more, and the last 10

struct Candidate {
  float value;
  int column;
};

__device__ inline Candidate better(Candidate a, Candidate b) {
  return b.value > a.value || (b.value == a.value && b.column < a.column) ? b : a;
}

// What a block finds out about its row.
struct Shared {
  Candidate candidates[WARPS];
  int infinite[WARPS];
  Units sums[WARPS];             // of scans
  unsigned low[BINS], high[BINS];  // two halves of a sum
  Units before;
  int bin;
  Units above[WARPS];  // kept beyond doubt, of each warp's columns
  int ties[WARPS];
};

// Calls f(element, column) for the columns from `first` to `end` that fall to one of `step` threads.
template <class F> __device__ inline void each(const float* x, int first, int end, int step, F f) {
  for (; first < end; first += AHEAD * step) {
    float v[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) v[i] = first + i * step < end ? x[first + i * step] : 0.0f;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (first + i * step < end) f(v[i], first + i * step);
  }
}

// The greatest element with the lowest column, for every thread, and how many are not finite. No NaN is greater than anything.
__device__ Candidate best_of(const float* x, int columns, Shared& shared, int& infinite) {
  Candidate own = {-INFINITY, INT_MAX};
  int count = 0;
  each(x, threadIdx.x, columns, THREADS, [&](float v, int column) {
    count += !isfinite(v);
    own = better(own, {v, column});
  });
  for (int o = WARP / 2; o; o >>= 1) {
    own = better(own, {__shfl_xor_sync(FULL, own.value, o), __shfl_xor_sync(FULL, own.column, o)});
    count += __shfl_xor_sync(FULL, count, o);
  }
  if (threadIdx.x % WARP == 0) {
    shared.candidates[threadIdx.x / WARP] = own;
    shared.infinite[threadIdx.x / WARP] = count;
  }
  __syncthreads();
  own = shared.candidates[0];
  infinite = shared.infinite[0];
  for (int w = 1; w < WARPS; ++w) {
    own = better(own, shared.candidates[w]);
    infinite += shared.infinite[w];
  }
  if (own.column == INT_MAX) own.column = 0;
  return own;
}

// The sum over the threads before this one; the total as well.
__device__ Units sum_before(Units x, Shared& shared, Units& total) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  Units sum = x;
  for (int o = 1; o < WARP; o <<= 1) {
    Units other = __shfl_up_sync(FULL, sum, o);
    if (lane >= o) sum += other;
  }
  if (lane == WARP - 1) shared.sums[warp] = sum;
  __syncthreads();
  Units before = sum - x;
  total = 0;
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += shared.sums[w];
    total += shared.sums[w];
  }
  __syncthreads();  // the next scan writes them
  return before;
}

// Rises with the element. Zeros of either sign are alike, and no finite number has key 0.
__device__ inline unsigned key_of(float x) {
  unsigned bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline float of_key(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// A row of which a token is drawn.
struct Row {
  const float* x;
  int columns;
  float max, temperature, min_p;

  // `exp_nonpositive`, `weight` and `units` of src/backend/draw/weights.rs: no product is fused with a sum.
  __device__ Units weigh(float x) const {
    constexpr float LOWEST = -28.0f;  // e^LOWEST is less than half a unit
    constexpr float ROUND = 12582912.0f, LOG2_E = 1.44269504088896340736f;
    constexpr float LN2_HIGH = 0.6933594f, LN2_LOW = -2.1219444e-4f;
    float y = __fdiv_rn(__fsub_rn(x, max), temperature);
    if (!(y > LOWEST)) return 0;
    float shifted = __fadd_rn(__fmul_rn(y, LOG2_E), ROUND);
    float n = __fsub_rn(shifted, ROUND);
    float r = __fsub_rn(__fsub_rn(y, __fmul_rn(n, LN2_HIGH)), __fmul_rn(n, LN2_LOW));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3982e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 0.16666665f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    float fraction = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
    float power = __uint_as_float((__float_as_uint(shifted) - __float_as_uint(ROUND) + 127u) << 23);
    float weight = __fmul_rn(fraction, power);
    return weight >= min_p ? __float2ull_rn(__fmul_rn(weight, 549755813888.0f)) : 0;
  }
};

// Keeps all keys above `key`, and of those that equal it the first `ties`.
struct Cut {
  unsigned key;
  int ties;
};
constexpr Cut NONE = {0, 0};

// The cut that keeps the fewest best tokens that come to `wanted`, more than 0 and no more than all come to: by weight or by number.
// Keys below `floor` are not among them.
template <bool BY_WEIGHT> __device__ Cut cut(const Row& row, Units wanted, unsigned floor, Shared& shared) {
  unsigned found = 0;  // leading bits of the key
  for (int level = 0; level < LEVELS; ++level) {
    int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bins = level == 2 ? BINS / 2 : BINS;
    for (int bin = threadIdx.x; bin < bins; bin += THREADS) shared.low[bin] = shared.high[bin] = 0;
    __syncthreads();
    each(row.x, threadIdx.x, row.columns, THREADS, [&](float x, int) {
      unsigned key = key_of(x);
      bool counts = level == 0 || key >> (level == 1 ? 21 : 10) == found;
      if (!counts || key < floor) return;
      int bin = key >> shift & (bins - 1);
      if (!BY_WEIGHT) {
        atomicAdd(&shared.low[bin], 1u);
        return;
      }
      Units weight = row.weigh(x);
      if (weight == 0) return;
      unsigned low = unsigned(weight), high = unsigned(weight >> 32);
      if (atomicAdd(&shared.low[bin], low) > ~low) ++high;  // a carry
      if (high) atomicAdd(&shared.high[bin], high);
    });
    __syncthreads();
    // Each thread has one or two bins, the first thread the uppermost.
    int own = bins / THREADS, top = bins - 1 - threadIdx.x * own;
    auto sum_of = [&](int bin) { return Units(shared.high[bin]) << 32 | shared.low[bin]; };
    Units sum = sum_of(top) + (own > 1 ? sum_of(top - 1) : 0), total;
    Units before = sum_before(sum, shared, total);
    if (before < wanted && before + sum >= wanted) {
      bool lower = before + sum_of(top) < wanted;
      shared.bin = lower ? top - 1 : top;
      shared.before = lower ? before + sum_of(top) : before;
    }
    __syncthreads();
    wanted -= shared.before;
    found = found << (level == 2 ? 10 : 11) | unsigned(shared.bin);
  }
  Units one = BY_WEIGHT ? row.weigh(of_key(found)) : 1;
  return {found, int((wanted + one - 1) / one)};
}

// What the kept tokens of each warp's columns weigh, apart from ties, and its ties; into shared memory. Returns what all kept tokens
// weigh. `part` columns are a warp's.
__device__ Units weigh_parts(const Row& row, Cut cut, int part, Shared& shared) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int first = warp * part, end = min(first + part, row.columns);
  Units above = 0;
  int ties = 0;
  each(row.x, first + lane, end, WARP, [&](float x, int) {
    unsigned key = key_of(x);
    if (key > cut.key) above += row.weigh(x);
    ties += key == cut.key;
  });
  for (int o = WARP / 2; o; o >>= 1) {
    above += __shfl_xor_sync(FULL, above, o);
    ties += __shfl_xor_sync(FULL, ties, o);
  }
  if (lane == 0) {
    shared.above[warp] = above;
    shared.ties[warp] = ties;
  }
  __syncthreads();
  Units all = cut.ties ? cut.ties * row.weigh(of_key(cut.key)) : 0;
  for (int w = 0; w < WARPS; ++w) all += shared.above[w];
  return all;
}

// The first token with which the weights of kept ones add up to more than `target`, less than what all weigh; written by the thread that
// finds it. After `weigh_parts`.
__device__ void pick(const Row& row, Cut cut, int part, Units target, Shared& shared, int32_t* token) {
  Units tie = cut.ties ? row.weigh(of_key(cut.key)) : 0;
  // Which warp's columns.
  int warp = 0;
  for (; warp < WARPS - 1; ++warp) {
    int kept = min(shared.ties[warp], cut.ties);
    Units sum = shared.above[warp] + kept * tie;
    if (sum > target) break;
    target -= sum;
    cut.ties -= kept;
  }
  // Which thread's.
  int start = warp * part, stop = min(start + part, row.columns), run = (part + THREADS - 1) / THREADS;
  int first = min(start + int(threadIdx.x) * run, stop), end = min(first + run, stop);
  Units above = 0, total;
  int ties = 0;
  for (int column = first; column < end; ++column) {
    unsigned key = key_of(row.x[column]);
    if (key > cut.key) above += row.weigh(row.x[column]);
    ties += key == cut.key;
  }
  int left = max(cut.ties - int(sum_before(ties, shared, total)), 0);
  Units sum = above + min(ties, left) * tie;
  Units before = sum_before(sum, shared, total);
  if (before > target || before + sum <= target) return;
  target -= before;
  for (int column = first; column < end; ++column) {
    unsigned key = key_of(row.x[column]);
    Units weight = key > cut.key ? row.weigh(row.x[column]) : key == cut.key && left-- > 0 ? tie : 0;
    if (weight > target) {
      *token = column;
      return;
    }
    target -= weight;
  }
}

// One block per row.
__global__ void __launch_bounds__(THREADS) sample(MoeyardSample a) {
  __shared__ Shared shared;
  start_in_turn();
  const float* x = static_cast<const float*>(a.x.data) + blockIdx.x * a.x.stride;
  int32_t* out = static_cast<int32_t*>(a.out.data) + blockIdx.x * a.out.stride;
  int infinite;
  Candidate best = best_of(x, a.x.cols, shared, infinite);
  MoeyardDraw draw{};
  if (a.draws) draw = a.draws[blockIdx.x];
  bool greedy = draw.temperature == 0.0f || infinite > 0;
  if (threadIdx.x == 0) {
    if (greedy) out[0] = best.column;
    out[1] = infinite;
  }
  if (greedy) return;
  Row row = {x, a.x.cols, best.value, draw.temperature, draw.min_p};
  int part = (row.columns + WARPS - 1) / WARPS;
  Cut kept = NONE;
  if (draw.top_k > 0 && draw.top_k < unsigned(row.columns)) kept = cut<false>(row, draw.top_k, 0, shared);
  Units mass = weigh_parts(row, kept, part, shared);
  if (draw.top_p < 1.0f) {
    Units wanted = __double2ull_ru(__dmul_rn(double(draw.top_p), __ull2double_rn(mass)));
    kept = cut<true>(row, wanted > 0 ? wanted : 1, kept.key, shared);
    mass = weigh_parts(row, kept, part, shared);
  }
  pick(row, kept, part, __umul64hi(draw.random, mass), shared, out);
}

}  // namespace

extern "C" int moeyard_sample(const MoeyardSample* a, void* stream) {
  if (a->x.rows == 0) return 0;
  return launch_early(sample, dim3(a->x.rows), THREADS, 0, stream, *a);
}
