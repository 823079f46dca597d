/* ggml's blocks for AVX2 and AVX-512. What is expanded is what quantised.h says, bit for bit. */

#define INLINE_AVX2 TARGET_AVX2 static inline __attribute__((always_inline))
#define INLINE_AVX512 TARGET_AVX512 static inline __attribute__((always_inline))

/* Or gcc keeps an array in vectors, and each number of it costs a shuffle where a load would be free. */
#define IN_MEMORY(array) __asm__("" : "+m"(array))

/* ---- AVX2: codes as 32 bytes, then floats eight at a time ---- */

INLINE_AVX2 __m256 half_avx2(const uint8_t *at)
{
    int16_t bits;
    memcpy(&bits, at, sizeof bits);
    return _mm256_cvtph_ps(_mm_set1_epi16(bits));
}

INLINE_AVX2 void factors_avx2(const int kind, const uint8_t *block, float *factor)
{
    uint8_t scales[FACTORS];
    const uint8_t *from = block + 192;
    __m256 d[2] = {half_avx2(block + (kind == Q6_K ? 208 : 0)), half_avx2(block + (kind == Q6_K ? 208 : 2))};
    if (kind != Q6_K) {
        unpack_scales(block + 4, scales);
        from = scales;
    }
    for (int i = 0; i < 2; i++) {
        const __m128i eight = _mm_loadl_epi64((const __m128i *)(from + 8 * i));
        const __m256i wide = kind == Q6_K ? _mm256_cvtepi8_epi32(eight) : _mm256_cvtepu8_epi32(eight);
        _mm256_storeu_ps(factor + 8 * i, _mm256_mul_ps(d[i], _mm256_cvtepi32_ps(wide)));
    }
}

/* 16 where a bit of 32 is set, in the byte of its number. */
INLINE_AVX2 __m256i sixteens_avx2(const uint8_t *at)
{
    int32_t bits;
    memcpy(&bits, at, sizeof bits);
    const __m256i each = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i one = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), each);
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, one), one);
    return _mm256_and_si256(is_set, _mm256_set1_epi8(16));
}

/* The codes of stretch j of a block, as whole numbers. */
INLINE_AVX2 __m256i codes_avx2(const int kind, const uint8_t *block, const int j)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    if (kind == Q8_0)
        return _mm256_loadu_si256((const __m256i *)(block + codes_at(kind)));
    if (is_large(kind)) {
        const int at = kind == Q4_K ? 16 + j / 2 * 32 : kind == Q5_K ? 48 + j / 2 * 32 : j / 4 * 64 + j % 2 * 32;
        const int is_upper = kind == Q6_K ? j % 4 / 2 : j % 2;
        const __m256i both = _mm256_loadu_si256((const __m256i *)(block + at));
        const __m256i low = _mm256_and_si256(is_upper ? _mm256_srli_epi16(both, 4) : both, nibble);
        if (kind == Q4_K)
            return low;
        if (kind == Q5_K) {
            const __m256i one = _mm256_set1_epi8((char)(1 << j));
            const __m256i bits = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(block + 16)), one);
            const __m256i is_set = _mm256_cmpeq_epi8(bits, one);
            return _mm256_or_si256(low, _mm256_and_si256(is_set, _mm256_set1_epi8(16)));
        }
        __m256i high = _mm256_loadu_si256((const __m256i *)(block + 128 + j / 4 * 32));
        high = j % 4 == 0 ? _mm256_slli_epi16(high, 4)
            : j % 4 == 1  ? _mm256_slli_epi16(high, 2)
            : j % 4 == 2  ? high
                          : _mm256_srli_epi16(high, 2);
        const __m256i codes = _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(48)));
        return _mm256_sub_epi8(codes, _mm256_set1_epi8(32));
    }
    const __m128i both = _mm_loadu_si128((const __m128i *)(block + codes_at(kind)));
    const __m256i apart = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
    const __m256i low = _mm256_and_si256(apart, nibble);
    switch (kind) {
    case Q4_0:
        return _mm256_sub_epi8(low, _mm256_set1_epi8(8));
    case Q4_1:
        return low;
    case Q5_0:
        return _mm256_sub_epi8(_mm256_or_si256(low, sixteens_avx2(block + bits_at(kind))), _mm256_set1_epi8(16));
    case Q5_1:
        return _mm256_or_si256(low, sixteens_avx2(block + bits_at(kind)));
    default:
        return _mm256_shuffle_epi8(
            _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)IQ4_NL_VALUES)), low);
    }
}

