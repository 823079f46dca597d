/* Products of stored weights with activations, on a few threads: FP8 blocks, bfloat16, float16, float32, ggml's
   blocks.

   Plain functions on pointers, called through ctypes; no torch, no Python headers. What is computed, and what stands in
   for this file where it cannot be built, is runner/fp8.py. Weights and scales may begin at any byte. Every sum has one
   order (panel.h), whatever the number of tokens and threads, so that neither changes a bit. */

#define _GNU_SOURCE
#include <math.h>
#include <stdalign.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"
#include "pool.h"

#define LANES 16
#define PIECE 128   /* columns that are summed before their scale is multiplied; DeepSeek's blocks are as wide */
#define LINE 64     /* columns that a few tokens' product takes of each row in turn */
#define SEGMENT 512 /* columns that are expanded at once for more tokens */
#define GROUP 16    /* rows that are expanded together for them */
#define TILE_ROWS 4
#define TOKENS 48   /* rows of activations that share one expansion; their sums with a group stay in the L2 cache */

enum { FP8_E4M3, BF16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, Q4_K, Q5_K, Q6_K };

typedef struct {
    const void *weight; /* [rows, columns], or rows of blocks */
    const void *scale;  /* [ceil(rows / block_rows), ceil(columns / block_columns)] float32; FP8 alone has it */
    int64_t rows, columns;
    int32_t block_rows, block_columns;
    int32_t kind;
    int32_t reserved;
} rk_matrix;

static inline int64_t element_bytes(int kind) { return kind == FP8_E4M3 ? 1 : kind == F32 ? 4 : 2; }

/* The scales of a row, NULL where it has none. */
static inline const uint8_t *scales_of(const rk_matrix *a, int64_t row)
{
    if (a->scale == NULL)
        return NULL;
    const int64_t blocks = (a->columns + a->block_columns - 1) / a->block_columns;
    return (const uint8_t *)a->scale + row / a->block_rows * blocks * (int64_t)sizeof(float);
}

static inline float scale_of(const uint8_t *scales, int64_t block)
{
    float scale = 1.0f;
    if (scales != NULL)
        memcpy(&scale, scales + block * (int64_t)sizeof scale, sizeof scale);
    return scale;
}

/* Always inlined: a function that does no more has no effect in gcc's eyes, and its calls are left out. */
static inline __attribute__((always_inline)) void prefetch(const uint8_t *at, int64_t size)
{
    for (int64_t i = 0; i < size; i += 64)
        __builtin_prefetch(at + i, 0, 3);
}

/* ---- portable ---- */

typedef float lanes_c __attribute__((vector_size(16)));

