// The search's inner loops, compiled once per instruction set. Internal linkage only, no STL, no inline function of
// another header: the linker would keep one copy of it, perhaps one that this processor cannot run.
#include "knn/knn_isa.hpp"

#include "common/half.hpp"
#include "common/intrinsics.hpp"

namespace urlfast {
namespace {

// Vectors -------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// R queries x N key vectors stay in registers: as many accumulators as leave room for the keys, one query value and
// one difference.
template <class T>
struct Shape {
  static constexpr int W = kVectorBytes / int(sizeof(T));
  static constexpr int R = kVectorBytes == 64 ? (W == 16 ? 12 : 8) : (W == 8 ? 6 : W == 4 ? 4 : 2);
  static constexpr int N = kVectorBytes == 64 ? (W == 16 ? 2 : 3) : (W == 2 ? 4 : 2);
};

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes), may_alias));
  using bits = uint32_t;
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes), may_alias));
  using bits = uint64_t;
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first n of W values, and zeros.
template <class T>
inline Vector<T> load_first(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vector<T>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  else
    return (Vector<T>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#else
  Vector<T> v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

// Bit i is set where a[i] <= b[i]; never for NaN.
inline uint32_t less_equal(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps(_mm_cmple_ps((__m128)a, (__m128)b)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= uint32_t(a[i] <= b[i]) << i;
  return mask;
#endif
}
inline uint32_t less_equal(Vector<double> a, Vector<double> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_LE_OQ)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_pd(_mm_cmple_pd((__m128d)a, (__m128d)b)));
#else
  return uint32_t(a[0] <= b[0]) | uint32_t(a[1] <= b[1]) << 1;
#endif
}

template <class T, int W>
struct Zip;  // the lanes of a and b in turn: first of both lower halves, then of both upper ones
template <class T>
struct Zip<T, 16> {
  static inline void apply(Vector<T> a, Vector<T> b, Vector<T>* low, Vector<T>* high) {
    using I = typename VectorOf<T>::integer;
    *low = __builtin_shuffle(a, b, I{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
    *high = __builtin_shuffle(a, b, I{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
  }
};
template <class T>
struct Zip<T, 8> {
  static inline void apply(Vector<T> a, Vector<T> b, Vector<T>* low, Vector<T>* high) {
    using I = typename VectorOf<T>::integer;
    *low = __builtin_shuffle(a, b, I{0, 8, 1, 9, 2, 10, 3, 11});
    *high = __builtin_shuffle(a, b, I{4, 12, 5, 13, 6, 14, 7, 15});
  }
};
template <class T>
struct Zip<T, 4> {
  static inline void apply(Vector<T> a, Vector<T> b, Vector<T>* low, Vector<T>* high) {
    using I = typename VectorOf<T>::integer;
    *low = __builtin_shuffle(a, b, I{0, 4, 1, 5});
    *high = __builtin_shuffle(a, b, I{2, 6, 3, 7});
  }
};
template <class T>
struct Zip<T, 2> {
  static inline void apply(Vector<T> a, Vector<T> b, Vector<T>* low, Vector<T>* high) {
    using I = typename VectorOf<T>::integer;
    *low = __builtin_shuffle(a, b, I{0, 2});
    *high = __builtin_shuffle(a, b, I{1, 3});
  }
};

// W vectors become the W columns of what they were: zipping row i with row i + W/2, log2(W) times over.
template <class T>
inline void transpose_tile(Vector<T>* rows) {
  constexpr int W = Shape<T>::W;
  Vector<T> other[W];
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) Zip<T, W>::apply(rows[i], rows[i + W / 2], &other[2 * i], &other[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = other[i];
  }
}

// Numbers -------------------------------------------------------------------------------------------------------------

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(Half x) { return to_float(x); }
inline float widen(BFloat16 x) { return to_float(x); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

template <class T, class Item>
inline Vector<T> load_widened(const Item* p) {
  constexpr int W = Shape<T>::W;
  T lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = widen(p[i]);
  return load<T>(lanes);
}
template <>
inline Vector<float> load_widened<float, float>(const float* p) {
  return load<float>(p);
}
template <>
inline Vector<double> load_widened<double, double>(const double* p) {
  return load<double>(p);
}

template <class Bits>
inline Bits largest_bits(const void* data, int64_t count) {
  const Bits* items = static_cast<const Bits*>(data);
  constexpr Bits kMagnitude = Bits(~Bits(0)) >> 1;
  Bits most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = items[i] & kMagnitude;
    most = most < magnitude ? magnitude : most;
  }
  return most;
}
template <class T>
double largest(const void* data, DType dtype, int64_t count) {
  constexpr double kInfinity = __builtin_inf();
  if (dtype == DType::f64) {
    const uint64_t most = largest_bits<uint64_t>(data, count);
    return most >= 0x7ffull << 52 ? kInfinity : bits_as<double>(most);
  }
  if (dtype == DType::f32) {
    const uint32_t most = largest_bits<uint32_t>(data, count);
    return most >= 0xffu << 23 ? kInfinity : double(bits_as<float>(most));
  }
  const uint16_t most = largest_bits<uint16_t>(data, count);
  if (dtype == DType::f16) return most >= 0x7c00 ? kInfinity : double(widen(Half{most}));
  return most >= 0x7f80 ? kInfinity : double(widen(BFloat16{most}));
}

// Packing -------------------------------------------------------------------------------------------------------------

template <class T, class Item>
void pack_items(const Item* data, int64_t rows, int64_t dim, int group, T scale, T* out) {
  constexpr int W = Shape<T>::W;
  for (int64_t first = 0; first < rows; first += group, out += dim * W) {
    const int have = int(rows - first < group ? rows - first : group);
    const Item* base = data + first * dim;
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
      Vector<T> tile[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) tile[i] = i < have ? load_widened<T>(base + i * dim + d) * scale : Vector<T>{};
      transpose_tile<T>(tile);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + (d + i) * W, tile[i]);
    }
    for (; d < dim; ++d)
      for (int i = 0; i < W; ++i) out[d * W + i] = i < have ? T(widen(base[i * dim + d])) * scale : T(0);
  }
}

void pack_float(const void* data, DType dtype, int64_t rows, int64_t dim, int group, float scale, float* out) {
  if (dtype == DType::f32)
    pack_items<float>(static_cast<const float*>(data), rows, dim, group, scale, out);
  else if (dtype == DType::f16)
    pack_items<float>(static_cast<const Half*>(data), rows, dim, group, scale, out);
  else
    pack_items<float>(static_cast<const BFloat16*>(data), rows, dim, group, scale, out);
}
void pack_double(const void* data, DType, int64_t rows, int64_t dim, int group, double scale, double* out) {
  pack_items<double>(static_cast<const double*>(data), rows, dim, group, scale, out);
}

template <class T>
void widen_all(const void* data, DType dtype, int64_t count, T scale, T* out) {
  const auto all = [&](auto* items) {
    for (int64_t i = 0; i < count; ++i) out[i] = T(widen(items[i])) * scale;
  };
  if (dtype == DType::f16) return all(static_cast<const Half*>(data));
  if (dtype == DType::bf16) return all(static_cast<const BFloat16*>(data));
  all(static_cast<const T*>(data));
}

template <class T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int W = Shape<T>::W;
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < columns; j += W) {
      Vector<T> tile[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) tile[r] = load(from + (i + r) * from_stride + j);
      transpose_tile<T>(tile);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) store(to + (j + r) * to_stride + i, tile[r]);
    }
}

