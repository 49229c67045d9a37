// The search on a GPU: direct differences, tiles through shared memory, the best of each query kept sorted in shared
// memory by the warp that computes its distances. No host synchronisation; everything on the caller's stream.
//
// A block of 8 warps takes some queries of one problem and a part of its keys. Features come in chunks: a chunk of all
// the tile's rows is read coalesced, waits in registers while the one before it is computed, and is stored transposed.
// With many queries every warp has its own, and all of them the same keys; with few, every warp has the same queries
// and its own keys. Where a query's keys were divided, over warps or blocks, a second kernel merges their best.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "common/cuda.hpp"
#include "knn/episodic.hpp"
#include "knn/knn.hpp"

namespace urlfast {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr unsigned kAll = 0xffffffffu;

// Keys: a squared distance's bits above an index order as the pair does, ties to the lowest index. NaN comes after
// infinity, and what is not there after both.
template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = unsigned long long;
};
template <>
struct KeyOf<double> {
  using type = unsigned __int128;
};
template <class T>
using Key = typename KeyOf<T>::type;
template <class K>
__device__ K nothing() {
  return ~K(0);
}
__device__ unsigned long long make_key(float squared, unsigned index) {
  return static_cast<unsigned long long>(__float_as_uint(squared)) << 32 | index;
}
__device__ unsigned __int128 make_key(double squared, unsigned index) {
  return static_cast<unsigned __int128>(static_cast<unsigned long long>(__double_as_longlong(squared))) << 32 | index;
}
__device__ float distance_of(unsigned long long key) { return sqrtf(__uint_as_float(unsigned(key >> 32))); }
__device__ double distance_of(unsigned __int128 key) {
  return sqrt(__longlong_as_double(static_cast<long long>(static_cast<unsigned long long>(key >> 32))));
}

__device__ unsigned long long shuffle(unsigned long long key, int lane) { return __shfl_sync(kAll, key, lane); }
__device__ unsigned long long shuffle_xor(unsigned long long key, int mask) { return __shfl_xor_sync(kAll, key, mask); }
__device__ unsigned long long shuffle_up(unsigned long long key) { return __shfl_up_sync(kAll, key, 1); }
template <class Move>
__device__ unsigned __int128 by_halves(unsigned __int128 key, Move move) {
  const auto low = static_cast<unsigned long long>(key), high = static_cast<unsigned long long>(key >> 64);
  return static_cast<unsigned __int128>(move(high)) << 64 | move(low);
}
__device__ unsigned __int128 shuffle(unsigned __int128 key, int lane) {
  return by_halves(key, [=](unsigned long long half) { return shuffle(half, lane); });
}
__device__ unsigned __int128 shuffle_xor(unsigned __int128 key, int mask) {
  return by_halves(key, [=](unsigned long long half) { return shuffle_xor(half, mask); });
}
__device__ unsigned __int128 shuffle_up(unsigned __int128 key) {
  return by_halves(key, [=](unsigned long long half) { return shuffle_up(half); });
}

// Bitonic networks over a warp: lane i ends with the i-th lowest.
template <class K>
__device__ K exchange(K key, int distance, bool keep_low) {
  const K other = shuffle_xor(key, distance);
  return (other < key) == keep_low ? other : key;
}
template <class K>
__device__ K merge_warp(K key, int lane) {  // of a bitonic sequence
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) key = exchange(key, distance, (lane & distance) == 0);
  return key;
}
template <class K>
__device__ K sort_warp(K key, int lane) {
#pragma unroll
  for (int size = 2; size <= 32; size *= 2)
#pragma unroll
    for (int distance = size / 2; distance > 0; distance /= 2)
      key = exchange(key, distance, ((lane & distance) == 0) == ((lane & size) == 0));
  return key;
}

