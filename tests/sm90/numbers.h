// 16-bit floating point in plain C++: bfloat16 or float16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float widen(uint16_t bits, bool bfloat16) {
  if (bfloat16) return float_of(uint32_t(bits) << 16);
  const float sign = bits & 0x8000 ? -1.f : 1.f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
  return sign * std::ldexp(float(1024 + fraction), exponent - 25);
}
// To the nearest, ties to even.
inline uint16_t narrow(double value, bool bfloat16) {
  if (std::isnan(value)) return 0x7FFF;
  const int digits = bfloat16 ? 8 : 11, smallest = bfloat16 ? -126 : -14, largest = bfloat16 ? 127 : 15;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (size == 0) return sign;
  int exponent = std::isinf(value) ? largest + 1 : std::ilogb(size);
  if (exponent < smallest) exponent = smallest;
  if (exponent <= largest) {
    const double unit = std::ldexp(1.0, exponent - digits + 1);
    const double count = std::nearbyint(size / unit);  // below 2^digits, or equal to it: then the carry is right too
    const int mantissa = int(count);
    const int hidden = 1 << (digits - 1);
    const int biased = mantissa < hidden ? 0 : exponent - smallest + 1;
    const int encoded = (biased << (digits - 1)) + (mantissa < hidden ? mantissa : mantissa - hidden);
    if (encoded < (bfloat16 ? 0x7F80 : 0x7C00)) return uint16_t(sign | encoded);
  }
  return uint16_t(sign | (bfloat16 ? 0x7F80 : 0x7C00));
}

}  // namespace emulated