// Distances -----------------------------------------------------------------------------------------------------------

// R queries x N key vectors over `depth` features, added to what `out` has unless they are the first.
template <class T, int R, int N>
void tile(const T* queries, const T* keys, int64_t keys_stride, int64_t depth, bool first, T* out, int64_t stride) {
  constexpr int W = Shape<T>::W;
  Vector<T> sum[R][N] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector<T> key[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) key[n] = load(keys + n * keys_stride + d * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Vector<T> difference = key[n] - queries[d * W + r];
        sum[r][n] += difference * difference;
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T* to = out + r * stride + n * W;
      store(to, first ? sum[r][n] : load(to) + sum[r][n]);
    }
  }
}

template <class T, int N>
void tile_rows(int64_t rows, const T* queries, const T* keys, int64_t keys_stride, int64_t depth, bool first, T* out,
               int64_t stride) {
  constexpr int R = Shape<T>::R;
  if (rows >= R) return tile<T, R, N>(queries, keys, keys_stride, depth, first, out, stride);
  if constexpr (R > 8)
    if (rows > 8) return tile<T, R, N>(queries, keys, keys_stride, depth, first, out, stride);
  if constexpr (R > 4)
    if (rows > 4) return tile<T, (R < 8 ? R : 8), N>(queries, keys, keys_stride, depth, first, out, stride);
  if constexpr (R > 2)
    if (rows > 2) return tile<T, 4, N>(queries, keys, keys_stride, depth, first, out, stride);
  if (rows == 2) return tile<T, 2, N>(queries, keys, keys_stride, depth, first, out, stride);
  tile<T, 1, N>(queries, keys, keys_stride, depth, first, out, stride);
}