// Takes a warp's candidates (one per lane where `mask` has its bit, else nothing()) into a sorted list of 32 * N keys.
// Few are inserted one by one, many are sorted and merged. Not inlined: it is called rarely, from many places.
template <class K, int N>
__device__ __noinline__ void absorb(K* list, K candidate, unsigned mask) {
  const int lane = threadIdx.x % 32;
  K best[N];
#pragma unroll
  for (int j = 0; j < N; ++j) best[j] = list[32 * j + lane];
  if (__popc(mask) <= 4) {
    for (; mask; mask &= mask - 1) {
      const K one = shuffle(candidate, __ffs(mask) - 1);
#pragma unroll
      for (int j = N - 1; j >= 0; --j) {  // from the end: an element's neighbour must still be the old one
        K before = shuffle_up(best[j]);
        const K carried = j > 0 ? shuffle(best[j > 0 ? j - 1 : 0], 31) : K(0);
        if (lane == 0) before = carried;
        const bool first = j == 0 && lane == 0;
        if (!(best[j] < one)) best[j] = first || before < one ? one : before;
      }
    }
  } else {
    candidate = sort_warp(candidate, lane);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const K other = shuffle(candidate, 31 - lane);
      const K low = other < best[j] ? other : best[j], high = other < best[j] ? best[j] : other;
      best[j] = merge_warp(low, lane);
      candidate = merge_warp(high, lane);
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) list[32 * j + lane] = best[j];
  __syncwarp();
}

// Takes what of a warp's keys belongs among the first `width` of the list.
template <class K, int N>
__device__ void absorb_all(K* list, K key, int width) {
  const bool wanted = key < list[width - 1];
  const unsigned mask = __ballot_sync(kAll, wanted);
  if (mask) absorb<K, N>(list, wanted ? key : nothing<K>(), mask);
}

// What the caller asked for -----------------------------------------------------------------------------------------

enum class Result { neighbours, kept, reward };

struct ProblemRow {  // of a ragged call
  int64_t length;
  int64_t kept_offset;  // where the problem's kept distances begin
};

struct Arguments {
  const void* queries;
  const void* keys;
  int64_t num_queries, num_keys, dim, k;
  int64_t query_tiles;  // blocks.x = problems * query_tiles, blocks.y = parts
  const ProblemRow* table;
  bool exclude_self;
  // A round finds the neighbours [first, first + width): those above the last one of the round before.
  int64_t first;
  int width;
  void* floors;  // [problems * num_queries] keys, or null: the last key of the round before, and of this one
  void*
      partials;  // [problems * num_queries, lists, width] keys, or null where no query's keys were divided over blocks
  int lists;
  // Results.
  Result result;
  void* distances;
  int64_t* indices;  // or null
  void* out;         // kept distances, or rewards
  KnnReward reward;

  __device__ int64_t length(int64_t s) const { return table ? table[s].length : num_keys; }
};

__device__ int64_t kept_of(int64_t found, bool kth) { return kth && found > 1 ? 1 : found; }

// A row's sorted keys become what was asked for. All lanes of a warp; N registers' worth of keys.
template <class T, int N>
__device__ void emit(const Arguments& a, int64_t s, int64_t row, const Key<T>* list) {
  const int lane = threadIdx.x % 32;
  const int64_t problem_row = s * a.num_queries + row, length = a.length(s);
  const int64_t found = a.k < length ? a.k : length;
  if (a.floors && lane == 0) static_cast<Key<T>*>(a.floors)[problem_row] = list[a.width - 1];
  double sum = 0;
  const int64_t kept = kept_of(found, a.reward.kth);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int64_t at = a.first + 32 * j + lane;
    if (32 * j + lane >= a.width || at >= a.k) continue;
    const Key<T> key = list[32 * j + lane];
    const bool there = key != nothing<Key<T>>();
    const T distance = there ? distance_of(key) : T(INFINITY);
    if (a.result == Result::neighbours) {
      static_cast<T*>(a.distances)[problem_row * a.k + at] = distance;
      if (a.indices) a.indices[problem_row * a.k + at] = there ? int64_t(unsigned(key)) : -1;
    } else if (at < found && at >= found - kept) {
      if (a.result == Result::kept) {
        const int64_t offset = a.table ? a.table[s].kept_offset : s * a.num_queries * kept;
        static_cast<T*>(a.out)[offset + row * kept + at - (found - kept)] = distance;
      } else {
        sum += knn_power(double(distance), a.reward.exponent);
      }
    }
  }
  if (a.result != Result::reward) return;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  if (lane == 0) static_cast<T*>(a.out)[problem_row] = T(knn_log_reward(sum, kept, a.reward.c));
}

