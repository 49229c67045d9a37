// float16 and bfloat16 as bits, to and from float. Without branches, so that loops over them vectorise on processors
// that have no instruction for it; round to nearest, ties to even; NaN stays NaN.
#pragma once
#include <cstdint>
#include <cstring>

namespace urlfast {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

static inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static inline float to_float(float x) { return x; }
static inline float to_float(BFloat16 x) { return float_of_bits(uint32_t(x.bits) << 16); }
static inline float to_float(Half x) {
  const uint32_t h = x.bits, exponent = h & 0x7c00, magnitude = h & 0x7fff;
  const uint32_t rebiased = (magnitude << 13) + (exponent == 0x7c00 ? 224u << 23 : 112u << 23);
  const uint32_t subnormal =
      bits_of_float(float(int32_t(magnitude)) * 0x1p-24f);  // exact; no denormal float on the way
  return float_of_bits((exponent == 0 ? subnormal : rebiased) | (h & 0x8000) << 16);
}

static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, BFloat16* out) {
  const uint32_t b = bits_of_float(x);
  const uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16, nan = b >> 16 | 0x40;
  out->bits = uint16_t((b & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}
static inline void from_float(float x, Half* out) {
  const uint32_t b = bits_of_float(x), sign = b >> 16 & 0x8000, m = b & 0x7fffffff;
  const uint32_t normal = (m - (112u << 23) + 0xfff + (m >> 13 & 1)) >> 13;
  // below the least normal half: adding 0.5 puts the half's last bit at the float's last bit, and rounds there
  const uint32_t subnormal = bits_of_float(float_of_bits(m) + 0.5f) - 0x3f000000;
  const uint32_t finite = m < 0x38800000 ? subnormal : normal;
  const uint32_t large = m > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN; infinity, also from 65520 on
  out->bits = uint16_t(sign | (m >= 0x477ff000 ? large : finite));
}

}  // namespace urlfast
