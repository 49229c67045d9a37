// What each instruction set provides to the search: a table of functions. Included by files compiled once per
// instruction set, so there is nothing here but plain structs and declarations.
//
// Rows are packed in groups: `group` rows, feature by feature, each feature's values side by side and padded to
// `width`. A group of keys is a vector per feature; a group of queries is broadcast value by value.
#pragma once
#include <cstdint>

#include "common/tensor.hpp"

namespace urlfast {

// A squared distance and an index in one integer that orders as the pair does: squared distances are not negative, so
// their bits order as they do. Equal distances go to the lowest index.
template <class T>
struct KnnKey;
template <>
struct KnnKey<float> {
  using type = uint64_t;
};
template <>
struct KnnKey<double> {
  using type = unsigned __int128;
};
constexpr int kKnnIndexBits = 32;

// The candidates of a range of rows: every key below the row's limit, which falls as better ones come. Whatever the
// order in which distances arrive, the k lowest are among them.
template <class T>
struct KnnCandidates {
  typename KnnKey<T>::type* keys;   // [rows, capacity]
  typename KnnKey<T>::type* limit;  // [rows]
  int64_t* count;                   // [rows]
  int64_t k;
  int64_t trigger;    // at this many candidates all but k are dropped
  bool limits_given;  // else a row's first block may set its limit
  int64_t capacity;   // trigger and room for what one step can add
};

// Rows as bytes, for a first pass over distances whose results are bounds (knn_isa.cpp says how they follow).
struct KnnBytes {
  uint8_t* values;   // groups of 16 rows, each: four features of every row, the next four of every row, ...
  int32_t* squares;  // of each row, what its squared distances begin with
  float* errors;     // [rows], the distance between a row and what its bytes stand for, at most
  float* norms;      // [rows], the distance between the centre and what the bytes stand for
  float* gains;      // [rows], by how much the row's own squared distance from the centre exceeds that one's, at least
};
constexpr int64_t kKnnBytesGroup = 16, kKnnBytesDim = 64;  // rows and features are rounded up to these
constexpr int64_t kKnnBytesMaxDim = 16384;                 // sums of products stay whole numbers in every lane

// Rows as they lie: one after the other from `first` on, or, where `pointers` is not null, each where its pointer says.
template <class T>
struct KnnRows {
  const T* first;
  const T* const* pointers;
};

struct KnnFirstPass {
  // Rows become bytes: round((row - centre) / step).
  void (*quantise)(const float* rows, int64_t count, int64_t dim, const float* centre, float step, bool queries,
                   KnnBytes out);
  // out[i * stride + j] is at most the distance between query i and key j. `out` has room for `rows` rounded up to 8
  // and `columns` rounded up to 32.
  void (*bounds)(KnnBytes queries, int64_t rows, KnnBytes keys, int64_t columns, int64_t dim, float step, float* out,
                 int64_t stride);
};

template <class T>
struct KnnKernels {
  int width;        // values in a vector
  int query_group;  // rows in a group of queries, at most `width`
  int64_t step;     // at most this many candidates come between two looks at the trigger

  // Largest absolute value of count items; infinity where one is NaN or infinite.
  double (*largest)(const void* data, DType dtype, int64_t count);
  // rows x dim of `data` times `scale`, in groups, into out [ceil(rows / group), dim, width]; missing rows are zeros.
  void (*pack)(const void* data, DType dtype, int64_t rows, int64_t dim, int group, T scale, T* out);
  // count values of data times `scale`.
  void (*widen)(const void* data, DType dtype, int64_t count, T scale, T* out);
  // Squared distances: out[i * stride + j] for packed queries i < rows and keys j < columns (rounded up to `width`).
  void (*distances)(const T* queries, int64_t rows, const T* keys, int64_t columns, int64_t dim, T* out,
                    int64_t stride);
  // The same for rows as they lie. Any two rows' distance has the same bits whatever the others.
  void (*row_distances)(KnnRows<T> queries, int64_t rows, KnnRows<T> keys, int64_t columns, int64_t dim, T* out,
                        int64_t stride);
  // to[j * to_stride + i] = from[i * from_stride + j]; both padded to `width`.
  void (*transpose)(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride);
  // Offers block [rows, columns] to rows first .. first + rows, as keys index ... The sum of all that was offered: NaN
  // or infinite where a distance was.
  T (*offer)(const T* block, int64_t stride, int64_t rows, int64_t columns, int64_t index, KnnCandidates<T> candidates,
             int64_t first);
  // Sorts the lowest min(k, count) keys of a row to its front; how many there are.
  int64_t (*settle)(KnnCandidates<T> candidates, int64_t row);
  const KnnFirstPass* first_pass;  // null where there is none
};

#define URLFAST_DECLARE_KNN(isa)              \
  namespace isa {                             \
  extern const KnnKernels<float> knn_float;   \
  extern const KnnKernels<double> knn_double; \
  }
URLFAST_DECLARE_KNN(baseline)
#ifdef __x86_64__
URLFAST_DECLARE_KNN(avx2)
URLFAST_DECLARE_KNN(avx512)
URLFAST_DECLARE_KNN(avx512vnni)
#endif
#undef URLFAST_DECLARE_KNN

}  // namespace urlfast