// The search --------------------------------------------------------------------------------------------------------

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
  T v[N];
};

// TQ queries a warp, QW of the 8 warps side by side along the queries and the rest along the keys, TK keys a lane,
// lists of 32 * N keys.
template <class T_, class Item_, int TQ_, int QW_, int TK_, int N_>
struct Shape {
  using T = T_;
  using Item = Item_;
  static constexpr int TQ = TQ_, QW = QW_, TK = TK_, N = N_;
  static constexpr int KW = kWarps / QW;
  static constexpr int queries = TQ * QW, keys = 32 * TK * KW;  // rows of a block's tiles
  static constexpr int chunk = sizeof(T) == 8 ? 8 : 16;         // features at a time
  static constexpr int lists = kWarps * TQ;
  static constexpr int pad = 16 / int(sizeof(T));  // keeps rows of the transposed tiles aligned, and off one bank
};

// A chunk of a tile's rows: into registers, coalesced; then transposed into shared memory.
template <class S, int Rows>
struct Chunk {
  static constexpr int count = (Rows * S::chunk + kThreads - 1) / kThreads;
  typename S::T value[count];

  __device__ void read(const typename S::Item* rows, int64_t have, int64_t dim, int64_t feature) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int item = threadIdx.x + i * kThreads, row = item / S::chunk;
      const int64_t d = feature + item % S::chunk;
      value[i] = row < have && d < dim && row < Rows ? widen(rows[row * dim + d]) : typename S::T(0);
    }
  }
  __device__ void write(typename S::T* shared) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int item = threadIdx.x + i * kThreads, row = item / S::chunk;
      if (row < Rows) shared[item % S::chunk * (Rows + S::pad) + row] = value[i];
    }
  }
};

