// URLFAST_HD marks a formula that the C++ compiler and nvcc both build, so that CPU and CUDA cannot drift apart. Such
// functions are `static inline`: a file compiled once per instruction set must not export inline functions.
#pragma once

#if defined(__CUDACC__)
#define URLFAST_HD __host__ __device__
#else
#define URLFAST_HD
#endif