INLINE_AVX2 void stretch_avx2(const int kind, const uint8_t *block, const int j, const float *factor, __m256 *out)
{
    const __m256i codes = codes_avx2(kind, block, j);
    const __m128i halves[2] = {_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1)};
    const __m256 d = is_large(kind) ? _mm256_set1_ps(factor[j]) : half_avx2(block);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m128i eight = i % 2 ? _mm_srli_si128(halves[i / 2], 8) : halves[i / 2];
        const __m256 some = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
        if (kind == Q6_K)
            out[i] = _mm256_mul_ps(_mm256_set1_ps(factor[2 * j + i / 2]), some);
        else if (is_large(kind))
            out[i] = _mm256_fmsub_ps(d, some, _mm256_set1_ps(factor[8 + j]));
        else if (kind == Q4_1 || kind == Q5_1)
            out[i] = _mm256_fmadd_ps(d, some, half_avx2(block + 2));
        else
            out[i] = _mm256_mul_ps(d, some);
    }
}

INLINE_AVX2 void small_block_avx2(const int kind, const uint8_t *block, __m256 *out)
{
    const float none[FACTORS] = {0};
    stretch_avx2(kind, block, 0, none, out);
}

/* ---- AVX-512: codes of 4 and 5 bits choose from what all codes of a scale stand for, 6 and 8 bits become floats ---- */

INLINE_AVX512 __m512 half_avx512(const uint8_t *at)
{
    int16_t bits;
    memcpy(&bits, at, sizeof bits);
    return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
}

/* Each scale of Q4_K and Q5_K is followed by its minimum here. */
INLINE_AVX512 void factors_avx512(const int kind, const uint8_t *block, float *factor)
{
    if (kind == Q6_K) {
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(block + 192)));
        _mm512_storeu_ps(factor, _mm512_mul_ps(half_avx512(block + 208), _mm512_cvtepi32_ps(wide)));
        IN_MEMORY(*(float(*)[FACTORS])factor);
        return;
    }
    uint64_t lower;
    uint32_t both;
    int32_t d;
    memcpy(&d, block, sizeof d);
    memcpy(&lower, block + 4, sizeof lower);
    memcpy(&both, block + 12, sizeof both);
    const uint64_t upper = (both & 0x0f0f0f0f) | (uint64_t)(both >> 4 & 0x0f0f0f0f) << 32 | (lower >> 2 & 0x3030303030303030);
    const __m128i bytes = _mm_unpacklo_epi32(
        _mm_cvtsi64_si128((long long)(lower & 0x3f3f3f3f3f3f3f3f)), _mm_cvtsi64_si128((long long)upper));
    const __m128i pairs = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    _mm512_storeu_ps(
        factor,
        _mm512_mul_ps(_mm512_cvtph_ps(_mm256_set1_epi32(d)), _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(pairs))));
    IN_MEMORY(*(float(*)[FACTORS])factor);
}

/* Four times 16 bytes, a lane each: lane l has the l-th bytes of all four, the first lowest. */
INLINE_AVX512 __m512i side_by_side_avx512(__m512i order, __m512i bytes)
{
    const __m512i quarters = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, bytes), quarters);
}

INLINE_AVX512 __m512i four_avx512(const uint8_t *at)
{
    return side_by_side_avx512(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), _mm512_loadu_si512(at));
}

/* The same of two times 16 bytes, both twice. */
INLINE_AVX512 __m512i two_avx512(const uint8_t *at)
{
    return side_by_side_avx512(
        _mm512_setr_epi32(0, 4, 0, 4, 1, 5, 1, 5, 2, 6, 2, 6, 3, 7, 3, 7),
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)at)));
}

/* The lower four bits of each byte with what the other has above them. */
INLINE_AVX512 __m512i nibbles_avx512(__m512i low, __m512i high)
{
    return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(15), 0xe4);
}

