// What the kernels of the search share: the best of a query, sorted over the lanes and registers of a warp, and what
// becomes of them. Included by knn_cuda.cu and knn_tensor.cuh alone.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/real.cuh"
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
__device__ inline unsigned long long make_key(float squared, unsigned index) {
  return static_cast<unsigned long long>(__float_as_uint(squared)) << 32 | index;
}
__device__ inline unsigned __int128 make_key(double squared, unsigned index) {
  return static_cast<unsigned __int128>(static_cast<unsigned long long>(__double_as_longlong(squared))) << 32 | index;
}
__device__ inline float squared_of(unsigned long long key) { return __uint_as_float(unsigned(key >> 32)); }
__device__ inline double squared_of(unsigned __int128 key) {
  return __longlong_as_double(static_cast<long long>(static_cast<unsigned long long>(key >> 32)));
}

__device__ inline unsigned long long shuffle(unsigned long long key, int lane) { return __shfl_sync(kAll, key, lane); }
__device__ inline unsigned long long shuffle_xor(unsigned long long key, int mask) {
  return __shfl_xor_sync(kAll, key, mask);
}
__device__ inline unsigned long long shuffle_up(unsigned long long key) { return __shfl_up_sync(kAll, key, 1); }
template <class Move>
__device__ unsigned __int128 by_halves(unsigned __int128 key, Move move) {
  const auto low = static_cast<unsigned long long>(key), high = static_cast<unsigned long long>(key >> 64);
  return static_cast<unsigned __int128>(move(high)) << 64 | move(low);
}
__device__ inline unsigned __int128 shuffle(unsigned __int128 key, int lane) {
  return by_halves(key, [=](unsigned long long half) { return shuffle(half, lane); });
}
__device__ inline unsigned __int128 shuffle_xor(unsigned __int128 key, int mask) {
  return by_halves(key, [=](unsigned long long half) { return shuffle_xor(half, mask); });
}
__device__ inline unsigned __int128 shuffle_up(unsigned __int128 key) {
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
#pragma unroll 1
  for (int distance = 16; distance > 0; distance /= 2) key = exchange(key, distance, (lane & distance) == 0);
  return key;
}
template <class K>
__device__ K sort_warp(K key, int lane) {
#pragma unroll 1
  for (int size = 2; size <= 32; size *= 2)
#pragma unroll 1
    for (int distance = size / 2; distance > 0; distance /= 2)
      key = exchange(key, distance, ((lane & distance) == 0) == ((lane & size) == 0));
  return key;
}

// The lowest 32 * N keys that a warp has met, ascending: key[j] of lane l is the (32 * j + l)-th.
template <class K, int N>
struct Best {
  K key[N];

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < N; ++j) key[j] = nothing<K>();
  }
  // The n-th, 0 <= n < 32 * N, in all lanes.
  __device__ K nth(int n) const {
    K at = shuffle(key[0], n % 32);
#pragma unroll
    for (int j = 1; j < N; ++j) {  // shuffled, then chosen: choosing first would put the registers into memory
      const K other = shuffle(key[j], n % 32);
      if (n / 32 == j) at = other;
    }
    return at;
  }
  // Takes in the candidates of the lanes in `mask`; the others bring nothing(). Few are inserted one by one, many are
  // sorted and merged.
  __device__ void absorb(K candidate, unsigned mask) {
    const int lane = threadIdx.x % 32;
    if (__popc(mask) <= 4) {
#pragma unroll 1
      for (; mask; mask &= mask - 1) {
        const K one = shuffle(candidate, __ffs(int(mask)) - 1);
#pragma unroll
        for (int j = N - 1; j >= 0; --j) {  // from the end: an element's neighbour must still be the old one
          K before = shuffle_up(key[j]);
          const K carried = j > 0 ? shuffle(key[j > 0 ? j - 1 : 0], 31) : K(0);
          if (lane == 0) before = carried;
          const bool first = j == 0 && lane == 0;
          if (!(key[j] < one)) key[j] = first || before < one ? one : before;
        }
      }
      return;
    }
    candidate = sort_warp(candidate, lane);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const K other = shuffle(candidate, 31 - lane);
      const K low = other < key[j] ? other : key[j], high = other < key[j] ? key[j] : other;
      key[j] = merge_warp(low, lane);
      candidate = merge_warp(high, lane);
    }
  }
  // Takes what of a warp's keys belongs among the first `width`.
  __device__ void absorb_all(K one, int width) {
    const bool wanted = one < nth(width - 1);
    const unsigned mask = __ballot_sync(kAll, wanted);
    if (mask) absorb(wanted ? one : nothing<K>(), mask);
  }
};

// What the caller asked for -----------------------------------------------------------------------------------------

enum class Result { neighbours, kept, reward };

struct ProblemRow {  // of a ragged call
  int64_t length;
  int64_t kept_offset;  // where the problem's kept distances begin
};