template <class S>
__global__ void __launch_bounds__(kThreads, 2) search(const __grid_constant__ Arguments a) {
  using T = typename S::T;
  using K = Key<T>;
  constexpr int query_stride = S::queries + S::pad, key_stride = S::keys + S::pad;
  __shared__ alignas(16) T query_tile[S::chunk * query_stride];
  __shared__ alignas(16) T key_tile[S::chunk * key_stride];
  __shared__ alignas(16) K lists[S::lists * 32 * S::N];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int query_warp = warp % S::QW, key_warp = warp / S::QW;
  const int64_t s = blockIdx.x / a.query_tiles, row0 = blockIdx.x % a.query_tiles * S::queries;
  const int64_t length = a.length(s), rows = min(int64_t(S::queries), a.num_queries - row0);
  const int64_t begin = length * blockIdx.y / gridDim.y, end = length * (blockIdx.y + 1) / gridDim.y;
  const auto* queries = static_cast<const typename S::Item*>(a.queries) + (s * a.num_queries + row0) * a.dim;
  const auto* keys = static_cast<const typename S::Item*>(a.keys) + s * a.num_keys * a.dim;
  const int query0 = query_warp * S::TQ;  // this warp's first query in the tile
  K* const own = lists + warp * S::TQ * 32 * S::N;
  for (int i = lane; i < S::TQ * 32 * S::N; i += 32) own[i] = nothing<K>();
  __syncwarp();
  Chunk<S, S::queries> next_queries;
  Chunk<S, S::keys> next_keys;
  for (int64_t tile = begin; tile < end; tile += S::keys) {
    const int64_t columns = min(int64_t(S::keys), end - tile);
    T sum[S::TQ][S::TK] = {};
    next_queries.read(queries, rows, a.dim, 0);
    next_keys.read(keys + tile * a.dim, columns, a.dim, 0);
    for (int64_t feature = 0; feature < a.dim; feature += S::chunk) {
      __syncthreads();  // the chunk before this one has been used by all
      next_queries.write(query_tile);
      next_keys.write(key_tile);
      __syncthreads();
      if (feature + S::chunk < a.dim) {
        next_queries.read(queries, rows, a.dim, feature + S::chunk);
        next_keys.read(keys + tile * a.dim, columns, a.dim, feature + S::chunk);
      }
#pragma unroll
      for (int d = 0; d < S::chunk; ++d) {  // features beyond the last are zeros in both tiles
        const auto q = *reinterpret_cast<const Pack<T, S::TQ>*>(query_tile + d * query_stride + query0);
        const auto k =
            *reinterpret_cast<const Pack<T, S::TK>*>(key_tile + d * key_stride + (key_warp * 32 + lane) * S::TK);
#pragma unroll
        for (int i = 0; i < S::TQ; ++i)
#pragma unroll
          for (int j = 0; j < S::TK; ++j) {
            const T difference = k.v[j] - q.v[i];
            sum[i][j] += difference * difference;
          }
      }
    }
#pragma unroll
    for (int i = 0; i < S::TQ; ++i) {
      if (query0 + i >= rows) continue;  // the same for all lanes
      K* const list = own + i * 32 * S::N;
      K worst = list[a.width - 1];
      // In a later round: the last that was found before, above which the search goes on.
      const K floor = a.first > 0 ? static_cast<const K*>(a.floors)[s * a.num_queries + row0 + query0 + i] : K(0);
#pragma unroll
      for (int j = 0; j < S::TK; ++j) {
        const int column = (key_warp * 32 + lane) * S::TK + j;
        const int64_t index = tile + column;
        const K key = make_key(sum[i][j], unsigned(index));
        const bool wanted = column < columns && key < worst && (a.first == 0 || key > floor) &&
                            !(a.exclude_self && index == row0 + query0 + i);
        const unsigned mask = __ballot_sync(kAll, wanted);
        if (!mask) continue;
        absorb<K, S::N>(list, wanted ? key : nothing<K>(), mask);
        worst = list[a.width - 1];
      }
    }
  }
  if constexpr (S::KW > 1) __syncthreads();
  // Warps that shared their queries meet: each takes some queries and the others' lists of them.
  for (int i = S::KW > 1 ? warp : 0; i < S::TQ && query0 + i < rows; i += S::KW > 1 ? kWarps : 1) {
    K* const list = (S::KW > 1 ? lists : own) + i * 32 * S::N;
    if constexpr (S::KW > 1)
      for (int w = 1; w < S::KW; ++w) {
        const K* const other = lists + (w * S::TQ + i) * 32 * S::N;
        for (int j = lane; j < 32 * S::N; j += 32) absorb_all<K, S::N>(list, other[j], a.width);
      }
    const int64_t row = row0 + query0 + i;
    if (!a.partials) {
      emit<T, S::N>(a, s, row, list);
      continue;
    }
    K* const to = static_cast<K*>(a.partials) + ((s * a.num_queries + row) * gridDim.y + blockIdx.y) * a.width;
    for (int j = lane; j < a.width; j += 32) to[j] = list[j];
  }
}

// A warp per query: the best of its parts' best.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ Arguments a, int64_t rows) {
  using K = Key<T>;
  __shared__ alignas(16) K lists[kWarps * 32 * N];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= rows) return;
  K* const list = lists + warp * 32 * N;
  for (int j = lane; j < 32 * N; j += 32) list[j] = nothing<K>();
  __syncwarp();
  const int64_t count = int64_t(a.lists) * a.width;
  const K* const from = static_cast<const K*>(a.partials) + row * count;
  for (int64_t j = 0; j < count; j += 32)
    absorb_all<K, N>(list, j + lane < count ? from[j + lane] : nothing<K>(), a.width);
  emit<T, N>(a, row / a.num_queries, row % a.num_queries, list);
}

