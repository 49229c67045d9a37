// Compiled once per instruction set: static functions and raw pointers only.
#include "normalizer/normalizer_isa.hpp"
#include "common/half.hpp"

namespace urlfast::URLFAST_ISA_NAMESPACE {
namespace {

// Values are summed in blocks, which merge. A block's deviations are taken from its first value: no further from the
// mean than the block's own spread, so that what cancels when they are moved there is a block's length of roundings at
// most.
constexpr int64_t kBlock = 2048;
constexpr int64_t kLanes = 8;

typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));

static inline Doubles load(const float* x) {
  Floats f;
  memcpy(&f, x, sizeof f);
  return __builtin_convertvector(f, Doubles);
}
static inline Doubles load(const double* x) {
  Doubles d;
  memcpy(&d, x, sizeof d);
  return d;
}
static inline void store(float* to, Doubles x) {
  const Floats f = __builtin_convertvector(x, Floats);
  memcpy(to, &f, sizeof f);
}
static inline void store(double* to, Doubles x) { memcpy(to, &x, sizeof x); }

static inline double sum(Doubles x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

// sum over i of term(x[i]); four accumulators hide the latency of the additions.
template <class T, class Term>
static inline double sum_of(const T* x, int64_t n, Term term) {
  Doubles sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) sums[j] += term(load(x + i + j * kLanes));
  for (; i + kLanes <= n; i += kLanes) sums[0] += term(load(x + i));
  double total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += term(Doubles{double(x[i])})[0];
  return total;
}

// mean and m2 of a block.
template <class T>
static inline void spread(const T* x, int64_t n, Statistic* s) {
  const double centre = double(x[0]);
  Doubles sums[4] = {}, squares[4] = {};
  const auto add = [&](int j, const T* from) {
    const Doubles v = load(from) - centre;
    sums[j] += v, squares[j] += v * v;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) add(j, x + i + j * kLanes);
  for (; i + kLanes <= n; i += kLanes) add(0, x + i);
  double total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  double square = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < n; ++i) {
    const double v = double(x[i]) - centre;
    total += v, square += v * v;
  }
  const double mean = total / double(n), m2 = square - total * mean;
  s->mean = centre + mean;
  s->m2 = m2 < 0 ? 0 : m2;
}

template <class T>
static inline Statistic block_moments(const T* x, int64_t n, MomentsOf what) {
  Statistic s;
  s.count = double(n);
  if (what == MomentsOf::magnitude) {
    s.mean = sum_of(x, n, [](Doubles v) { return v < 0 ? -v : v; }) / double(n);
    return s;
  }
  const auto itself = [](Doubles v) { return v; };
  if (what == MomentsOf::mean) {
    s.mean = sum_of(x, n, itself) / double(n);
    return s;
  }
  spread(x, n, &s);
  return s;
}

// The block in a type that is computed with: halves go through a buffer, the others stay where they are.
static inline const float* widen(const float* x, int64_t, float*) { return x; }
static inline const double* widen(const double* x, int64_t, float*) { return x; }
template <class T>
static inline const float* widen(const T* x, int64_t n, float* buffer) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(x[i]);
  return buffer;
}

template <class T>
static Statistic moments(const T* x, int64_t n, MomentsOf what) {
  float buffer[sizeof(T) == 2 ? kBlock : 1];
  Statistic total;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    total = statistic_merge(total, block_moments(widen(x + i, m, buffer), m, what));
  }
  return total;
}

// 64 rows of up to 256 columns are a block; merging, with its division, is rare enough not to be seen.
constexpr int64_t kRows = 64, kColumns = 256;

