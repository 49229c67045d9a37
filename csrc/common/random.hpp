// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a counter in, four integers out,
// the same on every device. A generator is (seed, stream, position): no state that threads would share. `static`: files
// compiled once per instruction set must not export inline functions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/hd.hpp"

namespace urlfast {

struct Philox {
  uint64_t seed = 0;
  uint64_t stream = 0;  // upper half of the counter: which consumer, which step
};

struct Philox4 {
  uint32_t v[4];
};

URLFAST_HD static inline Philox4 philox(Philox rng, uint64_t position) {
  uint32_t c0 = uint32_t(position), c1 = uint32_t(position >> 32), c2 = uint32_t(rng.stream),
           c3 = uint32_t(rng.stream >> 32);
  uint32_t k0 = uint32_t(rng.seed), k1 = uint32_t(rng.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 64 random bits at a position.
URLFAST_HD static inline uint64_t philox_u64(Philox rng, uint64_t position) {
  const Philox4 r = philox(rng, position);
  return uint64_t(r.v[1]) << 32 | r.v[0];
}

// [0, 1) with 24 bits, from 32 random ones.
URLFAST_HD static inline float uniform01(uint32_t bits) { return float(bits >> 8) * 0x1p-24f; }

// Two independent standard normals from 64 random bits (Box, Muller 1958). Polynomials and no branch, so that a loop of
// it vectorises and CPU and CUDA agree to a rounding; the logarithm's and the sine's are those of Cephes (Moshier),
// single precision. The radius takes 31 bits (at most 6.6), the angle 32.
URLFAST_HD static inline void normal_pair(uint32_t radius_bits, uint32_t angle_bits, float* first, float* second) {
  // -2 ln u, u in (0, 1]: u = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const float u = float(int32_t(radius_bits >> 1 | 1)) * 0x1p-31f;
  int32_t b;
  memcpy(&b, &u, 4);
  const int32_t shifted = b - 0x3f3504f3;  // the bits of sqrt(1/2)
  const float e = float(shifted >> 23);
  const int32_t mantissa = (shifted & 0x007fffff) + 0x3f3504f3;
  float m;
  memcpy(&m, &mantissa, 4);
  m -= 1.f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float m2 = m * m;
  const float log_u = (m + (p * m * m2 - 2.12194440e-4f * e - 0.5f * m2)) + 0.693359375f * e;
  const float squared = -2.f * log_u;
  const float radius = sqrtf(squared > 0.f ? squared : 0.f);  // u = 1 may round to the other side of 0
  // a whole turn is 2^32: the nearest quarter, and the rest in [-pi/4, pi/4)
  const uint32_t quarter = (angle_bits + 0x20000000u) >> 30;
  const float x = float(int32_t(angle_bits - (quarter << 30))) * 1.46291807926716e-9f;  // pi / 2^31
  const float x2 = x * x;
  const float sine = ((-1.9515295891e-4f * x2 + 8.3321608736e-3f) * x2 - 1.6666654611e-1f) * x2 * x + x;
  const float cosine =
      ((2.443315711809948e-5f * x2 - 1.388731625493765e-3f) * x2 + 4.166664568298827e-2f) * x2 * x2 - 0.5f * x2 + 1.f;
  const bool odd = quarter & 1;
  const float s = odd ? cosine : sine, c = odd ? sine : cosine;
  *first = radius * ((quarter + 1) & 2 ? -c : c);
  *second = radius * (quarter & 2 ? -s : s);
}

}  // namespace urlfast
