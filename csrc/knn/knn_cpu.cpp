#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/check.hpp"
#include "common/cpu.hpp"
#include "common/parallel.hpp"
#include "knn/knn.hpp"
#include "knn/knn_isa.hpp"

namespace urlfast {
namespace {

template <class T>
const KnnKernels<T>& kernels();
template <>
const KnnKernels<float>& kernels<float>() {
#ifdef URLFAST_X86
  if (chosen_isa() == Isa::avx512vnni) return avx512vnni::knn_float;
#endif
  return URLFAST_PICK(knn_float);
}
template <>
const KnnKernels<double>& kernels<double>() {
  return URLFAST_PICK(knn_double);
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory that a thread keeps between calls: fresh pages cost more than a small search. Large ones are given back.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = size_t(round_up(count * int64_t(sizeof(T)) + 64, 64));
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  void trim() {
    if (size_ <= size_t(4) << 20) return;
    std::free(data_);
    data_ = nullptr, size_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};
struct Workspace {
  Scratch queries, keys, block, turned, candidates, limits, counts;
  Scratch query_bytes, key_bytes, query_squares, key_squares, query_errors, key_errors, centre, measured, exact;
  void trim() {
    for (Scratch* s : {&queries, &keys, &block, &turned, &candidates, &limits, &counts, &query_bytes, &key_bytes,
                       &query_squares, &key_squares, &query_errors, &key_errors, &centre, &measured, &exact})
      s->trim();
  }
};
Workspace& workspace() {
  static thread_local Workspace mine;
  return mine;
}
Workspace& shared_workspace() {  // what one call lends to all threads
  static thread_local Workspace mine;
  return mine;
}

// work(unit, state) once for every unit, units going to threads as these become free. Which thread did what must not
// show in the result. `state` is one thread's.
template <class State, class Work>
void run_units(int64_t units, bool threads, Work&& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  parallel_for(threads ? std::min<int64_t>(num_threads(), units) : 1, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) try {
        State state{};
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) work(unit, state);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
    workspace().trim();
  });
  if (out_of_memory) throw std::bad_alloc();
}

template <class T>
KnnCandidates<T> room(Workspace& w, KnnCandidates<T> c, int64_t rows) {
  using Key = typename KnnKey<T>::type;
  c.keys = w.candidates.get<Key>(rows * c.capacity);
  c.limit = w.limits.get<Key>(rows);
  c.count = w.counts.get<int64_t>(rows);
  std::fill_n(c.limit, rows, ~Key(0));
  std::fill_n(c.count, rows, int64_t(0));
  return c;
}
template <class T>
KnnCandidates<T> candidate_sizes(const KnnKernels<T>& kernel, int64_t k) {
  KnnCandidates<T> c{};
  c.k = k;
  c.trigger = k + std::max<int64_t>(k, 24);
  c.capacity = c.trigger + kernel.step;
  return c;
}

template <class T>
using Bits = std::conditional_t<std::is_same_v<T, float>, uint32_t, uint64_t>;
template <class T>
T squared_of(typename KnnKey<T>::type key) {
  const Bits<T> bits = Bits<T>(key >> kKnnIndexBits);
  T squared;
  std::memcpy(&squared, &bits, sizeof bits);
  return squared;
}
template <class T>
typename KnnKey<T>::type key_of(T squared, uint32_t index) {
  Bits<T> bits;
  std::memcpy(&bits, &squared, sizeof bits);
  return typename KnnKey<T>::type(bits) << kKnnIndexBits | index;
}

// One search. emit(s, row, keys, count, unscale) is called once per query, with its neighbours in order; a distance is
// sqrt(squared) * unscale.
template <class T, class Emit>
class Search {
  using Key = typename KnnKey<T>::type;

 public:
  Search(const KnnProblem& problem, const Emit& emit) : p(problem), emit_(emit) {}

