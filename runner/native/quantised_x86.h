/* ggml's blocks for AVX2 and AVX-512. What is expanded is what quantised.h says, bit for bit. */

#define INLINE_AVX2 TARGET_AVX2 static inline __attribute__((always_inline))
#define INLINE_AVX512 TARGET_AVX512 static inline __attribute__((always_inline))

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

/* ---- AVX-512: 4 bits choose from what the 16 codes of a scale stand for, longer codes are converted ---- */

INLINE_AVX512 __m512 half_avx512(const uint8_t *at)
{
    int16_t bits;
    memcpy(&bits, at, sizeof bits);
    return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
}

INLINE_AVX512 void factors_avx512(const int kind, const uint8_t *block, float *factor)
{
    uint8_t scales[FACTORS];
    if (kind == Q6_K) {
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(block + 192)));
        _mm512_storeu_ps(factor, _mm512_mul_ps(half_avx512(block + 208), _mm512_cvtepi32_ps(wide)));
        return;
    }
    unpack_scales(block + 4, scales);
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)scales));
    const __m512 d = _mm512_mask_blend_ps(0xff00, half_avx512(block), half_avx512(block + 2));
    _mm512_storeu_ps(factor, _mm512_mul_ps(d, _mm512_cvtepi32_ps(wide)));
}

/* 16 bytes at w, a lane each. */
INLINE_AVX512 __m512i bytes_avx512(const uint8_t *w) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)w)); }

/* As codes_avx2. */
INLINE_AVX512 __m256i codes_avx512(const int kind, const uint8_t *block, const int j)
{
    __mmask32 bits; /* which codes are 16 more */
    __m256i low;
    if (kind == Q5_K) {
        low = codes_avx2(Q4_K, block + 32, j);
        bits = _mm256_test_epi8_mask(
            _mm256_loadu_si256((const __m256i *)(block + 16)), _mm256_set1_epi8((char)(1 << j)));
    } else if (kind == Q5_0 || kind == Q5_1) {
        low = codes_avx2(Q4_1, block + codes_at(kind) - codes_at(Q4_1), 0);
        memcpy(&bits, block + bits_at(kind), sizeof bits);
    } else {
        return codes_avx2(kind, block, j);
    }
    if (kind == Q5_0)
        return _mm256_mask_sub_epi8(low, ~bits, low, _mm256_set1_epi8(16));
    return _mm256_mask_add_epi8(low, bits, low, _mm256_set1_epi8(16));
}

/* What a code stands for, or 16 codes do. */
INLINE_AVX512 __m512 number_avx512(
    const int kind, const uint8_t *block, const int half, const float *factor, __m512 codes)
{
    if (kind == Q6_K)
        return _mm512_mul_ps(_mm512_set1_ps(factor[half]), codes);
    if (is_large(kind))
        return _mm512_fmsub_ps(_mm512_set1_ps(factor[half / 2]), codes, _mm512_set1_ps(factor[8 + half / 2]));
    if (kind == Q4_1 || kind == Q5_1)
        return _mm512_fmadd_ps(half_avx512(block), codes, half_avx512(block + 2));
    return _mm512_mul_ps(half_avx512(block), codes);
}

INLINE_AVX512 void stretch_avx512(const int kind, const uint8_t *block, const int j, const float *factor, __m512 *out)
{
    if (kind != Q4_0 && kind != Q4_1 && kind != IQ4_NL && kind != Q4_K) {
        const __m256i codes = codes_avx512(kind, block, j);
        const __m128i halves[2] = {_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1)};
        for (int i = 0; i < 2; i++)
            out[i] = number_avx512(
                kind, block, 2 * j + i, factor, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(halves[i])));
        return;
    }
    __m512 all = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (kind == Q4_0)
        all = _mm512_sub_ps(all, _mm512_set1_ps(8));
    else if (kind == IQ4_NL)
        all = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)IQ4_NL_VALUES)));
    const __m512 choices = number_avx512(kind, block, 2 * j, factor, all);
    /* A permutation looks at the lower four bits alone. */
    const uint8_t *w = kind == Q4_K ? block + 16 + j / 2 * 32 : block + codes_at(kind);
    const __m512i first = bytes_avx512(w), second = kind == Q4_K ? bytes_avx512(w + 16) : _mm512_srli_epi32(first, 4);
    const int is_upper = kind == Q4_K && j % 2;
    out[0] = _mm512_permutexvar_ps(is_upper ? _mm512_srli_epi32(first, 4) : first, choices);
    out[1] = _mm512_permutexvar_ps(is_upper ? _mm512_srli_epi32(second, 4) : second, choices);
}
