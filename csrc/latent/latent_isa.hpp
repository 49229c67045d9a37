// The loops of the latent dynamics and of the EMA that exist once per instruction set.
#pragma once
#include "latent/latent.hpp"

namespace urlfast {

struct LatentRun {  // values [0, n) that stand at `position` and on, in groups of four
  float* z;
  const float* actions;  // null in a first row
  int64_t n;
  uint64_t seed, row, position;
  LatentParams params;
};

struct LatentKernels {
  void (*run)(const LatentRun& run);
  void (*lerp)(void* target, const void* source, DType dtype, int64_t n, double tau);
};

namespace baseline {
extern const LatentKernels latent_kernels;
}
#ifdef URLFAST_X86
namespace avx2 {
extern const LatentKernels latent_kernels;
}
namespace avx512 {
extern const LatentKernels latent_kernels;
}
#endif

}  // namespace urlfast