INLINE_AVX512 __m512 counted_avx512(float first)
{
    const __m512 lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_ps(lanes, _mm512_set1_ps(first));
}

/* 6 bits from bit `at` of each lane on, less 32: as the last digits of a power of two they need no shift. */
INLINE_AVX512 __m512 sixes_avx512(__m512i codes, const int at)
{
    const __m512i mask = _mm512_set1_epi32(63 << at), power = _mm512_set1_epi32((150 - at) << 23);
    const __m512 sum = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(codes, mask, power, 0xea)); /* a & b | c */
    return _mm512_sub_ps(sum, _mm512_set1_ps((float)(1 << (23 - at)) + 32));
}

/* Stretches j and j + 1 of a large block, whose half has 64 bytes with the lower four bits of its codes. Here as below
   what is above a code may stay, for a permutation does not look at it. */
INLINE_AVX512 void large_avx512(const int kind, const uint8_t *block, const int j, const float *factor, __m512 *out)
{
    const int half = j / 4, is_second = j % 4 / 2;
    const __m512i low = four_avx512(block + (kind == Q4_K ? 16 : kind == Q5_K ? 48 : 0) + 64 * half);
    if (kind == Q6_K) {
        /* Bytes of a lane are the halves of stretches 0 and 1; above them are those of 2 and 3. */
        const __m512i high = two_avx512(block + 128 + 32 * half);
        const __m512i codes = is_second
            ? nibbles_avx512(_mm512_srli_epi32(low, 4), _mm512_srlv_epi16(high, _mm512_set1_epi32(2 << 16)))
            : nibbles_avx512(low, _mm512_sllv_epi16(high, _mm512_set1_epi32(2 << 16 | 4)));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            /* The last byte's upper bits are no digits of a float. */
            const __m512 code = i == 3 ? sixes_avx512(_mm512_srli_epi32(codes, 24), 0) : sixes_avx512(codes, i * 8);
            out[i] = _mm512_mul_ps(_mm512_set1_ps(factor[2 * j + i]), code);
        }
        return;
    }
    /* Bytes of a lane are the halves of stretches 0 and 2; above them are those of 1 and 3. */
    __m512i codes[2] = {low, low};
    if (kind == Q5_K) {
        const __m512i high = two_avx512(block + 16), above = _mm512_srli_epi32(low, 4);
        if (half == 0) {
            codes[0] = nibbles_avx512(low, _mm512_sllv_epi16(high, _mm512_set1_epi32(2 << 16 | 4)));
            codes[1] = nibbles_avx512(above, _mm512_sllv_epi16(high, _mm512_set1_epi32(1 << 16 | 3)));
        } else {
            codes[0] = nibbles_avx512(low, _mm512_srlv_epi16(high, _mm512_set1_epi32(2 << 16)));
            codes[1] = nibbles_avx512(above, _mm512_srlv_epi16(high, _mm512_set1_epi32(3 << 16 | 1)));
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m512 scale = _mm512_set1_ps(factor[2 * (j + i)]), minimum = _mm512_set1_ps(factor[2 * (j + i) + 1]);
        const int at = is_second * 16 + (kind == Q4_K ? i * 4 : 0);
        const __m512 choices = _mm512_fmsub_ps(scale, counted_avx512(0), minimum);
        const __m512i first = _mm512_srli_epi32(codes[i], at), second = _mm512_srli_epi32(codes[i], at + 8);
        if (kind == Q4_K) {
            out[2 * i] = _mm512_permutexvar_ps(first, choices);
            out[2 * i + 1] = _mm512_permutexvar_ps(second, choices);
        } else {
            const __m512 more = _mm512_fmsub_ps(scale, counted_avx512(16), minimum);
            out[2 * i] = _mm512_permutex2var_ps(choices, first, more);
            out[2 * i + 1] = _mm512_permutex2var_ps(choices, second, more);
        }
    }
}

