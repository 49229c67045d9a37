#include <algorithm>
#include <cstdint>

#include "common/cuda.hpp"
#include "common/random.hpp"
#include "common/real.cuh"
#include "latent/latent.hpp"

namespace urlfast {
namespace {

constexpr int kThreads = 256;

struct LatentArrays {
  float* z;
  const float* actions;
  int64_t* classes;
  bool *is_first, *is_last;
};

// A thread draws, mixes and smooths groups of four values: 16 bytes of z and of the actions at a time where rows are
// whole groups. The clock is on the device, so that a captured graph moves it on at each replay.
template <bool kWholeGroups>
__global__ void __launch_bounds__(kThreads)
    advance(LatentArrays a, LatentClock* clock, LatentShape shape, LatentParams params, uint64_t seed, bool reset) {
  const uint64_t row = clock->rows;
  const bool first = reset || clock->t == shape.episode_length;
  const int64_t t = first ? 0 : clock->t + 1;
  const Philox noise_rng{seed, 4 * row + kDrawNoise}, action_rng{seed, 4 * row + kDrawAction};
  const int64_t groups = (shape.dim + 3) / 4, total = shape.num_envs * groups;
  const int64_t start = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t position = start; position < total; position += stride) {
    int64_t at = 4 * position;
    int n = 4;
    if (!kWholeGroups) {
      const int64_t env = position / groups, group = position - env * groups;
      at = env * shape.dim + 4 * group;
      n = int(min(int64_t(4), shape.dim - 4 * group));
    }
    alignas(16) float action[4] = {}, z[4] = {};
    float noise[4];
    const Philox4 bits = philox(noise_rng, uint64_t(position));
    normal_pair(bits.v[0], bits.v[1], &noise[0], &noise[1]);
    normal_pair(bits.v[2], bits.v[3], &noise[2], &noise[3]);
    if (first) {
      const Philox4 drawn = philox(action_rng, uint64_t(position));
      for (int k = 0; k < 4; ++k) action[k] = 2.f * uniform01(drawn.v[k]) - 1.f;
    } else if (kWholeGroups) {
      *reinterpret_cast<float4*>(action) = *reinterpret_cast<const float4*>(a.actions + at);
      *reinterpret_cast<float4*>(z) = *reinterpret_cast<const float4*>(a.z + at);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)  // a constant count keeps the four in registers
        if (k < n) action[k] = a.actions[at + k], z[k] = a.z[at + k];
    }
    for (int k = 0; k < 4; ++k) z[k] = latent_step(z[k], action[k], noise[k], first, params);
    if (kWholeGroups)
      *reinterpret_cast<float4*>(a.z + at) = *reinterpret_cast<const float4*>(z);
    else
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k < n) a.z[at + k] = z[k];
  }
  for (int64_t env = start; env < shape.num_envs; env += stride) {
    if (first) a.classes[env] = latent_class(philox({seed, 4 * row + kDrawClass}, uint64_t(env)).v[0], shape.classes);
    a.is_first[env] = first;
    a.is_last[env] = t == shape.episode_length;
  }
  __syncthreads();  // every thread of the block has read the clock
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&clock->ticket, 1u) == gridDim.x - 1) clock->rows = row + 1, clock->t = t, clock->ticket = 0;
  }
}

// The tensors of one launch, as a kernel argument: nothing is copied to the device beforehand.
constexpr int kTensors = 136;
struct EmaTable {
  void* target[kTensors];
  const void* source[kTensors];
  int64_t size[kTensors];
  int32_t first_block[kTensors + 1];
  DType dtype[kTensors];
  int32_t count;
};
static_assert(sizeof(EmaTable) <= 4000, "4 kB of arguments is what every architecture takes");

constexpr int64_t kChunk = 8192;  // items a block works on

template <class T>
__device__ T lerp(T target, T source, double tau) {
  const Real<T> t = to_real(target), s = to_real(source), w = Real<T>(tau);
  T out;
  // as on the CPU: tau = 1 gives the source itself
  from_real(w < Real<T>(0.5) ? t + w * (s - t) : s - (s - t) * (Real<T>(1) - w), &out);
  return out;
}

