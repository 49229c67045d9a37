// The search on a GPU. No host synchronisation; everything on the caller's stream, in memory that the caller brings.
//
// The direct search (below) tiles queries and keys through shared memory, differences in registers, and the best of a
// query stay sorted in the registers of the warp that computes its distances: a block of 8 warps takes some queries of
// one problem and a part of its keys. Features come in chunks: a chunk of all the tile's rows is read coalesced, waits
// in registers while the one before it is computed, and is stored transposed. With many queries every warp has its own,
// and all of them the same keys; with few, every warp has the same queries and its own keys. Where a query's keys were
// divided over blocks, a second kernel merges their best. With many features tensor cores go first (knn_tensor.cuh).
#include <algorithm>
#include <atomic>
#include <type_traits>

#include "common/cuda.hpp"
#include "knn/episodic.hpp"
#include "knn/knn.hpp"
#include "knn/knn_select.cuh"
#include "knn/knn_tensor.cuh"

namespace urlfast {
namespace {

// TQ queries a warp, QW of the 8 warps side by side along the queries and the rest along the keys, TK keys a lane,
// 32 * N neighbours.
template <class T_, class Item_, int TQ_, int QW_, int TK_, int N_>
struct Shape {
  using T = T_;
  using Item = Item_;
  static constexpr int TQ = TQ_, QW = QW_, TK = TK_, N = N_;
  static constexpr int KW = kWarps / QW;
  static constexpr int queries = TQ * QW, keys = 32 * TK * KW;  // rows of a block's tiles
  static constexpr int chunk = sizeof(T) == 8 ? 8 : 16;         // features at a time
  static constexpr int pad = 16 / int(sizeof(T));               // keeps rows of the transposed tiles aligned
  static constexpr int query_stride = queries + pad, key_stride = keys + pad;
  static constexpr int tile_bytes = chunk * (query_stride + key_stride) * int(sizeof(T));
  static constexpr int list_bytes = KW > 1 ? kWarps * TQ * 32 * N * int(sizeof(Key<T>)) : 0;
  static constexpr int shared = tile_bytes > list_bytes ? tile_bytes : list_bytes;
  static constexpr int blocks = TQ == 1 ? 3 : 2;  // of a multiprocessor: one query is a matter of bytes in flight
};

// A chunk of a tile's rows: into registers; then transposed into shared memory. A warp reads 16 rows by 32 bytes (64 of
// doubles): whole sectors, and columns of the transposed tile that lie in different banks.
template <class S, int Rows>
struct Chunk {
  using T = typename S::T;
  static constexpr int pieces = S::chunk / kGroup, half = pieces / 2;  // pieces of a row; warps side by side
  static constexpr int step = 16 * kWarps / half;                      // rows that the block reads at once
  static constexpr int count = (Rows + step - 1) / step;
  Pack<T, kGroup> value[count];

  __device__ static int row_of(int i) { return int(threadIdx.x) / 32 / half * 16 + int(threadIdx.x) % 16 + i * step; }
  __device__ static int column() { return (int(threadIdx.x) / 32 % half * 2 + int(threadIdx.x) / 16 % 2) * kGroup; }
  __device__ void read(const typename S::Item* rows, int64_t have, int64_t dim, int64_t feature, bool wide) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int row = row_of(i);
      const int64_t d = row < have && row < Rows ? feature + column() : dim;  // zeros from there on
      value[i] = read_group<T>(rows + row * dim, d, dim, wide);
    }
  }
  __device__ void write(T* shared) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int row = row_of(i);
      if (row >= Rows) continue;
#pragma unroll
      for (int e = 0; e < kGroup; ++e) shared[(column() + e) * (Rows + S::pad) + row] = value[i].v[e];
    }
  }
};

// What a block found of a row: merged later where the row's keys were divided over blocks.
template <class T, int N>
__device__ void deliver(const Arguments& a, int64_t s, int64_t row, const Best<Key<T>, N>& best) {
  if (!a.partials) return emit<T, N>(a, s, row, best);
  const int lane = threadIdx.x % 32;
  auto* const to = static_cast<Key<T>*>(a.partials) + ((s * a.num_queries + row) * gridDim.y + blockIdx.y) * a.width;
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (32 * j + lane < a.width) to[32 * j + lane] = best.key[j];
}