/* 32 codes of 5 bits, in lane l that of column l and 16 bits above it that of column l + 16. */
INLINE_AVX512 __m512i fives_avx512(const uint8_t *bits, const uint8_t *low)
{
    const __m512i both = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)low));
    const __m512i twice = _mm512_set_epi32(
        0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808, 0x07070707,
        0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0x00000000);
    const __m512i turns = _mm512_setr_epi32(4, 3, 2, 1, 0, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21);
    int32_t all;
    memcpy(&all, bits, sizeof all);
    return nibbles_avx512(
        _mm512_srlv_epi16(_mm512_shuffle_epi8(both, twice), _mm512_set1_epi32(4 << 16)),
        _mm512_rolv_epi32(_mm512_set1_epi32(all), turns));
}

/* The scales of `count` small blocks, each followed by its minimum if it has one; up to four. */
INLINE_AVX512 void small_factors_avx512(const int kind, const uint8_t *block, const int count, float *factor)
{
    const int has_minimum = kind == Q4_1 || kind == Q5_1;
    uint64_t bits[2] = {0, 0};
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        uint32_t pair = 0;
        memcpy(&pair, block + i * bytes_of_block(kind), has_minimum ? 4 : 2);
        bits[has_minimum ? i / 2 : 0] |= (uint64_t)pair << (has_minimum ? i % 2 * 32 : i * 16);
    }
    if (has_minimum)
        _mm256_storeu_ps(factor, _mm256_cvtph_ps(_mm_set_epi64x((long long)bits[1], (long long)bits[0])));
    else
        _mm_storeu_ps(factor, _mm_cvtph_ps(_mm_cvtsi64_si128((long long)bits[0])));
}

/* What codes of a small block stand for. */
INLINE_AVX512 __m512 numbers_avx512(const int kind, const float *factor, __m512 codes)
{
    if (kind == Q4_1 || kind == Q5_1)
        return _mm512_fmadd_ps(_mm512_set1_ps(factor[0]), codes, _mm512_set1_ps(factor[1]));
    return _mm512_mul_ps(_mm512_set1_ps(factor[0]), codes);
}

INLINE_AVX512 void small_codes_avx512(const int kind, const uint8_t *block, const float *factor, __m512 *out)
{
    const uint8_t *low = block + codes_at(kind);
    if (kind == Q8_0) {
        for (int i = 0; i < 2; i++) {
            const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(low + 16 * i)));
            out[i] = numbers_avx512(kind, factor, _mm512_cvtepi32_ps(codes));
        }
        return;
    }
    const float least = kind == Q5_0 ? -16 : kind == Q4_0 ? -8 : 0;
    __m512 all = counted_avx512(least);
    if (kind == IQ4_NL)
        all = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)IQ4_NL_VALUES)));
    const __m512 choices = numbers_avx512(kind, factor, all);
    if (kind == Q5_0 || kind == Q5_1) {
        const __m512 more = numbers_avx512(kind, factor, counted_avx512(16 + least));
        const __m512i codes = fives_avx512(block + bits_at(kind), low);
        out[0] = _mm512_permutex2var_ps(choices, codes, more);
        out[1] = _mm512_permutex2var_ps(choices, _mm512_srli_epi32(codes, 16), more);
        return;
    }
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)low));
    out[0] = _mm512_permutexvar_ps(codes, choices);
    out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), choices);
}

INLINE_AVX512 void small_block_avx512(const int kind, const uint8_t *block, __m512 *out)
{
    float factor[FACTORS];
    small_factors_avx512(kind, block, 1, factor);
    small_codes_avx512(kind, block, factor, out);
}

/* Two stretches: j and j + 1 of a large block, or two small blocks. */
INLINE_AVX512 void line_avx512(const int kind, const uint8_t *block, const int j, const float *factor, __m512 *out)
{
    if (is_large(kind)) {
        large_avx512(kind, block, j, factor, out);
        return;
    }
    float some[FACTORS];
    small_factors_avx512(kind, block, LINE / STRETCH, some);
    IN_MEMORY(some);
#pragma GCC unroll 4
    for (int i = 0; i < LINE / STRETCH; i++)
        small_codes_avx512(
            kind, block + i * bytes_of_block(kind), some + (kind == Q4_1 || kind == Q5_1 ? 2 * i : i), out + 2 * i);
}
