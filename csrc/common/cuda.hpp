// What the build and this machine can do with CUDA, and the checks around launches. Plain C++ includes the first half.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#include "common/tensor.hpp"

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
inline std::shared_ptr<void> cuda_buffer(int device, int64_t bytes) {
  return {cuda_allocate(device, bytes), [device](void* p) { cuda_free(device, p); }};
}
void cuda_copy(int device, void* to, const void* from, int64_t bytes,
               CUstream_st* stream);  // any direction; asynchronous
void cuda_synchronize(int device, CUstream_st* stream);
void cuda_synchronize(int device);                     // every stream of it
bool cuda_capturing(int device, CUstream_st* stream);  // what is queued there goes into a graph
// For constructors, saves and loads: after all that `device` was given to do, on whatever stream, and done on return.
inline void copy_waiting(Device device, void* to, const void* from, int64_t bytes) {
  if (!device.cuda) {
    std::memcpy(to, from, size_t(bytes));
    return;
  }
  cuda_synchronize(device.index);
  cuda_copy(device.index, to, from, bytes, nullptr);
  cuda_synchronize(device.index, nullptr);
}
// Pinned: a device reads it without the processor's help. Null when there is none left.
void* cuda_allocate_host(int64_t bytes) noexcept;
void cuda_free_host(void* pointer) noexcept;

// A moment in the work of a stream of `device`. One that was never recorded has passed. A stream may be null: the
// legacy default stream.
class CudaEvent {
 public:
  explicit CudaEvent(int device);
  ~CudaEvent();
  CudaEvent(const CudaEvent&) = delete;
  int device() const { return device_; }
  void record(CUstream_st* stream);       // what was queued there so far
  void order(CUstream_st* stream) const;  // what is queued there from now on waits for it
  bool passed() const;
  void wait() const;  // the calling thread does

 private:
  int device_;
  void* event_ = nullptr;
};

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
