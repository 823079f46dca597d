/* Products of stored weights with activations, on a few threads: FP8 blocks, bfloat16, float16, float32.

   Plain functions on pointers, called through ctypes; no torch, no Python headers. What is computed, and what stands in
   for this file where it cannot be built, is runner/fp8.py. Weights and scales may begin at any byte. Every sum has one
   order (panel.h), whatever the number of tokens and threads, so that neither changes a bit. */

#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PIECE 128  /* columns that are summed before their scale is multiplied; DeepSeek's blocks are as wide */
#define LANES 16
#define TOKENS 32  /* rows of activations that share one expansion of the weights; their sums stay in the L1 cache */
#define AHEAD 8192 /* bytes between reading a weight and asking memory for it: 35 % faster than 0 */
#define MAX_THREADS 64

enum { FP8_E4M3, BF16, F16, F32 };

typedef struct {
    const void *weight; /* [rows, columns] */
    const void *scale;  /* [ceil(rows / block_rows), ceil(columns / block_columns)] float32; FP8 alone has it */
    int64_t rows, columns;
    int32_t block_rows, block_columns;
    int32_t kind;
    int32_t reserved;
} rk_matrix;

static inline int64_t element_bytes(int kind) { return kind == FP8_E4M3 ? 1 : kind == F32 ? 4 : 2; }

/* Columns from begin on that belong together: of one block, at most PIECE of them. */
static inline int64_t piece_size(const rk_matrix *a, int64_t begin)
{
    int64_t size = a->columns - begin;
    if (a->scale != NULL) {
        const int64_t left = a->block_columns - begin % a->block_columns;
        size = left < size ? left : size;
    }
    return size < PIECE ? size : PIECE;
}

static inline float scale_of(const rk_matrix *a, int64_t row, int64_t column)
{
    if (a->scale == NULL)
        return 1.0f;
    const int64_t blocks = (a->columns + a->block_columns - 1) / a->block_columns;
    float scale;
    memcpy(&scale, (const float *)a->scale + row / a->block_rows * blocks + column / a->block_columns, sizeof scale);
    return scale;
}

static inline void prefetch(const uint8_t *at, int64_t size)
{
    for (int64_t i = 0; i < size; i += 64)
        __builtin_prefetch(at + i, 0, 3);
}

/* ---- one stored number ---- */

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

/* ---- portable ---- */

typedef struct { float lane[LANES]; } lanes_c;

