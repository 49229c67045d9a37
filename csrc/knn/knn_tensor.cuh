// The search with many features: a first pass on the tensor cores tells which keys may be among the nearest of a query,
// an exact one ranks these. knn_bound.hpp says why nothing is lost; distances and indices are, to the bit, those of the
// direct search. Included by knn_cuda.cu alone.
//
//   centre     the mean of some keys of each problem
//   prepare    every row: moved by it, rounded to bfloat16, its norm and what the rounding lost
//   first_pass of every tile, once: the least upper bound of each of many small groups of keys
//   threshold  of every query: the k-th least of these, so that k keys are known to lie below it
//   first_pass again: the keys that are not known to lie above it, appended to the query's candidates
//   rank       their exact distances, the k nearest, and what was asked for
// A query with more candidates than there is room for (many equal rows, clusters far apart) is searched directly after.
#pragma once
#include "common/tensor_core.cuh"
#include "knn/knn_bound.hpp"
#include "knn/knn_select.cuh"

namespace urlfast {
namespace {

constexpr int kTile = 128;       // queries, and keys, of a block's tile: 4 x 2 warps of 32 x 64
constexpr int kSlice = 32;       // features of a tile at a time: rows of 64 bytes
constexpr int kStages = 4;       // slices of shared memory: three on their way while one is multiplied
constexpr int kPartGroups = 32;  // groups whose least bound a part of the keys gives each query
constexpr int kCentreRows = 64;
constexpr int kSliceBytes = 2 * kTile * kSlice * 2;
constexpr int kFirstPassShared = kStages * kSliceBytes;

struct Rounded {
  Arguments a;
  __nv_bfloat16* rows;  // [problems * num_keys, width], then those of the queries unless they are the keys
  KnnPoint* points;     // of these rows
  float* centre;        // [problems, width]
  float* upper;         // [problems * num_queries, groups]
  float* limits;        // [problems * num_queries]
  unsigned* count;      // [problems * num_queries], candidates met
  unsigned* candidate;  // [problems * num_queries, room]
  int64_t problems;
  int64_t width;        // features, in whole slices
  int64_t first_query;  // row of the first query among `rows`
  int groups;
  unsigned room;
};

template <class Item>
__global__ void __launch_bounds__(kThreads) centre(const __grid_constant__ Rounded r) {
  const int64_t s = blockIdx.y, d = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, length = r.a.length(s);
  if (d >= r.width) return;
  const auto* keys = static_cast<const Item*>(r.a.keys) + s * r.a.num_keys * r.a.dim;
  const int64_t count = length < kCentreRows ? length : kCentreRows;
  float sum = 0;
  if (d < r.a.dim)
    for (int64_t i = 0; i < count; ++i) sum += to_real(keys[i * length / count * r.a.dim + d]);
  const float mean = count > 0 ? sum / float(count) : 0.f;
  r.centre[s * r.width + d] = fabsf(mean) < INFINITY ? mean : 0.f;
}

// A warp per row.
template <class Item>
__global__ void __launch_bounds__(kThreads) prepare(const __grid_constant__ Rounded r, int64_t count) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= count) return;
  const bool key = row < r.problems * r.a.num_keys;  // queries may be keys, or begin where these do
  const int64_t at = key ? row : row - r.first_query, each = key ? r.a.num_keys : r.a.num_queries, s = at / each;
  if (key && at % each >= r.a.length(s)) return;  // it is never looked at
  const Item* from = static_cast<const Item*>(key ? r.a.keys : r.a.queries) + at * r.a.dim;
  const float* middle = r.centre + s * r.width;
  float norm = 0, lost = 0;
  for (int64_t d = kGroup * lane; d < r.width; d += 32 * kGroup) {
    const Pack<float, kGroup> x = read_group<float>(from, d, r.a.dim, r.a.wide);
    Pack<__nv_bfloat16, kGroup> rounded;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float moved = d + i < r.a.dim ? x.v[i] - middle[d + i] : 0.f;
      rounded.v[i] = __float2bfloat16_rn(moved);
      const float kept = __bfloat162float(rounded.v[i]);
      norm = add_square(norm, kept), lost = add_square(lost, moved - kept);
    }
    *reinterpret_cast<Pack<__nv_bfloat16, kGroup>*>(r.rows + row * r.width + d) = rounded;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    norm += __shfl_xor_sync(kAll, norm, distance);
    lost += __shfl_xor_sync(kAll, lost, distance);
  }
  if (lane == 0) r.points[row] = knn_point(norm, lost);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// Where in a slice 16 bytes of a row lie: so that eight rows' pieces of one column, which ldmatrix reads at once, are
// in different banks, two rows to 128 bytes.
__device__ inline int slice_offset(int row, int piece) {
  return row / 2 * 128 + (row % 2 * 4 + (piece ^ (row / 2 % 4))) * 16;
}