template <class S>
__global__ void __launch_bounds__(kThreads, S::blocks) search(const __grid_constant__ Arguments a) {
  using T = typename S::T;
  using K = Key<T>;
  __shared__ alignas(16) char memory[S::shared];  // the tiles; then the lists of warps that share their queries
  T* const query_tile = reinterpret_cast<T*>(memory);
  T* const key_tile = query_tile + S::chunk * S::query_stride;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int query_warp = warp % S::QW, key_warp = warp / S::QW;
  const int64_t s = blockIdx.x / a.query_tiles, row0 = blockIdx.x % a.query_tiles * S::queries;
  const int64_t length = a.length(s);
  const int rows = int(min(int64_t(S::queries), a.num_queries - row0));
  if (a.candidates && !__syncthreads_or(int(threadIdx.x) < rows && a.searched(s * a.num_queries + row0 + threadIdx.x)))
    return;
  const int64_t begin = length * blockIdx.y / gridDim.y, end = length * (blockIdx.y + 1) / gridDim.y;
  const auto* queries = static_cast<const typename S::Item*>(a.queries) + (s * a.num_queries + row0) * a.dim;
  const auto* keys = static_cast<const typename S::Item*>(a.keys) + s * a.num_keys * a.dim;
  const int query0 = query_warp * S::TQ;  // this warp's first query in the tile
  Best<K, S::N> best[S::TQ];
#pragma unroll
  for (int i = 0; i < S::TQ; ++i) best[i].clear();
  Chunk<S, S::queries> next_queries;
  Chunk<S, S::keys> next_keys;
  for (int64_t tile = begin; tile < end; tile += S::keys) {
    const int columns = int(min(int64_t(S::keys), end - tile));
    T sum[S::TQ][S::TK] = {};
    next_queries.read(queries, rows, a.dim, 0, a.wide);
    next_keys.read(keys + tile * a.dim, columns, a.dim, 0, a.wide);
    for (int64_t feature = 0; feature < a.dim; feature += S::chunk) {
      __syncthreads();  // the chunk before this one has been used by all
      next_queries.write(query_tile);
      next_keys.write(key_tile);
      __syncthreads();
      if (feature + S::chunk < a.dim) {
        next_queries.read(queries, rows, a.dim, feature + S::chunk, a.wide);
        next_keys.read(keys + tile * a.dim, columns, a.dim, feature + S::chunk, a.wide);
      }
#pragma unroll
      for (int d = 0; d < S::chunk; ++d) {  // features beyond the last are zeros in both tiles
        const auto q = *reinterpret_cast<const Pack<T, S::TQ>*>(query_tile + d * S::query_stride + query0);
        const auto k =
            *reinterpret_cast<const Pack<T, S::TK>*>(key_tile + d * S::key_stride + (key_warp * 32 + lane) * S::TK);
#pragma unroll
        for (int i = 0; i < S::TQ; ++i)
#pragma unroll
          for (int j = 0; j < S::TK; ++j) sum[i][j] = add_square(sum[i][j], k.v[j] - q.v[i]);
      }
    }
    const int column0 = (key_warp * 32 + lane) * S::TK;
#pragma unroll
    for (int i = 0; i < S::TQ; ++i) {
      if (query0 + i >= rows) continue;  // the same for all lanes
      const int64_t row = row0 + query0 + i;
      K worst = best[i].nth(a.width - 1);
      const T farthest = squared_of(worst);  // NaN while there is room
      unsigned wanted = 0;                   // of this lane's keys; nearly always none, so that is asked cheaply
#pragma unroll
      for (int j = 0; j < S::TK; ++j)
        if (!(sum[i][j] > farthest) && column0 + j < columns && !(a.exclude_self && tile + column0 + j == row))
          wanted |= 1u << j;
      if (!__ballot_sync(kAll, wanted != 0)) continue;
      // In a later round: the last that was found before, above which the search goes on.
      const K floor = a.first > 0 ? static_cast<const K*>(a.floors)[s * a.num_queries + row] : K(0);
      for (;;) {  // each lane's nearest at a time
        K mine = nothing<K>();
        int at = 0;
#pragma unroll
        for (int j = 0; j < S::TK; ++j) {
          const K key = make_key(sum[i][j], unsigned(tile + column0 + j));
          if ((wanted >> j & 1) && key < worst && key < mine && (a.first == 0 || key > floor)) mine = key, at = j;
        }
        const unsigned mask = __ballot_sync(kAll, mine != nothing<K>());
        if (!mask) break;
        best[i].absorb(mine, mask);
        if (mine != nothing<K>()) wanted &= ~(1u << at);
        worst = best[i].nth(a.width - 1);
      }
    }
  }
  const auto done = [&](const Best<K, S::N>& own, int i) { deliver<T, S::N>(a, s, row0 + query0 + i, own); };
  if constexpr (S::KW == 1) {
#pragma unroll
    for (int i = 0; i < S::TQ; ++i)
      if (query0 + i < rows) done(best[i], i);
  } else {  // warps that shared their queries meet: each takes some of these, and all lists of them
    K* const lists = reinterpret_cast<K*>(memory);
    __syncthreads();  // the tiles have been used by all
#pragma unroll
    for (int i = 0; i < S::TQ; ++i)
#pragma unroll
      for (int j = 0; j < S::N; ++j) lists[(warp * S::TQ + i) * 32 * S::N + 32 * j + lane] = best[i].key[j];
    __syncthreads();
    for (int i = warp; i < rows; i += kWarps) {
      Best<K, S::N> all;
      all.clear();
      for (int w = 0; w < kWarps; ++w)
        for (int j = 0; j < S::N; ++j) all.absorb_all(lists[(w * S::TQ + i) * 32 * S::N + 32 * j + lane], a.width);
      done(all, i);
    }
  }
}

