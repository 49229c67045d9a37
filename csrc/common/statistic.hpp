// The running statistic that rewards and distances are divided by: its state, its update, its scale. One formula for
// CPU and CUDA, for RunningNormalizer and for knn_reward.
//
// A statistic over F features is F of these structs in a row, float64, on the device of its data. It holds the values
// seen and nothing else: URLB's prior (mean 0, variance 1, weight 1e-4) enters when the scale is read, which gives the
// same numbers as URLB's sequential update and keeps merging exact.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/hd.hpp"

namespace urlfast {

enum class StatisticMode : int { mean = 0, std = 1, var = 2, ema_abs = 3 };

struct StatisticRule {
  StatisticMode mode = StatisticMode::mean;
  double epsilon = 1e-8;   // keeps the scale off zero
  double clip = -1;        // taken off after dividing, floored at 0; negative: neither
  double momentum = 0.99;  // ema_abs: weight of the past
};

// Of the values seen, or of one batch of them. ema_abs uses `mean` alone: of a batch, mean |x|; of the state, the
// running magnitude, 1 at first.
struct Statistic {
  double count = 0, mean = 0, m2 = 0;  // m2: sum of squared deviations from the mean
};

URLFAST_HD static inline Statistic statistic_start(StatisticMode mode) {
  Statistic s;
  s.mean = mode == StatisticMode::ema_abs ? 1. : 0.;
  return s;
}

// Of a and b together (Chan, Golub, LeVeque 1979).
URLFAST_HD static inline Statistic statistic_merge(Statistic a, Statistic b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const double n = a.count + b.count, delta = b.mean - a.mean, part = b.count / n;
  Statistic s;
  s.count = n;
  s.mean = a.mean + delta * part;
  s.m2 = a.m2 + b.m2 + delta * delta * a.count * part;
  return s;
}

// The state after a batch.
URLFAST_HD static inline Statistic statistic_update(Statistic state, Statistic batch, StatisticRule rule) {
  if (rule.mode != StatisticMode::ema_abs) {
    state = statistic_merge(state, batch);
    if (rule.mode == StatisticMode::mean) state.m2 = 0;  // batches come without theirs
    return state;
  }
  if (batch.count == 0) return state;
  state.count += batch.count;
  state.mean = rule.momentum * state.mean + (1 - rule.momentum) * batch.mean;
  return state;
}

// What values are divided by: 1 before any was seen. A negative mean divides by its size: dividing never turns a sign.
URLFAST_HD static inline double statistic_scale(Statistic s, StatisticRule rule) {
  if (s.count == 0) return 1;
  if (rule.mode == StatisticMode::ema_abs) return s.mean + rule.epsilon;
  Statistic prior;
  prior.count = 1e-4, prior.mean = 0, prior.m2 = 1e-4;  // URLB's RMS: M = 0, S = 1, n = 1e-4
  s = statistic_merge(prior, s);
  if (rule.mode == StatisticMode::mean) return fabs(s.mean) + rule.epsilon;
  const double variance = s.m2 / s.count;
  return rule.mode == StatisticMode::var ? variance + rule.epsilon : sqrt(variance + rule.epsilon);
}

// One value; inverse = 1 / statistic_scale. Double throughout: the scale of a variance may lie outside float's range.
URLFAST_HD static inline double statistic_normalize(double x, double inverse, double clip) {
  const double y = x * inverse;
  if (clip < 0) return y;
  return y - clip < 0 ? 0. : y - clip;  // written so that NaN stays NaN
}

}  // namespace urlfast
