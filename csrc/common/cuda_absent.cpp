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
bool cuda_capturing(int, CUstream_st*) { absent("device"); }
void* cuda_allocate_host(int64_t) noexcept { return nullptr; }
void cuda_free_host(void*) noexcept {}
CudaEvent::CudaEvent(int device) : device_(device) { absent("device"); }
CudaEvent::~CudaEvent() = default;
void CudaEvent::record(CUstream_st*) { absent("device"); }
void CudaEvent::order(CUstream_st*) const { absent("device"); }
bool CudaEvent::passed() const { absent("device"); }
void CudaEvent::wait() const { absent("device"); }

}  // namespace urlfast
