// Loads and stores of every floating dtype on the device, computed with in float, or double for double.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/tensor.hpp"

namespace urlfast {

template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class T>
using Real = typename RealOf<T>::type;  // what T is computed with

__device__ inline float to_real(float x) { return x; }
__device__ inline double to_real(double x) { return x; }
__device__ inline float to_real(__half x) { return __half2float(x); }
__device__ inline float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_real(float x, float* out) { *out = x; }
__device__ inline void from_real(double x, double* out) { *out = x; }
__device__ inline void from_real(float x, __half* out) { *out = __float2half_rn(x); }
__device__ inline void from_real(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

// body(static_cast<const T*>(nullptr)) for the floating T of a dtype.
template <class Body>
void with_real_type(DType dtype, Body&& body) {
  if (dtype == DType::f32)
    body(static_cast<const float*>(nullptr));
  else if (dtype == DType::f64)
    body(static_cast<const double*>(nullptr));
  else if (dtype == DType::f16)
    body(static_cast<const __half*>(nullptr));
  else
    body(static_cast<const __nv_bfloat16*>(nullptr));
}

}  // namespace urlfast
