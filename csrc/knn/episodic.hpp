// Episodic memories of many actors (NGU): each asks for its nearest earlier embeddings and adds the new one, all in one
// call. No Python, torch or CUDA header reaches this file.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "common/tensor.hpp"
#include "knn/knn.hpp"

namespace urlfast {

class EpisodicMemory {
 public:
  // Memories live on `device`, float32; their pages are taken when they are first written.
  EpisodicMemory(int64_t streams, int64_t capacity, int64_t dim, int64_t k, Device device);

  int64_t streams() const { return streams_; }
  int64_t capacity() const { return capacity_; }
  int64_t dim() const { return dim_; }
  int64_t k() const { return k_; }
  const Device& device() const { return device_; }

  // Empties the memories whose reset is set; writes each stream's k lowest distances, [streams, k], ascending and
  // padded with infinity; then appends, over the oldest row where a memory is full. embeddings: [streams, dim] on
  // device(); reset: [streams], on device() where reset_on_device, else on the host; read as bytes. On the CPU NaN and
  // infinity throw std::invalid_argument and change nothing; on CUDA nothing waits for the device. workspace: on the
  // device, workspace_bytes() of it (0 on the CPU), aligned to 256.
  void step(const float* embeddings, const bool* reset, bool reset_on_device, float* distances, void* workspace,
            CUstream_st* stream);
  int64_t workspace_bytes() const;

  // Rows held by each stream, [streams]; and these rows, stream after stream, oldest first, or false where it holds
  // other numbers by now. On CUDA they wait.
  std::vector<int64_t> lengths() const;
  bool save(const std::vector<int64_t>& lengths, float* rows) const;
  void load(const std::vector<int64_t>& lengths, const float* rows);

 private:
  KnnProblem problem(const float* embeddings) const;
  std::vector<int64_t> totals() const;  // on the host

  int64_t streams_, capacity_, dim_, k_;
  Device device_;
  std::shared_ptr<float> rows_;     // [streams, capacity, dim]
  std::shared_ptr<int64_t> total_;  // [streams], rows ever appended since the last reset: row t is at t % capacity
  mutable std::mutex mutex_;
};

// knn_cuda.cu. All pointers on the device, but `reset` where it is not `reset_on_device`.
int64_t episodic_workspace_cuda(const KnnProblem& p, int device);
void episodic_step_cuda(float* rows, int64_t* total, const KnnProblem& p, const bool* reset, bool reset_on_device,
                        float* distances, void* workspace, int device, CUstream_st* stream);

}  // namespace urlfast
