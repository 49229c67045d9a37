#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "common/cpu.hpp"
#include "common/cuda.hpp"
#include "common/parallel.hpp"
#include "common/random.hpp"
#include "latent/latent.hpp"
#include "latent/latent_isa.hpp"

namespace urlfast {
namespace {

const LatentKernels& kernels() {
  static const LatentKernels& chosen = URLFAST_PICK(latent_kernels);
  return chosen;
}

template <class T>
std::shared_ptr<T> allocate(Device device, int64_t n) {
  const int64_t bytes = (n * int64_t(sizeof(T)) + 63) / 64 * 64;
  if (device.cuda) return std::static_pointer_cast<T>(cuda_buffer(device.index, bytes));
  void* memory = std::aligned_alloc(64, size_t(bytes));
  if (!memory) throw std::bad_alloc();
  std::memset(memory, 0, size_t(bytes));
  return {static_cast<T*>(memory), [](T* p) { std::free(p); }};
}

}  // namespace

Latent::Latent(LatentShape shape, LatentParams params, uint64_t seed, Device device)
    : z(allocate<float>(device, shape.num_envs * shape.dim)),
      classes(allocate<int64_t>(device, shape.num_envs)),
      is_first(allocate<bool>(device, shape.num_envs)),
      is_last(allocate<bool>(device, shape.num_envs)),
      shape_(shape),
      params_(params),
      seed_(seed),
      device_(device),
      clock_(allocate<LatentClock>(device, 1)) {
  const LatentClock start;
  copy_waiting(device, clock_.get(), &start, sizeof start);
}

void Latent::advance(const float* actions, bool reset, CUstream_st* stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (device_.cuda) {
#ifdef URLFAST_HAS_CUDA
    latent_advance_cuda(*this, clock_.get(), actions, reset, stream);
#endif
    return;
  }
  (void)stream;
  LatentClock& clock = *clock_;
  const bool first = reset || clock.t == shape_.episode_length;
  clock.t = first ? 0 : clock.t + 1;
  const uint64_t row = clock.rows++;
  const int64_t dim = shape_.dim, groups = (dim + 3) / 4;
  const auto run = [&, this](int64_t value, int64_t n, int64_t position) {
    kernels().run({z.get() + value, first ? nullptr : actions + value, n, seed_, row, uint64_t(position), params_});
  };
  constexpr int64_t kGrain = 4096;  // positions, some 15 us of drawing
  if (dim % 4 == 0)                 // no group is cut short: the environments are one long row
    parallel_for(shape_.num_envs * groups, kGrain,
                 [&](int64_t begin, int64_t end) { run(4 * begin, 4 * (end - begin), begin); });
  else
    parallel_for(shape_.num_envs, std::max<int64_t>(1, kGrain / groups), [&](int64_t begin, int64_t end) {
      for (int64_t env = begin; env < end; ++env) run(env * dim, dim, env * groups);
    });
  if (first)
    for (int64_t env = 0; env < shape_.num_envs; ++env)
      classes.get()[env] = latent_class(philox({seed_, 4 * row + kDrawClass}, uint64_t(env)).v[0], shape_.classes);
  std::fill_n(is_first.get(), shape_.num_envs, first);
  std::fill_n(is_last.get(), shape_.num_envs, clock.t == shape_.episode_length);
}

void Latent::read(LatentClock* clock, float* z_out, int64_t* classes_out) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  copy_waiting(device_, clock, clock_.get(), sizeof *clock);
  copy_waiting(device_, z_out, z.get(), shape_.num_envs * shape_.dim * 4);
  copy_waiting(device_, classes_out, classes.get(), shape_.num_envs * 8);
}

void Latent::write(const LatentClock& clock, const float* z_in, const int64_t* classes_in) {
  const std::lock_guard<std::mutex> lock(mutex_);
  copy_waiting(device_, clock_.get(), &clock, sizeof clock);
  copy_waiting(device_, z.get(), z_in, shape_.num_envs * shape_.dim * 4);
  copy_waiting(device_, classes.get(), classes_in, shape_.num_envs * 8);
}

void ema_update_cpu(const EmaPair* pairs, int64_t count, double tau) {
  std::vector<int64_t> starts(count + 1, 0);  // of each tensor in the concatenation of all
  for (int64_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + pairs[i].size;
  // Items: about 128 kB of both. A thread gets one part, and the same as last time: its caches may have it still.
  constexpr int64_t kGrain = 16384;
  const LatentKernels& k = kernels();
  parallel_for(starts[count], kGrain, [&](int64_t begin, int64_t end) {
    int64_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; i < count && starts[i] < end; ++i) {
      const int64_t from = std::max(begin, starts[i]) - starts[i], to = std::min(end, starts[i + 1]) - starts[i];
      if (from >= to) continue;
      const int64_t offset = from * item_size(pairs[i].dtype);
      k.lerp(static_cast<char*>(pairs[i].target) + offset, static_cast<const char*>(pairs[i].source) + offset,
             pairs[i].dtype, to - from, tau);
    }
  });
}

}  // namespace urlfast
