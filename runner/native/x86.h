/* The panel for the instruction sets of x86: AVX2, AVX-512, and AVX-512 with byte permutes. */

#include <immintrin.h>

/* e4m3 to float16: the sign stays, seven bits move up by seven. That is the value / 256, subnormals included; of the two
   NaN codes it makes 480, so they are looked for. */
#define FP8_AS_F16 256.0f

/* ---- AVX2 ---- */

#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
typedef struct { __m256 low, high; } lanes_avx2;

TARGET_AVX2 static inline lanes_avx2 set_avx2(float f)
{
    return (lanes_avx2){_mm256_set1_ps(f), _mm256_set1_ps(f)};
}
TARGET_AVX2 static inline lanes_avx2 load_avx2(const float *from)
{
    return (lanes_avx2){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
TARGET_AVX2 static inline lanes_avx2 load_some_avx2(const float *from, int64_t count)
{
    float some[LANES] = {0};
    memcpy(some, from, (size_t)count * sizeof *from);
    return load_avx2(some);
}
TARGET_AVX2 static inline void store_avx2(float *to, lanes_avx2 v)
{
    _mm256_storeu_ps(to, v.low);
    _mm256_storeu_ps(to + 8, v.high);
}
TARGET_AVX2 static inline lanes_avx2 fma_avx2(lanes_avx2 a, lanes_avx2 b, lanes_avx2 c)
{
    return (lanes_avx2){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
TARGET_AVX2 static inline float sum8(__m256 v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
TARGET_AVX2 static inline float sum_avx2(lanes_avx2 v) { return sum8(_mm256_add_ps(v.low, v.high)); }

TARGET_AVX2 static inline void decode_avx2(int kind, const uint8_t *w, int64_t count, float *out)
{
    int64_t i = 0;
    switch (kind) {
    case FP8_E4M3: {
        const __m256i mask = _mm256_set1_epi16((short)0xBFFF);
        const __m256 factor = _mm256_set1_ps(FP8_AS_F16);
        const __m128i digits = _mm_set1_epi8(0x7f);
        __m128i nan = _mm_setzero_si128();
        for (; i + 16 <= count; i += 16) {
            const __m128i codes = _mm_loadu_si128((const __m128i *)(w + i));
            const __m256i bits = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), mask);
            nan = _mm_or_si128(nan, _mm_cmpeq_epi8(_mm_and_si128(codes, digits), digits));
            _mm256_store_ps(out + i, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), factor));
            _mm256_store_ps(out + i + 8, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)), factor));
        }
        if (_mm_movemask_epi8(nan))
            i = 0;
        break;
    }
    case BF16:
        for (; i + 8 <= count; i += 8) {
            const __m128i bits = _mm_loadu_si128((const __m128i *)(w + 2 * i));
            _mm256_store_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
        }
        break;
    case F16:
        for (; i + 8 <= count; i += 8)
            _mm256_store_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + 2 * i))));
        break;
    default:
        memcpy(out, w, (size_t)count * 4);
        i = count;
    }
    if (i < count || count % LANES)
        decode_c(kind, w + i * element_bytes(kind), count - i, out + i);
}

#define NAME(x) x##_avx2
#define TARGET TARGET_AVX2
#define V lanes_avx2
#define ZERO() set_avx2(0.0f)
#define SET(f) set_avx2(f)
#define LOAD(p) load_avx2(p)
#define STORE(p, v) store_avx2(p, v)
#define FMA(a, b, c) fma_avx2(a, b, c)
#define SUM(v) sum_avx2(v)
#define DECODE(kind, w, n, out) decode_avx2(kind, w, n, out)
#include "panel.h"

/* ---- AVX-512 ---- */

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))

TARGET_AVX512 static inline __m512 load_some_avx512(const float *from, int64_t count)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
}
TARGET_AVX512 static inline float sum_avx512(__m512 v)
{
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* All but FP8, 16 at a time. */
TARGET_AVX512 static inline int64_t decode_plain_avx512(int kind, const uint8_t *w, int64_t count, float *out)
{
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m512 v;
        if (kind == BF16) {
            const __m256i bits = _mm256_loadu_si256((const __m256i *)(w + 2 * i));
            v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        } else if (kind == F16) {
            v = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + 2 * i)));
        } else {
            v = _mm512_loadu_ps(w + 4 * i);
        }
        _mm512_store_ps(out + i, v);
    }
    return i;
}

