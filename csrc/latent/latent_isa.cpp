// Compiled once per instruction set: static functions and raw pointers only.
#include "latent/latent_isa.hpp"
#include "common/half.hpp"
#include "common/intrinsics.hpp"
#include "common/random.hpp"

namespace urlfast::URLFAST_ISA_NAMESPACE {
namespace {

constexpr int kTile = 64;  // positions drawn at a time: 256 values, all in the first cache

struct Bits {
  alignas(64) uint32_t v[4][kTile];
};

// philox(rng, position + j) for every j < kTile. By hand on AVX: compilers do not see that the factors of the 64-bit
// products have 32 bits, and the product is most of the work.
#if defined(__AVX2__)
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#define URLFAST_MULTIPLY_EVEN _mm512_mul_epu32
typedef __m512i Integers;
#else
constexpr int kWidth = 8;
#define URLFAST_MULTIPLY_EVEN _mm256_mul_epu32
typedef __m256i Integers;
#endif
typedef uint32_t U32 __attribute__((vector_size(4 * kWidth)));
typedef uint64_t U64 __attribute__((vector_size(4 * kWidth)));

static inline void multiply(U32 a, uint32_t factor, U32* high, U32* low) {
  const U64 f = U64{} + factor, mask = U64{} + 0xffffffffu;
  const U64 even = (U64)URLFAST_MULTIPLY_EVEN((Integers)a, (Integers)f);
  const U64 odd = (U64)URLFAST_MULTIPLY_EVEN((Integers)((U64)a >> 32), (Integers)f);
  *low = (U32)((even & mask) | (odd << 32));
  *high = (U32)((even >> 32) | (odd & ~mask));
}

static void draw(Philox rng, uint64_t position, Bits* out) {
  constexpr int kAtOnce = 2;  // their chains of products overlap
  for (int j = 0; j < kTile; j += kAtOnce * kWidth) {
    U32 c0[kAtOnce], c1[kAtOnce], c2[kAtOnce], c3[kAtOnce];
    for (int g = 0; g < kAtOnce; ++g) {
      for (int i = 0; i < kWidth; ++i) {
        const uint64_t at = position + uint64_t(j + g * kWidth + i);
        c0[g][i] = uint32_t(at), c1[g][i] = uint32_t(at >> 32);
      }
      c2[g] = U32{} + uint32_t(rng.stream), c3[g] = U32{} + uint32_t(rng.stream >> 32);
    }
    uint32_t k0 = uint32_t(rng.seed), k1 = uint32_t(rng.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      for (int g = 0; g < kAtOnce; ++g) {
        U32 high0, low0, high2, low2;
        multiply(c0[g], 0xD2511F53u, &high0, &low0);
        multiply(c2[g], 0xCD9E8D57u, &high2, &low2);
        c0[g] = high2 ^ c1[g] ^ k0, c2[g] = high0 ^ c3[g] ^ k1;
        c1[g] = low2, c3[g] = low0;
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int g = 0; g < kAtOnce; ++g) {
      const int at = j + g * kWidth;
      memcpy(&out->v[0][at], &c0[g], sizeof c0[g]);
      memcpy(&out->v[1][at], &c1[g], sizeof c0[g]);
      memcpy(&out->v[2][at], &c2[g], sizeof c0[g]);
      memcpy(&out->v[3][at], &c3[g], sizeof c0[g]);
    }
  }
}
#undef URLFAST_MULTIPLY_EVEN
#else
static void draw(Philox rng, uint64_t position, Bits* out) {
  for (int j = 0; j < kTile; ++j) {
    const Philox4 r = philox(rng, position + uint64_t(j));
    for (int k = 0; k < 4; ++k) out->v[k][j] = r.v[k];
  }
}
#endif

static void normals(const Bits& bits, float* out) {
  float n[4][kTile];
  for (int j = 0; j < kTile; ++j) {
    normal_pair(bits.v[0][j], bits.v[1][j], &n[0][j], &n[1][j]);
    normal_pair(bits.v[2][j], bits.v[3][j], &n[2][j], &n[3][j]);
  }
  for (int j = 0; j < kTile; ++j)
    for (int k = 0; k < 4; ++k) out[4 * j + k] = n[k][j];
}

static void uniforms(const Bits& bits, float* out) {  // [-1, 1)
  for (int j = 0; j < kTile; ++j)
    for (int k = 0; k < 4; ++k) out[4 * j + k] = 2.f * uniform01(bits.v[k][j]) - 1.f;
}

void run(const LatentRun& r) {
  Bits bits;
  alignas(64) float noise[4 * kTile], drawn[4 * kTile];
  const LatentParams p = r.params;
  for (int64_t start = 0; start < r.n; start += 4 * kTile) {
    const int64_t n = r.n - start < 4 * kTile ? r.n - start : 4 * kTile;
    const uint64_t position = r.position + uint64_t(start / 4);
    draw({r.seed, 4 * r.row + kDrawNoise}, position, &bits);
    normals(bits, noise);
    float* z = r.z + start;
    if (r.actions) {
      const float* actions = r.actions + start;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) z[i] = latent_step(z[i], actions[i], noise[i], false, p);
    } else {
      draw({r.seed, 4 * r.row + kDrawAction}, position, &bits);
      uniforms(bits, drawn);
      for (int64_t i = 0; i < n; ++i) z[i] = latent_step(0, drawn[i], noise[i], true, p);
    }
  }
}

// The end nearer to the result is the one that is moved away from, so that tau = 1 gives the source itself. For values
// and for vectors of them.
template <bool Near, class V, class Real>
static inline V lerp_one(V target, V source, Real tau) {
  return Near ? target + tau * (source - target) : source - (source - target) * (1 - tau);
}

// 32 bytes at a time everywhere: memory bounds it, and with 64, with prefetches or with stores past the caches the pass
// over 26 million parameters takes a tenth longer (Zen 4).
template <bool Near, class Real>
static void lerp_all(Real* target, const Real* source, int64_t n, Real tau) {
  typedef Real Vector __attribute__((vector_size(32)));
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(Real);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vector t, s;
    memcpy(&t, target + i, sizeof t);
    memcpy(&s, source + i, sizeof s);
    t = lerp_one<Near>(t, s, tau);
    memcpy(target + i, &t, sizeof t);
  }
  for (; i < n; ++i) target[i] = lerp_one<Near>(target[i], source[i], tau);
}

template <class Real>
static void lerp(Real* target, const Real* source, int64_t n, Real tau) {
  tau < Real(0.5) ? lerp_all<true>(target, source, n, tau) : lerp_all<false>(target, source, n, tau);
}

template <class T>
static void lerp_half(T* target, const T* source, int64_t n, float tau) {
  constexpr int64_t kBlock = 512;
  float t[kBlock], s[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t m = n - start < kBlock ? n - start : kBlock;
    for (int64_t i = 0; i < m; ++i) t[i] = to_float(target[start + i]);
    for (int64_t i = 0; i < m; ++i) s[i] = to_float(source[start + i]);
    lerp(t, s, m, tau);
    for (int64_t i = 0; i < m; ++i) from_float(t[i], target + start + i);
  }
}

void lerp_any(void* target, const void* source, DType dtype, int64_t n, double tau) {
  if (dtype == DType::f32)
    lerp(static_cast<float*>(target), static_cast<const float*>(source), n, float(tau));
  else if (dtype == DType::f64)
    lerp(static_cast<double*>(target), static_cast<const double*>(source), n, tau);
  else if (dtype == DType::f16)
    lerp_half(static_cast<Half*>(target), static_cast<const Half*>(source), n, float(tau));
  else
    lerp_half(static_cast<BFloat16*>(target), static_cast<const BFloat16*>(source), n, float(tau));
}

}  // namespace

extern const LatentKernels latent_kernels = {run, lerp_any};

}  // namespace urlfast::URLFAST_ISA_NAMESPACE