constexpr int64_t kDepth = 256;  // features at a time: N groups of keys stay in the first cache over all queries

template <class T>
void distances(const T* queries, int64_t rows, const T* keys, int64_t columns, int64_t dim, T* out, int64_t stride) {
  constexpr int W = Shape<T>::W, R = Shape<T>::R, N = Shape<T>::N;
  const int64_t groups = (columns + W - 1) / W, group_size = dim * W;
  for (int64_t d = 0; d < dim; d += kDepth) {
    const int64_t depth = dim - d < kDepth ? dim - d : kDepth;
    int64_t g = 0;
    for (; g + N <= groups; g += N)
      for (int64_t i = 0; i < rows; i += R)
        tile_rows<T, N>(rows - i, queries + i / R * group_size + d * W, keys + g * group_size + d * W, group_size,
                        depth, d == 0, out + i * stride + g * W, stride);
    for (; g < groups; ++g)
      for (int64_t i = 0; i < rows; i += R)
        tile_rows<T, 1>(rows - i, queries + i / R * group_size + d * W, keys + g * group_size + d * W, group_size,
                        depth, d == 0, out + i * stride + g * W, stride);
  }
}

// Rows as they lie: a pair's products are summed along the features, lane by lane, and W pairs' sums become one vector.
// A pair's distance is the same bits in either tile, so that it may be computed again alone.
template <class T>
struct RowTile {
  static constexpr int W = Shape<T>::W, N = W == 16 ? 4 : W == 2 ? 1 : 2, R = W / N;
};
constexpr int64_t kRowDepth = 1024;  // features at a time: a tile's queries stay in the first cache over all keys

// Vector i of the result's W lanes is the sum of sums[i].
template <class T>
inline Vector<T> sum_each(Vector<T>* sums) {
#pragma GCC unroll 4
  for (int n = Shape<T>::W / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      Vector<T> low, high;
      Zip<T, Shape<T>::W>::apply(sums[i], sums[i + n], &low, &high);
      sums[i] = low + high;
    }
  return sums[0];
}

// R queries x N keys, features d .. end.
template <class T, int R, int N>
inline void row_tile(const T* const* queries, const T* const* keys, int64_t d, int64_t end, Vector<T>* sum) {
  constexpr int W = Shape<T>::W;
#pragma GCC unroll 16
  for (int i = 0; i < R * N; ++i) sum[i] = Vector<T>{};
  const auto add = [&](auto&& at) {
    Vector<T> query[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) query[r] = at(queries[r]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Vector<T> key = at(keys[n]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vector<T> difference = key - query[r];
        sum[r * N + n] += difference * difference;
      }
    }
  };
  // the odd ones first: the sums then stay in registers
  if (const int odd = int((end - d) % W)) add([d, odd](const T* row) { return load_first(row + d, odd); }), d += odd;
  for (; d < end; d += W) add([d](const T* row) { return load(row + d); });
}

template <class T>
inline const T* row_at(KnnRows<T> rows, int64_t dim, int64_t i) {
  return rows.pointers ? rows.pointers[i] : rows.first + i * dim;
}