  void run() {
    // Squares leave float32's range above 1e19 and below 1e-19 (float64: 1e154): such data is brought near 1 by a power
    // of two, which changes no digit. Bad memory rows are found by their distances, so that good ones are read once.
    constexpr double kSmall = std::is_same_v<T, float> ? 0x1p-30 : 0x1p-400;
    constexpr double kLarge = std::is_same_v<T, float> ? 0x1p50 : 0x1p450;
    const double largest_query = largest(p.queries, p.problems * p.num_queries * p.dim, p.queries_name);
    if (largest_query >= kSmall && largest_query <= kLarge && search(1)) return;
    double most = largest_query;
    if (!p.self)
      for (int64_t s = 0; s < p.problems; ++s)
        most = std::max(most, largest(key_rows(s, 0), p.length(s) * p.dim, p.keys_name));
    int exponent = 0;
    std::frexp(most, &exponent);
    const int reach = std::is_same_v<T, float> ? 126 : 1000;
    search(std::ldexp(1., std::clamp(20 - exponent, -reach, reach)));
  }

 private:
  const char* query_rows(int64_t s, int64_t row) const {
    return static_cast<const char*>(p.queries) + (s * p.num_queries + row) * p.dim * item_size(p.dtype);
  }
  const char* key_rows(int64_t s, int64_t row) const {
    return static_cast<const char*>(p.keys) + (s * p.num_keys + row) * p.dim * item_size(p.dtype);
  }
  double largest(const void* data, int64_t count, const char* name) const {
    const double most = kernel.largest(data, p.dtype, count);
    require(std::isfinite(most), name, "must be finite, has NaN or infinity");
    return most;
  }

  // False where a distance was not finite.
  bool search(double scale) {
    scale_ = T(scale), unscale_ = 1 / scale;
    finite_ = true;
    const int64_t pairs = p.problems * p.num_queries * p.num_keys;
    threads_ = num_threads() > 1 && double(pairs) * double(p.dim + 16) > 1.5e6;
    // What computes a distance hangs on the problem's shape alone, so that it is the same whatever the threads.
    by_rows_ = p.num_queries <= 2 || p.dim >= 128;
    // A first pass is worth more than symmetry, which halves the work.
    const bool bounds_first = p.dim >= 128 && first_pass_pays(p.num_queries, p.num_queries);
    if (p.self && p.num_queries > (by_rows_ ? 32 : kSide) && p.dim >= 32 && !bounds_first)
      search_symmetric();
    else
      search_blocks();
    return finite_;
  }

  void note(T sum) {
    if (!std::isfinite(sum)) finite_.store(false, std::memory_order_relaxed);
  }

  // Rows as the kernels take them: packed in groups, or, where distances are by rows, as they lie.
  const T* take(Scratch& values, const char* rows, int64_t count, int group) const {
    if (by_rows_) return as_they_lie(values, rows, count);
    T* out = values.get<T>(round_up(count, group) / group * p.dim * kernel.width);
    kernel.pack(rows, p.dtype, count, p.dim, group, scale_, out);
    return out;
  }
  const T* as_they_lie(Scratch& values, const char* rows, int64_t count) const {
    if (in_place()) return reinterpret_cast<const T*>(rows);
    T* out = values.get<T>(count * p.dim);
    kernel.widen(rows, p.dtype, count * p.dim, scale_, out);
    return out;
  }
  bool in_place() const { return scale_ == 1 && item_size(p.dtype) == int64_t(sizeof(T)); }
  const T* take_queries(Workspace& w, int64_t s, int64_t row, int64_t count) const {
    return take(w.queries, query_rows(s, row), count, kernel.query_group);
  }
  const T* take_keys(Workspace& w, int64_t s, int64_t row, int64_t count) const {
    return take(w.keys, key_rows(s, row), count, kernel.width);
  }
  // Of `rows` queries from `first` on, a multiple of the kernel's query_group or a single one.
  void distances(const T* queries, int64_t first, int64_t rows, const T* keys, int64_t columns, T* out,
                 int64_t stride) const {
    const int64_t R = kernel.query_group;
    if (by_rows_)
      kernel.row_distances({queries + first * p.dim, nullptr}, rows, {keys, nullptr}, columns, p.dim, out, stride);
    else
      kernel.distances(queries + first / R * p.dim * kernel.width + first % R, rows, keys, columns, p.dim, out, stride);
  }

