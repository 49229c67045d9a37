#include <algorithm>
#include <type_traits>

#include "common/cuda.hpp"
#include "common/real.cuh"
#include "normalizer/normalizer.hpp"

namespace urlfast {
namespace {

// A block is `columns` features wide (a power of two, at most 32) and kThreads / columns rows high, so that a warp
// reads neighbours both for one statistic over everything and for many features.
constexpr int kThreads = 256;
constexpr int kValues = 16;  // per thread and turn: enough loads in flight, and the mean is taken off them in registers
constexpr int kMostBlocks = 512;  // of the reduction: what the last block still merges quickly

struct Grid {
  dim3 blocks, threads;
};

int columns_of(int64_t features) {
  int columns = 1;
  while (columns < 32 && columns < features) columns *= 2;
  return columns;
}

int64_t tiles_of(int64_t features) { return (features + columns_of(features) - 1) / columns_of(features); }

// Depends on the shape alone, and so does the order of every sum.
Grid grid_of(int64_t rows, int64_t features, int64_t most_blocks) {
  const int columns = columns_of(features);
  const int64_t tiles = tiles_of(features), per_block = int64_t(kThreads / columns) * kValues;
  const int64_t splits = std::min((rows + per_block - 1) / per_block, std::max<int64_t>(1, most_blocks / tiles));
  return {dim3(unsigned(tiles), unsigned(splits)), dim3(unsigned(columns), unsigned(kThreads / columns))};
}

int64_t most_partials(int64_t features) { return std::max<int64_t>(1, kMostBlocks / tiles_of(features)) * features; }

__device__ Statistic load(const Statistic* p) {  // from the cache that all blocks share
  Statistic s;
  s.count = __ldcg(&p->count), s.mean = __ldcg(&p->mean), s.m2 = __ldcg(&p->m2);
  return s;
}

// The merge of a block's columns over its rows, always in the same order; valid in the threads of row 0.
__device__ Statistic merge_rows(Statistic mine) {
  __shared__ double count[kThreads], mean[kThreads], m2[kThreads];
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    count[at] = mine.count, mean[at] = mine.mean, m2[at] = mine.m2;
    __syncthreads();
    if (threadIdx.y < half) {
      const int other = at + half * blockDim.x;
      Statistic theirs;
      theirs.count = count[other], theirs.mean = mean[other], theirs.m2 = m2[other];
      mine = statistic_merge(mine, theirs);
    }
    __syncthreads();
  }
  return mine;
}

template <class T>
__global__ void __launch_bounds__(kThreads) update(Statistic* state, Statistic* partials, unsigned* tickets,
                                                   StatisticRule rule, int64_t features, const T* x, int64_t rows) {
  const int64_t feature = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  Statistic mine;
  if (feature < features)
    for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += kValues * step) {
      double values[kValues], sum = 0;
      int n = 0;
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const int64_t r = row + k * step;
        const bool inside = r < rows;
        values[k] = inside ? double(to_real(x[r * features + feature])) : 0.;
        if (rule.mode == StatisticMode::ema_abs) values[k] = fabs(values[k]);
        sum += values[k];
        n += inside;
      }
      Statistic part;
      part.count = n;
      part.mean = sum / n;
      if (rule.mode == StatisticMode::std || rule.mode == StatisticMode::var)
#pragma unroll
        for (int k = 0; k < kValues; ++k)
          if (k < n) part.m2 += (values[k] - part.mean) * (values[k] - part.mean);
      mine = statistic_merge(mine, part);
    }
  mine = merge_rows(mine);
  if (gridDim.y > 1) {
    if (threadIdx.y == 0 && feature < features) {
      partials[blockIdx.y * features + feature] = mine;
      __threadfence();
    }
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) last = atomicAdd(&tickets[blockIdx.x], 1u) == gridDim.y - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    mine = Statistic();
    if (feature < features)
      for (unsigned p = threadIdx.y; p < gridDim.y; p += blockDim.y)
        mine = statistic_merge(mine, load(&partials[p * features + feature]));
    mine = merge_rows(mine);
    if (threadIdx.x == 0 && threadIdx.y == 0) tickets[blockIdx.x] = 0;  // as the next launch expects it
  }
  if (threadIdx.y == 0 && feature < features) state[feature] = statistic_update(state[feature], mine, rule);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    normalize(const Statistic* state, StatisticRule rule, int64_t features, const T* x, int64_t rows, Real<T>* out) {
  const int64_t feature = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (feature >= features) return;
  const double inverse = 1 / statistic_scale(state[feature], rule);
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
#pragma unroll 4
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += step) {
    const int64_t i = row * features + feature;
    out[i] = Real<T>(statistic_normalize(double(to_real(x[i])), inverse, rule.clip));
  }
}

__global__ void merge(Statistic* state, const Statistic* other, StatisticRule rule, int64_t features) {
  const int64_t f = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (f < features) state[f] = statistic_update(state[f], other[f], rule);
}

}  // namespace

int64_t normalizer_scratch_bytes(int64_t features) {
  return most_partials(features) * int64_t(sizeof(Statistic)) + tiles_of(features) * int64_t(sizeof(unsigned));
}

void normalizer_update_cuda(Statistic* state, void* scratch, StatisticRule rule, int64_t features, const void* x,
                            DType dtype, int64_t rows, int device, CUstream_st* stream) {
  DeviceGuard guard(device);
  const Grid grid = grid_of(rows, features, kMostBlocks);
  auto* partials = static_cast<Statistic*>(scratch);
  auto* tickets = reinterpret_cast<unsigned*>(partials + most_partials(features));
  with_real_type(dtype, [&](auto* type) {
    update<<<grid.blocks, grid.threads, 0, stream>>>(state, partials, tickets, rule, features,
                                                     static_cast<decltype(type)>(x), rows);
  });
  URLFAST_CUDA_CHECK(cudaGetLastError());
}

void normalizer_normalize_cuda(const Statistic* state, StatisticRule rule, int64_t features, const void* x, DType dtype,
                               int64_t rows, void* out, int device, CUstream_st* stream) {
  DeviceGuard guard(device);
  const Grid grid = grid_of(rows, features, 4096);
  with_real_type(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    normalize<<<grid.blocks, grid.threads, 0, stream>>>(state, rule, features, static_cast<const T*>(x), rows,
                                                        static_cast<Real<T>*>(out));
  });
  URLFAST_CUDA_CHECK(cudaGetLastError());
}

void normalizer_merge_cuda(Statistic* state, const Statistic* other, StatisticRule rule, int64_t features, int device,
                           CUstream_st* stream) {
  DeviceGuard guard(device);
  merge<<<unsigned((features + 255) / 256), 256, 0, stream>>>(state, other, rule, features);
  URLFAST_CUDA_CHECK(cudaGetLastError());
}

}  // namespace urlfast