// As many tiles of R queries, from i on, x N keys, from j on, as fill a vector with their sums.
template <class T, int R, int N>
void row_tiles(KnnRows<T> queries, int64_t i, KnnRows<T> keys, int64_t j, int64_t columns, int64_t dim, int64_t d,
               int64_t end, T* out, int64_t stride) {
  constexpr int W = Shape<T>::W, kTiles = W / (R * N);
  static_assert(R == 1 || kTiles == 1, "several tiles are of one query");
  const T* query[R];
  for (int r = 0; r < R; ++r) query[r] = row_at(queries, dim, i + r);
  for (; j < columns; j += kTiles * N) {
    const T* key[kTiles * N];
    for (int n = 0; n < kTiles * N; ++n) key[n] = row_at(keys, dim, j + n < columns ? j + n : j);
    Vector<T> sums[W];
#pragma GCC unroll 8
    for (int t = 0; t < kTiles; ++t) row_tile<T, R, N>(query, key + t * N, d, end, sums + t * N);
    const Vector<T> sum = sum_each<T>(sums);
    if constexpr (R == 1) {
      store(out + j, d == 0 ? sum : load(out + j) + sum);
    } else {
      T lanes[R][N];
      store(lanes[0], sum);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
          T* to = out + r * stride + j + n;
          *to = d == 0 ? lanes[r][n] : *to + lanes[r][n];
        }
    }
  }
}

// One query, and keys of V vectors each: read in order, and asked for some two kilobytes ahead, their page some sixteen
// ahead, which is what it takes to read at the memory's speed. As many keys as fill vectors; how many they were.
constexpr int64_t kPagesAhead = 16384;  // bytes
template <class T, int V>
int64_t short_rows(const T* query, const T* keys, int64_t columns, T* out) {
  constexpr int W = Shape<T>::W;
  const volatile T zero = 0;  // known to the compiler, it could add the products in another order than row_tile does
  const Vector<T> start = Vector<T>{} + zero;
  Vector<T> asked[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) asked[v] = load(query + v * W);
  int64_t j = 0;
  for (; j + W <= columns; j += W, keys += W * V * W) {
    const T* ahead = keys + W * V * W;  // where the keys after these lie, if there are any: a prefetch never faults
    __builtin_prefetch(keys + kPagesAhead / int64_t(sizeof(T)), 0, 2);
    Vector<T> sums[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      sums[i] = start;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int at = (i * V + v) * W;
        if (v * kVectorBytes % 64 == 0) __builtin_prefetch(ahead + at, 0, 2);
        const Vector<T> difference = load(keys + at) - asked[v];
        sums[i] += difference * difference;
      }
      asm volatile("" ::: "memory");  // prefetches stay among the loads: all of them at once would hold these up
    }
    store(out + j, sum_each<T>(sums));
  }
  return j;
}

template <class T>
void row_distances(KnnRows<T> queries, int64_t rows, KnnRows<T> keys, int64_t columns, int64_t dim, T* out,
                   int64_t stride) {
  constexpr int W = Shape<T>::W, R = RowTile<T>::R, N = RowTile<T>::N;
  for (int64_t d = 0; d < dim; d += kRowDepth) {
    const int64_t end = dim - d < kRowDepth ? dim : d + kRowDepth;
    int64_t i = 0;
    for (; i + R <= rows; i += R)
      row_tiles<T, R, N>(queries, i, keys, 0, columns, dim, d, end, out + i * stride, stride);
    for (; i < rows; ++i) {
      int64_t j = 0;
      if (!keys.pointers && dim == 2 * W)
        j = short_rows<T, 2>(row_at(queries, dim, i), keys.first, columns, out + i * stride);
      if (!keys.pointers && dim == 4 * W)
        j = short_rows<T, 4>(row_at(queries, dim, i), keys.first, columns, out + i * stride);
      row_tiles<T, 1, (W < 4 ? 2 : 4)>(queries, i, keys, j, columns, dim, d, end, out + i * stride, stride);
    }
  }
}