  // Of rows as they lie to each other: each pair once, but for those of one tile.
  void own_distances(const T* rows, int64_t count, T* out, int64_t stride) const {
    constexpr int64_t kTile = 4;
    for (int64_t i = 0; i < count; i += kTile) {
      const KnnRows<T> rest{rows + i * p.dim, nullptr};
      kernel.row_distances(rest, std::min(kTile, count - i), rest, count - i, p.dim, out + i * stride + i, stride);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < i; ++j) out[i * stride + j] = out[j * stride + i];
  }

  // Queries x keys in blocks: the keys of one stay in the second cache, its distances too.
  void search_blocks() {
    constexpr int64_t kCache = 384 << 10;  // bytes of a block's keys
    const int64_t W = kernel.width, R = kernel.query_group, row_bytes = p.dim * int64_t(sizeof(T));
    int64_t block_keys = std::clamp<int64_t>(kCache / row_bytes / (2 * W) * 2 * W, 4 * W, 1024);
    if (p.num_queries == 1 && in_place()) block_keys = 4096;  // no key is read twice, and reading pauses after each
    const int64_t stride = block_keys + W;
    const int64_t longest = p.lengths ? *std::max_element(p.lengths, p.lengths + p.problems) : p.num_keys;
    const KnnCandidates<T> sizes = candidate_sizes<T>(kernel, std::min(p.k, longest));
    const int64_t threads = threads_ ? num_threads() : 1;

    int64_t unit_rows =
        std::clamp<int64_t>((1 << 20) / std::max<int64_t>(row_bytes, sizes.capacity * int64_t(sizeof(Key))), R, 256);
    if (threads > 1)
      unit_rows = std::min(unit_rows, std::max<int64_t>(R, (p.problems * p.num_queries + threads - 1) / threads));
    unit_rows = round_up(unit_rows, R);
    const int64_t row_units = (p.num_queries + unit_rows - 1) / unit_rows;
    // Few queries and many keys: the keys are divided too, and each part's best are merged below.
    int64_t parts = 1;
    if (p.problems * row_units < threads)
      parts =
          std::clamp<int64_t>(longest / 2048, 1, (2 * threads + p.problems * row_units - 1) / (p.problems * row_units));
    Merge merge(parts, parts > 1 ? p.problems * p.num_queries : 0, sizes.k, shared_workspace());

    run_units<None>(p.problems * row_units * parts, threads > 1, [&](int64_t unit, None&) {
      const int64_t part = unit % parts, s = unit / parts / row_units, first = unit / parts % row_units * unit_rows;
      const int64_t rows = std::min(unit_rows, p.num_queries - first), length = p.length(s);
      const int64_t begin = length * part / parts, end = length * (part + 1) / parts;
      Workspace& w = workspace();
      const T* queries = take_queries(w, s, first, rows);
      if constexpr (std::is_same_v<T, float>)
        if (parts == 1 && first_pass_pays(rows, length) && search_bounds(s, first, rows, queries)) return;
      KnnCandidates<T> c = room(w, sizes, rows);
      c.k = std::min(p.k, length);
      T* block = w.block.get<T>(std::min(kRows, unit_rows) * stride);
      T sum = 0;
      for (int64_t m = begin; m < end; m += block_keys) {
        const int64_t columns = std::min(block_keys, end - m);
        const T* keys = take_keys(w, s, m, columns);
        for (int64_t r = 0; r < rows; r += kRows) {
          const int64_t some = std::min(kRows, rows - r);
          distances(queries, r, some, keys, columns, block, stride);
          exclude(block, stride, first + r, some, m, columns);
          sum += kernel.offer(block, stride, some, columns, m, c, r);
        }
      }
      note(sum);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t found = kernel.settle(c, r);
        const Key* best = c.keys + r * c.capacity;
        if (parts > 1)
          merge.put(s * p.num_queries + first + r, part, best, found);
        else
          emit_(s, first + r, best, found, unscale_);
      }
    });
    if (parts > 1)
      for (int64_t row = 0; row < p.problems * p.num_queries; ++row) {
        KnnCandidates<T> c = merge.row(row);
        c.k = std::min(p.k, p.length(row / p.num_queries));
        const int64_t found = kernel.settle(c, 0);
        emit_(row / p.num_queries, row % p.num_queries, c.keys, found, unscale_);
      }
  }