// A warp per query: kept distances to rewards. `state` null: nothing divides them.
template <class T>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ Arguments a, const T* kept, int64_t rows,
                                                   const Statistic* state, StatisticRule rule) {
  const int lane = threadIdx.x % 32;
  const int64_t problem_row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (problem_row >= rows) return;
  const int64_t s = problem_row / a.num_queries, row = problem_row % a.num_queries, length = a.length(s);
  const int64_t n = kept_of(a.k < length ? a.k : length, a.reward.kth);
  const T* const from = kept + (a.table ? a.table[s].kept_offset : s * a.num_queries * n) + row * n;
  const double inverse = state ? 1 / statistic_scale(*state, rule) : 1;
  double sum = 0;
  for (int64_t i = lane; i < n; i += 32)
    sum += knn_power(statistic_normalize(from[i], inverse, state ? rule.clip : -1), a.reward.exponent);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  if (lane == 0) static_cast<T*>(a.out)[problem_row] = T(knn_log_reward(sum, n, a.reward.c));
}

// Host lengths travel as kernel arguments: no pinned memory to keep alive, no wait, and a graph can capture it.
constexpr int kTablePart = 200;  // 16 bytes each, below the 4 kB that arguments may have
struct TablePart {
  ProblemRow rows[kTablePart];
};
__global__ void fill_table(const __grid_constant__ TablePart part, ProblemRow* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = part.rows[i];
}

// Episodic memories: what is held is known to the device alone.
constexpr int kResetPart = 2048;
struct ResetPart {
  bool reset[kResetPart];
};
__global__ void begin_step(const __grid_constant__ ResetPart part, const bool* reset, int64_t first, int count,
                           int64_t capacity, int64_t* total, ProblemRow* table) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t n = first + i;
  if (reset ? reset[n] : part.reset[i]) total[n] = 0;
  table[n] = {min(total[n], capacity), 0};
}
// A block per stream.
__global__ void append(const float* embeddings, int64_t capacity, int64_t dim, int64_t* total, float* rows) {
  const int64_t n = blockIdx.x, slot = total[n] % capacity;
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x)
    rows[(n * capacity + slot) * dim + d] = embeddings[n * dim + d];
  __syncthreads();  // all have read the total
  if (threadIdx.x == 0) ++total[n];
}

// Launching ---------------------------------------------------------------------------------------------------------

