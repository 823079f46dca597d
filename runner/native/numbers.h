/* One stored number as a float, by its definition: what the fast ways in kernels.c must equal. */

#include <stdint.h>
#include <string.h>

static float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float e4m3(uint8_t code)
{
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float sign = code & 0x80 ? -1.0f : 1.0f;
    if (exponent == 15 && mantissa == 7)
        return float_of_bits(0x7fc00000u | (uint32_t)(code & 0x80) << 24);
    if (exponent == 0)
        return sign * (float)mantissa * 0x1p-9f;
    return sign * float_of_bits((uint32_t)(exponent + 120) << 23 | (uint32_t)mantissa << 20);
}

static float half(uint16_t bits)
{
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31)
        return float_of_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0)
        return (sign ? -1.0f : 1.0f) * (float)mantissa * 0x1p-24f;
    return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

static float E4M3[256];

static inline float bf16(const uint8_t *at)
{
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return float_of_bits((uint32_t)bits << 16);
}

static inline float f16(const uint8_t *at)
{
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return half(bits);
}

