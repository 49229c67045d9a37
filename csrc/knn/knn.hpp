// Nearest neighbours, exact, and the particle-entropy reward. No Python, torch or CUDA header reaches this file.
//
// S problems of B queries each: every row of queries[s] against keys[s], or against queries[s] itself. Euclidean,
// ascending, ties to the lowest index; float32 arithmetic for float16, bfloat16 and float32, float64 for float64.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/hd.hpp"
#include "common/statistic.hpp"
#include "common/tensor.hpp"

struct CUstream_st;  // what cudaStream_t points to

namespace urlfast {

struct KnnProblem {
  const void* queries = nullptr;  // [problems, num_queries, dim]
  const void* keys = nullptr;     // [problems, num_keys, dim]; `queries` where `self`
  DType dtype = DType::f32;
  int64_t problems = 1, num_queries = 0, num_keys = 0, dim = 0, k = 1;
  const int64_t* lengths = nullptr;  // [problems], on the host: rows of keys in use, from the first; null: all of them
  bool self = false;
  bool include_self = true;  // false, with `self`: a row is not its own neighbour
  const char* queries_name = "queries";
  const char* keys_name = "keys";

  int64_t length(int64_t s) const { return lengths ? lengths[s] : num_keys; }
  int64_t neighbours(int64_t s) const { return k < length(s) ? k : length(s); }  // found by each query of problem s
};

// The statistic and the reward see, of each query's neighbours, all or the farthest ("kth"): the kept distances. They
// lie packed: problem after problem, query after query, knn_kept(...) each.
struct KnnReward {
  bool kth = false;
  double exponent = 1, c = 1;
};
inline int64_t knn_kept(const KnnProblem& p, const KnnReward& reward, int64_t s) {
  const int64_t n = p.neighbours(s);
  return reward.kth && n > 1 ? 1 : n;
}

URLFAST_HD static inline double knn_power(double distance, double exponent) {
  return exponent == 1 ? distance : exponent == 2 ? distance * distance : pow(distance, exponent);
}
URLFAST_HD static inline double knn_log_reward(double sum, int64_t kept, double c) {
  return log(kept > 0 ? c + sum / double(kept) : c);
}

// Throws std::invalid_argument, naming the array, where a row in use has NaN or infinity.
// distances: [problems, num_queries, k], float32 (float64 for float64), padded with infinity; indices: int64, with -1,
// or null.
void knn_cpu(const KnnProblem& p, void* distances, int64_t* indices);
// reward: [problems, num_queries], float32 (float64 for float64).
void knn_reward_cpu(const KnnProblem& p, const KnnReward& reward, void* out);
// The same in two steps, with a statistic between them: kept distances; then what they amount to after division by
// statistic_scale(state, rule).
void knn_kept_cpu(const KnnProblem& p, const KnnReward& reward, void* kept);
void knn_finish_cpu(const KnnProblem& p, const KnnReward& reward, const void* kept, Statistic state, StatisticRule rule,
                    void* out);

// The same on a device: nothing waits for it, lengths are taken before the call returns, and NaN and infinity are not
// looked for: they make the distances that they touch infinite or NaN, which come last. workspace: on the device, as
// many bytes as knn_workspace_cuda says, aligned to 256; its work on `stream` is over when the results are there.
int64_t knn_workspace_cuda(const KnnProblem& p, int device);
void knn_cuda(const KnnProblem& p, void* distances, int64_t* indices, void* workspace, int device, CUstream_st* stream);
void knn_reward_cuda(const KnnProblem& p, const KnnReward& reward, void* out, void* workspace, int device,
                     CUstream_st* stream);
void knn_kept_cuda(const KnnProblem& p, const KnnReward& reward, void* kept, void* workspace, int device,
                   CUstream_st* stream);
// state: on the device. workspace: as knn_kept_cuda left it.
void knn_finish_cuda(const KnnProblem& p, const KnnReward& reward, const void* kept, const Statistic* state,
                     StatisticRule rule, void* out, void* workspace, int device, CUstream_st* stream);

}  // namespace urlfast