static inline lanes_c set_c(float f)
{
    lanes_c v;
    for (int l = 0; l < LANES; l++)
        v.lane[l] = f;
    return v;
}
static inline lanes_c load_c(const float *from)
{
    lanes_c v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline lanes_c load_some_c(const float *from, int64_t count)
{
    lanes_c v = set_c(0.0f);
    memcpy(&v, from, (size_t)count * sizeof *from);
    return v;
}
static inline void store_c(float *to, lanes_c v) { memcpy(to, &v, sizeof v); }
static inline lanes_c fma_c(lanes_c a, lanes_c b, lanes_c c)
{
    for (int l = 0; l < LANES; l++)
        c.lane[l] += a.lane[l] * b.lane[l];
    return c;
}
static inline float sum_c(lanes_c v)
{
    for (int half_lanes = LANES / 2; half_lanes; half_lanes /= 2)
        for (int l = 0; l < half_lanes; l++)
            v.lane[l] += v.lane[l + half_lanes];
    return v.lane[0];
}
static inline void decode_c(int kind, const uint8_t *w, int64_t count, float *out)
{
    switch (kind) {
    case FP8_E4M3:
        for (int64_t i = 0; i < count; i++)
            out[i] = E4M3[w[i]];
        break;
    case BF16:
        for (int64_t i = 0; i < count; i++)
            out[i] = bf16(w + 2 * i);
        break;
    case F16:
        for (int64_t i = 0; i < count; i++)
            out[i] = f16(w + 2 * i);
        break;
    default:
        memcpy(out, w, (size_t)count * 4);
    }
    for (int64_t i = count; i % LANES; i++)
        out[i] = 0.0f;
}

#define NAME(x) x##_c
#define TARGET
#define V lanes_c
#define ZERO() set_c(0.0f)
#define SET(f) set_c(f)
#define LOAD(p) load_c(p)
#define STORE(p, v) store_c(p, v)
#define FMA(a, b, c) fma_c(a, b, c)
#define SUM(v) sum_c(v)
#define DECODE(kind, w, n, out) decode_c(kind, w, n, out)
#include "panel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
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
#endif

/* ---- which instruction set ---- */

enum { PORTABLE, AVX2, AVX512, AVX512_VBMI, VARIANTS };

typedef void panel_fn(const rk_matrix *, int64_t, int64_t, const float *, int64_t, float *);

static panel_fn *panel = panel_c;

/* Whether this processor, and this build, can do it. */
int rk_supports(int variant)
{
#ifdef X86
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (variant) {
    case AVX2:
        return avx2;
    case AVX512:
        return avx512;
    case AVX512_VBMI:
        return avx512 && __builtin_cpu_supports("avx512vbmi");
    }
#endif
    return variant == PORTABLE;
}

/* ---- threads ---- */

#define WORTH_SHARING (1 << 18) /* bytes of weights; fewer are gone over before another thread has begun */
#define SPINS 2000 /* looks for the next job before a thread sleeps: some 20 us, a wake-up takes longer */

typedef void job_fn(const void *context, int64_t chunk);

static struct {
    pthread_mutex_t caller, lock;
    pthread_cond_t wake;
    int threads; /* the caller's included */
    int sleeping;
    atomic_uint job;
    atomic_int working;
    atomic_int_fast64_t next;
    int64_t chunks;
    job_fn *run;
    const void *context;
    int is_ending;
    pthread_t started[MAX_THREADS];
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER,
          .threads = 1};

static inline void pause_briefly(void)
{
#ifdef X86
    _mm_pause();
#endif
}

/* Products of denormal numbers take thirty times as long, and are nothing: they are zeros here, in every thread. */
static inline unsigned flush_denormals(void)
{
#ifdef X86
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}

static inline void restore_denormals(unsigned before)
{
#ifdef X86
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

static void take_chunks(void)
{
    for (int64_t chunk; (chunk = atomic_fetch_add(&pool.next, 1)) < pool.chunks;)
        pool.run(pool.context, chunk);
}

static void *serve(void *seen_job)
{
    unsigned seen = (unsigned)(uintptr_t)seen_job;
    flush_denormals();
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&pool.job, memory_order_acquire) == seen; i++)
            pause_briefly();
        if (atomic_load(&pool.job) == seen) {
            pthread_mutex_lock(&pool.lock);
            pool.sleeping++;
            while (atomic_load(&pool.job) == seen)
                pthread_cond_wait(&pool.wake, &pool.lock);
            pool.sleeping--;
            pthread_mutex_unlock(&pool.lock);
        }
        seen = atomic_load(&pool.job);
        if (pool.is_ending)
            return NULL;
        take_chunks();
        atomic_fetch_sub(&pool.working, 1);
    }
}

