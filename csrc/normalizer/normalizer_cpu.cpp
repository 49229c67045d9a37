#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/cpu.hpp"
#include "common/cuda.hpp"
#include "common/parallel.hpp"
#include "normalizer/normalizer.hpp"
#include "normalizer/normalizer_isa.hpp"

namespace urlfast {
namespace {

// Values that one thread takes at a time, about 128 kB: below it, waking another costs more than it brings. What is
// summed together depends on the shape alone, never on the number of threads.
constexpr int64_t kChunk = 32768;

const NormalizerKernels& kernels() {
  static const NormalizerKernels& chosen = URLFAST_PICK(normalizer_kernels);
  return chosen;
}

MomentsOf needed(StatisticMode mode) {
  return mode == StatisticMode::mean      ? MomentsOf::mean
         : mode == StatisticMode::ema_abs ? MomentsOf::magnitude
                                          : MomentsOf::mean_and_m2;
}

const void* at(const void* x, DType dtype, int64_t i) { return static_cast<const char*>(x) + i * item_size(dtype); }
void* out_at(void* out, DType dtype, int64_t i) { return static_cast<char*>(out) + i * (dtype == DType::f64 ? 8 : 4); }

bool finite(const Statistic& s) { return std::isfinite(s.mean) && std::isfinite(s.m2); }

Statistic moments(const void* x, DType dtype, int64_t n, MomentsOf what) {
  const NormalizerKernels& k = kernels();
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  if (chunks == 1) return k.moments(x, dtype, n, what);
  std::vector<Statistic> parts(chunks);
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      parts[c] = k.moments(at(x, dtype, c * kChunk), dtype, std::min(kChunk, n - c * kChunk), what);
  });
  for (int64_t c = 1; c < chunks; ++c) parts[0] = statistic_merge(parts[0], parts[c]);
  return parts[0];
}

std::vector<Statistic> column_moments(const void* x, DType dtype, int64_t rows, int64_t features, MomentsOf what) {
  const NormalizerKernels& k = kernels();
  const int64_t per_chunk = std::max({int64_t(64), kChunk / features, (rows + 63) / 64});  // at most 64 parts
  const int64_t chunks = (rows + per_chunk - 1) / per_chunk;
  std::vector<Statistic> parts(chunks * features);
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      k.column_moments(at(x, dtype, c * per_chunk * features), dtype, std::min(per_chunk, rows - c * per_chunk),
                       features, what, &parts[c * features]);
  });
  for (int64_t i = features; i < chunks * features; ++i)
    parts[i % features] = statistic_merge(parts[i % features], parts[i]);
  parts.resize(features);
  return parts;
}

}  // namespace

Normalizer::Normalizer(StatisticRule rule, int64_t features, Device device)
    : rule_(rule), features_(features), device_(device) {
  const std::vector<Statistic> start(features, statistic_start(rule.mode));
  if (device.cuda) {
    const int index = device.index;
    state_ = std::static_pointer_cast<Statistic>(cuda_buffer(index, features * int64_t(sizeof(Statistic))));
#ifdef URLFAST_HAS_CUDA
    const std::vector<char> zeros(normalizer_scratch_bytes(features));
    scratch_ = cuda_buffer(index, int64_t(zeros.size()));
    cuda_copy(index, scratch_.get(), zeros.data(), int64_t(zeros.size()), nullptr);
#endif
  } else {
    state_ = std::shared_ptr<Statistic>(new Statistic[features], std::default_delete<Statistic[]>());
  }
  write(start.data());
}

bool Normalizer::update(const void* x, DType dtype, int64_t rows, CUstream_st* stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (device_.cuda) {
#ifdef URLFAST_HAS_CUDA
    normalizer_update_cuda(state_.get(), scratch_.get(), rule_, features_, x, dtype, rows, device_.index, stream);
#endif
    return true;
  }
  (void)stream;
  const MomentsOf what = needed(rule_.mode);
  if (features_ == 1) {
    const Statistic next = statistic_update(*state_, moments(x, dtype, rows, what), rule_);
    if (!finite(next)) return false;
    *state_ = next;
    return true;
  }
  std::vector<Statistic> next = column_moments(x, dtype, rows, features_, what);
  for (int64_t f = 0; f < features_; ++f) {
    next[f] = statistic_update(state_.get()[f], next[f], rule_);
    if (!finite(next[f])) return false;
  }
  std::memcpy(state_.get(), next.data(), features_ * sizeof(Statistic));
  return true;
}

void Normalizer::normalize(const void* x, DType dtype, int64_t rows, void* out, CUstream_st* stream) const {
  if (device_.cuda) {
    const std::lock_guard<std::mutex> lock(mutex_);
#ifdef URLFAST_HAS_CUDA
    normalizer_normalize_cuda(state_.get(), rule_, features_, x, dtype, rows, out, device_.index, stream);
#endif
    return;
  }
  (void)stream;
  const NormalizerKernels& k = kernels();
  if (features_ == 1) {
    double inverse;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      inverse = 1 / statistic_scale(*state_, rule_);
    }
    parallel_for(rows, kChunk, [&](int64_t begin, int64_t end) {
      k.scale(at(x, dtype, begin), dtype, end - begin, out_at(out, dtype, begin), inverse, rule_.clip);
    });
    return;
  }
  std::vector<double> inverses(features_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t f = 0; f < features_; ++f) inverses[f] = 1 / statistic_scale(state_.get()[f], rule_);
  }
  parallel_for(rows, std::max<int64_t>(1, kChunk / features_), [&](int64_t begin, int64_t end) {
    k.scale_columns(at(x, dtype, begin * features_), dtype, end - begin, features_,
                    out_at(out, dtype, begin * features_), inverses.data(), rule_.clip);
  });
}

bool Normalizer::merge(const Normalizer& other, CUstream_st* stream) {
  if (device_.cuda && device_ == other.device_) {
    const std::lock_guard<std::mutex> lock(mutex_);
#ifdef URLFAST_HAS_CUDA
    normalizer_merge_cuda(state_.get(), other.state_.get(), rule_, features_, device_.index, stream);
#endif
    return true;
  }
  (void)stream;
  std::vector<Statistic> theirs(features_), ours(features_);
  other.read(theirs.data());  // one lock at a time: two threads may merge two normalisers crosswise
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t bytes = features_ * int64_t(sizeof(Statistic));
  copy_waiting(device_, ours.data(), state_.get(), bytes);
  for (int64_t f = 0; f < features_; ++f) {
    ours[f] = statistic_update(ours[f], theirs[f], rule_);
    if (!finite(ours[f])) return false;
  }
  copy_waiting(device_, state_.get(), ours.data(), bytes);
  return true;
}

void Normalizer::read(Statistic* out) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  copy_waiting(device_, out, state_.get(), features_ * int64_t(sizeof(Statistic)));
}

void Normalizer::write(const Statistic* in) {
  const std::lock_guard<std::mutex> lock(mutex_);
  copy_waiting(device_, state_.get(), in, features_ * int64_t(sizeof(Statistic)));
}

}  // namespace urlfast