  // Bounds first, from rows as bytes; then exact distances, from the very arithmetic of the direct search, for the keys
  // that may be among the k nearest. False where bounds leave too many of them, which is known before it has cost much.
  bool first_pass_pays(int64_t rows, int64_t length) const {
    return kernel.first_pass && rows >= 32 && length >= 512 && p.k <= length / 16 && p.dim >= 32 &&
           p.dim <= kKnnBytesMaxDim && most_measured(p.k) < first_pass_keys();
  }
  // Of a block. It has more keys than the first limits are set from, so that these come from real neighbours, k or
  // more, also where a row itself is excluded.
  int64_t first_pass_keys() const {
    return std::clamp<int64_t>((256 << 10) / round_up(p.dim, kKnnBytesDim) / 32 * 32, 64, 1024);
  }

  bool search_bounds(int64_t s, int64_t first, int64_t rows, const T* queries) {
    const KnnFirstPass& pass = *kernel.first_pass;
    Workspace& w = workspace();
    const int64_t length = p.length(s), row_bytes = round_up(p.dim, kKnnBytesDim);
    const int64_t block_keys = first_pass_keys(), stride = block_keys;
    float* centre = w.centre.get<float>(p.dim);
    const float step = choose_step(s, first, rows, centre);
    if (!(step > 0x1p-60f)) return false;

    const auto bytes = [&](Scratch& values, Scratch& squares, Scratch& errors, int64_t count) {
      count = round_up(count, 32);
      float* facts = errors.get<float>(3 * count);
      return KnnBytes{values.get<uint8_t>(count * row_bytes), squares.get<int32_t>(count), facts, facts + count,
                      facts + 2 * count};
    };
    const KnnBytes query = bytes(w.query_bytes, w.query_squares, w.query_errors, rows);
    const KnnBytes key = bytes(w.key_bytes, w.key_squares, w.key_errors, block_keys);
    pass.quantise(as_they_lie(w.turned, query_rows(s, first), rows), rows, p.dim, centre, step, true, query);

    const int64_t many = std::min(length / 2, std::max<int64_t>(512, 4 * p.k));  // candidates of a query
    KnnCandidates<T> sizes{};
    sizes.k = p.k, sizes.capacity = many + block_keys, sizes.trigger = sizes.capacity + 1;
    KnnCandidates<T> c = room(w, sizes, rows);
    Key* measured = w.measured.get<Key>(most_measured(p.k));
    T* block = w.block.get<T>(kRows * stride);
    int64_t left = rows * (length / 16);  // distances to compute one by one, at most: each takes longer than in blocks
    for (int64_t m = 0; m < length; m += block_keys) {
      const int64_t columns = std::min(block_keys, length - m);
      pass.quantise(as_they_lie(w.keys, key_rows(s, m), columns), columns, p.dim, centre, step, false, key);
      note(std::accumulate(key.errors, key.errors + columns, T(0)));
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t some = std::min(kRows, rows - r);
        pass.bounds(
            {query.values + r * row_bytes, query.squares + r, query.errors + r, query.norms + r, query.gains + r}, some,
            key, columns, p.dim, step, block, stride);
        exclude(block, stride, first + r, some, m, columns);
        if (m == 0) {  // the keys of lowest bounds give the first limits, and are then offered like all others
          kernel.offer(block, stride, some, columns, m, c, r);
          for (int64_t i = r; i < r + some; ++i) {
            c.limit[i] = ~Key(0);
            tighten(c, s, queries, i, measured);
            c.count[i] = 0;
          }
        }
        c.limits_given = true;
        kernel.offer(block, stride, some, columns, m, c, r);
        c.limits_given = m > 0;
      }
      for (int64_t r = 0; r < rows; ++r) {
        if (c.count[r] <= many) continue;
        tighten(c, s, queries, r, measured);
        if (c.count[r] <= many * 3 / 4) continue;
        c.count[r] = 0, c.limit[r] = 0;  // this query's bounds are too wide: nothing is offered to it any more
        if ((left -= length) < 0) return false;
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (c.limit[r] == 0) {
        rank_all(c, s, queries, r, first + r);
      } else {
        left -= rank(c, s, queries, r, measured);
        if (left < 0) return false;
      }
      emit_(s, first + r, c.keys + r * c.capacity, p.k, unscale_);
    }
    return true;
  }