// Few rows of many features: a block takes 4 queries and 32 keys at a time, a lane one of these, and 16 warps share out
// the features: a row is read by all of them at once. Their sums meet in a fixed order.
constexpr int kDeepWarps = 16, kDeepQueries = 4, kDeepFeatures = 8;

template <class T, class Item, int N>
__global__ void __launch_bounds__(32 * kDeepWarps) search_deep(const __grid_constant__ Arguments a) {
  using K = Key<T>;
  __shared__ alignas(16) T sums[kDeepWarps][kDeepQueries][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t s = blockIdx.x / a.query_tiles, row0 = blockIdx.x % a.query_tiles * kDeepQueries;
  const int64_t length = a.length(s), row = row0 + warp;
  const int rows = int(min(int64_t(kDeepQueries), a.num_queries - row0));
  const int64_t begin = length * blockIdx.y / gridDim.y, end = length * (blockIdx.y + 1) / gridDim.y;
  const auto* queries = static_cast<const Item*>(a.queries) + (s * a.num_queries + row0) * a.dim;
  const auto* keys = static_cast<const Item*>(a.keys) + s * a.num_keys * a.dim;
  const K floor = a.first > 0 && warp < rows ? static_cast<const K*>(a.floors)[s * a.num_queries + row] : K(0);
  Best<K, N> best;  // of query `warp`, in the first warps
  best.clear();
  for (int64_t tile = begin; tile < end; tile += 32) {
    const int64_t index = tile + lane;
    const Item* const own = keys + (index < end ? index : tile) * a.dim;
    T sum[kDeepQueries] = {};
#pragma unroll 2
    for (int64_t d = warp * kDeepFeatures; d < a.dim; d += kDeepWarps * kDeepFeatures)
#pragma unroll
      for (int g = 0; g < kDeepFeatures; g += kGroup) {
        const Pack<T, kGroup> k = read_group<T>(own, d + g, a.dim, a.wide);
#pragma unroll
        for (int i = 0; i < kDeepQueries; ++i) {
          const Pack<T, kGroup> q = read_group<T>(queries + min(i, rows - 1) * a.dim, d + g, a.dim, a.wide);
#pragma unroll
          for (int e = 0; e < kGroup; ++e) sum[i] = add_square(sum[i], k.v[e] - q.v[e]);
        }
      }
    __syncthreads();  // the sums of the tile before have been read
#pragma unroll
    for (int i = 0; i < kDeepQueries; ++i) sums[warp][i][lane] = sum[i];
    __syncthreads();
    if (warp >= rows) continue;
    T all = 0;
#pragma unroll
    for (int w = 0; w < kDeepWarps; ++w) all += sums[w][warp][lane];
    const K key = make_key(all, unsigned(index));
    const bool valid = index < end && !(a.exclude_self && index == row) && (a.first == 0 || key > floor);
    best.absorb_all(valid ? key : nothing<K>(), a.width);
  }
  if (warp < rows) deliver<T, N>(a, s, row, best);
}

// A warp per query: the best of its parts' best.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ Arguments a, int64_t rows) {
  using K = Key<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= rows || !a.searched(row)) return;
  Best<K, N> best;
  best.clear();
  const int64_t count = int64_t(a.parts) * a.width;
  const K* const from = static_cast<const K*>(a.partials) + row * count;
  for (int64_t j = 0; j < count; j += 32) best.absorb_all(j + lane < count ? from[j + lane] : nothing<K>(), a.width);
  emit<T, N>(a, row / a.num_queries, row % a.num_queries, best);
}

