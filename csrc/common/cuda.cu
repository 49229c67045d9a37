#include "common/cuda.hpp"

#include <atomic>
#include <exception>

namespace urlfast {
namespace {

__global__ void probe() {}

// Why device `index` cannot run what was compiled, in words; empty when it can.
std::string why_not(int index) {
  DeviceGuard guard(index);
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, probe) == cudaSuccess) return "";
  cudaGetLastError();  // clears it: the caller's next CUDA call must not see ours
  cudaDeviceProp properties;
  URLFAST_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  const std::string major = std::to_string(properties.major), minor = std::to_string(properties.minor);
  return std::string(properties.name) + " has compute capability " + major + "." + minor +
         ", this build has code for " + URLFAST_CUDA_ARCHITECTURES +
         "; rebuild with -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=" + major + minor;
}

CudaStatus ask() {
  CudaStatus status;
  status.compiled = true;
  status.architectures = URLFAST_CUDA_ARCHITECTURES;
  cudaRuntimeGetVersion(&status.runtime);
  cudaDriverGetVersion(&status.driver);
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    cudaGetLastError();
    const std::string runtime =
        std::to_string(status.runtime / 1000) + "." + std::to_string(status.runtime % 1000 / 10);
    status.reason = status.driver == 0 ? "no NVIDIA driver found"
                    : error == cudaErrorInsufficientDriver
                        ? "the NVIDIA driver is older than the CUDA " + runtime + " runtime needs: update it"
                        : std::string("no usable device: ") + cudaGetErrorString(error);
    return status;
  }
  try {
    for (int i = 0; i < devices && !status.usable; ++i) {
      const std::string reason = why_not(i);
      status.usable = reason.empty();
      if (i == 0) status.reason = reason;
    }
  } catch (const std::exception& error) {  // a device that another process holds exclusively, say
    status.reason = error.what();
  }
  if (status.usable) status.reason.clear();
  return status;
}

}  // namespace

const CudaStatus& cuda_status() {
  static const CudaStatus status = ask();
  return status;
}

void require_cuda(const char* argument, int index) {
  const CudaStatus& status = cuda_status();
  const std::string name = std::string(argument) + ": CUDA is not usable here: ";
  if (!status.usable) throw std::runtime_error(name + status.reason);
  int devices = 0;
  URLFAST_CUDA_CHECK(cudaGetDeviceCount(&devices));
  if (index < 0 || index >= devices)
    throw std::runtime_error(std::string(argument) + ": cuda:" + std::to_string(index) +
                             " does not exist; this machine has " + std::to_string(devices) + " CUDA device(s)");
  static std::atomic<uint64_t> known_good{0};  // asking costs more than a small launch
  if (index < 64 && known_good.load(std::memory_order_relaxed) >> index & 1) return;
  const std::string reason = why_not(index);
  if (!reason.empty()) throw std::runtime_error(name + reason);
  if (index < 64) known_good.fetch_or(uint64_t(1) << index, std::memory_order_relaxed);
}

void* cuda_allocate(int device, int64_t bytes) {
  DeviceGuard guard(device);
  void* pointer = nullptr;
  if (cudaMalloc(&pointer, size_t(bytes > 0 ? bytes : 1)) != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("CUDA: could not allocate " + std::to_string(bytes) +
                             " bytes on cuda:" + std::to_string(device));
  }
  return pointer;
}

void cuda_free(int device, void* pointer) noexcept {
  int previous = 0;
  if (!pointer || cudaGetDevice(&previous) != cudaSuccess) return;  // at process exit the driver may be gone already
  cudaSetDevice(device);
  cudaFree(pointer);
  cudaSetDevice(previous);
}

void cuda_copy(int device, void* to, const void* from, int64_t bytes, CUstream_st* stream) {
  DeviceGuard guard(device);
  URLFAST_CUDA_CHECK(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, stream));
}

void cuda_synchronize(int device, CUstream_st* stream) {
  DeviceGuard guard(device);
  URLFAST_CUDA_CHECK(cudaStreamSynchronize(stream));
}

void cuda_synchronize(int device) {
  DeviceGuard guard(device);
  URLFAST_CUDA_CHECK(cudaDeviceSynchronize());
}

bool cuda_capturing(int device, CUstream_st* stream) {
  DeviceGuard guard(device);
  cudaStreamCaptureStatus status;
  URLFAST_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void* cuda_allocate_host(int64_t bytes) noexcept {
  void* pointer = nullptr;
  if (cudaHostAlloc(&pointer, size_t(bytes > 0 ? bytes : 1), cudaHostAllocPortable) == cudaSuccess) return pointer;
  cudaGetLastError();
  return nullptr;
}

void cuda_free_host(void* pointer) noexcept {
  if (pointer) cudaFreeHost(pointer);
}

CudaEvent::CudaEvent(int device) : device_(device) {
  DeviceGuard guard(device);
  cudaEvent_t event;
  URLFAST_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  event_ = event;
}
CudaEvent::~CudaEvent() { cudaEventDestroy(static_cast<cudaEvent_t>(event_)); }
void CudaEvent::record(CUstream_st* stream) {
  DeviceGuard guard(device_);
  URLFAST_CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(event_), stream));
}
void CudaEvent::order(CUstream_st* stream) const {
  DeviceGuard guard(device_);
  URLFAST_CUDA_CHECK(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(event_), 0));
}
bool CudaEvent::passed() const {
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event_));
  if (status == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  URLFAST_CUDA_CHECK(status);
  return true;
}
void CudaEvent::wait() const { URLFAST_CUDA_CHECK(cudaEventSynchronize(static_cast<cudaEvent_t>(event_))); }

}  // namespace urlfast
