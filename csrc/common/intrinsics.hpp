// The compiler's x86 intrinsics, where there are any.
#pragma once
#if defined(__SSE2__)
#if defined(__GNUC__) && !defined(__clang__)  // the header's undefined vectors are no mistake of ours
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
