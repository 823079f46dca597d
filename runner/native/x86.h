/* The panel for the instruction sets of x86: AVX2, AVX-512, and AVX-512 with byte permutes. */

#include <immintrin.h>

#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))

#include "quantised_x86.h"

/* e4m3 to float16: the sign stays, seven bits move up by seven. That is the value / 256, subnormals included; of the two
   NaN codes it makes 480, so they are looked for: the largest of the seven bits is kept. Sums of these are multiplied by
   256 with their scale; products under 2^-118 are zeros here, not with the tables below. */
#define FP8_AS_F16 (1 / 256.0f)

/* ---- AVX2 ---- */

TARGET_AVX2 static inline __m256 load_some_avx2(const float *from, int64_t count)
{
    float some[8] = {0};
    if (count > 0)
        memcpy(some, from, (size_t)(count < 8 ? count : 8) * sizeof *from);
    return _mm256_loadu_ps(some);
}
TARGET_AVX2 static inline float sum_avx2(const float *from)
{
    const __m256 v = _mm256_add_ps(_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

typedef struct { __m256i most; } table_avx2;

TARGET_AVX2 static inline int has_nan_avx2(table_avx2 table)
{
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(table.most, _mm256_set1_epi8(0x7f))) != 0;
}

TARGET_AVX2 static inline __attribute__((always_inline)) void decode_avx2(
    const int kind, table_avx2 *table, const uint8_t *w, __m256 *out)
{
    if (kind == FP8_E4M3) {
        const __m256i mask = _mm256_set1_epi16((short)0xBFFF);
        const __m256i digits = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)w), _mm256_set1_epi8(0x7f));
        table->most = _mm256_max_epu8(table->most, digits);
        for (int j = 0; j < 2; j++) {
            const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + 16 * j)));
            const __m256i bits = _mm256_and_si256(_mm256_slli_epi16(codes, 7), mask);
            out[2 * j] = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
            out[2 * j + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
        }
        return;
    }
    for (int j = 0; j < 4; j++)
        if (kind == BF16) {
            const __m128i bits = _mm_loadu_si128((const __m128i *)(w + 16 * j));
            out[j] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
        } else if (kind == F16) {
            out[j] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + 16 * j)));
        } else {
            out[j] = _mm256_loadu_ps((const float *)(w + 32 * j));
        }
}

#define NAME(x) x##_avx2
#define TARGET TARGET_AVX2
#define V __m256
#define WIDTH 8
#define ZERO() _mm256_setzero_ps()
#define SET(f) _mm256_set1_ps(f)
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define LOAD_SOME(p, n) load_some_avx2(p, n)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SUM(p) sum_avx2(p)
#define STREAMS 2
#define STREAM_TOKENS 2
#define TILE_TOKENS 3
#define UNIT 32
#define TABLE table_avx2
#define TABLE_LOAD() {_mm256_setzero_si256()}
#define DECODE(kind, table, w, out) decode_avx2(kind, &table, w, out)
#define FP8_UNIT FP8_AS_F16
#define HAS_NAN(table) has_nan_avx2(table)
#define BLOCK_FACTORS(kind, block, factor) factors_avx2(kind, block, factor)
#define SPAN STRETCH
#define SPAN_OF(kind, block, j, factor, out) stretch_avx2(kind, block, j, factor, out)
#define STRETCH_OF(kind, block, out) small_block_avx2(kind, block, out)
#define BLOCK_STREAMS 2
#define BLOCKS(x) x##_avx2
#include "quantised_rows.h"
#include "panel.h"

/* ---- AVX-512 ---- */

/* All but FP8. */
TARGET_AVX512 static inline __attribute__((always_inline)) void decode_plain_avx512(
    const int kind, const uint8_t *w, __m512 *out)
{
    for (int j = 0; j < 4; j++)
        if (kind == BF16) {
            const __m256i bits = _mm256_loadu_si256((const __m256i *)(w + 32 * j));
            out[j] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        } else if (kind == F16) {
            out[j] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + 32 * j)));
        } else {
            out[j] = _mm512_loadu_ps(w + 64 * j);
        }
}

typedef struct { __m512i most; } table_avx512;

TARGET_AVX512 static inline int has_nan_avx512(table_avx512 table)
{
    return _mm512_cmpeq_epi8_mask(table.most, _mm512_set1_epi8(0x7f)) != 0;
}

TARGET_AVX512 static inline __attribute__((always_inline)) void decode_avx512(
    const int kind, table_avx512 *table, const uint8_t *w, __m512 *out)
{
    if (kind != FP8_E4M3) {
        decode_plain_avx512(kind, w, out);
        return;
    }
    const __m512i mask = _mm512_set1_epi16((short)0xBFFF);
    table->most = _mm512_max_epu8(table->most, _mm512_and_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(0x7f)));
    for (int j = 0; j < 2; j++) {
        const __m512i codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(w + 32 * j)));
        const __m512i bits = _mm512_and_si512(_mm512_slli_epi16(codes, 7), mask);
        out[2 * j] = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
        out[2 * j + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
    }
}