static inline lanes_c set_c(float f) { return (lanes_c){f, f, f, f}; }
static inline lanes_c load_c(const float *from)
{
    lanes_c v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline lanes_c load_some_c(const float *from, int64_t count)
{
    float some[4] = {0};
    for (int i = 0; i < 4 && i < count; i++)
        some[i] = from[i];
    return load_c(some);
}
static inline void store_c(float *to, lanes_c v) { memcpy(to, &v, sizeof v); }
static inline float sum_c(const float *from)
{
    const lanes_c v = (load_c(from) + load_c(from + 8)) + (load_c(from + 4) + load_c(from + 12));
    return (v[0] + v[2]) + (v[1] + v[3]);
}
static inline float decode_c(int kind, const uint8_t *w)
{
    float value;
    switch (kind) {
    case FP8_E4M3:
        return E4M3[*w];
    case BF16:
        return bf16(w);
    case F16:
        return f16(w);
    default:
        memcpy(&value, w, sizeof value);
        return value;
    }
}
static inline __attribute__((always_inline)) void decode_four_c(const int kind, const uint8_t *w, lanes_c *out)
{
    const int64_t bytes = element_bytes(kind);
    for (int j = 0; j < 4; j++, w += 4 * bytes)
        out[j] = (lanes_c){decode_c(kind, w), decode_c(kind, w + bytes), decode_c(kind, w + 2 * bytes),
                           decode_c(kind, w + 3 * bytes)};
}

/* What is left over by those that take many at once. */
static __attribute__((noinline)) void decode_some(int kind, const uint8_t *w, int64_t count, float fp8_unit, float *out)
{
    const float unit = kind == FP8_E4M3 ? fp8_unit : 1.0f;
    for (int64_t i = 0; i < count; i++)
        out[i] = decode_c(kind, w + i * element_bytes(kind)) * unit;
}

#include "quantised.h"

#define NAME(x) x##_c
#define TARGET
#define V lanes_c
#define WIDTH 4
#define ZERO() set_c(0.0f)
#define SET(f) set_c(f)
#define LOAD(p) load_c(p)
#define STORE(p, v) store_c(p, v)
#define LOAD_SOME(p, n) load_some_c(p, n)
#define FMA(a, b, c) ((a) * (b) + (c))
#define SUM(p) sum_c(p)
#define STREAMS 1
#define STREAM_TOKENS 1
#define TILE_TOKENS 2
#define UNIT LANES
#define TABLE int
#define TABLE_LOAD() 0
#define DECODE(kind, table, w, out) decode_four_c(kind, w, out)
#define FP8_UNIT 1.0f
#define HAS_NAN(table) table
#define BLOCK_FACTORS(kind, block, factor) factors_c(kind, block, factor)
#define SPAN STRETCH
#define SPAN_OF(kind, block, j, factor, out) stretch_c(kind, block, j, factor, out)
#define STRETCH_OF(kind, block, out) small_block_c(kind, block, out)
#define BLOCK_STREAMS 1
#define BLOCKS(x) x##_c
#include "quantised_rows.h"
#include "panel.h"

#ifdef X86
#include "x86.h"
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

#define LONE_CHUNKS 4         /* of each thread */

/* Rows of a chunk, a multiple of 32. With packed activations 32 rows ask for the next 32, and those behind a chunk's end
   are another thread's: so chunks are long, but each thread has four. */
static int64_t chunk_rows(const rk_matrix *a, int is_packed)
{
    int64_t rows = CHUNK_BYTES / (bytes_of(a->kind, a->columns) + 1);
    if (is_packed && rows < a->rows / (4 * pool.threads))
        rows = a->rows / (4 * pool.threads);
    return rows < 32 ? 32 : rows & ~(int64_t)31;
}

/* The same where no other matrix evens out which thread ends last: each has several. */
static int64_t lone_chunk_rows(const rk_matrix *a, int is_packed)
{
    const int64_t rows = chunk_rows(a, is_packed), few = a->rows / (LONE_CHUNKS * pool.threads) & ~(int64_t)31;
    return is_packed || few > rows ? rows : few < 32 ? 32 : few;
}

static int64_t matrix_bytes(const rk_matrix *a) { return a->rows * bytes_of(a->kind, a->columns); }

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

#include "bf16.h"

/* The same from packed activations where there are any. */
static void multiply_either(
    const rk_matrix *a, int64_t begin, int64_t end, const float *x, const uint16_t *packed, int64_t tokens, float *y)
{
    if (packed != NULL)
        multiply_packed(a, begin, end, packed, tokens, y);
    else
        multiply(a, begin, end, x, tokens, y);
}

typedef struct {
    const rk_matrix *a;
    const float *x;
    uint16_t *packed; /* NULL: x is taken as it is */
    int64_t tokens, size;
    float *y;
} linear_job;

static void run_pack(const void *context, int64_t piece)
{
    const linear_job *job = context;
    pack(job->a, job->x, NULL, job->tokens, piece, job->packed);
}

static void run_linear(const void *context, int64_t chunk)
{
    const linear_job *job = context;
    const int64_t begin = chunk * job->size, end = begin + job->size;
    multiply_either(job->a, begin, end, job->x, job->packed, job->tokens, job->y);
}

/* Floats of working memory that rk_linear needs for activations that are rounded to bfloat16. */
int64_t rk_linear_room(const rk_matrix *a, int64_t tokens)
{
    return is_packed(a, tokens) ? packed_room(tokens, a->columns) : 0;
}

/* y = a x: x is [tokens, columns], y is [tokens, rows]. `room` is NULL where x is not rounded to bfloat16. */
void rk_linear(const rk_matrix *a, const float *x, int64_t tokens, float *y, float *room)
{
    uint16_t *packed = room && is_packed(a, tokens) ? (uint16_t *)room : NULL;
    const linear_job job = {a, x, packed, tokens, lone_chunk_rows(a, packed != NULL), y};
    pthread_mutex_lock(&pool.caller);
    if (packed)
        run_chunks(run_pack, &job, count_pieces(a->columns), tokens * a->columns * (int64_t)sizeof *x);
    run_chunks(run_linear, &job, count_chunks(a->rows, job.size), matrix_bytes(a) * tokens);
    pthread_mutex_unlock(&pool.caller);
}

typedef struct {
    const rk_matrix *a;
    int64_t size;
    float *out;
} expand_job;

static void run_expand(const void *context, int64_t chunk)
{
    const expand_job *job = context;
    const rk_matrix *a = job->a;
    const int64_t begin = chunk * job->size, end = begin + job->size < a->rows ? begin + job->size : a->rows;
    const uint8_t *row = (const uint8_t *)a->weight + begin * bytes_of(a->kind, a->columns);
    for (int64_t r = begin; r < end; r++, row += bytes_of(a->kind, a->columns))
        expand_blocks_c(a->kind, row, 0, a->columns, job->out + r * a->columns);
}

/* What rows of blocks stand for: out is [rows, columns]. The portable way will do: it is for rows of an embedding, and
   for what is made once. */
void rk_expand(const rk_matrix *a, float *out)
{
    const expand_job job = {a, chunk_rows(a, 0), out};
    pthread_mutex_lock(&pool.caller);
    run_chunks(run_expand, &job, count_chunks(a->rows, job.size), matrix_bytes(a));
    pthread_mutex_unlock(&pool.caller);
}

#include "experts.h"
#include "attention.h"
#include "floor.h"
#include "guard.h"
#include "route.h"
