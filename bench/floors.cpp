// What this machine's memory and arithmetic allow: loops that do nothing else, each on `threads` threads. Compiled for
// the processor at hand; bench/floors.py times them.
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

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

// Threads that are there before the work is, as the contestants' are: they spin for a while, then sleep.
class Team {
 public:
  // body(i) for every i < threads; 0 is the caller's.
  template <class Body>
  void run(int threads, const Body& body) {
    while (int(workers_.size()) < threads - 1)
      workers_.emplace_back([this, i = int(workers_.size()) + 1, seen = round_.load()] { loop(i, seen); });
    if (threads > 1) {
      call_ = [](const void* b, int i) { (*static_cast<const Body*>(b))(i); };
      body_ = &body, threads_ = threads, busy_ = int(workers_.size());
      {
        std::lock_guard<std::mutex> lock(mutex_);
        round_.fetch_add(1);
      }
      wake_.notify_all();
    }
    body(0);
    while (busy_.load() > 0) std::this_thread::yield();
  }

 private:
  void loop(int i, uint64_t seen) {
    for (;; ++seen) {
      for (int spins = 0; spins < 300 && round_.load() == seen; ++spins) std::this_thread::yield();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load() != seen; });
      }
      if (i < threads_) call_(body_, i);
      busy_.fetch_sub(1);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int> busy_{0};
  void (*call_)(const void*, int) = nullptr;
  const void* body_ = nullptr;
  int threads_ = 0;
};

// body(i, first, end) on each thread, with its part of `count`.
template <class Body>
static void share(int threads, size_t count, const Body& body) {
  static Team* team = new Team;  // never destroyed: its threads outlive main
  team->run(threads, [&](int i) { body(i, count * i / threads, count * (i + 1) / threads); });
}

static float read_part(const float* x, size_t count) {
  Vector sum[8] = {};
  for (size_t i = 0; i + 8 * kLanes <= count; i += 8 * kLanes)
    for (size_t j = 0; j < 8; ++j) sum[j] += *(const Vector*)(x + i + j * kLanes);
  float total = 0;
  for (size_t j = 0; j < 8; ++j)
    for (size_t l = 0; l < kLanes; ++l) total += sum[j][l];
  return total;
}

// Fused multiply-adds in registers; returns how many float operations it did, and through `out` what keeps them from
// being dropped.
static double multiply_add_part(size_t rounds, float* out) {
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

extern "C" {

// out [threads]: sums, so that nothing is left out.
void read_all(const float* x, size_t count, float* out, int threads) {
  share(threads, count, [=](int i, size_t first, size_t end) { out[i] = read_part(x + first, end - first); });
}

void copy_all(char* to, const char* from, size_t bytes, int threads) {
  share(threads, bytes, [=](int, size_t first, size_t end) {
    copy_past(to + first, from + first, end - first, from + first + 1024);
    fence();
  });
}

// `count` runs of `bytes`, the i-th from from + start[i], one after another into `to`.
void gather(char* to, const char* from, const int64_t* start, size_t count, size_t bytes, int threads) {
  share(threads, count, [=](int, size_t first, size_t end) {
    for (size_t i = first; i < end; ++i)
      copy_past(to + i * bytes, from + start[i], bytes, from + start[i + 1 < end ? i + 1 : i]);
    fence();
  });
}

// out [threads]. The operations of all threads.
double multiply_add(size_t rounds, float* out, int threads) {
  double operations = 0;
  share(threads, size_t(threads), [&](int i, size_t, size_t) {
    const double done = multiply_add_part(rounds, out + i);
    if (i == 0) operations = done * threads;
  });
  return operations;
}
}