#define NAME(x) x##_avx512
#define TARGET TARGET_AVX512
#define V __m512
#define WIDTH 16
#define ZERO() _mm512_setzero_ps()
#define SET(f) _mm512_set1_ps(f)
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define LOAD_SOME(p, n) _mm512_maskz_loadu_ps((__mmask16)((1u << ((n) < 16 ? (n) : 16)) - 1), p)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM(p) sum_avx2(p)
#define STREAMS 4
#define STREAM_TOKENS 3
#define TILE_TOKENS 6
#define UNIT 64
#define TABLE table_avx512
#define TABLE_LOAD() {_mm512_setzero_si512()}
#define DECODE(kind, table, w, out) decode_avx512(kind, &table, w, out)
#define FP8_UNIT FP8_AS_F16
#define HAS_NAN(table) has_nan_avx512(table)
#define BLOCK_FACTORS(kind, block, factor) factors_avx512(kind, block, factor)
#define SPAN LINE
#define SPAN_OF(kind, block, j, factor, out) line_avx512(kind, block, j, factor, out)
#define STRETCH_OF(kind, block, out) small_block_avx512(kind, block, out)
#define BLOCK_STREAMS 4
#define BLOCKS(x) x##_avx512
#include "quantised_rows.h"
#include "panel.h"

/* ---- AVX-512 with byte permutes: FP8 by table, the upper two bytes of each float ---- */

#define TARGET_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,fma,f16c")))

alignas(64) static uint8_t E4M3_UPPER[128], E4M3_LOWER[128], E4M3_ORDER[64];

typedef struct { __m512i upper0, upper1, lower0, lower1, order; } table_vbmi;

TARGET_VBMI static inline table_vbmi table_load_vbmi(void)
{
    return (table_vbmi){_mm512_load_si512(E4M3_UPPER), _mm512_load_si512(E4M3_UPPER + 64), _mm512_load_si512(E4M3_LOWER),
                        _mm512_load_si512(E4M3_LOWER + 64), _mm512_load_si512(E4M3_ORDER)};
}

/* The uppermost byte of each code's float, and the next; the two below are 0. */
TARGET_VBMI static inline __attribute__((always_inline)) __m512i upper_bytes_vbmi(table_vbmi table, __m512i codes)
{
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    return _mm512_ternarylogic_epi64(
        _mm512_permutex2var_epi8(table.upper0, codes, table.upper1), codes, sign, 0xF8); /* a | b & c */
}
TARGET_VBMI static inline __attribute__((always_inline)) __m512i lower_bytes_vbmi(table_vbmi table, __m512i codes)
{
    return _mm512_permutex2var_epi8(table.lower0, codes, table.lower1);
}

TARGET_VBMI static inline __attribute__((always_inline)) void decode_vbmi(
    const int kind, table_vbmi table, const uint8_t *w, __m512 *out)
{
    if (kind != FP8_E4M3) {
        decode_plain_avx512(kind, w, out);
        return;
    }
    const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
    const __m512i codes = _mm512_permutexvar_epi8(table.order, _mm512_loadu_si512(w));
    const __m512i upper = upper_bytes_vbmi(table, codes), lower = lower_bytes_vbmi(table, codes);
    const __m512i first = _mm512_unpacklo_epi8(lower, upper), second = _mm512_unpackhi_epi8(lower, upper);
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(first, odd));
    out[2] = _mm512_castsi512_ps(_mm512_slli_epi32(second, 16));
    out[3] = _mm512_castsi512_ps(_mm512_and_si512(second, odd));
}

static void make_tables(void)
{
    for (int code = 0; code < 128; code++) {
        uint32_t bits;
        memcpy(&bits, &E4M3[code], sizeof bits);
        E4M3_UPPER[code] = (uint8_t)(bits >> 24);
        E4M3_LOWER[code] = (uint8_t)(bits >> 16);
    }
    /* Unpacking takes bytes 0 to 7 of each 16 for the first 32 numbers and splits even from odd; so column 16 j + l of
       64 is put where it comes out as lane l of vector j. */
    for (int j = 0; j < 4; j++)
        for (int l = 0; l < LANES; l++)
            E4M3_ORDER[l / 4 * 16 + j / 2 * 8 + l % 4 * 2 + j % 2] = (uint8_t)(16 * j + l);
}

#define NAME(x) x##_vbmi
#define TARGET TARGET_VBMI
#define V __m512
#define WIDTH 16
#define ZERO() _mm512_setzero_ps()
#define SET(f) _mm512_set1_ps(f)
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define LOAD_SOME(p, n) _mm512_maskz_loadu_ps((__mmask16)((1u << ((n) < 16 ? (n) : 16)) - 1), p)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM(p) sum_avx2(p)
#define STREAMS 4
#define STREAM_TOKENS 3
#define TILE_TOKENS 6
#define UNIT 64
#define TABLE table_vbmi
#define TABLE_LOAD() table_load_vbmi()
#define DECODE(kind, table, w, out) decode_vbmi(kind, table, w, out)
#define FP8_UNIT 1.0f
#define HAS_NAN(table) 0
#define BLOCKS(x) x##_avx512
#include "panel.h"