  // Centre and step from a sample of rows: any are right, these leave small errors.
  float choose_step(int64_t s, int64_t first, int64_t rows, float* centre) const {
    constexpr int64_t kSample = 16;  // of queries, and of keys
    Workspace& w = workspace();
    float* sample = w.exact.get<float>(2 * kSample * p.dim);
    for (int64_t i = 0; i < kSample; ++i) {
      kernel.widen(query_rows(s, first + rows * i / kSample), p.dtype, p.dim, scale_, sample + i * p.dim);
      kernel.widen(key_rows(s, p.length(s) * i / kSample), p.dtype, p.dim, scale_, sample + (kSample + i) * p.dim);
    }
    double square = 0;
    for (int64_t d = 0; d < p.dim; ++d) {
      double sum = 0, squares = 0;
      for (int64_t i = d; i < 2 * kSample * p.dim; i += p.dim)
        sum += sample[i], squares += double(sample[i]) * sample[i];
      centre[d] = float(sum / (2 * kSample));
      square += squares - sum * sum / (2 * kSample);
    }
    const double deviation = std::sqrt(std::max(0., square / double(2 * kSample * p.dim)));
    float* facts = w.key_errors.get<float>(3 * 2 * kSample);
    KnnBytes bytes{w.key_bytes.get<uint8_t>(2 * kSample * round_up(p.dim, kKnnBytesDim)),
                   w.key_squares.get<int32_t>(2 * kSample), facts, facts + 2 * kSample, facts + 4 * kSample};
    float step = 0, least = std::numeric_limits<float>::infinity();
    for (double reach = 3; reach < 64; reach *= 1.15) {  // the largest value that bytes hold, in deviations
      const float tried = float(reach * deviation / 127);
      if (!(tried > 0x1p-60f)) break;
      kernel.first_pass->quantise(sample, 2 * kSample, p.dim, centre, tried, false, bytes);
      const float sum = std::accumulate(bytes.errors, bytes.errors + 2 * kSample, 0.f);
      if (!(sum < least)) break;
      least = sum, step = tried;
    }
    return step;
  }

  // Measures the keys of lowest bounds, some more than k as a large error may lower one's bound; lowers the limit to
  // the k-th lowest distance and drops the other candidates above it. How many were measured: they lie at the front.
  int64_t tighten(KnnCandidates<T> c, int64_t s, const T* queries, int64_t row, Key* measured) {
    Key* keys = c.keys + row * c.capacity;
    const int64_t count = c.count[row], k = c.k, some = c.k = std::min(count, most_measured(k));
    if (count < k) return 0;
    kernel.settle(c, row);
    std::copy_n(keys, some, measured);
    measure(s, queries, row, measured, some);
    std::nth_element(measured, measured + k - 1, measured + some);
    // A measured square differs from the true one by less than 2^-12 of it, and by 2^-130 where it underflows.
    const T worst = std::sqrt(squared_of<T>(measured[k - 1])) * (1 + T(0x1p-12)) + T(0x1p-60);
    const Key limit = c.limit[row] = std::min(c.limit[row], key_of(worst, ~uint32_t(0)));
    c.count[row] = std::remove_if(keys + some, keys + count, [limit](Key key) { return key > limit; }) - keys;
    return some;
  }
  static int64_t most_measured(int64_t k) { return k + k / 2 + 4; }

