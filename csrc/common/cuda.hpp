// What the build and this machine can do with CUDA, and the checks around launches. Plain C++ includes the first half.
#pragma once
#include <cstdint>
#include <string>

struct CUstream_st;  // what cudaStream_t points to

namespace urlfast {

struct CudaStatus {
  bool compiled = false;
  bool usable = false;
  std::string reason;         // why not, in words; empty when usable
  std::string architectures;  // what was compiled for
  int runtime = 0, driver = 0;
};
// Asked once, at first need, never at import. Loading the extension needs no driver.
const CudaStatus& cuda_status();
// Throws std::runtime_error naming `argument` unless `index` is a usable device.
void require_cuda(const char* argument, int index);

// Memory of the library itself (replay's columns, normaliser's state). Throws std::runtime_error when there is none
// left.
void* cuda_allocate(int device, int64_t bytes);
void cuda_free(int device, void* pointer) noexcept;
void cuda_copy(int device, void* to, const void* from, int64_t bytes,
               CUstream_st* stream);  // any direction; asynchronous
void cuda_synchronize(int device, CUstream_st* stream);
void cuda_synchronize(int device);  // every stream of it

}  // namespace urlfast

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>

#define URLFAST_CUDA_CHECK(call)                                                                         \
  do {                                                                                                   \
    const cudaError_t status_ = (call);                                                                  \
    if (status_ != cudaSuccess)                                                                          \
      throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status_) + " (" __FILE__ ":" + \
                               std::to_string(__LINE__) + ")");                                          \
  } while (0)

namespace urlfast {
// Makes `index` current for a scope and gives the caller's device back.
struct DeviceGuard {
  int previous = 0;
  explicit DeviceGuard(int index) {
    URLFAST_CUDA_CHECK(cudaGetDevice(&previous));
    URLFAST_CUDA_CHECK(cudaSetDevice(index));
  }
  ~DeviceGuard() { cudaSetDevice(previous); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};
}  // namespace urlfast
#endif
