// What this machine's memory and arithmetic allow: loops that do nothing else. Compiled for the processor at hand, each
// run by one thread on its part; bench/floors.py times them.
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr size_t kBytes = 64;
static void stream(char* to, const char* from) { _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from)); }
static void fence() { _mm_sfence(); }
#elif defined(__AVX__)
#include <immintrin.h>
constexpr size_t kBytes = 32;
static void stream(char* to, const char* from) {
  _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
}
static void fence() { _mm_sfence(); }
#else
constexpr size_t kBytes = 16;
static void stream(char* to, const char* from) { memcpy(to, from, kBytes); }
static void fence() {}
#endif

typedef float Vector __attribute__((vector_size(kBytes), aligned(4)));
constexpr size_t kLanes = kBytes / sizeof(float);

// Past the caches where the processor can: `to` is not read first. `next` is where the copy after this one reads.
static void copy_past(char* to, const char* from, size_t bytes, const char* next) {
  const size_t head = (kBytes - (uintptr_t)to % kBytes) % kBytes;
  if (bytes < head + kBytes) {
    memcpy(to, from, bytes);
    return;
  }
  memcpy(to, from, head);
  size_t i = head;
  for (; i + kBytes <= bytes; i += kBytes) {
    __builtin_prefetch(next + i);
    stream(to + i, from + i);
  }
  memcpy(to + i, from + i, bytes - i);
}

extern "C" {

// The sum, so that nothing is left out.
float read_all(const float* x, size_t count) {
  Vector sum[8] = {};
  for (size_t i = 0; i + 8 * kLanes <= count; i += 8 * kLanes)
    for (size_t j = 0; j < 8; ++j) sum[j] += *(const Vector*)(x + i + j * kLanes);
  float total = 0;
  for (size_t j = 0; j < 8; ++j)
    for (size_t l = 0; l < kLanes; ++l) total += sum[j][l];
  return total;
}

void copy_all(char* to, const char* from, size_t bytes) {
  copy_past(to, from, bytes, from + 1024);
  fence();
}

// `count` runs of `bytes`, the i-th from from + start[i], one after another into `to`.
void gather(char* to, const char* from, const int64_t* start, size_t count, size_t bytes) {
  for (size_t i = 0; i < count; ++i) copy_past(to + i * bytes, from + start[i], bytes, from + start[i + 1 < count ? i + 1 : i]);
  fence();
}

// Fused multiply-adds in registers; returns how many float operations it did, and through `out` what keeps them from
// being dropped.
double multiply_add(size_t rounds, float* out) {
  constexpr size_t kChains = 12;
  Vector sum[kChains], a, b;
  for (size_t l = 0; l < kLanes; ++l) {
    a[l] = 0.5f + *out, b[l] = 1.f + *out;
    for (size_t j = 0; j < kChains; ++j) sum[j][l] = *out + j;  // chains that differ: equal ones would be computed once
  }
  for (size_t i = 0; i < rounds; ++i)
    for (size_t j = 0; j < kChains; ++j) sum[j] = sum[j] * a + b;
  for (size_t j = 0; j < kChains; ++j)
    for (size_t l = 0; l < kLanes; ++l) *out += sum[j][l] * 0.f;
  return 2.0 * rounds * kChains * kLanes;
}
}