// A warp per query: kept distances to rewards. `state` null: nothing divides them.
template <class T>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ Arguments a, const T* kept, int64_t rows,
                                                   const Statistic* state, StatisticRule rule) {
  const int lane = threadIdx.x % 32;
  const int64_t problem_row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (problem_row >= rows) return;
  const int64_t s = problem_row / a.num_queries, row = problem_row % a.num_queries;
  const int64_t n = kept_of(a, a.length(s));
  const T* const from = kept + kept_offset(a, s) + row * n;
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

// Planning: what depends on the shape and the device alone ---------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct DeviceFacts {
  int processors;  // multiprocessors
  int capability;  // 80 for 8.0; less where the code that runs there was compiled for less
};
DeviceFacts facts_of(int device) {
  static std::atomic<uint64_t> known[64];  // asking costs more than a small launch
  const uint64_t packed = device < 64 ? known[device].load(std::memory_order_relaxed) : 0;
  if (packed) return {int(packed >> 32), int(packed & 0xffffffff)};
  const DeviceGuard guard(device);
  int processors = 0, major = 0, minor = 0;
  cudaFuncAttributes code;
  URLFAST_CUDA_CHECK(cudaFuncGetAttributes(&code, first_pass<false>));
  URLFAST_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  URLFAST_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  URLFAST_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const DeviceFacts facts{processors, std::min(major * 10 + minor, code.ptxVersion)};
  if (device < 64) known[device].store(uint64_t(facts.processors) << 32 | uint64_t(facts.capability));
  return facts;
}

constexpr int kMostWidth = 128;                       // neighbours that one round finds
constexpr int64_t kBlocksEach = 2;                    // of a multiprocessor, before a query's keys stay together
constexpr int64_t kMostPartials = int64_t(64) << 20;  // bytes
// A block reads at least this many features of every row of its tiles before its best are merged with others': less is
// over before the launch that merges.
constexpr int64_t kLeastFeatures = 64;
constexpr int64_t kDeepDim = 256;  // features that are worth being shared out, where rows alone leave the device idle

enum class Tiles { one, few, many, deep };  // queries of a problem that share the keys that are read; or the features

// Queries and keys of a tile, as choose_shape has them.
struct TileSize {
  int64_t queries, keys;
};
TileSize tile_size(Tiles tiles, bool f64, bool long_lists) {
  const int64_t many = 8 / (f64 ? 2 : 1) / (long_lists ? 2 : 1);
  if (tiles == Tiles::one) return {1, 256};
  if (tiles == Tiles::deep) return {kDeepQueries, 32};
  if (tiles == Tiles::few) return {long_lists ? many / 2 : many, 256};
  return {many * kWarps, f64 ? 64 : 128};
}