// Memory for one call, ordered by the stream where the device has memory pools.
class StreamMemory {
 public:
  StreamMemory(int64_t bytes, int device, CUstream_st* stream) : stream_(stream) {
    if (bytes == 0) return;
    int pools = 0;
    URLFAST_CUDA_CHECK(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, device));
    pooled_ = pools != 0;
    URLFAST_CUDA_CHECK(pooled_ ? cudaMallocAsync(&data_, size_t(bytes), stream) : cudaMalloc(&data_, size_t(bytes)));
  }
  ~StreamMemory() {
    if (!data_) return;
    if (pooled_)
      cudaFreeAsync(data_, stream_);
    else
      cudaFree(data_);  // waits for the device, so nothing still uses it
  }
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
  CUstream_st* stream_;
  bool pooled_ = false;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int multiprocessors(int device) {
  static std::atomic<int> known[64];
  int count = device < 64 ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    URLFAST_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (device < 64) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

struct Call {
  const KnnProblem& p;
  KnnReward reward;
  int device;
  CUstream_st* stream;

  int64_t rows() const { return p.problems * p.num_queries; }
  int64_t longest() const { return p.lengths ? *std::max_element(p.lengths, p.lengths + p.problems) : p.num_keys; }
  int64_t kept_count() const {
    int64_t count = 0;
    for (int64_t s = 0; s < p.problems; ++s) count += p.num_queries * knn_kept(p, reward, s);
    return count;
  }
  Arguments arguments() const {
    Arguments a{};
    a.queries = p.queries, a.keys = p.keys;
    a.num_queries = p.num_queries, a.num_keys = p.num_keys, a.dim = p.dim, a.k = p.k;
    a.exclude_self = p.self && !p.include_self;
    a.reward = reward;
    return a;
  }
  int64_t table_bytes() const { return p.lengths ? p.problems * int64_t(sizeof(ProblemRow)) : 0; }
  void upload_table(ProblemRow* to) const {
    if (!p.lengths) return;
    int64_t offset = 0;
    for (int64_t s = 0; s < p.problems; s += kTablePart) {
      TablePart part{};
      const int count = int(std::min<int64_t>(kTablePart, p.problems - s));
      for (int i = 0; i < count; ++i) {
        part.rows[i] = {p.lengths[s + i], offset};
        offset += p.num_queries * knn_kept(p, reward, s + i);
      }
      fill_table<<<1, kThreads, 0, stream>>>(part, to + s, count);
      URLFAST_CUDA_CHECK(cudaGetLastError());
    }
  }
};

// One block should find work of at least this many tiles of keys; a device is full with this many blocks for each of
// its multiprocessors.
constexpr int64_t kTilesOfPart = 4, kBlocksEach = 4;
constexpr int64_t kMostPartials = int64_t(64) << 20;  // bytes

template <class S>
void launch_search(const Call& call, Arguments a) {
  using K = Key<typename S::T>;
  const KnnProblem& p = call.p;
  const int64_t longest = call.longest();
  a.query_tiles = ceil_div(p.num_queries, S::queries);
  const int64_t blocks = p.problems * a.query_tiles;
  if (blocks > 0x7fffffff) throw std::invalid_argument(std::string(p.queries_name) + ": too many rows for one launch");
  int64_t parts = ceil_div(kBlocksEach * multiprocessors(call.device), blocks);
  parts = std::min(parts, longest / (kTilesOfPart * S::keys));
  parts = std::min(parts, kMostPartials / (call.rows() * a.width * int64_t(sizeof(K))));
  parts = std::clamp<int64_t>(parts, 1, 65535);
  a.lists = int(parts);
  const StreamMemory partials(a.lists > 1 ? call.rows() * a.lists * a.width * int64_t(sizeof(K)) : 0, call.device,
                              call.stream);
  a.partials = partials.get();
  search<S><<<dim3(unsigned(blocks), unsigned(parts)), kThreads, 0, call.stream>>>(a);
  URLFAST_CUDA_CHECK(cudaGetLastError());
  if (!a.partials) return;
  merge<typename S::T, S::N><<<unsigned(ceil_div(call.rows(), kWarps)), kThreads, 0, call.stream>>>(a, call.rows());
  URLFAST_CUDA_CHECK(cudaGetLastError());
}

template <class T, class Item, int N>
void choose_shape(const Call& call, const Arguments& a) {
  // Longer lists leave room for fewer of them in 48 kB, which every device has; float64 takes twice the room.
  constexpr int many = 8 / (sizeof(T) == 8 ? 2 : 1) / (N > 1 ? 2 : 1), few = N > 1 ? many / 2 : many;
  if (call.p.num_queries == 1)
    launch_search<Shape<T, Item, 1, 1, 1, N>>(call, a);
  else if (call.p.num_queries <= 2 * many)
    launch_search<Shape<T, Item, few, 1, 1, N>>(call, a);
  else
    launch_search<Shape<T, Item, many, kWarps, sizeof(T) == 8 ? 2 : 4, N>>(call, a);
}

constexpr int kMostWidth = 128;  // neighbours that one round finds

template <class T, class Item>
void rounds(const Call& call, Arguments a) {
  // Neighbours have padding to be written, too, where k goes beyond the longest memory.
  const int64_t most = std::max<int64_t>(1, std::min(call.p.k, call.longest()));
  const int64_t last = a.result == Result::neighbours ? call.p.k : most;
  const StreamMemory floors(last > kMostWidth ? call.rows() * int64_t(sizeof(Key<T>)) : 0, call.device, call.stream);
  a.floors = floors.get();
  for (a.first = 0; a.first < last; a.first += kMostWidth) {
    a.width = int(std::min<int64_t>(kMostWidth, last - a.first));
    if (a.width <= 32 && !a.floors)
      choose_shape<T, Item, 1>(call, a);
    else
      choose_shape<T, Item, 4>(call, a);
  }
}

void run(const Call& call, const Arguments& a) {
  switch (call.p.dtype) {
    case DType::f64:
      return rounds<double, double>(call, a);
    case DType::f32:
      return rounds<float, float>(call, a);
    case DType::f16:
      return rounds<float, __half>(call, a);
    default:
      return rounds<float, __nv_bfloat16>(call, a);
  }
}

void launch_finish(const Call& call, const Arguments& a, const void* kept, const Statistic* state, StatisticRule rule) {
  const unsigned blocks = unsigned(ceil_div(call.rows(), kWarps));
  if (call.p.dtype == DType::f64)
    finish<<<blocks, kThreads, 0, call.stream>>>(a, static_cast<const double*>(kept), call.rows(), state, rule);
  else
    finish<<<blocks, kThreads, 0, call.stream>>>(a, static_cast<const float*>(kept), call.rows(), state, rule);
  URLFAST_CUDA_CHECK(cudaGetLastError());
}

// A call with its table on its device, which is the current one meanwhile.
struct Launch {
  explicit Launch(const Call& c)
      : guard(c.device), call(c), table(c.table_bytes(), c.device, c.stream), a(c.arguments()) {
    auto* const rows = static_cast<ProblemRow*>(table.get());
    call.upload_table(rows);
    a.table = rows;
  }
  DeviceGuard guard;
  Call call;
  StreamMemory table;
  Arguments a;
};

}  // namespace