TARGET_AVX512 static inline void decode_avx512(int kind, const uint8_t *w, int64_t count, float *out)
{
    int64_t i = 0;
    if (kind == FP8_E4M3) {
        const __m512i mask = _mm512_set1_epi16((short)0xBFFF);
        const __m512 factor = _mm512_set1_ps(FP8_AS_F16);
        const __m256i digits = _mm256_set1_epi8(0x7f);
        __mmask32 nan = 0;
        for (; i + 32 <= count; i += 32) {
            const __m256i codes = _mm256_loadu_si256((const __m256i *)(w + i));
            const __m512i bits = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7), mask);
            nan |= _mm256_cmpeq_epi8_mask(_mm256_and_si256(codes, digits), digits);
            _mm512_store_ps(out + i, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)), factor));
            _mm512_store_ps(out + i + 16, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)), factor));
        }
        if (nan)
            i = 0;
    } else {
        i = decode_plain_avx512(kind, w, count, out);
    }
    if (i < count || count % LANES)
        decode_c(kind, w + i * element_bytes(kind), count - i, out + i);
}

#define NAME(x) x##_avx512
#define TARGET TARGET_AVX512
#define V __m512
#define ZERO() _mm512_setzero_ps()
#define SET(f) _mm512_set1_ps(f)
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM(v) sum_avx512(v)
#define DECODE(kind, w, n, out) decode_avx512(kind, w, n, out)
#include "panel.h"

/* ---- AVX-512 with byte permutes: FP8 by table, the upper two bytes of each float ---- */

#define TARGET_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,fma")))

alignas(64) static uint8_t E4M3_UPPER[128], E4M3_LOWER[128], E4M3_ORDER[64];

#define load_some_vbmi load_some_avx512
TARGET_VBMI static inline void decode_vbmi(int kind, const uint8_t *w, int64_t count, float *out)
{
    int64_t i = 0;
    if (kind == FP8_E4M3) {
        const __m512i upper0 = _mm512_load_si512(E4M3_UPPER), upper1 = _mm512_load_si512(E4M3_UPPER + 64);
        const __m512i lower0 = _mm512_load_si512(E4M3_LOWER), lower1 = _mm512_load_si512(E4M3_LOWER + 64);
        const __m512i order = _mm512_load_si512(E4M3_ORDER);
        const __m512i sign = _mm512_set1_epi8((char)0x80), odd = _mm512_set1_epi32((int)0xffff0000);
        for (; i + 64 <= count; i += 64) {
            const __m512i codes = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(w + i));
            const __m512i upper = _mm512_ternarylogic_epi64(
                _mm512_permutex2var_epi8(upper0, codes, upper1), codes, sign, 0xF8); /* a | b & c */
            const __m512i lower = _mm512_permutex2var_epi8(lower0, codes, lower1);
            const __m512i first = _mm512_unpacklo_epi8(lower, upper), second = _mm512_unpackhi_epi8(lower, upper);
            _mm512_store_si512(out + i, _mm512_slli_epi32(first, 16));
            _mm512_store_si512(out + i + 16, _mm512_and_si512(first, odd));
            _mm512_store_si512(out + i + 32, _mm512_slli_epi32(second, 16));
            _mm512_store_si512(out + i + 48, _mm512_and_si512(second, odd));
        }
    } else {
        i = decode_plain_avx512(kind, w, count, out);
    }
    if (i < count || count % LANES)
        decode_c(kind, w + i * element_bytes(kind), count - i, out + i);
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
#define ZERO() _mm512_setzero_ps()
#define SET(f) _mm512_set1_ps(f)
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM(v) sum_avx512(v)
#define DECODE(kind, w, n, out) decode_vbmi(kind, w, n, out)
#include "panel.h"
