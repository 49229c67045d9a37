// Running statistics of rewards and distances, and division by them. No Python, torch or CUDA header reaches this file.
//
// knn_reward fuses nothing: its binding lets the search write distances, calls normalizer.update(distances, rows, ...)
// on them, and gives rule() and state() to the kernel that finishes the reward.
#pragma once
#include <memory>
#include <mutex>

#include "common/statistic.hpp"
#include "common/tensor.hpp"

struct CUstream_st;  // what cudaStream_t points to

namespace urlfast {

class Normalizer {
 public:
  // features: 1 for one statistic over all values. On CUDA, state and scratch live on the device; `stream` is where its
  // first values are written.
  Normalizer(StatisticRule rule, int64_t features, Device device, CUstream_st* stream);

  const StatisticRule& rule() const { return rule_; }
  int64_t features() const { return features_; }
  const Device& device() const { return device_; }
  Statistic* state() const { return state_.get(); }  // [features], on device()
  std::mutex& mutex() const { return mutex_; }       // held by whoever reads or writes the state on the CPU

  // x: [rows, features], C-contiguous, floating, on device(). False, and nothing changed, where a value on the CPU is
  // NaN or infinite. On CUDA: one launch, no host synchronisation, NaN propagates into the state. Takes the mutex.
  bool update(const void* x, DType dtype, int64_t rows, CUstream_st* stream);
  // out: [rows, features]; float64 for float64 x, float32 otherwise. Takes the mutex.
  void normalize(const void* x, DType dtype, int64_t rows, void* out, CUstream_st* stream) const;

  // Host copies of the state, [features]. On CUDA these wait for the stream.
  void read(Statistic* out, CUstream_st* stream) const;
  void write(const Statistic* in, CUstream_st* stream);

 private:
  StatisticRule rule_;
  int64_t features_;
  Device device_;
  std::shared_ptr<Statistic> state_;
  std::shared_ptr<void> scratch_;  // CUDA: partial results of the reduction, and its tickets
  mutable std::mutex mutex_;
};

}  // namespace urlfast