// The launches of a call, and what each part of its workspace is for. Rewards of more neighbours than one round finds
// are kept distances first.
struct Plan {
  Plan(const KnnProblem& p, int64_t longest_, bool table_, int device) : longest(longest_) {
    const DeviceFacts facts = facts_of(device);
    const bool f64 = p.dtype == DType::f64;
    const int64_t rows = p.problems * p.num_queries, key_bytes = f64 ? 16 : 8;
    // Neighbours have padding to be written, too, where k goes beyond the longest memory.
    rounds = ceil_div(p.k, kMostWidth);
    const int64_t width = std::min<int64_t>(p.k, kMostWidth);
    long_lists = width > 32;

    const auto blocks_of = [&](Tiles t) {
      return p.problems * ceil_div(p.num_queries, tile_size(t, f64, long_lists).queries);
    };
    const auto parts_of = [&](Tiles t) {
      const int64_t key_tiles = ceil_div(longest, tile_size(t, f64, long_lists).keys);
      const int64_t n =
          std::min(ceil_div(kBlocksEach * facts.processors, blocks_of(t)), key_tiles / ceil_div(kLeastFeatures, p.dim));
      return std::clamp<int64_t>(std::min(n, kMostPartials / (rows * width * key_bytes)), 1, 65535);
    };
    tiles = Tiles::many;  // the fewest bytes, if there is work for all multiprocessors
    if (p.num_queries == 1)
      tiles = Tiles::one;
    else if (p.num_queries <= 16 || blocks_of(Tiles::many) * parts_of(Tiles::many) < facts.processors)
      tiles = Tiles::few;
    if (p.dim >= kDeepDim && 2 * blocks_of(tiles) * parts_of(tiles) < facts.processors) tiles = Tiles::deep;
    parts = parts_of(tiles);
    blocks = blocks_of(tiles);
    if (blocks > 0x7fffffff)
      throw std::invalid_argument(std::string(p.queries_name) + ": too many rows for one launch");

    table = take(table_ ? p.problems * int64_t(sizeof(ProblemRow)) : 0);
    partials = take(parts > 1 ? rows * parts * width * key_bytes : 0);
    floors = take(rounds > 1 ? rows * key_bytes : 0);
    kept = take(rounds > 1 ? rows * p.k * (f64 ? 8 : 4) : 0);
    plan_first_pass(p, facts);
  }

  int64_t longest, rounds, parts, blocks;
  bool long_lists;
  Tiles tiles;
  int64_t bytes = 0;
  int64_t table, partials, floors, kept;  // where in the workspace
  // The first pass, where it pays.
  bool first_pass = false;
  int64_t pass_tiles = 0, pass_parts = 0, pass_width = 0, room = 0;
  int64_t rounded = 0, points = 0, centre = 0, upper = 0, limits = 0, count = 0, candidate = 0;

 private:
  int64_t take(int64_t n) {
    const int64_t at = bytes;
    bytes += (n + 255) & ~int64_t(255);
    return at;
  }
  void plan_first_pass(const KnnProblem& p, DeviceFacts facts) {
    constexpr int64_t kLeastWork = int64_t(1) << 29;    // multiplications: below, seven launches cost what they save
    constexpr int64_t kMostRounded = int64_t(1) << 32;  // bytes
    const int64_t rows = p.problems * p.num_queries, points_count = p.problems * p.num_keys + (p.self ? 0 : rows);
    pass_width = ceil_div(p.dim, kSlice) * kSlice;
    const double work = double(rows) * double(longest) * double(p.dim);
    // With deep tiles there is too little work, and the sums of what is searched after it would round differently.
    if (tiles == Tiles::deep || facts.capability < 80 || p.dtype == DType::f64 || p.dim < 32 || p.dim > kBoundMostDim ||
        p.num_queries < 64 || longest < 1024 || p.k > kMostWidth || work < double(kLeastWork) ||
        double(points_count) * double(pass_width) * 2 > double(kMostRounded))
      return;
    const int64_t key_tiles = ceil_div(longest, kTile);
    pass_tiles = ceil_div(p.num_queries, kTile);
    // As many groups as make their k-th least bound nearly the k-th least of all, and blocks enough to fill the device.
    const int64_t wanted =
        std::max(ceil_div(kBlocksEach * facts.processors, p.problems * pass_tiles), ceil_div(8 * p.k, kPartGroups));
    pass_parts = std::min(std::min(key_tiles, wanted), std::max<int64_t>(1, kMostPartials / (rows * kPartGroups * 4)));
    if (pass_parts * kPartGroups < 2 * p.k || p.problems * pass_tiles > 0x7fffffff || pass_parts > 65535 ||
        p.problems > 65535)
      return;
    first_pass = true;
    room = ceil_div(4 * p.k + 64, 32) * 32;
    rounded = take(points_count * pass_width * 2);
    points = take(points_count * int64_t(sizeof(KnnPoint)));
    centre = take(p.problems * pass_width * 4);
    upper = take(rows * pass_parts * kPartGroups * 4);
    limits = take(rows * 4);
    count = take(rows * 4);
    candidate = take(rows * room * 4);
  }
};