  // A row's candidates become its k nearest, in order. How many were measured.
  int64_t rank(KnnCandidates<T> c, int64_t s, const T* queries, int64_t row, Key* measured) {
    Key* keys = c.keys + row * c.capacity;
    const int64_t some = tighten(c, s, queries, row, measured);
    measure(s, queries, row, keys + some, c.count[row] - some);
    std::copy_n(measured, some, keys);
    kernel.settle(c, row);
    return c.count[row];
  }

  // All keys are measured, and a row's candidates become its k nearest, in order.
  void rank_all(KnnCandidates<T> c, int64_t s, const T* queries, int64_t row, int64_t query) {
    Key* keys = c.keys + row * c.capacity;
    int64_t held = 0;
    for (int64_t m = 0; m < p.length(s); m += kAtOnce) {
      int64_t more = held;
      for (int64_t j = m; j < std::min(m + kAtOnce, p.length(s)); ++j)
        if (p.include_self || j != query) keys[more++] = Key(j);
      measure(s, queries, row, keys + held, more - held);
      c.count[row] = more;
      held = kernel.settle(c, row);
    }
  }

  // Keys with bounds become keys with distances.
  void measure(int64_t s, const T* queries, int64_t row, Key* keys, int64_t count) {
    Workspace& w = workspace();
    T* out = w.exact.get<T>(kAtOnce);
    T sum = 0;
    for (int64_t first = 0; first < count; first += kAtOnce, keys += kAtOnce) {
      const int64_t some = std::min(kAtOnce, count - first);
      const bool where_they_lie = by_rows_ && in_place();
      const T* pointers[kAtOnce];
      T* rows = where_they_lie ? nullptr : w.turned.get<T>(kAtOnce * p.dim);
      for (int64_t i = 0; i < some; ++i) {
        const char* from = key_rows(s, uint32_t(keys[i]));
        pointers[i] = reinterpret_cast<const T*>(from);
        if (!where_they_lie) kernel.widen(from, p.dtype, p.dim, scale_, rows + i * p.dim);
      }
      if (by_rows_) {
        const KnnRows<T> taken{rows, where_they_lie ? pointers : nullptr};
        kernel.row_distances({queries + row * p.dim, nullptr}, 1, taken, some, p.dim, out, kAtOnce);
      } else {
        T* packed = w.keys.get<T>(kAtOnce * p.dim);
        kernel.pack(rows, DType::f32, some, p.dim, kernel.width, 1, packed);
        distances(queries, row, 1, packed, some, out, kAtOnce);
      }
      for (int64_t i = 0; i < some; ++i) sum += out[i], keys[i] = key_of(out[i], uint32_t(keys[i]));
    }
    note(sum);
  }

