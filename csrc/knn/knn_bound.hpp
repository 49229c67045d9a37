// Two passes for many features: a cheap one on rounded points, which tells what cannot be among the nearest, then the
// exact one on what is left. Here is why nothing is lost.
//
// All points of a problem are moved by a common centre m and rounded: t = fl(x - m), x' = bfloat16(t). Of each the pass
// knows  norm = fl(|x'|^2)  and  residual >= |(x - m) - x'|.  Distances do not change with m, so by the triangle
// inequality the distance d of two points lies within the sum of their residuals of |x' - y'|, and that is known from
// p = fl(x'.y'), which a matrix product gives:
//
//   | |x' - y'|^2 - (norm(x) + norm(y) - 2 p) |  <=  slack (norm(x) + norm(y)) + tiny,
//   slack = 9/8 (dim + 64) 2^-22
//
// Products of two bfloat16 are exact in float32. A sum of dim of them loses at most 2^-22 of the sum of their sizes at
// each, which is at most (norm(x) + norm(y)) / 2 in all; tensor cores, which align 16 products and the sum so far to
// the largest and cut them off at 24 bits, lose at most 18 * 2^-23 of it at each 16. The rest of `slack` is for the
// norms, which are sums of positive terms, and for the few operations around; `tiny` for what flushing denormals loses.
//
// The exact pass rounds too: the root of its sum lies within `wobble` = (dim + 64) 2^-23 of d, relatively. Hence
//   upper = (sqrt(norm(x) + norm(y) - 2 p + slack (...)) + residual(x) + residual(y)) (1 + wobble)
// is no less than what the exact pass will find. With T the k-th least upper of x, k neighbours are at most T away, and
// y can be left out where
//   norm(x) + norm(y) - 2 p - slack (...)  >  (T (1 + 2 wobble) + residual(x) + residual(y))^2.
// Any T that k different points stay below will do. What is not a number is never left out.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/hd.hpp"

namespace urlfast {

constexpr int64_t kBoundMostDim = int64_t(1) << 17;  // sums of more terms would need more slack
constexpr float kBoundTiny = 0x1p-100f;              // of squares

struct KnnPoint {
  float norm, residual;
};

// From the sums of x'^2 and of (t - x')^2. The latter's differences are exact. t itself is rounded, and so are the
// sums.
URLFAST_HD static inline KnnPoint knn_point(float norm, float lost) {
  return {norm, sqrtf(lost) * (1 + 0x1p-9f) + sqrtf(norm) * 0x1p-22f + 0x1p-60f};
}
URLFAST_HD static inline float knn_slack(int64_t dim) { return float(dim + 64) * 0x1.2p-22f; }
URLFAST_HD static inline float knn_wobble(int64_t dim) { return float(dim + 64) * 0x1p-23f; }

// No less than the exact pass's distance; `square`: norm(x) + norm(y) - 2 p + slack (norm(x) + norm(y)).
URLFAST_HD static inline float knn_upper(float square, float residuals, float wobble) {
  square += kBoundTiny;
  const float root = square > 0 ? sqrtf(square) : square <= 0 ? 0.f : INFINITY;  // NaN knows nothing
  return (root + residuals) * (1 + wobble);
}
// Of x, from T and its residual: what knn_beyond compares with.
URLFAST_HD static inline float knn_limit(float upper, float residual, float wobble) {
  return upper * (1 + 2 * wobble) + residual;
}
// True where y is not among the nearest of x; `square`: norm(x) + norm(y) - 2 p - slack (norm(x) + norm(y)).
URLFAST_HD static inline bool knn_beyond(float square, float limit, float residual) {
  const float reach = limit + residual;
  return square - kBoundTiny > reach * reach;
}

}  // namespace urlfast