// Launching ---------------------------------------------------------------------------------------------------------

struct Call {
  // held: lengths that are known to the device alone; null: those of the problem.
  Call(const KnnProblem& problem, const KnnReward& reward, void* workspace_, int device, CUstream_st* stream_,
       bool held = false)
      : p(problem),
        guard(device),
        plan(problem, held || !problem.lengths ? problem.num_keys : longest_of(problem), held || tabled(problem),
             device),
        workspace(static_cast<char*>(workspace_)),
        stream(stream_) {
    a.queries = p.queries, a.keys = p.keys;
    a.num_queries = p.num_queries, a.num_keys = p.num_keys, a.dim = p.dim, a.k = p.k;
    a.ragged = held || p.lengths;
    a.exclude_self = p.self && !p.include_self;
    const int64_t group = kGroup * item_size(p.dtype);
    const auto aligned = [=](const void* at) {
      return reinterpret_cast<uintptr_t>(at) % uintptr_t(std::min<int64_t>(group, 16)) == 0;
    };
    a.wide = p.dim % kGroup == 0 && aligned(p.queries) && aligned(p.keys);
    a.reward = reward;
    a.parts = int(plan.parts);
    a.partials = plan.parts > 1 ? at<void>(plan.partials) : nullptr;
    if (held || tabled(p)) a.table = at<ProblemRow>(plan.table);
    if (p.lengths && !tabled(p)) std::copy_n(p.lengths, p.problems, a.lengths);
  }

  static int64_t longest_of(const KnnProblem& p) { return *std::max_element(p.lengths, p.lengths + p.problems); }
  static bool tabled(const KnnProblem& p) { return p.lengths && p.problems > kFewProblems; }
  static int64_t workspace_bytes(const KnnProblem& p, int device, bool held = false) {
    return Plan(p, held || !p.lengths ? p.num_keys : longest_of(p), held || tabled(p), device).bytes;
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(workspace + offset);
  }
  int64_t rows() const { return p.problems * p.num_queries; }

  void upload_table() const {
    if (!tabled(p)) return;
    int64_t offset = 0;
    for (int64_t s = 0; s < p.problems; s += kTablePart) {
      TablePart part{};
      const int count = int(std::min<int64_t>(kTablePart, p.problems - s));
      for (int i = 0; i < count; ++i) {
        part.rows[i] = {p.lengths[s + i], offset};
        offset += p.num_queries * knn_kept(p, a.reward, s + i);
      }
      fill_table<<<1, kThreads, 0, stream>>>(part, at<ProblemRow>(plan.table) + s, count);
      URLFAST_CUDA_CHECK(cudaGetLastError());
    }
  }

  const KnnProblem& p;
  DeviceGuard guard;
  Plan plan;
  char* workspace;
  CUstream_st* stream;
  Arguments a{};
};

template <class T, int N>
void launch_merge(const Call& call, const Arguments& a) {
  if (!a.partials) return;
  merge<T, N><<<unsigned(ceil_div(call.rows(), kWarps)), kThreads, 0, call.stream>>>(a, call.rows());
  URLFAST_CUDA_CHECK(cudaGetLastError());
}