  // The batch against itself: a pair of blocks is computed once, and its distances go to the rows of both.
  void search_symmetric() {
    const int64_t W = kernel.width, n = p.num_queries;
    const int64_t side = by_rows_ ? std::clamp<int64_t>(round_up(n / 4, W), W, kSide) : kSide;
    const int64_t blocks = (n + side - 1) / side, pairs = blocks * (blocks + 1) / 2;
    Workspace& shared = shared_workspace();
    const KnnCandidates<T> c = room(shared, candidate_sizes<T>(kernel, p.k), p.problems * n);
    const std::unique_ptr<std::mutex[]> locks(new std::mutex[size_t(p.problems * blocks)]);

    struct Taken {
      int64_t block = -1;  // the block of queries that this thread has taken
      const T* rows = nullptr;
    };
    run_units<Taken>(p.problems * pairs, threads_, [&](int64_t unit, Taken& queries) {
      const int64_t s = unit / pairs;
      int64_t i = 0, j = unit % pairs;  // row i of the upper triangle has blocks - i units
      for (; j >= blocks - i; ++i) j -= blocks - i;
      j += i;
      const int64_t rows = std::min(side, n - i * side), columns = std::min(side, n - j * side);
      Workspace& w = workspace();
      T* block = w.block.get<T>(round_up(side, W) * (side + W));
      if (queries.block != s * blocks + i) queries = {s * blocks + i, take_queries(w, s, i * side, rows)};
      const T* keys = take_keys(w, s, j * side, columns);
      if (i == j && by_rows_)
        own_distances(keys, columns, block, side + W);
      else
        distances(queries.rows, 0, rows, keys, columns, block, side + W);
      if (i == j) exclude(block, side + W, i * side, rows, j * side, columns);
      {
        const std::lock_guard<std::mutex> lock(locks[size_t(s * blocks + i)]);
        note(kernel.offer(block, side + W, rows, columns, j * side, c, s * n + i * side));
      }
      if (i == j) return;
      T* turned = w.turned.get<T>(round_up(side, W) * (side + W));
      kernel.transpose(block, side + W, rows, columns, turned, side + W);
      const std::lock_guard<std::mutex> lock(locks[size_t(s * blocks + j)]);
      kernel.offer(turned, side + W, columns, rows, i * side, c, s * n + j * side);
    });
    run_units<None>((p.problems * n + 63) / 64, threads_ && p.problems * n >= 512, [&](int64_t unit, None&) {
      for (int64_t row = unit * 64; row < std::min(unit * 64 + 64, p.problems * n); ++row) {
        const int64_t found = kernel.settle(c, row);
        emit_(row / n, row % n, c.keys + row * c.capacity, found, unscale_);
      }
    });
    shared.trim();
  }

  // A row's distance to itself becomes so large that every other comes first.
  void exclude(T* block, int64_t stride, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    if (p.include_self) return;
    for (int64_t i = 0; i < rows; ++i)
      if (row + i >= column && row + i < column + columns)
        block[i * stride + row + i - column] = std::numeric_limits<T>::max();
  }

  struct None {};

  // The best of each part of the keys, side by side per query.
  class Merge {
   public:
    Merge(int64_t parts, int64_t rows, int64_t k, Workspace& w)
        : parts_(parts),
          k_(k),
          keys_(w.candidates.get<Key>(rows * parts * k)),
          counts_(w.counts.get<int64_t>(rows * parts)) {}
    void put(int64_t row, int64_t part, const Key* best, int64_t found) {
      std::copy_n(best, found, keys_ + (row * parts_ + part) * k_);
      counts_[row * parts_ + part] = found;
    }
    KnnCandidates<T> row(int64_t row) {
      Key* to = keys_ + row * parts_ * k_;
      total_ = 0;
      for (int64_t part = 0; part < parts_; ++part) {
        const int64_t found = counts_[row * parts_ + part];
        std::copy_n(keys_ + (row * parts_ + part) * k_, found, to + total_);
        total_ += found;
      }
      KnnCandidates<T> c{};
      c.keys = to, c.count = &total_, c.capacity = parts_ * k_;
      return c;
    }

   private:
    int64_t parts_, k_;
    Key* keys_;
    int64_t* counts_;
    int64_t total_ = 0;
  };

  static constexpr int64_t kRows = 48;    // queries of a block
  static constexpr int64_t kAtOnce = 64;  // keys measured one by one
  static constexpr int64_t kSide = 96;    // of a symmetric block: a multiple of every instruction set's groups

  const KnnProblem& p;
  const Emit& emit_;
  const KnnKernels<T>& kernel = kernels<T>();
  T scale_ = 1;
  double unscale_ = 1;
  bool threads_ = false;
  bool by_rows_ = false;  // distances are of rows as they lie, not packed
  std::atomic<bool> finite_{true};
};

template <class T, class Emit>
void search(const KnnProblem& p, const Emit& emit) {
  Search<T, Emit>(p, emit).run();
}