// The slices of a block's tiles, one after the other, on their way into shared memory.
struct Slices {
  const __nv_bfloat16* queries;  // of the tile
  const __nv_bfloat16* keys;     // of the part
  int width, query_rows, key_rows;
  int tile = 0, feature = 0, stage = 0;

  __device__ void next(char* shared) {
    if (tile < key_rows) {
      char* const to = shared + stage * kSliceBytes;
#pragma unroll
      for (int i = 0; i < 2 * kTile * 4 / kThreads; ++i) {
        const int item = int(threadIdx.x) + i * kThreads, row = item / 4 % kTile, piece = item % 4;
        const bool key = item >= kTile * 4;
        // Beyond the last row it is read again, and not looked at.
        const int64_t at = key ? min(tile + row, key_rows - 1) : min(row, query_rows - 1);
        copy_async(to + (key ? kSliceBytes / 2 : 0) + slice_offset(row, piece),
                   (key ? keys : queries) + at * width + feature + piece * 8);
      }
      feature += kSlice;
      if (feature == width) feature = 0, tile += kTile;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    commit_copies();  // an empty group, too: waiting counts them
  }
};

#endif

// Bounds of a tile of queries and a part of the keys. Collect: candidates; else the groups' least upper bounds.
template <bool Collect>
__global__ void __launch_bounds__(kThreads) first_pass(const __grid_constant__ Rounded r) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kRows = 2, kColumns = 8;  // 16 x 8 products of a warp
  const Arguments& a = r.a;
  char* const shared = dynamic_shared();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;
  const int64_t s = blockIdx.x / a.query_tiles, row0 = blockIdx.x % a.query_tiles * kTile, length = a.length(s);
  const int64_t tiles = (length + kTile - 1) / kTile;
  const int64_t begin = tiles * blockIdx.y / gridDim.y * kTile, past = tiles * (blockIdx.y + 1) / gridDim.y * kTile;
  const int key_rows = int(min(past, length) - begin), query_rows = int(min(int64_t(kTile), a.num_queries - row0));
  const int64_t query_row = s * a.num_queries + row0, key_row = s * a.num_keys + begin;
  const KnnPoint* const query_points = r.points + r.first_query + query_row;
  const KnnPoint* const key_points = r.points + key_row;
  const float weight = Collect ? 1 - knn_slack(a.dim) : 1 + knn_slack(a.dim);  // of norms

  // Of the queries 16 i + 8 h + lane / 4 of this warp, the least bound of each group; of the keys' residuals the most.
  float least[kRows][2][4], residual[4];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    residual[g] = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) least[i][0][g] = least[i][1][g] = INFINITY;
  }

  Slices slices{r.rows + (r.first_query + query_row) * r.width, r.rows + key_row * r.width, int(r.width), query_rows,
                key_rows};
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) slices.next(shared);
  int stage = 0;
  for (int tile = 0; tile < key_rows; tile += kTile) {
    float sum[kRows][kColumns][4] = {};
    for (int feature = 0; feature < slices.width; feature += kSlice) {
      await_copies<kStages - 2>();
      __syncthreads();  // this slice is there for all, and the one before it has been used by all
      slices.next(shared);
      const char* const query_slice = shared + stage * kSliceBytes;
      const char* const key_slice = query_slice + kSliceBytes / 2;
      stage = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
      for (int step = 0; step < kSlice / 16; ++step) {
        unsigned q[kRows][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          load_matrices(q[i], query_slice + slice_offset(warp_row + 16 * i + lane % 16, 2 * step + lane / 16));
#pragma unroll
        for (int j = 0; j < kColumns; j += 2) {
          unsigned k[4];
          load_matrices(
              k, key_slice + slice_offset(warp_column + 8 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            multiply_add(sum[i][j], q[i], k[0], k[1]);
            multiply_add(sum[i][j + 1], q[i], k[2], k[3]);
          }
        }
      }
    }
    float norm[kRows][2], limit[kRows][2];  // of this lane's queries, where candidates are collected
    if constexpr (Collect) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = min(warp_row + 16 * i + 8 * h + lane / 4, query_rows - 1);
          norm[i][h] = query_points[row].norm * weight, limit[i][h] = r.limits[query_row + row];
        }
    }
    const int diagonal = a.exclude_self ? int(begin + tile - row0) : kTile;  // row - column of a query and itself
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = warp_column + 8 * j + 2 * (lane % 4) + c, group = j / 4 * 2 + c;
        if (tile + column >= key_rows) continue;
        const KnnPoint point = key_points[tile + column];
        // NaN bounds nothing: fmaxf and fminf pass over it.
        if constexpr (!Collect) residual[group] = fmaxf(residual[group], point.residual);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = warp_row + 16 * i + 8 * h + lane / 4;
            const float part = fmaf(-2.f, sum[i][j][2 * h + c], point.norm * weight);
            if (row - column == diagonal) continue;
            if constexpr (!Collect) {
              least[i][h][group] = fminf(least[i][h][group], part);
            } else if (row < query_rows && !knn_beyond(norm[i][h] + part, limit[i][h], point.residual)) {
              const unsigned at = atomicAdd(&r.count[query_row + row], 1u);
              if (at < r.room) r.candidate[(query_row + row) * r.room + at] = unsigned(begin + tile + column);
            }
          }
      }
  }
  await_copies<0>();
  if constexpr (!Collect) {
    const int at = int(blockIdx.y) * kPartGroups + (warp % 2 * 4 + lane % 4) * 4;
    const float wobble = knn_wobble(a.dim);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 16 * i + 8 * h + lane / 4;
        if (row >= query_rows) continue;
        const KnnPoint point = query_points[row];
        Pack<float, 4> upper;
#pragma unroll
        for (int g = 0; g < 4; ++g)
          upper.v[g] = knn_upper(point.norm * weight + least[i][h][g], point.residual + residual[g], wobble);
        *reinterpret_cast<Pack<float, 4>*>(r.upper + (query_row + row) * r.groups + at) = upper;
      }
  }