void knn_cuda(const KnnProblem& p, void* distances, int64_t* indices, int device, CUstream_st* stream) {
  Launch launch({p, {}, device, stream});
  launch.a.result = Result::neighbours, launch.a.distances = distances, launch.a.indices = indices;
  run(launch.call, launch.a);
}

void knn_kept_cuda(const KnnProblem& p, const KnnReward& reward, void* kept, int device, CUstream_st* stream) {
  Launch launch({p, reward, device, stream});
  launch.a.result = Result::kept, launch.a.out = kept;
  run(launch.call, launch.a);
}

void knn_finish_cuda(const KnnProblem& p, const KnnReward& reward, const void* kept, const Statistic* state,
                     StatisticRule rule, void* out, int device, CUstream_st* stream) {
  Launch launch({p, reward, device, stream});
  launch.a.out = out;
  launch_finish(launch.call, launch.a, kept, state, rule);
}

void knn_reward_cuda(const KnnProblem& p, const KnnReward& reward, void* out, int device, CUstream_st* stream) {
  Launch launch({p, reward, device, stream});
  if (std::min(p.k, launch.call.longest()) <= kMostWidth) {  // one round sees all that a reward needs
    launch.a.result = Result::reward, launch.a.out = out;
    return run(launch.call, launch.a);
  }
  const StreamMemory kept(launch.call.kept_count() * item_size(p.dtype == DType::f64 ? DType::f64 : DType::f32), device,
                          stream);
  launch.a.result = Result::kept, launch.a.out = kept.get();
  run(launch.call, launch.a);
  launch.a.out = out;
  launch_finish(launch.call, launch.a, kept.get(), nullptr, {});
}

void episodic_step_cuda(float* rows, int64_t* total, const KnnProblem& p, const bool* reset, bool reset_on_device,
                        float* distances, int device, CUstream_st* stream) {
  const DeviceGuard guard(device);
  const Call call{p, {}, device, stream};
  const StreamMemory table(p.problems * int64_t(sizeof(ProblemRow)), device, stream);
  auto* const held = static_cast<ProblemRow*>(table.get());
  for (int64_t first = 0; first < p.problems; first += kResetPart) {
    ResetPart part{};
    const int count = int(std::min<int64_t>(kResetPart, p.problems - first));
    if (!reset_on_device) std::copy_n(reset + first, count, part.reset);
    begin_step<<<unsigned(ceil_div(count, kThreads)), kThreads, 0, stream>>>(part, reset_on_device ? reset : nullptr,
                                                                             first, count, p.num_keys, total, held);
    URLFAST_CUDA_CHECK(cudaGetLastError());
  }
  Arguments a = call.arguments();
  a.table = held;
  a.result = Result::neighbours, a.distances = distances;
  run(call, a);
  append<<<unsigned(p.problems), 128, 0, stream>>>(static_cast<const float*>(p.queries), p.num_keys, p.dim, total,
                                                   rows);
  URLFAST_CUDA_CHECK(cudaGetLastError());
}

}  // namespace urlfast
