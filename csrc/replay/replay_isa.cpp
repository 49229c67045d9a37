// Compiled once per instruction set: static functions and raw pointers only.
#include "replay/replay_isa.hpp"

#include <string.h>
#if defined(__SSE2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own header's undefined registers
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

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

}  // namespace

extern const ReplayKernels replay_kernels = {copy};

}  // namespace urlfast::URLFAST_ISA_NAMESPACE