template <class T>
T distance_of(typename KnnKey<T>::type key, double unscale) {
  return T(std::sqrt(squared_of<T>(key)) * unscale);
}

template <class T>
void find(const KnnProblem& p, T* distances, int64_t* indices) {
  search<T>(p, [&](int64_t s, int64_t row, const typename KnnKey<T>::type* keys, int64_t count, double unscale) {
    const int64_t at = (s * p.num_queries + row) * p.k;
    for (int64_t i = 0; i < p.k; ++i) {
      distances[at + i] = i < count ? distance_of<T>(keys[i], unscale) : std::numeric_limits<T>::infinity();
      if (indices) indices[at + i] = i < count ? int64_t(uint32_t(keys[i])) : -1;
    }
  });
}

template <class T>
void reward_at_once(const KnnProblem& p, const KnnReward& reward, T* out) {
  search<T>(p, [&](int64_t s, int64_t row, const typename KnnKey<T>::type* keys, int64_t count, double unscale) {
    double sum = 0;
    const int64_t first = reward.kth && count > 0 ? count - 1 : 0;
    for (int64_t i = first; i < count; ++i) sum += knn_power(distance_of<T>(keys[i], unscale), reward.exponent);
    out[s * p.num_queries + row] = T(knn_log_reward(sum, count - first, reward.c));
  });
}

template <class T>
void keep(const KnnProblem& p, const KnnReward& reward, T* kept) {
  std::vector<int64_t> offset(size_t(p.problems) + 1, 0);
  for (int64_t s = 0; s < p.problems; ++s)
    offset[size_t(s) + 1] = offset[size_t(s)] + p.num_queries * knn_kept(p, reward, s);
  search<T>(p, [&](int64_t s, int64_t row, const typename KnnKey<T>::type* keys, int64_t count, double unscale) {
    const int64_t n = knn_kept(p, reward, s);
    T* to = kept + offset[size_t(s)] + row * n;
    for (int64_t i = 0; i < n; ++i)  // fewer are found only where distances are NaN, which the search then refuses
      to[i] = count >= n ? distance_of<T>(keys[count - n + i], unscale) : std::numeric_limits<T>::infinity();
  });
}

template <class T>
void finish(const KnnProblem& p, const KnnReward& reward, const T* kept, double inverse, double clip, T* out) {
  for (int64_t s = 0; s < p.problems; ++s) {
    const int64_t n = knn_kept(p, reward, s);
    for (int64_t row = 0; row < p.num_queries; ++row, kept += n) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += knn_power(statistic_normalize(kept[i], inverse, clip), reward.exponent);
      *out++ = T(knn_log_reward(sum, n, reward.c));
    }
  }
}

}  // namespace

void knn_cpu(const KnnProblem& p, void* distances, int64_t* indices) {
  if (p.dtype == DType::f64)
    find(p, static_cast<double*>(distances), indices);
  else
    find(p, static_cast<float*>(distances), indices);
}
void knn_reward_cpu(const KnnProblem& p, const KnnReward& reward, void* out) {
  if (p.dtype == DType::f64)
    reward_at_once(p, reward, static_cast<double*>(out));
  else
    reward_at_once(p, reward, static_cast<float*>(out));
}
void knn_kept_cpu(const KnnProblem& p, const KnnReward& reward, void* kept) {
  if (p.dtype == DType::f64)
    keep(p, reward, static_cast<double*>(kept));
  else
    keep(p, reward, static_cast<float*>(kept));
}
void knn_finish_cpu(const KnnProblem& p, const KnnReward& reward, const void* kept, Statistic state, StatisticRule rule,
                    void* out) {
  const double inverse = 1 / statistic_scale(state, rule);
  if (p.dtype == DType::f64)
    finish(p, reward, static_cast<const double*>(kept), inverse, rule.clip, static_cast<double*>(out));
  else
    finish(p, reward, static_cast<const float*>(kept), inverse, rule.clip, static_cast<float*>(out));
}

}  // namespace urlfast