// First pass ----------------------------------------------------------------------------------------------------------
//
// A row x stands for x' = centre + step * b, with whole b in -127 .. 127, and e(x) >= |x - x'|. With one step for all,
// |q' - k'|^2 = step^2 * (|b_q|^2 + |b_k|^2 - 2 b_q . b_k) is a whole number times step^2, and 32 bits hold it: nothing
// rounds and nothing cancels. By the triangle inequality | |q - k| - |q' - k'| | <= e(q) + e(k).
//
// e is computed: with u = 2^-24, r = fl(x - centre) and t = fl(r - step * b), of one rounding each,
// |x - x'| <= |t| (1 + u) + 2u |r|, and |r| <= |t| + step * |b|; sums of at most 16384 squares, lane by lane, are
// within (16384 / 16 + 6) u < 2^-13, and what underflows is less than 2^-67 in all. Values are at most 2^50 wherever
// this is used (knn_cpu.cpp). The root, with its conversion and products, is within 2^-13 of |q' - k'|, so that a * (1
// - 2^-12) - e(q) - e(k) is below the distance, also when rounded.
//
// That takes all of both errors to lie along q - k. Of many features a second bound is closer: with q and k from the
// centre, n(x) = |x'| and g(x) = |x|^2 - n(x)^2,
//   |q - k|^2 = |q' - k'|^2 + g(q) + g(k) - 2 (q . k - q' . k')  and  q . k - q' . k' <= n(q) e(k) + e(q) (n(k) +
//   e(k)).
// g is taken 2^-12 |x|^2 + 2^-20 n(x)^2 lower, the square 2^-18 of it, the product 2^-16 of it larger: each more than
// what rounding can do to them, or to their sum. What is infinite on the way becomes NaN or negative, and says nothing.

#if defined(__AVX512VNNI__)
inline Vector<float> root(Vector<float> x) { return (Vector<float>)_mm512_sqrt_ps((__m512)x); }