template <class T>
static void column_moments(const T* x, int64_t rows, int64_t features, MomentsOf what, Statistic* out) {
  double mean[kColumns], m2[kColumns];
  float buffer[kColumns];
  for (int64_t f0 = 0; f0 < features; f0 += kColumns) {
    const int64_t width = features - f0 < kColumns ? features - f0 : kColumns;
    for (int64_t f = 0; f < width; ++f) out[f0 + f] = Statistic();
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const int64_t height = rows - r0 < kRows ? rows - r0 : kRows;
      for (int64_t f = 0; f < width; ++f) mean[f] = m2[f] = 0;
      for (int64_t r = 0; r < height; ++r) {
        const auto* row = widen(x + (r0 + r) * features + f0, width, buffer);
        if (what == MomentsOf::magnitude)
          for (int64_t f = 0; f < width; ++f) mean[f] += row[f] < 0 ? -double(row[f]) : double(row[f]);
        else
          for (int64_t f = 0; f < width; ++f) mean[f] += double(row[f]);
      }
      for (int64_t f = 0; f < width; ++f) mean[f] /= double(height);
      if (what == MomentsOf::mean_and_m2)
        for (int64_t r = 0; r < height; ++r) {
          const auto* row = widen(x + (r0 + r) * features + f0, width, buffer);
          for (int64_t f = 0; f < width; ++f) {
            const double d = double(row[f]) - mean[f];
            m2[f] += d * d;
          }
        }
      for (int64_t f = 0; f < width; ++f) {
        Statistic block;
        block.count = double(height), block.mean = mean[f], block.m2 = m2[f];
        out[f0 + f] = statistic_merge(out[f0 + f], block);
      }
    }
  }
}

// `out` is as wide as what is computed with: it can be written block by block even where it is x itself.
template <class T, class Out>
static void scale(const T* x, int64_t n, Out* out, double inverse, double clip) {
  float buffer[sizeof(T) == 2 ? kBlock : 1];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t m = n - start < kBlock ? n - start : kBlock;
    const auto* from = widen(x + start, m, buffer);
    Out* to = out + start;
    int64_t i = 0;
    if (clip < 0)
      for (; i + kLanes <= m; i += kLanes) store(to + i, load(from + i) * inverse);
    else
      for (; i + kLanes <= m; i += kLanes) {
        const Doubles y = load(from + i) * inverse - clip;
        store(to + i, y < 0 ? Doubles{} : y);
      }
    for (; i < m; ++i) to[i] = Out(statistic_normalize(double(from[i]), inverse, clip));
  }
}

template <class T, class Out>
static void scale_columns(const T* x, int64_t rows, int64_t features, Out* out, const double* inverses, double clip) {
  float buffer[kColumns];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t f0 = 0; f0 < features; f0 += kColumns) {
      const int64_t width = features - f0 < kColumns ? features - f0 : kColumns;
      const auto* from = widen(x + r * features + f0, width, buffer);
      Out* to = out + r * features + f0;
      for (int64_t f = 0; f < width; ++f) to[f] = Out(statistic_normalize(double(from[f]), inverses[f0 + f], clip));
    }
}

template <class Body>
static inline void with_type(const void* x, DType dtype, Body body) {
  if (dtype == DType::f32)
    body(static_cast<const float*>(x), static_cast<float*>(nullptr));
  else if (dtype == DType::f64)
    body(static_cast<const double*>(x), static_cast<double*>(nullptr));
  else if (dtype == DType::f16)
    body(static_cast<const Half*>(x), static_cast<float*>(nullptr));
  else
    body(static_cast<const BFloat16*>(x), static_cast<float*>(nullptr));
}

Statistic moments_any(const void* x, DType dtype, int64_t n, MomentsOf what) {
  Statistic out;
  with_type(x, dtype, [&](auto* typed, auto*) { out = moments(typed, n, what); });
  return out;
}
void column_moments_any(const void* x, DType dtype, int64_t rows, int64_t features, MomentsOf what, Statistic* out) {
  with_type(x, dtype, [&](auto* typed, auto*) { column_moments(typed, rows, features, what, out); });
}
void scale_any(const void* x, DType dtype, int64_t n, void* out, double inverse, double clip) {
  with_type(x, dtype, [&](auto* typed, auto* of) { scale(typed, n, static_cast<decltype(of)>(out), inverse, clip); });
}
void scale_columns_any(const void* x, DType dtype, int64_t rows, int64_t features, void* out, const double* inverses,
                       double clip) {
  with_type(x, dtype, [&](auto* typed, auto* of) {
    scale_columns(typed, rows, features, static_cast<decltype(of)>(out), inverses, clip);
  });
}

}  // namespace

extern const NormalizerKernels normalizer_kernels = {moments_any, column_moments_any, scale_any, scale_columns_any};

}  // namespace urlfast::URLFAST_ISA_NAMESPACE
