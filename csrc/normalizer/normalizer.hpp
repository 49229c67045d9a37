// Running statistics of rewards and distances, and division by them. No Python, torch or CUDA header reaches this file.
//
// knn_reward uses it so: its binding lets the search write distances, calls update() on them, and gives rule() and
// state() to the kernel that finishes the reward (statistic.hpp has the formula).
#pragma once
#include <memory>
#include <mutex>

#include "common/statistic.hpp"
#include "common/tensor.hpp"

struct CUstream_st;  // what cudaStream_t points to

namespace urlfast {

class Normalizer {
 public:
  // features: 1 for one statistic over all values. On CUDA, state and scratch live on the device, and making it waits
  // for the device.
  Normalizer(StatisticRule rule, int64_t features, Device device);

  const StatisticRule& rule() const { return rule_; }
  int64_t features() const { return features_; }
  const Device& device() const { return device_; }
  Statistic* state() const { return state_.get(); }  // [features], on device()
  std::mutex& mutex() const { return mutex_; }       // held by whoever reads or writes the state on the CPU

  // x: [rows, features], C-contiguous, floating, on device(), not empty. False, and nothing changed, where a value on
  // the CPU is NaN or infinite (or too large for its square to be a double). On CUDA: one launch, no host
  // synchronisation, NaN propagates into the state; all calls must be ordered by streams. Takes the mutex.
  bool update(const void* x, DType dtype, int64_t rows, CUstream_st* stream);
  // out: [rows, features]; float64 for float64 x, float32 otherwise; may be x where the dtypes agree. Takes the mutex.
  void normalize(const void* x, DType dtype, int64_t rows, void* out, CUstream_st* stream) const;
  // Adds what `other` has seen. Same mode and features; never ema_abs. May be this one itself. Between two on the same
  // CUDA device one launch on `stream`; otherwise by way of the host, and false, with nothing changed, where the sum
  // would not be finite.
  bool merge(const Normalizer& other, CUstream_st* stream);

  // Host copies of the state, [features]. On CUDA these wait for the device.
  void read(Statistic* out) const;
  void write(const Statistic* in);

 private:
  StatisticRule rule_;
  int64_t features_;
  Device device_;
  std::shared_ptr<Statistic> state_;
  std::shared_ptr<void> scratch_;  // CUDA: partial results of the reduction, and its tickets
  mutable std::mutex mutex_;
};

// normalizer_cuda.cu. Arguments as above; scratch: normalizer_scratch_bytes(features), zeroed before the first use.
int64_t normalizer_scratch_bytes(int64_t features);
void normalizer_update_cuda(Statistic* state, void* scratch, StatisticRule rule, int64_t features, const void* x,
                            DType dtype, int64_t rows, int device, CUstream_st* stream);
void normalizer_normalize_cuda(const Statistic* state, StatisticRule rule, int64_t features, const void* x, DType dtype,
                               int64_t rows, void* out, int device, CUstream_st* stream);
void normalizer_merge_cuda(Statistic* state, const Statistic* other, StatisticRule rule, int64_t features, int device,
                           CUstream_st* stream);

}  // namespace urlfast