template <class T>
__device__ void lerp_chunk(T* target, const T* source, int64_t n, double tau) {
  constexpr int kPack = 16 / sizeof(T);
  struct alignas(16) Pack {
    T v[kPack];
  };
  int64_t done = 0;
  if (((reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source)) & 15) == 0) {
    auto* packs = reinterpret_cast<Pack*>(target);
    const auto* from = reinterpret_cast<const Pack*>(source);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < n / kPack; i += kThreads) {
      Pack t = packs[i];
      const Pack s = from[i];
#pragma unroll
      for (int k = 0; k < kPack; ++k) t.v[k] = lerp(t.v[k], s.v[k], tau);
      packs[i] = t;
    }
    done = n / kPack * kPack;
  }
  for (int64_t i = done + threadIdx.x; i < n; i += kThreads) target[i] = lerp(target[i], source[i], tau);
}

__global__ void __launch_bounds__(kThreads) ema_update(const __grid_constant__ EmaTable table, double tau) {
  int low = 0, high = table.count;  // the tensor whose chunks this block is among
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= int(blockIdx.x))
      low = middle;
    else
      high = middle;
  }
  const int64_t start = int64_t(int(blockIdx.x) - table.first_block[low]) * kChunk;
  const int64_t n = min(kChunk, table.size[low] - start);
  void* const target = table.target[low];
  const void* const source = table.source[low];
  switch (table.dtype[low]) {
    case DType::f32:
      return lerp_chunk(static_cast<float*>(target) + start, static_cast<const float*>(source) + start, n, tau);
    case DType::f64:
      return lerp_chunk(static_cast<double*>(target) + start, static_cast<const double*>(source) + start, n, tau);
    case DType::f16:
      return lerp_chunk(static_cast<__half*>(target) + start, static_cast<const __half*>(source) + start, n, tau);
    default:
      return lerp_chunk(static_cast<__nv_bfloat16*>(target) + start, static_cast<const __nv_bfloat16*>(source) + start,
                        n, tau);
  }
}

}  // namespace

void latent_advance_cuda(const Latent& latent, LatentClock* clock, const float* actions, bool reset,
                         CUstream_st* stream) {
  DeviceGuard guard(latent.device().index);
  const LatentShape& shape = latent.shape();
  const LatentArrays arrays{latent.z.get(), actions, latent.classes.get(), latent.is_first.get(), latent.is_last.get()};
  const int64_t total = shape.num_envs * ((shape.dim + 3) / 4);
  const unsigned blocks = unsigned(std::min<int64_t>((total + kThreads - 1) / kThreads, 2048));
  const bool whole = shape.dim % 4 == 0 && reinterpret_cast<uintptr_t>(actions) % 16 == 0;
  if (whole)
    advance<true><<<blocks, kThreads, 0, stream>>>(arrays, clock, shape, latent.params(), latent.seed(), reset);
  else
    advance<false><<<blocks, kThreads, 0, stream>>>(arrays, clock, shape, latent.params(), latent.seed(), reset);
  URLFAST_CUDA_CHECK(cudaGetLastError());
}

void ema_update_cuda(const EmaPair* pairs, int64_t count, double tau, int device, CUstream_st* stream) {
  DeviceGuard guard(device);
  constexpr int64_t kMostBlocks = int64_t(1) << 30;
  EmaTable table;
  int64_t blocks = 0, offset = 0;  // offset: of the next chunk within pairs[i]
  table.count = 0;
  const auto launch = [&] {
    if (table.count == 0) return;
    table.first_block[table.count] = int32_t(blocks);
    ema_update<<<unsigned(blocks), kThreads, 0, stream>>>(table, tau);
    URLFAST_CUDA_CHECK(cudaGetLastError());
    table.count = 0, blocks = 0;
  };
  for (int64_t i = 0; i < count; offset = 0, ++i)
    while (offset < pairs[i].size) {
      if (table.count == kTensors || blocks == kMostBlocks) launch();
      const int64_t chunks = std::min((pairs[i].size - offset + kChunk - 1) / kChunk, kMostBlocks - blocks);
      const int64_t size = std::min(pairs[i].size - offset, chunks * kChunk), skip = offset * item_size(pairs[i].dtype);
      const int at = table.count++;
      table.target[at] = static_cast<char*>(pairs[i].target) + skip;
      table.source[at] = static_cast<const char*>(pairs[i].source) + skip;
      table.size[at] = size, table.dtype[at] = pairs[i].dtype, table.first_block[at] = int32_t(blocks);
      blocks += chunks, offset += size;
    }
  launch();
}

}  // namespace urlfast
