// Latent dynamics of PALM, section 4.1, and the EMA of parameters. No Python, torch or CUDA header reaches this file.
#pragma once
#include <memory>
#include <mutex>

#include "common/hd.hpp"
#include "common/tensor.hpp"

struct CUstream_st;  // what cudaStream_t points to

namespace urlfast {

struct LatentParams {
  float alpha, beta;  // weight of the action; weight of the past
};

URLFAST_HD static inline float latent_step(float z, float action, float noise, bool first, LatentParams p) {
  const float mixed = p.alpha * action + (1.f - p.alpha) * noise;  // T_com
  return first ? mixed : p.beta * z + (1.f - p.beta) * mixed;      // T_ema
}

// What is drawn for row r of the process: Philox stream 4 * r + purpose. Position p of noise and action is one of the
// num_envs * ceil(latent_dim / 4) groups of four values, row-major; that of a class is its environment.
enum LatentDraw : uint64_t { kDrawNoise = 0, kDrawAction = 1, kDrawClass = 2 };

// [0, classes): the bias is below classes / 2^32.
URLFAST_HD static inline int64_t latent_class(uint32_t bits, uint32_t classes) {
  return int64_t(uint64_t(bits) * classes >> 32);
}

// All environments open and close their episodes together, so that one clock serves them.
struct LatentClock {
  uint64_t rows = 0;    // drawn since the seed: no two rows share their draws
  int64_t t = 0;        // of the row shown
  uint32_t ticket = 0;  // CUDA: blocks that are done
};

struct LatentShape {
  int64_t num_envs, dim;
  uint32_t classes;
  int64_t episode_length;  // steps: rows 0..episode_length, and the last has no step
};

class Latent {
 public:
  Latent(LatentShape shape, LatentParams params, uint64_t seed, Device device);

  const LatentShape& shape() const { return shape_; }
  const LatentParams& params() const { return params_; }
  const Device& device() const { return device_; }
  uint64_t seed() const { return seed_; }

  // Device memory, rewritten in place by each advance.
  std::shared_ptr<float> z;          // [num_envs, dim]
  std::shared_ptr<int64_t> classes;  // [num_envs]
  std::shared_ptr<bool> is_first, is_last;

  // One row for every environment: the first of a new episode with `reset` or after an episode's last, else the next.
  // actions: float32 [num_envs, dim] on device(), not read by a first row, which draws a uniform one. One launch on
  // CUDA, no host synchronisation.
  void advance(const float* actions, bool reset, CUstream_st* stream);

  // Host copies; these wait for the device.
  void read(LatentClock* clock, float* z_out, int64_t* classes_out) const;
  void write(const LatentClock& clock, const float* z_in, const int64_t* classes_in);

 private:
  LatentShape shape_;
  LatentParams params_;
  uint64_t seed_;
  Device device_;
  std::shared_ptr<LatentClock> clock_;  // on device()
  mutable std::mutex mutex_;
};

// One parameter tensor and its average: `size` items each, in one block of memory.
struct EmaPair {
  void* target;
  const void* source;
  int64_t size;
  DType dtype;
};
// target += tau * (source - target) for all pairs, in one parallel pass over them all, or as few launches as their
// table takes. float16 and bfloat16 compute in float32, float64 in float64. Targets must not overlap.
void ema_update_cpu(const EmaPair* pairs, int64_t count, double tau);

// latent_cuda.cu
void latent_advance_cuda(const Latent& latent, LatentClock* clock, const float* actions, bool reset,
                         CUstream_st* stream);
void ema_update_cuda(const EmaPair* pairs, int64_t count, double tau, int device, CUstream_st* stream);

}  // namespace urlfast
