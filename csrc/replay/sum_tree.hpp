// A sum tree of fixed-point weights: 16 children to a node, each level contiguous. Sums are exact uint64, so totals
// never drift, do not depend on the order of updates, and equal leaves give equal draws on every device.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/random.hpp"

namespace urlfast {

constexpr int kTreeFanoutLog2 = 4;  // two cache lines of children: five levels for a million leaves
constexpr int kTreeMaxLevels = 10;

struct SumTree {
  uint64_t* nodes = nullptr;  // 0 at first; memory of `size()` items, aligned to 128 bytes, owned by the caller
  int levels = 0;             // level 0 holds the leaves, level levels-1 the root alone
  int64_t leaves = 0;
  int64_t offset[kTreeMaxLevels + 1] = {};

  explicit SumTree(int64_t number_of_leaves) : leaves(number_of_leaves) {
    for (int64_t n = leaves;; n = ((n - 1) >> kTreeFanoutLog2) + 1) {
      offset[levels + 1] = offset[levels] + ((n + 15) & ~int64_t(15));
      ++levels;
      if (n == 1) break;
    }
  }
  SumTree() = default;

  int64_t size() const { return offset[levels]; }
  URLFAST_HD uint64_t total() const { return nodes[offset[levels - 1]]; }
  URLFAST_HD uint64_t leaf(int64_t i) const { return nodes[i]; }

  // A walk from the root to the leaf in whose interval `rest` < total() falls, intervals laid end to end in the order
  // of the leaves: a node, and where in its interval.
  struct Walk {
    uint64_t rest;
    int64_t node = 0;
  };
  URLFAST_HD const uint64_t* children(int level, int64_t node) const {
    return nodes + offset[level] + (node << kTreeFanoutLog2);
  }
  // To the child at `level`, from the node above.
  URLFAST_HD void descend(Walk& walk, int level) const {
    const uint64_t* child = children(level, walk.node);
    uint64_t sum = 0, before = 0;
    int64_t j = 0;
    const auto pass = [&](uint64_t more, int64_t n) {  // no branch to mispredict, so that several draws overlap
      sum += more;
      const uint64_t past = -uint64_t(sum <= walk.rest);  // all bits or none
      before += more & past;
      j += n & int64_t(past);
    };
    // By fours, then one by one: the last is where what is left must fall.
    for (int k = 0; k < 12; k += 4) pass((child[k] + child[k + 1]) + (child[k + 2] + child[k + 3]), 4);
    sum = before;
    const uint64_t* four = child + j;
    for (int k = 0; k < 3; ++k) pass(four[k], 1);
    walk.rest -= before;
    walk.node = (walk.node << kTreeFanoutLog2) + j;
  }

  // One thread at a time; a device adds `value - leaf(i)` with atomics along the same path.
  void set(int64_t i, uint64_t value) {
    const uint64_t delta = value - nodes[i];  // modulo 2^64: a decrease adds its complement
    if (delta == 0) return;
    for (int level = 0; level < levels; ++level, i >>= kTreeFanoutLog2) nodes[offset[level] + i] += delta;
  }
};

// Weights are multiples of 2^-24. The largest one leaves room for every leaf to have it.
URLFAST_HD static inline uint64_t tree_weight(double weight, int64_t leaves) {
  const double scaled = weight * 0x1p24 + 0.5;
  const uint64_t most = (uint64_t(1) << 63) / uint64_t(leaves);
  if (!(scaled >= 1.0)) return 1;  // what was once added stays reachable
  return scaled >= double(most) ? most : uint64_t(scaled);
}

// Uniform in [0, total): the upper half of the 128-bit product, whose bias is below total / 2^64.
URLFAST_HD static inline uint64_t tree_draw(Philox rng, uint64_t position, uint64_t total) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(philox_u64(rng, position), total);
#else
  return uint64_t((static_cast<unsigned __int128>(philox_u64(rng, position)) * total) >> 64);
#endif
}

}  // namespace urlfast