template <class S>
void launch_search(const Call& call, Arguments a) {
  a.query_tiles = ceil_div(call.p.num_queries, S::queries);
  search<S><<<dim3(unsigned(call.plan.blocks), unsigned(call.plan.parts)), kThreads, 0, call.stream>>>(a);
  URLFAST_CUDA_CHECK(cudaGetLastError());
  launch_merge<typename S::T, S::N>(call, a);
}

template <class T, class Item, int N>
void launch_deep(const Call& call, Arguments a) {
  constexpr int kDeepThreads = 32 * kDeepWarps;
  a.query_tiles = ceil_div(call.p.num_queries, kDeepQueries);
  const dim3 blocks(unsigned(call.plan.blocks), unsigned(call.plan.parts));
  search_deep<T, Item, N><<<blocks, kDeepThreads, 0, call.stream>>>(a);
  URLFAST_CUDA_CHECK(cudaGetLastError());
  launch_merge<T, N>(call, a);
}

template <class T, class Item, int N>
void choose_shape(const Call& call, const Arguments& a) {
  // Longer lists leave registers for fewer of them; float64 takes twice the room.
  constexpr int many = 8 / (sizeof(T) == 8 ? 2 : 1) / (N > 1 ? 2 : 1), few = N > 1 ? many / 2 : many;
  if (call.plan.tiles == Tiles::deep)
    launch_deep<T, Item, N>(call, a);
  else if (call.plan.tiles == Tiles::one)
    launch_search<Shape<T, Item, 1, 1, 1, N>>(call, a);
  else if (call.plan.tiles == Tiles::few)
    launch_search<Shape<T, Item, few, 1, 1, N>>(call, a);
  else
    launch_search<Shape<T, Item, many, kWarps, sizeof(T) == 8 ? 2 : 4, N>>(call, a);
}

template <class Item>
void launch_first_pass(const Call& call, Arguments& a) {
  const Plan& plan = call.plan;
  const KnnProblem& p = call.p;
  const int64_t keys = p.problems * p.num_keys;
  Rounded r{};
  r.a = a;
  r.a.query_tiles = plan.pass_tiles;
  r.rows = call.at<__nv_bfloat16>(plan.rounded), r.points = call.at<KnnPoint>(plan.points);
  r.centre = call.at<float>(plan.centre), r.upper = call.at<float>(plan.upper);
  r.limits = call.at<float>(plan.limits), r.count = call.at<unsigned>(plan.count);
  r.candidate = call.at<unsigned>(plan.candidate);
  r.problems = p.problems, r.width = plan.pass_width, r.first_query = p.self ? 0 : keys;
  r.groups = int(plan.pass_parts) * kPartGroups, r.room = unsigned(plan.room);
  const int64_t points = p.self ? keys : keys + call.rows();
  const auto grid = [](int64_t n) { return unsigned(ceil_div(n, kWarps)); };
  centre<Item><<<dim3(unsigned(ceil_div(r.width, kThreads)), unsigned(p.problems)), kThreads, 0, call.stream>>>(r);
  URLFAST_CUDA_CHECK(cudaGetLastError());
  prepare<Item><<<grid(points), kThreads, 0, call.stream>>>(r, points);
  URLFAST_CUDA_CHECK(cudaGetLastError());
  const auto pass = [&](auto* kernel) {
    URLFAST_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kFirstPassShared));
    const dim3 blocks(unsigned(p.problems * plan.pass_tiles), unsigned(plan.pass_parts));
    kernel<<<blocks, kThreads, kFirstPassShared, call.stream>>>(r);
    URLFAST_CUDA_CHECK(cudaGetLastError());
  };
  pass(first_pass<false>);
  threshold<<<grid(call.rows()), kThreads, 0, call.stream>>>(r, call.rows());
  URLFAST_CUDA_CHECK(cudaGetLastError());
  pass(first_pass<true>);
  rank<Item><<<unsigned(call.rows()), 32 * kRankWarps, 0, call.stream>>>(r);
  URLFAST_CUDA_CHECK(cudaGetLastError());
  a.candidates = r.count, a.most_candidates = r.room;
}

