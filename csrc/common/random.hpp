// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a counter in, four integers out,
// the same on every device. A generator is (seed, stream, position): no state that threads would share. `static`: files
// compiled once per instruction set must not export inline functions.
#pragma once
#include <cstdint>

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

}  // namespace urlfast