static void publish(void)
{
    atomic_store(&pool.working, pool.threads - 1);
    atomic_fetch_add(&pool.job, 1);
    pthread_mutex_lock(&pool.lock);
    if (pool.sleeping)
        pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

/* Make `chunks` calls on all threads, that go over `bytes` of weights; they end before this does. */
static void run_chunks(job_fn *run, const void *context, int64_t chunks, int64_t bytes)
{
    const unsigned before = flush_denormals();
    if (pool.threads == 1 || chunks == 1 || bytes < WORTH_SHARING) {
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            run(context, chunk);
    } else {
        pool.run = run;
        pool.context = context;
        pool.chunks = chunks;
        atomic_store(&pool.next, 0);
        publish();
        take_chunks();
        for (int spins = 0; atomic_load(&pool.working) != 0; spins++) {
            pause_briefly();
            if (spins % 1024 == 1023)
                sched_yield(); /* the machine has fewer cores than there are threads */
        }
    }
    restore_denormals(before);
}

static void end_threads(void)
{
    if (pool.threads > 1) {
        pool.is_ending = 1;
        publish();
        for (int i = 1; i < pool.threads; i++)
            pthread_join(pool.started[i], NULL);
        pool.is_ending = 0;
    }
    pool.threads = 1;
}

static void forget_threads(void)
{
    /* A forked child has none of them. */
    pool.threads = 1;
    pool.sleeping = 0;
    pthread_mutex_init(&pool.caller, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
}

/* Take an instruction set that rk_supports, and so many threads; returns how many there are. */
int rk_start(int variant, int threads)
{
    static panel_fn *const panels[VARIANTS] = {
        panel_c,
#ifdef X86
        panel_avx2, panel_avx512, panel_vbmi,
#endif
    };
    static int is_ready;
    pthread_mutex_lock(&pool.caller);
    if (!is_ready) {
        for (int code = 0; code < 256; code++)
            E4M3[code] = e4m3((uint8_t)code);
#ifdef X86
        make_tables();
#endif
        pthread_atfork(NULL, NULL, forget_threads);
        is_ready = 1;
    }
    panel = panels[variant];
    end_threads();
    threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    const uintptr_t seen = atomic_load(&pool.job);
    for (int i = 1; i < threads; i++) {
        if (pthread_create(&pool.started[i], NULL, serve, (void *)seen) != 0)
            break;
        pool.threads = i + 1;
    }
    const int started = pool.threads;
    pthread_mutex_unlock(&pool.caller);
    return started;
}

/* ---- products ---- */

#define CHUNK_BYTES (1 << 19) /* of weights: small enough to share out evenly, large enough to stream */

/* Rows of a chunk, a multiple of 16. */
static int64_t chunk_rows(const rk_matrix *a)
{
    const int64_t rows = CHUNK_BYTES / (a->columns * element_bytes(a->kind) + 1);
    return rows < 16 ? 16 : rows & ~(int64_t)15;
}

static int64_t matrix_bytes(const rk_matrix *a) { return a->rows * a->columns * element_bytes(a->kind); }

static int64_t count_chunks(int64_t rows, int64_t size) { return (rows + size - 1) / size; }

/* Rows begin to end of y = a x, for any number of tokens. */
static void multiply(const rk_matrix *a, int64_t begin, int64_t end, const float *x, int64_t tokens, float *y)
{
    end = end < a->rows ? end : a->rows;
    for (int64_t t = 0; t < tokens; t += TOKENS) {
        const int64_t some = tokens - t < TOKENS ? tokens - t : TOKENS;
        panel(a, begin, end, x + t * a->columns, some, y + t * a->rows);
    }
}

typedef struct {
    const rk_matrix *a;
    const float *x;
    int64_t tokens, size;
    float *y;
} linear_job;

static void run_linear(const void *context, int64_t chunk)
{
    const linear_job *job = context;
    multiply(job->a, chunk * job->size, (chunk + 1) * job->size, job->x, job->tokens, job->y);
}

/* y = a x: x is [tokens, columns], y is [tokens, rows]. */
void rk_linear(const rk_matrix *a, const float *x, int64_t tokens, float *y)
{
    const linear_job job = {a, x, tokens, chunk_rows(a), y};
    pthread_mutex_lock(&pool.caller);
    run_chunks(run_linear, &job, count_chunks(a->rows, job.size), matrix_bytes(a) * tokens);
    pthread_mutex_unlock(&pool.caller);
}

/* ---- the floor ---- */

typedef struct {
    const uint8_t *memory;
    int64_t size;
    atomic_uint_fast64_t *sum;
} read_job;

static uint64_t read_c(const uint8_t *at, int64_t size)
{
    uint64_t sum[8] = {0};
    for (int64_t i = 0; i + 64 <= size; i += 64) {
        uint64_t words[8];
        __builtin_prefetch(at + i + AHEAD, 0, 3);
        memcpy(words, at + i, sizeof words);
        for (int j = 0; j < 8; j++)
            sum[j] += words[j];
    }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

#ifdef X86
TARGET_AVX2 static uint64_t read_avx2(const uint8_t *at, int64_t size)
{
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int64_t i = 0; i + 64 <= size; i += 64) {
        __builtin_prefetch(at + i + AHEAD, 0, 3);
        low = _mm256_add_epi64(low, _mm256_loadu_si256((const __m256i *)(at + i)));
        high = _mm256_add_epi64(high, _mm256_loadu_si256((const __m256i *)(at + i + 32)));
    }
    uint64_t words[4];
    _mm256_storeu_si256((__m256i *)words, _mm256_add_epi64(low, high));
    return words[0] + words[1] + words[2] + words[3];
}
#endif

static void run_read(const void *context, int64_t chunk)
{
    const read_job *job = context;
    const uint8_t *at = job->memory + chunk * CHUNK_BYTES;
    const int64_t left = job->size - chunk * CHUNK_BYTES, size = left < CHUNK_BYTES ? left : CHUNK_BYTES;
#ifdef X86
    if (panel != panel_c) {
        atomic_fetch_add(job->sum, read_avx2(at, size));
        return;
    }
#endif
    atomic_fetch_add(job->sum, read_c(at, size));
}

/* Read memory as the products do, and nothing else: no product can be faster. The sum of its whole 64-byte lines, as
   64-bit numbers, keeps it from being left out. */
uint64_t rk_read(const void *memory, int64_t size)
{
    atomic_uint_fast64_t sum = 0;
    const read_job job = {memory, size, &sum};
    pthread_mutex_lock(&pool.caller);
    run_chunks(run_read, &job, count_chunks(size, CHUNK_BYTES), size);
    pthread_mutex_unlock(&pool.caller);
    return atomic_load(&sum);
}

/* ---- experts ---- */

typedef struct {
    rk_matrix gate, up, down;
    const int64_t *token; /* which rows of x it is for; NULL for all of them in order */
    const float *weight;  /* of each in the sum; NULL for 1 */
    int64_t tokens;
} rk_expert;

typedef struct {
    const rk_expert *experts;
    int64_t count, hidden, size;
    const int64_t *first; /* chunks before each expert's own; the last is their number */
    const float *const *x;
    float *const *h, *const *up, *const *y;
    float *out;
    int64_t tokens;
    int rounds;
} experts_job;

static inline float round_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) /* a NaN stays one */
        return value;
    return float_of_bits((bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u);
}

/* silu(gate x) * (up x), a few rows of one expert. */
static void run_gate_up(const void *context, int64_t chunk)
{
    const experts_job *job = context;
    int64_t e = 0;
    while (chunk >= job->first[e + 1])
        e++;
    const rk_expert *expert = job->experts + e;
    const int64_t width = expert->gate.rows, begin = (chunk - job->first[e]) * chunk_rows(&expert->gate);
    int64_t end = begin + chunk_rows(&expert->gate);
    end = end < width ? end : width;
    float *h = job->h[e], *up = job->up[e];
    multiply(&expert->gate, begin, end, job->x[e], expert->tokens, h);
    multiply(&expert->up, begin, end, job->x[e], expert->tokens, up);
    for (int64_t t = 0; t < expert->tokens; t++)
        for (int64_t i = t * width + begin; i < t * width + end; i++) {
            const float value = h[i] / (1.0f + expf(-h[i])) * up[i];
            h[i] = job->rounds ? round_to_bf16(value) : value;
        }
}

/* The weighted sum of the experts, in their order, of a few numbers of every token. */
static void run_down(const void *context, int64_t chunk)
{
    const experts_job *job = context;
    const int64_t begin = chunk * job->size, hidden = job->hidden;
    const int64_t end = begin + job->size < hidden ? begin + job->size : hidden;
    for (int64_t t = 0; t < job->tokens; t++)
        memset(job->out + t * hidden + begin, 0, (size_t)(end - begin) * sizeof(float));
    for (int64_t e = 0; e < job->count; e++) {
        const rk_expert *expert = job->experts + e;
        multiply(&expert->down, begin, end, job->h[e], expert->tokens, job->y[e]);
        for (int64_t t = 0; t < expert->tokens; t++) {
            const float weight = expert->weight ? expert->weight[t] : 1.0f;
            float *out = job->out + (expert->token ? expert->token[t] : t) * hidden;
            const float *y = job->y[e] + t * hidden;
            for (int64_t i = begin; i < end; i++)
                out[i] += weight * y[i];
        }
    }
}

/* Floats of working memory that rk_experts needs. */
int64_t rk_experts_room(const rk_expert *experts, int64_t count)
{
    int64_t room = 0;
    for (int64_t e = 0; e < count; e++)
        room += experts[e].tokens * (2 * experts[e].gate.rows + 2 * experts[e].gate.columns);
    return room;
}

/* out = the sum over experts of weight * down(silu(gate x) * up x), in their order; x and out are [tokens, hidden].

   With `rounds` the products' other operands are rounded to bfloat16: h here, x by the caller. Returns 0, or -1 when
   there is no memory. */
int rk_experts(const rk_expert *experts, int64_t count, const float *x, int64_t tokens, float *out, float *room, int rounds)
{
    const int64_t hidden = count ? experts[0].gate.columns : 0;
    void *memory = malloc((size_t)(count + 1) * (sizeof(int64_t) + 4 * sizeof(float *)));
    if (memory == NULL)
        return -1;
    float **inputs = memory, **h = inputs + count, **up = h + count, **y = up + count;
    int64_t *first = (int64_t *)(y + count);
    int64_t bytes = 0;
    first[0] = 0;
    for (int64_t e = 0; e < count; e++) {
        const rk_expert *expert = experts + e;
        const int64_t width = expert->gate.rows;
        h[e] = room;
        up[e] = h[e] + expert->tokens * width;
        y[e] = up[e] + expert->tokens * width;
        inputs[e] = y[e] + expert->tokens * hidden;
        room = inputs[e] + expert->tokens * hidden;
        bytes += matrix_bytes(&expert->gate) * expert->tokens;
        first[e + 1] = first[e] + count_chunks(width, chunk_rows(&expert->gate));
        for (int64_t t = 0; t < expert->tokens; t++)
            memcpy(inputs[e] + t * hidden, x + (expert->token ? expert->token[t] : t) * hidden, (size_t)hidden * sizeof *x);
    }
    experts_job job = {experts, count, hidden, 0, first, (const float *const *)inputs, h, up, y, out, tokens, rounds};
    pthread_mutex_lock(&pool.caller);
    run_chunks(run_gate_up, &job, first[count], 2 * bytes);
    job.size = count ? chunk_rows(&experts[0].down) : 1;
    run_chunks(run_down, &job, count_chunks(hidden, job.size), bytes);
    pthread_mutex_unlock(&pool.caller);
    free(memory);
    return 0;
}
