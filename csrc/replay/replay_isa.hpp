// The loops of the replay that exist once per instruction set.
#pragma once
#include <cstdint>

namespace urlfast {

struct ReplayErrors {  // of the entries that count
  double sum;          // of their sizes; not finite when one of them is not
  float most;          // the largest size
  int64_t count;
};

struct ReplayKernels {
  // `bytes` bytes of rows that lie anywhere in memory far larger than the caches. next: where the following copy will
  // read, null for the last one; fetched while this one ends, so that no copy waits for its first lines and pages.
  // past_caches: with stores that bypass the caches; the caller fences them.
  void (*copy)(char* to, const char* from, int64_t bytes, const char* next, bool past_caches);
  // Entries of td where mask is not 0 (null: all of them). Added in eight lanes, so the same everywhere.
  ReplayErrors (*errors)(const float* td, const uint8_t* mask, int64_t n);
};

namespace baseline {
extern const ReplayKernels replay_kernels;
}
#ifdef URLFAST_X86
namespace avx2 {
extern const ReplayKernels replay_kernels;
}
namespace avx512 {
extern const ReplayKernels replay_kernels;
}
#endif

}  // namespace urlfast