template <class T, class Item>
void rounds(const Call& call, Arguments a) {
  const Plan& plan = call.plan;
  a.floors = plan.rounds > 1 ? call.at<void>(plan.floors) : nullptr;
  for (a.first = 0; a.first < a.k; a.first += kMostWidth) {
    a.width = int(std::min<int64_t>(kMostWidth, a.k - a.first));
    if constexpr (sizeof(T) == 4)
      if (plan.first_pass) launch_first_pass<Item>(call, a);
    if (plan.long_lists)
      choose_shape<T, Item, 4>(call, a);
    else
      choose_shape<T, Item, 1>(call, a);
  }
}

void run(const Call& call, const Arguments& a) {
  call.upload_table();
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

void launch_finish(const Call& call, const void* kept, void* out, const Statistic* state, StatisticRule rule) {
  Arguments a = call.a;
  a.out = out;
  const unsigned blocks = unsigned(ceil_div(call.rows(), kWarps));
  if (call.p.dtype == DType::f64)
    finish<<<blocks, kThreads, 0, call.stream>>>(a, static_cast<const double*>(kept), call.rows(), state, rule);
  else
    finish<<<blocks, kThreads, 0, call.stream>>>(a, static_cast<const float*>(kept), call.rows(), state, rule);
  URLFAST_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

int64_t knn_workspace_cuda(const KnnProblem& p, int device) { return Call::workspace_bytes(p, device); }

void knn_cuda(const KnnProblem& p, void* distances, int64_t* indices, void* workspace, int device,
              CUstream_st* stream) {
  Call call(p, {}, workspace, device, stream);
  call.a.result = Result::neighbours, call.a.distances = distances, call.a.indices = indices;
  run(call, call.a);
}

void knn_kept_cuda(const KnnProblem& p, const KnnReward& reward, void* kept, void* workspace, int device,
                   CUstream_st* stream) {
  Call call(p, reward, workspace, device, stream);
  call.a.result = Result::kept, call.a.out = kept;
  run(call, call.a);
}

void knn_finish_cuda(const KnnProblem& p, const KnnReward& reward, const void* kept, const Statistic* state,
                     StatisticRule rule, void* out, void* workspace, int device, CUstream_st* stream) {
  const Call call(p, reward, workspace, device, stream);
  launch_finish(call, kept, out, state, rule);
}

void knn_reward_cuda(const KnnProblem& p, const KnnReward& reward, void* out, void* workspace, int device,
                     CUstream_st* stream) {
  Call call(p, reward, workspace, device, stream);
  if (call.plan.rounds == 1) {  // one round sees all that a reward needs
    call.a.result = Result::reward, call.a.out = out;
    return run(call, call.a);
  }
  void* const kept = call.at<void>(call.plan.kept);
  call.a.result = Result::kept, call.a.out = kept;
  run(call, call.a);
  launch_finish(call, kept, out, nullptr, {});
}

int64_t episodic_workspace_cuda(const KnnProblem& p, int device) { return Call::workspace_bytes(p, device, true); }

void episodic_step_cuda(float* rows, int64_t* total, const KnnProblem& p, const bool* reset, bool reset_on_device,
                        float* distances, void* workspace, int device, CUstream_st* stream) {
  Call call(p, {}, workspace, device, stream, true);
  for (int64_t first = 0; first < p.problems; first += kResetPart) {
    ResetPart part{};
    const int count = int(std::min<int64_t>(kResetPart, p.problems - first));
    if (!reset_on_device) std::copy_n(reset + first, count, part.reset);
    begin_step<<<unsigned(ceil_div(count, kThreads)), kThreads, 0, stream>>>(
        part, reset_on_device ? reset : nullptr, first, count, p.num_keys, total, call.at<ProblemRow>(call.plan.table));
    URLFAST_CUDA_CHECK(cudaGetLastError());
  }
  call.a.result = Result::neighbours, call.a.distances = distances;
  run(call, call.a);
  append<<<unsigned(p.problems), 128, 0, stream>>>(static_cast<const float*>(p.queries), p.num_keys, p.dim, total,
                                                   rows);
  URLFAST_CUDA_CHECK(cudaGetLastError());
}

}  // namespace urlfast