void quantise(const float* rows, int64_t count, int64_t dim, const float* centre, float step, bool queries,
              KnnBytes out) {
  constexpr int G = kKnnBytesGroup;
  using Floats = Vector<float>;
  const Floats inverse = Floats{} + 1 / step, most = Floats{} + 127;
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i offset = _mm512_set1_epi8(queries ? 0 : -128);  // keys are unsigned in the product below
  for (int64_t first = 0; first < count; first += G) {
    Floats missed[G] = {}, square[G] = {}, sum[G] = {}, whole[G] = {};
    for (int64_t d = 0; d < dim; d += kKnnBytesDim, out.values += G * kKnnBytesDim) {
      Floats bytes[G];
      for (int i = 0; i < G; ++i) {
        const float* row = rows + (first + i < count ? first + i : first) * dim;
        __m512i part[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const int64_t at = d + v * 16, have = dim - at;
          const Floats x = have >= 16  ? load(row + at) - load(centre + at)
                           : have <= 0 ? Floats{}
                                       : load_first(row + at, int(have)) - load_first(centre + at, int(have));
          Floats b = (Floats)_mm512_roundscale_ps((__m512)(x * inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
          b = (Floats)_mm512_max_ps(_mm512_min_ps((__m512)b, (__m512)most), (__m512)-most);
          const Floats miss = (Floats)_mm512_fnmadd_ps((__m512)b, _mm512_set1_ps(step), (__m512)x);
          missed[i] += miss * miss, square[i] += b * b, whole[i] += x * x;
          if (queries) sum[i] += b;
          part[v] = _mm512_cvtps_epi32((__m512)b);
        }
        const __m512i packed =
            _mm512_packs_epi16(_mm512_packs_epi32(part[0], part[1]), _mm512_packs_epi32(part[2], part[3]));
        bytes[i] = (Floats)_mm512_xor_si512(_mm512_permutexvar_epi32(order, packed), offset);
      }
      transpose_tile<float>(bytes);
      for (int i = 0; i < G; ++i) __builtin_memcpy(out.values + i * 4 * G, &bytes[i], 4 * G);
    }
    float lengths[G];
    for (int i = 0; i < G; ++i) {
      const int squares = _mm512_reduce_add_epi32(_mm512_cvtps_epi32((__m512)square[i]));
      const int total = _mm512_reduce_add_epi32(_mm512_cvtps_epi32((__m512)sum[i]));
      out.squares[first + i] = queries ? squares + 256 * total : squares;
      lengths[i] = float(squares);
    }
    const Floats miss = root(sum_each<float>(missed)), norm = root(load(lengths)) * step;
    store(out.errors + first, miss * (1 + 0x1p-10f) + (norm + miss) * 0x1p-20f + 0x1p-60f);
    store(out.norms + first, norm);
    store(out.gains + first, sum_each<float>(whole) * (1 - 0x1p-12f) - norm * norm * (1 + 0x1p-20f));
  }
}

// 8 queries x 32 keys. The product takes keys as b + 128: the queries' squares make up for that.
template <bool Both>
void bound_tile(KnnBytes queries, KnnBytes keys, int64_t keys_stride, int64_t depth, float step, float* out,
                int64_t stride) {
  constexpr int R = 8, N = 2, G = kKnnBytesGroup;
  __m512i sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_si512();
  for (int64_t d = 0; d < depth; ++d) {
    __m512i key[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) key[n] = _mm512_loadu_si512(keys.values + n * keys_stride + d * 4 * G);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t query;
      __builtin_memcpy(&query, queries.values + d * 4 * G + r * 4, 4);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[r][n] = _mm512_dpbusd_epi32(sum[r][n], key[n], _mm512_set1_epi32(query));
    }
  }
  const __m512 factor = _mm512_set1_ps(step * (1 - 0x1p-12f)), one = _mm512_set1_ps(1), zero = _mm512_setzero_ps();
  const __m512 squared = _mm512_set1_ps(step * step * (1 - 0x1p-18f));
  constexpr float kMore = 1 + 0x1p-16f;
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const __m512i squares = _mm512_loadu_si512(keys.squares + n * G);
    const __m512 errors = _mm512_loadu_ps(keys.errors + n * G), gains = _mm512_loadu_ps(keys.gains + n * G);
    const __m512 reach = _mm512_add_ps(_mm512_loadu_ps(keys.norms + n * G), errors);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i both = _mm512_add_epi32(squares, _mm512_set1_epi32(queries.squares[r]));
      const __m512 square = _mm512_cvtepi32_ps(_mm512_sub_epi32(both, _mm512_slli_epi32(sum[r][n], 1)));
      const __m512 root = _mm512_mul_ps(square, _mm512_rsqrt14_ps(_mm512_max_ps(square, one)));
      const __m512 error = _mm512_add_ps(errors, _mm512_set1_ps(queries.errors[r]));
      __m512 bound = _mm512_max_ps(_mm512_fmsub_ps(root, factor, error), zero);
      if constexpr (Both) {
        const __m512 product = _mm512_fmadd_ps(errors, _mm512_set1_ps(2 * kMore * queries.norms[r]),
                                               _mm512_mul_ps(reach, _mm512_set1_ps(2 * kMore * queries.errors[r])));
        const __m512 gain = _mm512_add_ps(gains, _mm512_set1_ps(queries.gains[r]));
        const __m512 closer = _mm512_sub_ps(_mm512_fmadd_ps(square, squared, gain), product);
        const __m512 inverse = _mm512_rsqrt14_ps(_mm512_max_ps(closer, _mm512_set1_ps(0x1p-100f)));
        // the larger; the second where the first is NaN
        bound = _mm512_max_ps(_mm512_mul_ps(_mm512_mul_ps(closer, inverse), _mm512_set1_ps(1 - 0x1p-12f)), bound);
      }
      _mm512_storeu_ps(out + r * stride + n * G, bound);
    }
  }
}

void bounds(KnnBytes queries, int64_t rows, KnnBytes keys, int64_t columns, int64_t dim, float step, float* out,
            int64_t stride) {
  constexpr int64_t G = kKnnBytesGroup, kManyFeatures = 256;  // fewer cost less than a second bound
  const int64_t group = (dim + kKnnBytesDim - 1) / kKnnBytesDim * kKnnBytesDim * G, depth = (dim + 3) / 4;
  const auto from = [group](KnnBytes b, int64_t i) {
    return KnnBytes{b.values + i / G * group + i % G * 4, b.squares + i, b.errors + i, b.norms + i, b.gains + i};
  };
  for (int64_t j = 0; j < columns; j += 2 * G)
    for (int64_t i = 0; i < rows; i += 8)
      (dim < kManyFeatures ? bound_tile<false> : bound_tile<true>)(from(queries, i), from(keys, j), group, depth, step,
                                                                   out + i * stride + j, stride);
}

