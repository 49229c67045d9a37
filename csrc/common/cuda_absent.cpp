// Stands in for cuda.cu in a build without CUDA: every question has its answer, every request its error.
#include <stdexcept>

#include "common/cuda.hpp"

namespace urlfast {

const CudaStatus& cuda_status() {
  static const CudaStatus status = [] {
    CudaStatus s;
    s.reason = "this build has no CUDA: install again where nvcc is found, with -Ccmake.define.URLFAST_CUDA=ON";
    return s;
  }();
  return status;
}
[[noreturn]] static void absent(const std::string& argument) {
  throw std::runtime_error(argument + ": CUDA is not usable here: " + cuda_status().reason);
}
void require_cuda(const char* argument, int) { absent(argument); }
void* cuda_allocate(int, int64_t) { absent("device"); }
void cuda_free(int, void*) noexcept {}
void cuda_copy(int, void*, const void*, int64_t, CUstream_st*) { absent("device"); }
void cuda_synchronize(int, CUstream_st*) { absent("device"); }
void cuda_synchronize(int) { absent("device"); }

}  // namespace urlfast
