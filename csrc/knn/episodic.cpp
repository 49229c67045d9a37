#include "knn/episodic.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "common/check.hpp"
#include "common/cuda.hpp"
#include "common/memory.hpp"

namespace urlfast {

EpisodicMemory::EpisodicMemory(int64_t streams, int64_t capacity, int64_t dim, int64_t k, Device device)
    : streams_(streams), capacity_(capacity), dim_(dim), k_(k), device_(device) {
  const int64_t bytes = streams * capacity * dim * int64_t(sizeof(float));
  if (device.cuda) {
    rows_ = std::static_pointer_cast<float>(cuda_buffer(device.index, bytes));
    total_ = std::static_pointer_cast<int64_t>(cuda_buffer(device.index, streams * int64_t(sizeof(int64_t))));
    const std::vector<int64_t> zeros(size_t(streams), 0);
    copy_waiting(device, total_.get(), zeros.data(), streams * int64_t(sizeof(int64_t)));
    return;
  }
  if (void* pages = map_pages(bytes, false))
    rows_.reset(static_cast<float*>(pages), [bytes](void* p) { unmap_pages(p, bytes); });
  total_.reset(static_cast<int64_t*>(std::calloc(size_t(streams), sizeof(int64_t))), std::free);
  if (!rows_ || !total_)
    throw MemoryShortage(text("capacity: ", streams, " x ", capacity, " rows take ", gigabytes(double(bytes)),
                              ", more than the system gives"));
}

KnnProblem EpisodicMemory::problem(const float* embeddings) const {
  KnnProblem p;
  p.queries_name = "embeddings";
  p.queries = embeddings, p.keys = rows_.get();
  p.problems = streams_, p.num_queries = 1, p.num_keys = capacity_, p.dim = dim_, p.k = k_;
  return p;
}

int64_t EpisodicMemory::workspace_bytes() const {
#ifdef URLFAST_HAS_CUDA
  if (device_.cuda) return episodic_workspace_cuda(problem(nullptr), device_.index);
#endif
  return 0;
}

void EpisodicMemory::step(const float* embeddings, const bool* reset, bool reset_on_device, float* distances,
                          void* workspace, CUstream_st* stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  KnnProblem p = problem(embeddings);
  if (device_.cuda) {
#ifdef URLFAST_HAS_CUDA
    episodic_step_cuda(rows_.get(), total_.get(), p, reset, reset_on_device, distances, workspace, device_.index,
                       stream);
#endif
    return;
  }
  (void)reset_on_device, (void)workspace, (void)stream;
  int64_t* total = total_.get();
  const auto* is_reset = reinterpret_cast<const uint8_t*>(reset);
  std::vector<int64_t> held(static_cast<size_t>(streams_));
  for (int64_t n = 0; n < streams_; ++n) held[size_t(n)] = is_reset[n] ? 0 : std::min(total[n], capacity_);
  p.lengths = held.data();
  knn_cpu(p, distances, nullptr);  // throws before anything has changed
  for (int64_t n = 0; n < streams_; ++n) {
    if (is_reset[n]) total[n] = 0;
    std::memcpy(rows_.get() + (n * capacity_ + total[n] % capacity_) * dim_, embeddings + n * dim_,
                size_t(dim_) * sizeof(float));
    ++total[n];
  }
}

std::vector<int64_t> EpisodicMemory::totals() const {
  std::vector<int64_t> out(static_cast<size_t>(streams_));
  copy_waiting(device_, out.data(), total_.get(), streams_ * int64_t(sizeof(int64_t)));
  return out;
}

std::vector<int64_t> EpisodicMemory::lengths() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int64_t> out = totals();
  for (int64_t& n : out) n = std::min(n, capacity_);
  return out;
}

bool EpisodicMemory::save(const std::vector<int64_t>& lengths, float* rows) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<int64_t> total = totals();
  for (int64_t n = 0; n < streams_; ++n)
    if (lengths[size_t(n)] != std::min(total[size_t(n)], capacity_)) return false;
  const auto copy = [&](const float* from, int64_t count) {
    const int64_t bytes = count * dim_ * int64_t(sizeof(float));
    copy_waiting(device_, rows, from, bytes);
    rows += count * dim_;
  };
  for (int64_t n = 0; n < streams_; ++n) {
    const float* own = rows_.get() + n * capacity_ * dim_;
    const int64_t held = lengths[size_t(n)], oldest = held < capacity_ ? 0 : total[size_t(n)] % capacity_;
    const int64_t to_end = std::min(held, capacity_ - oldest);
    if (to_end > 0) copy(own + oldest * dim_, to_end);
    if (held > to_end) copy(own, held - to_end);
  }
  return true;
}

void EpisodicMemory::load(const std::vector<int64_t>& lengths, const float* rows) {
  const std::lock_guard<std::mutex> lock(mutex_);
  copy_waiting(device_, total_.get(), lengths.data(), streams_ * int64_t(sizeof(int64_t)));
  for (int64_t n = 0; n < streams_; ++n) {
    const int64_t count = lengths[size_t(n)] * dim_;
    if (count > 0) copy_waiting(device_, rows_.get() + n * capacity_ * dim_, rows, count * int64_t(sizeof(float)));
    rows += count;
  }
}

}  // namespace urlfast