constexpr KnnFirstPass kBytes = {quantise, bounds};
#endif

template <class T>
constexpr const KnnFirstPass* first_pass() {
#if defined(__AVX512VNNI__)
  if (sizeof(T) == sizeof(float)) return &kBytes;
#endif
  return nullptr;
}

// Candidates ----------------------------------------------------------------------------------------------------------

template <class T>
using Key = typename KnnKey<T>::type;

template <class T>
inline Key<T> make_key(T distance, int64_t index) {
  return Key<T>(bits_as<typename VectorOf<T>::bits>(distance)) << kKnnIndexBits | Key<T>(index);
}
template <class T>
inline T distance_of(Key<T> key) {
  return bits_as<T>(typename VectorOf<T>::bits(key >> kKnnIndexBits));
}

template <class K>
inline void swap(K& a, K& b) {
  const K c = a;
  a = b, b = c;
}

template <class K>
void insertion_sort(K* keys, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const K key = keys[i];
    int64_t j = i;
    for (; j > 0 && key < keys[j - 1]; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}
template <class K>
void heap_sort(K* keys, int64_t n) {
  for (int64_t root = n / 2, end = n;;) {
    if (root > 0)
      --root;
    else if (--end > 0)
      swap(keys[0], keys[end]);
    else
      return;
    const K key = keys[root];
    int64_t hole = root;
    for (int64_t child; (child = 2 * hole + 1) < end; hole = child) {
      if (child + 1 < end && keys[child] < keys[child + 1]) ++child;
      if (!(key < keys[child])) break;
      keys[hole] = keys[child];
    }
    keys[hole] = key;
  }
}
template <class K>
void sort(K* keys, int64_t n) {
  if (n <= 48)
    insertion_sort(keys, n);
  else
    heap_sort(keys, n);
}

// The k lowest to the front, in any order. Keys are distinct. Quickselect; should its pivots be bad, it sorts.
template <class K>
void select(K* keys, int64_t n, int64_t k) {
  int64_t low = 0, high = n;  // the k-th lies in [low, high)
  for (int64_t rounds = 0; high - low > 24; ++rounds) {
    if (rounds > 48) return heap_sort(keys + low, high - low);
    K a = keys[low], b = keys[low + (high - low) / 2], c = keys[high - 1];
    if (b < a) swap(a, b);
    if (c < b) b = c < a ? a : c;
    const K pivot = b;
    int64_t i = low, j = high - 1;
    while (i <= j) {
      while (keys[i] < pivot) ++i;
      while (pivot < keys[j]) --j;
      if (i <= j) swap(keys[i++], keys[j--]);
    }
    if (k <= j + 1)
      high = j + 1;
    else if (k > i)
      low = i;
    else
      return;
  }
  insertion_sort(keys + low, high - low);
}

// Drops all but the k lowest candidates and lowers the limit to the worst of them.
template <class T>
void shrink(Key<T>* keys, int64_t* count, Key<T>* limit, int64_t k) {
  select(keys, *count, k);
  Key<T> worst = 0;
  for (int64_t i = 0; i < k; ++i) worst = worst < keys[i] ? keys[i] : worst;
  *count = k;
  *limit = worst;
}

// A bound on the k-th lowest of a first block: its columns fall into G groups, and the k-th lowest of the groups'
// minima belongs to k different columns.
template <class T, int V>
inline T bound(const T* row, int64_t columns, int64_t k) {
  constexpr int W = Shape<T>::W;
  Vector<T> least[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) least[v] = load(row + v * W);
  int64_t j = V * W;
  for (; j + V * W <= columns; j += V * W)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vector<T> x = load(row + j + v * W);
      least[v] = x < least[v] ? x : least[v];
    }
  Vector<T> lowest = least[0], highest = least[0];
#pragma GCC unroll 8
  for (int v = 1; v < V; ++v) {
    lowest = least[v] < lowest ? least[v] : lowest;
    highest = least[v] > highest ? least[v] : highest;
  }
  T low = lowest[0], high = highest[0];
  T lanes[2][W];
  store(lanes[0], lowest), store(lanes[1], highest);
  for (int i = 1; i < W; ++i)
    low = lanes[0][i] < low ? lanes[0][i] : low, high = lanes[1][i] > high ? lanes[1][i] : high;
  // Bisection, without branches: a few keys too many are cheaper than the exact one.
  for (int i = 0; i < 8; ++i) {
    const T middle = low + (high - low) / 2;
    const Vector<T> at = Vector<T>{} + middle;
    int64_t below = 0;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) below += __builtin_popcount(less_equal(least[v], at));
    high = below >= k ? middle : high;
    low = below >= k ? low : middle;
  }
  return high;
}
template <class T>
inline T first_bound(const T* row, int64_t columns, int64_t k) {
  constexpr int W = Shape<T>::W;
  if (2 * k <= 2 * W && columns >= 4 * W) return bound<T, 2>(row, columns, k);
  if (2 * k <= 4 * W && columns >= 8 * W) return bound<T, 4>(row, columns, k);
  if (2 * k <= 8 * W && columns >= 16 * W) return bound<T, 8>(row, columns, k);
  return T(__builtin_inf());
}

