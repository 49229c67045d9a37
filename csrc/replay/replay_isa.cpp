// Compiled once per instruction set: static functions and raw pointers only.
#include "replay/replay_isa.hpp"

#include <string.h>

#include "common/intrinsics.hpp"

namespace urlfast::URLFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kLine = 64;
// How far ahead lines are called to the second and to the first cache. Runs of 28 kB at random places of 700 MB, copied
// past the caches by one thread (read and written): 36 GB/s so, 31 where a run does not call the next one, 25 by
// memcpy.
constexpr int64_t kFar = 4096, kNear = 1024;
constexpr int64_t kPage = 4096, kPages = 8 * kPage;  // of the next run, whose addresses are looked up first

#if defined(__AVX512F__)
typedef __m512i Vector;
static inline void stream(Vector* to, Vector v) { _mm512_stream_si512(to, v); }
#elif defined(__AVX2__)
typedef __m256i Vector;
static inline void stream(Vector* to, Vector v) { _mm256_stream_si256(to, v); }
#elif defined(__SSE2__)
typedef __m128i Vector;
static inline void stream(Vector* to, Vector v) { _mm_stream_si128(to, v); }
#else
typedef uint64_t Vector __attribute__((vector_size(16)));
static inline void stream(Vector* to, Vector v) { *to = v; }
#endif

template <bool PastCaches>
static inline void copy_line(char* to, const char* from) {  // `to` begins a line
  Vector v[kLine / sizeof(Vector)];
  memcpy(v, from, kLine);
  for (size_t i = 0; i < kLine / sizeof(Vector); ++i)
    if (PastCaches)
      stream(reinterpret_cast<Vector*>(to) + i, v[i]);
    else
      reinterpret_cast<Vector*>(to)[i] = v[i];
}

template <bool PastCaches>
static void copy_run(char* to, const char* from, int64_t bytes, const char* next) {
  for (int64_t i = 0; next && i < bytes && i < kPages; i += kPage) __builtin_prefetch(next + i, 0, 2);
  const int64_t to_line = int64_t(-reinterpret_cast<uintptr_t>(to) & (kLine - 1));
  const int64_t head = to_line < bytes ? to_line : bytes;
  memcpy(to, from, size_t(head));
  int64_t i = head;
  // The address of a byte of this run and the next, laid end to end. Prefetches never fault.
  const auto at = [=](int64_t place) { return place < bytes || !next ? from + place : next + (place - bytes); };
  for (; i + kLine <= bytes; i += kLine) {
    __builtin_prefetch(at(i + kFar), 0, 2);
    __builtin_prefetch(at(i + kNear), 0, 0);
    copy_line<PastCaches>(to + i, from + i);
  }
  memcpy(to + i, from + i, size_t(bytes - i));
}

void copy(char* to, const char* from, int64_t bytes, const char* next, bool past_caches) {
  past_caches ? copy_run<true>(to, from, bytes, next) : copy_run<false>(to, from, bytes, next);
}

constexpr int64_t kLanes = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));

struct Lanes {
  Doubles sum = {};
  Integers most = {};  // the bits of a float that is not negative: they are ordered as it is
  Integers count = {};
};

// `only`: which of these kLanes entries, where not all have been left to take.
template <bool Masked>
static inline void take(Lanes& lanes, const float* td, const uint8_t* mask, Integers only) {
  Integers bits;
  memcpy(&bits, td, sizeof bits);
  if (Masked) {
    Bytes counts;
    memcpy(&counts, mask, sizeof counts);
    only &= __builtin_convertvector(counts, Integers) != 0;
    lanes.count -= only;
  }
  const Integers size = bits & 0x7fffffff & only;
  lanes.sum += __builtin_convertvector((Floats)size, Doubles);
  lanes.most = lanes.most > size ? lanes.most : size;
}

template <bool Masked>
static ReplayErrors errors_in(const float* td, const uint8_t* mask, int64_t n) {
  const Integers all = Integers{} - 1, lane = {0, 1, 2, 3, 4, 5, 6, 7};
  Lanes a, b;  // two, so that one's addition need not wait for the other's
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    take<Masked>(a, td + j, mask + j, all);
    take<Masked>(b, td + j + kLanes, mask + j + kLanes, all);
  }
  if (j + kLanes <= n) take<Masked>(a, td + j, mask + j, all), j += kLanes;
  if (j < n && n >= kLanes) {  // the last kLanes, without those taken before
    take<Masked>(b, td + n - kLanes, mask + n - kLanes, lane >= int32_t(kLanes - (n - j)));
  } else if (j < n) {
    float rest[kLanes] = {};
    uint8_t counts[kLanes] = {};
    memcpy(rest, td, size_t(n) * sizeof(float));
    if (Masked) memcpy(counts, mask, size_t(n));
    take<Masked>(b, rest, counts, all);
  }
  const Doubles sum = a.sum + b.sum;
  const Integers both = a.most > b.most ? a.most : b.most;
  int32_t most = 0;
  for (int64_t l = 0; l < kLanes; ++l) most = most > both[l] ? most : both[l];
  const Integers count = a.count + b.count;
  ReplayErrors e = {((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7])), 0, n};
  memcpy(&e.most, &most, sizeof most);
  if (Masked) {
    e.count = 0;
    for (int64_t l = 0; l < kLanes; ++l) e.count += count[l];
  }
  return e;
}

ReplayErrors errors(const float* td, const uint8_t* mask, int64_t n) {
  return mask ? errors_in<true>(td, mask, n) : errors_in<false>(td, nullptr, n);
}

}  // namespace

extern const ReplayKernels replay_kernels = {copy, errors};

}  // namespace urlfast::URLFAST_ISA_NAMESPACE