#endif
}

// A warp per query.
__global__ void __launch_bounds__(kThreads) threshold(const __grid_constant__ Rounded r, int64_t rows) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  Best<Key<float>, 4> best;
  best.clear();
  const float* const upper = r.upper + row * r.groups;
  for (int g = 0; g < r.groups; g += 32) best.absorb_all(make_key(upper[g + lane], 0u), int(r.a.k));
  const Key<float> last = best.nth(int(r.a.k) - 1);
  if (lane != 0) return;
  r.limits[row] = knn_limit(squared_of(last), r.points[r.first_query + row].residual, knn_wobble(r.a.dim));
  r.count[row] = 0;
}

// A block per query: four warps take eight candidates each at a time, a lane adding one's squares in the order in which
// the direct search does.
constexpr int kRankWarps = 4, kRankRows = 8, kRankSlice = 32 * kGroup;
constexpr int kMostCandidates = 608;  // what shared memory has room for; 4 * 128 + 64 and whole warps

template <class Item>
__global__ void __launch_bounds__(32 * kRankWarps) rank(const __grid_constant__ Rounded r) {
  const Arguments& a = r.a;
  constexpr int kStride = kRankSlice + kGroup;  // lanes read their rows' same column from different banks
  __shared__ alignas(16) float query[kRankWarps][kRankSlice];
  __shared__ alignas(16) float rows[kRankWarps][kRankRows * kStride];
  __shared__ Key<float> found[kMostCandidates];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t problem_row = blockIdx.x, s = problem_row / a.num_queries;
  const unsigned count = r.count[problem_row];
  if (count > r.room) return;  // the direct search comes after
  const unsigned* const candidate = r.candidate + problem_row * r.room;
  const auto* const from = static_cast<const Item*>(a.queries) + problem_row * a.dim;
  const auto* const keys = static_cast<const Item*>(a.keys) + s * a.num_keys * a.dim;
  for (unsigned first = unsigned(warp) * kRankRows; first < count; first += kRankWarps * kRankRows) {
    const int n = int(count - first < unsigned(kRankRows) ? count - first : unsigned(kRankRows));
    const unsigned mine = candidate[first + unsigned(lane < n ? lane : 0)];
    float sum = 0;
    for (int64_t feature = 0; feature < a.dim; feature += kRankSlice) {
      const int64_t d = feature + kGroup * lane;
      Pack<float, kGroup> own = read_group<float>(from, d, a.dim, a.wide), value[kRankRows];
#pragma unroll
      for (int i = 0; i < kRankRows; ++i)
        value[i] = read_group<float>(keys + int64_t(__shfl_sync(kAll, mine, i)) * a.dim, d, a.dim, a.wide);
      __syncwarp();  // the slice before this one has been used
      *reinterpret_cast<Pack<float, kGroup>*>(query[warp] + kGroup * lane) = own;
#pragma unroll
      for (int i = 0; i < kRankRows; ++i)
        *reinterpret_cast<Pack<float, kGroup>*>(rows[warp] + i * kStride + kGroup * lane) = value[i];
      __syncwarp();
      if (lane < n)
#pragma unroll 4
        for (int e = 0; e < kRankSlice; e += kGroup) {
          const auto q = *reinterpret_cast<const Pack<float, kGroup>*>(query[warp] + e);
          const auto k = *reinterpret_cast<const Pack<float, kGroup>*>(rows[warp] + lane * kStride + e);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) sum = add_square(sum, k.v[i] - q.v[i]);
        }
      __syncwarp();
    }
    if (lane < n) found[first + unsigned(lane)] = make_key(sum, mine);
  }
  __syncthreads();
  if (warp != 0) return;
  Best<Key<float>, 4> best;
  best.clear();
  for (unsigned i = 0; i < count; i += 32)
    best.absorb_all(i + unsigned(lane) < count ? found[i + unsigned(lane)] : nothing<Key<float>>(), a.width);
  emit<float, 4>(a, s, problem_row % a.num_queries, best);
}

}  // namespace
}  // namespace urlfast