template <class T>
T offer(const T* block, int64_t stride, int64_t rows, int64_t columns, int64_t index, KnnCandidates<T> candidates,
        int64_t first_row) {
  constexpr int W = Shape<T>::W, kStep = 4;
  Vector<T> total = {};
  T rest_total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = block + r * stride;
    Key<T>* keys = candidates.keys + (first_row + r) * candidates.capacity;
    Key<T>* limit = candidates.limit + first_row + r;
    int64_t* count = candidates.count + first_row + r;
    if (*count == 0 && !candidates.limits_given) {
      const T least = first_bound(row, columns, candidates.k);
      const Key<T> offered = make_key(least, 0) | ((Key<T>(1) << kKnnIndexBits) - 1);
      if (offered < *limit) *limit = offered;
    }
    T threshold = distance_of<T>(*limit);
    for (int64_t j = 0; j < columns; j += kStep * W) {
      uint64_t hits = 0;
      const Vector<T> bar = Vector<T>{} + threshold;
      if (j + kStep * W <= columns) {
#pragma GCC unroll 4
        for (int v = 0; v < kStep; ++v) {
          const Vector<T> x = load(row + j + v * W);
          total += x;
          hits |= uint64_t(less_equal(x, bar)) << v * W;
        }
      } else {
        for (int64_t i = j; i < columns; ++i) {
          rest_total += row[i];
          hits |= uint64_t(row[i] <= threshold) << (i - j);
        }
      }
      if (!hits) continue;
      int64_t n = *count;
      const Key<T> below = *limit;
      for (; hits; hits &= hits - 1) {
        const int64_t at = j + __builtin_ctzll(hits);
        keys[n] = make_key(row[at], index + at);
        n += keys[n] <= below;
      }
      *count = n;
      if (n >= candidates.trigger) {
        shrink<T>(keys, count, limit, candidates.k);
        threshold = distance_of<T>(*limit);
      }
    }
  }
  T lanes[W];
  store(lanes, total);
  for (int i = 0; i < W; ++i) rest_total += lanes[i];
  return rest_total;
}

template <class T>
int64_t settle(KnnCandidates<T> candidates, int64_t row) {
  Key<T>* keys = candidates.keys + row * candidates.capacity;
  int64_t count = candidates.count[row];
  if (count > candidates.k) {
    select(keys, count, candidates.k);
    count = candidates.k;
  }
  sort(keys, count);
  return count;
}

template <class T>
constexpr KnnKernels<T> kernels(void (*pack)(const void*, DType, int64_t, int64_t, int, T, T*)) {
  return {Shape<T>::W,  Shape<T>::R,      4 * Shape<T>::W, largest<T>, pack,      widen_all<T>,
          distances<T>, row_distances<T>, transpose<T>,    offer<T>,   settle<T>, first_pass<T>()};
}

}  // namespace

namespace URLFAST_ISA_NAMESPACE {
const KnnKernels<float> knn_float = kernels<float>(pack_float);
const KnnKernels<double> knn_double = kernels<double>(pack_double);
}  // namespace URLFAST_ISA_NAMESPACE
}  // namespace urlfast