// Lengths of few problems travel in a launch's arguments, those of many lie in a table.
constexpr int kFewProblems = 256;

struct Arguments {
  const void* queries;
  const void* keys;
  int64_t num_queries, num_keys, dim, k;
  int64_t query_tiles;  // blocks.x = problems * query_tiles, blocks.y = parts
  bool ragged, exclude_self;
  bool wide;  // rows are whole groups of four items, and aligned to them
  // A round finds the neighbours [first, first + width): those above the last one of the round before.
  int64_t first;
  int width;
  void* floors;    // [problems * num_queries] keys, or null: the last key of the round before, and of this one
  void* partials;  // [problems * num_queries, parts, width] keys, or null where no query's keys are divided over blocks
  int parts;
  // After a first pass: the search is for rows that had more candidates than this alone. Null: for all.
  const unsigned* candidates;
  unsigned most_candidates;
  // Results.
  Result result;
  void* distances;
  int64_t* indices;  // or null
  void* out;         // kept distances, or rewards
  KnnReward reward;
  const ProblemRow* table;
  unsigned lengths[kFewProblems];

  __device__ int64_t length(int64_t s) const {
    return !ragged ? num_keys : table ? table[s].length : int64_t(lengths[s]);
  }
  __device__ bool searched(int64_t problem_row) const {
    return !candidates || candidates[problem_row] > most_candidates;
  }
};
static_assert(sizeof(Arguments) < 2048, "arguments of a launch are limited to 4096 bytes");

__device__ inline int64_t kept_of(const Arguments& a, int64_t length) {
  const int64_t found = a.k < length ? a.k : length;
  return a.reward.kth && found > 1 ? 1 : found;
}
// Where a problem's kept distances begin. All lanes of a warp.
__device__ inline int64_t kept_offset(const Arguments& a, int64_t s) {
  if (!a.ragged) return s * a.num_queries * kept_of(a, a.num_keys);
  if (a.table) return a.table[s].kept_offset;
  long long sum = 0;
  for (int64_t before = threadIdx.x % 32; before < s; before += 32) sum += kept_of(a, int64_t(a.lengths[before]));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  return a.num_queries * sum;
}

// A row's best become what was asked for. All lanes of a warp.
template <class T, int N>
__device__ void emit(const Arguments& a, int64_t s, int64_t row, const Best<Key<T>, N>& best) {
  const int lane = threadIdx.x % 32;
  const int64_t problem_row = s * a.num_queries + row, length = a.length(s);
  const int64_t found = a.k < length ? a.k : length, kept = kept_of(a, length);
  if (a.floors) {
    const Key<T> last = best.nth(a.width - 1);
    if (lane == 0) static_cast<Key<T>*>(a.floors)[problem_row] = last;
  }
  double sum = 0;
  const int64_t offset = a.result == Result::kept ? kept_offset(a, s) + row * kept - (found - kept) : 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int64_t at = a.first + 32 * j + lane;
    if (32 * j + lane >= a.width || at >= a.k) continue;
    const Key<T> key = best.key[j];
    const bool there = key != nothing<Key<T>>();
    const T distance = there ? sqrt(squared_of(key)) : T(INFINITY);
    if (a.result == Result::neighbours) {
      static_cast<T*>(a.distances)[problem_row * a.k + at] = distance;
      if (a.indices) a.indices[problem_row * a.k + at] = there ? int64_t(unsigned(key)) : -1;
    } else if (at < found && at >= found - kept) {
      if (a.result == Result::kept)
        static_cast<T*>(a.out)[offset + at] = distance;
      else
        sum += knn_power(double(distance), a.reward.exponent);
    }
  }
  if (a.result != Result::reward) return;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  if (lane == 0) static_cast<T*>(a.out)[problem_row] = T(knn_log_reward(sum, kept, a.reward.c));
}

// Reading rows ------------------------------------------------------------------------------------------------------

constexpr int kGroup = 4;  // features that a thread reads at a time

template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
  T v[N];
};

// Features [d, d + 4) of a row; zeros beyond `dim`. wide: they are one aligned group or none.
template <class T, class Item>
__device__ Pack<T, kGroup> read_group(const Item* row, int64_t d, int64_t dim, bool wide) {
  Pack<T, kGroup> out;
  if (wide && d < dim) {
    const auto items = *reinterpret_cast<const Pack<Item, kGroup>*>(row + d);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out.v[i] = to_real(items.v[i]);
    return out;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) out.v[i] = d + i < dim ? to_real(row[d + i]) : T(0);
  return out;
}

// One term of a squared distance: rounded alike wherever it is added.
__device__ inline float add_square(float sum, float difference) { return fmaf(difference, difference, sum); }
__device__ inline double add_square(double sum, double difference) { return fma(difference, difference, sum); }

}  // namespace
}  // namespace urlfast
