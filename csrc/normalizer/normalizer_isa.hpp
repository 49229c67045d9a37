// The loops of the normaliser that exist once per instruction set.
#pragma once
#include "common/statistic.hpp"
#include "common/tensor.hpp"

namespace urlfast {

enum class MomentsOf { mean, mean_and_m2, magnitude };

struct NormalizerKernels {
  // The statistic of n values. Its mean or m2 is not finite where one of them is not.
  Statistic (*moments)(const void* x, DType dtype, int64_t n, MomentsOf what);
  // The same per column of x [rows, features].
  void (*column_moments)(const void* x, DType dtype, int64_t rows, int64_t features, MomentsOf what, Statistic* out);
  // out[i] = statistic_normalize(x[i], inverse, clip), float64 for float64 and float32 otherwise. May work in place.
  void (*scale)(const void* x, DType dtype, int64_t n, void* out, double inverse, double clip);
  void (*scale_columns)(const void* x, DType dtype, int64_t rows, int64_t features, void* out, const double* inverses,
                        double clip);
};

namespace baseline {
extern const NormalizerKernels normalizer_kernels;
}
#ifdef URLFAST_X86
namespace avx2 {
extern const NormalizerKernels normalizer_kernels;
}
namespace avx512 {
extern const NormalizerKernels normalizer_kernels;
}
#endif

}  // namespace urlfast
