/* Absorbed attention over latents: what the queries meet of kv_b, scores, softmax, sums of latents, and their values.

   What is computed, and what stands in for this file, is attend_absorbed in runner/attention.py. A token's numbers are
   the same bits whatever other tokens come with it: its positions are taken in blocks that begin at multiples of BLOCK,
   the blocks' sums follow each other, and so do the spans'. Positions after its own are not looked at. */

#include <float.h>

#define BLOCK 64              /* positions whose scores are held at once */
#define SPAN 1024             /* positions of one call: a long text is shared out even where there are few heads */
#define SOME_TOKENS 32           /* tokens, or spans of them, that are worked on at once: what the room is for */
#define HEADS (2 * LANES)     /* heads of one call; each position is read once for all of them */
#define DEEP 64               /* numbers of a score that are summed before they are added to the others */
#define SLAB 32               /* rows of weights that are expanded at once */

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

typedef struct {
    rk_matrix kv_b;               /* [heads * (nope + value), latent], a head's key rows before its value rows */
    const float *q;               /* [tokens, heads, nope + rotary], not rotated */
    const float *cos, *sin;       /* [tokens, rotary / 2] */
    const float *c, *k_pe;        /* [cached, latent] and [cached, rotary], the new tokens last */
    float *out;                   /* [tokens, heads, value] */
    int64_t tokens, cached, heads, nope, rotary, value;
    float scale;
    int32_t rounds;               /* to bfloat16, what is multiplied by kv_b */
} rk_attention;

typedef struct {
    void (*transposed)(const rk_matrix *, int64_t, int64_t, const float *, int64_t, int64_t, float *, int64_t);
    void (*span)(
        const rk_attention *, const float *, int64_t, int, int64_t, int64_t, float *, int64_t, float *, float *);
    void (*norm)(const float *, const float *, int64_t, float, float *);
} steps;

/* exp of numbers up to 0, within 2e-7 of it; 0 where that would be denormal. Without branches, and without fused
   multiply-add, so that it is the same in every lane of every instruction set. */
INLINE float exp_of(float x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, which is then the low bits */
    const float shifted = x * 1.44269504f + magic, whole = shifted - magic;
    const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float series = 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    uint32_t power;
    memcpy(&power, &shifted, sizeof power);
    power = (power + 127) << 23;
    float factor;
    memcpy(&factor, &power, sizeof factor);
    return x < -87.0f ? 0.0f : series * factor;
}

#define NAME(x) x##_c
#define TARGET
#define V lanes_c
#define WIDTH 4
#define ZERO() set_c(0.0f)
#define SET(f) set_c(f)
#define LOAD(p) load_c(p)
#define STORE(p, v) store_c(p, v)
#define FMA(a, b, c) ((a) * (b) + (c))
#define SUM(p) sum_c(p)
#define FP8_UNIT 1.0f
#define UNIT LANES
#define TABLE int
#define TABLE_LOAD() 0
#define DECODE(kind, table, w, out) decode_four_c(kind, w, out)
#define HAS_NAN(table) table
#define SUM_ROWS 2
#define SUM_VECS 1
#define LONE_VECS 2
#include "attend.h"

#ifdef X86
#define NAME(x) x##_avx2
#define TARGET TARGET_AVX2
#define V __m256
#define WIDTH 8
#define ZERO() _mm256_setzero_ps()
#define SET(f) _mm256_set1_ps(f)
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SUM(p) sum_avx2(p)
#define FP8_UNIT FP8_AS_F16
#define UNIT 32
#define TABLE table_avx2
#define TABLE_LOAD() {_mm256_setzero_si256()}
#define DECODE(kind, table, w, out) decode_avx2(kind, &table, w, out)
#define HAS_NAN(table) has_nan_avx2(table)
#define SUM_ROWS 6
#define SUM_VECS 1
#define LONE_VECS 4
#include "attend.h"

#define NAME(x) x##_avx512
#define TARGET TARGET_AVX512
#define V __m512
#define WIDTH 16
#define ZERO() _mm512_setzero_ps()
#define SET(f) _mm512_set1_ps(f)
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM(p) sum_avx2(p)
#define FP8_UNIT FP8_AS_F16
#define UNIT 64
#define TABLE table_avx512
#define TABLE_LOAD() {_mm512_setzero_si512()}
#define DECODE(kind, table, w, out) decode_avx512(kind, &table, w, out)
#define HAS_NAN(table) has_nan_avx512(table)
#define SUM_ROWS 8
#define SUM_VECS 2
#define LONE_VECS 8
#include "attend.h"

#define NAME(x) x##_vbmi
#define TARGET TARGET_VBMI
#define V __m512
#define WIDTH 16
#define ZERO() _mm512_setzero_ps()
#define SET(f) _mm512_set1_ps(f)
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM(p) sum_avx2(p)
#define FP8_UNIT 1.0f
#define UNIT 64
#define TABLE table_vbmi
#define TABLE_LOAD() table_load_vbmi()
#define DECODE(kind, table, w, out) decode_vbmi(kind, table, w, out)
#define HAS_NAN(table) 0
#define SUM_ROWS 8
#define SUM_VECS 2
#define LONE_VECS 8
#include "attend.h"
#endif

static const steps *chosen_steps(void)
{
#ifdef X86
    if (panel == panel_avx2)
        return &steps_avx2;
    if (panel == panel_avx512)
        return &steps_avx512;
    if (panel == panel_vbmi)
        return &steps_vbmi;
#endif
    return &steps_c;
}

/* ---- a few tokens at a time ---- */

typedef struct {
    const rk_attention *of;
    const steps *with;
    int64_t begin, tokens; /* those of this group */
    int64_t vecs, tiles;   /* heads by 16, and by HEADS */
    int64_t spans, padded; /* the most of a token; latents up to a multiple of HEADS */
    float *rounded;        /* [heads, tokens, nope] */
    float *q;              /* [heads, tokens, latent], against latents; then the mixed latents */
    float *turned;         /* [tokens, vecs, latent + rotary, 16] */
    float *mixed;          /* [tokens, spans, vecs * 16, padded] */
    float *most, *sum;     /* [tokens, spans, vecs * 16] */
    float *y;              /* [tokens, rows of kv_b]; those of the keys are not filled */
} group;

static int64_t count_spans(const rk_attention *of) { return count_chunks(of->cached, SPAN); }

/* How many tokens make a group. */
static int64_t group_tokens(const rk_attention *of)
{
    const int64_t some = SOME_TOKENS / (count_spans(of) ? count_spans(of) : 1), least = some ? some : 1;
    return least < of->tokens ? least : of->tokens;
}

/* Take `count` floats of the room, by whole cache lines. */
static float *take_room(float *room, int64_t *used, int64_t count)
{
    float *taken = room == NULL ? NULL : room + *used;
    *used += (count + LANES - 1) & ~(int64_t)(LANES - 1);
    return taken;
}

/* A group's arrays in the room, NULL when only its size is wanted; returns that. */
static int64_t lay_out(group *g, const rk_attention *of, float *room)
{
    int64_t used = 0;
    const int64_t tokens = group_tokens(of), latent = of->kv_b.columns;
    g->of = of;
    g->vecs = count_chunks(of->heads, LANES);
    g->tiles = count_chunks(of->heads, HEADS);
    g->spans = count_spans(of);
    g->padded = count_chunks(latent, HEADS) * HEADS;
    const int64_t sums = tokens * g->spans * g->vecs * LANES;
    g->rounded = take_room(room, &used, of->heads * tokens * of->nope);
    g->q = take_room(room, &used, of->heads * tokens * latent);
    g->turned = take_room(room, &used, tokens * g->vecs * LANES * (latent + of->rotary));
    g->mixed = take_room(room, &used, sums * g->padded);
    g->most = take_room(room, &used, sums);
    g->sum = take_room(room, &used, sums);
    g->y = take_room(room, &used, tokens * of->kv_b.rows);
    return used;
}

/* Positions that token t of the group sees. */
static int64_t seen_by(const group *g, int64_t t) { return g->of->cached - g->of->tokens + g->begin + t + 1; }

/* One head's queries against latents. */
static void run_keys(const void *context, int64_t head)
{
    const group *g = context;
    const rk_attention *of = g->of;
    const int64_t width = of->nope + of->rotary, stride = of->heads * width, latent = of->kv_b.columns;
    const float *q = of->q + g->begin * stride + head * width;
    float *rounded = g->rounded + head * g->tokens * of->nope;
    for (int64_t t = 0; t < g->tokens; t++)
        for (int64_t n = 0; n < of->nope; n++)
            rounded[t * of->nope + n] = of->rounds ? round_to_bf16(q[t * stride + n]) : q[t * stride + n];
    g->with->transposed(&of->kv_b, head * (of->nope + of->value), of->nope, rounded, of->nope, g->tokens,
                        g->q + head * g->tokens * latent, latent);
}

/* Turn interleaved pairs by their angles; the numbers of `to` lie `step` apart. */
static inline void rotate(const float *from, const float *cos, const float *sin, int64_t pairs, float *to, int64_t step)
{
    for (int64_t i = 0; i < pairs; i++) {
        const float even = from[2 * i], odd = from[2 * i + 1];
        to[2 * i * step] = even * cos[i] - odd * sin[i];
        to[(2 * i + 1) * step] = even * sin[i] + odd * cos[i];
    }
}

/* One token's queries of 16 heads side by side, the rotated part behind. Heads that are none have zeros. */
static void run_turn(const void *context, int64_t chunk)
{
    const group *g = context;
    const rk_attention *of = g->of;
    const int64_t t = chunk / g->vecs, first = chunk % g->vecs * LANES, latent = of->kv_b.columns;
    const float *cos = of->cos + (g->begin + t) * (of->rotary / 2), *sin = of->sin + (g->begin + t) * (of->rotary / 2);
    float *to = g->turned + chunk * LANES * (latent + of->rotary);
    /* A cache line of each head at a time: the heads lie a power of two apart, and few fit the L1 side by side. */
    for (int64_t k = 0; k < latent; k += LANES)
        for (int64_t l = 0; l < LANES && first + l < of->heads; l++) {
            const float *q = g->q + ((first + l) * g->tokens + t) * latent;
            for (int64_t i = k; i < latent && i < k + LANES; i++)
                to[i * LANES + l] = q[i];
        }
    for (int64_t l = 0; l < LANES; l++) {
        const int64_t head = first + l;
        if (head >= of->heads) {
            for (int64_t k = 0; k < latent + of->rotary; k++)
                to[k * LANES + l] = 0.0f;
            continue;
        }
        const float *q_pe = of->q + (((g->begin + t) * of->heads + head) * (of->nope + of->rotary) + of->nope);
        rotate(q_pe, cos, sin, of->rotary / 2, to + latent * LANES + l, LANES);
    }
}

/* A span of positions for HEADS heads of one token. */
static void run_span(const void *context, int64_t chunk)
{
    const group *g = context;
    const rk_attention *of = g->of;
    const int64_t t = chunk / (g->tiles * g->spans), tile = chunk / g->spans % g->tiles, span = chunk % g->spans;
    const int64_t begin = span * SPAN, seen = seen_by(g, t), end = begin + SPAN < seen ? begin + SPAN : seen;
    if (begin >= end)
        return;
    const int64_t vec = tile * 2, q_vec = LANES * (of->kv_b.columns + of->rotary);
    const int64_t at = ((t * g->spans + span) * g->vecs + vec) * LANES;
    g->with->span(of, g->turned + (t * g->vecs + vec) * q_vec, q_vec, g->vecs - vec < 2 ? 1 : 2, begin, end,
                  g->mixed + at * g->padded, g->padded, g->most + at, g->sum + at);
}

/* One head's values of the mixed latents, once the spans are put together. */
static void run_values(const void *context, int64_t head)
{
    const group *g = context;
    const rk_attention *of = g->of;
    const int64_t latent = of->kv_b.columns, first = head * (of->nope + of->value) + of->nope;
    float *mixed = g->q + head * g->tokens * latent;
    for (int64_t t = 0; t < g->tokens; t++) {
        const int64_t spans = count_chunks(seen_by(g, t), SPAN), step = g->vecs * LANES;
        const int64_t at = t * g->spans * step + head;
        float most = -FLT_MAX, sum = 0.0f, *to = mixed + t * latent;
        for (int64_t s = 0; s < spans; s++)
            most = g->most[at + s * step] > most ? g->most[at + s * step] : most;
        memset(to, 0, (size_t)latent * sizeof *to);
        for (int64_t s = 0; s < spans; s++) {
            const float weight = exp_of(g->most[at + s * step] - most);
            const float *from = g->mixed + (at + s * step) * g->padded;
            sum += weight * g->sum[at + s * step];
            for (int64_t i = 0; i < latent; i++)
                to[i] += weight * from[i];
        }
        for (int64_t i = 0; i < latent; i++)
            to[i] = of->rounds ? round_to_bf16(to[i] / sum) : to[i] / sum;
    }
    multiply(&of->kv_b, first, first + of->value, mixed, g->tokens, g->y);
    for (int64_t t = 0; t < g->tokens; t++)
        memcpy(of->out + ((g->begin + t) * of->heads + head) * of->value, g->y + t * of->kv_b.rows + first,
               (size_t)of->value * sizeof(float));
}

/* Floats of working memory that rk_attend needs. */
int64_t rk_attend_room(const rk_attention *of)
{
    group g;
    return lay_out(&g, of, NULL);
}

/* Attend causally from the last `tokens` of `cached` positions. */
void rk_attend(const rk_attention *of, float *room)
{
    group g;
    lay_out(&g, of, room);
    const int64_t most = group_tokens(of), latent = of->kv_b.columns;
    pthread_mutex_lock(&pool.caller);
    g.with = chosen_steps();
    for (g.begin = 0; g.begin < of->tokens; g.begin += most) {
        g.tokens = of->tokens - g.begin < most ? of->tokens - g.begin : most;
        const int64_t bytes = matrix_bytes(&of->kv_b) / 2 * g.tokens;
        const int64_t turned = g.tokens * of->heads * latent * (int64_t)sizeof(float);
        run_chunks(run_keys, &g, of->heads, bytes);
        run_chunks(run_turn, &g, g.tokens * g.vecs, turned);
        run_chunks(run_span, &g, g.tokens * g.tiles * g.spans, turned * of->cached / 16);
        run_chunks(run_values, &g, of->heads, bytes);
    }
    pthread_mutex_unlock(&pool.caller);
}

/* ---- norms, and what the cache keeps ---- */

typedef struct {
    const steps *with;
    const float *x, *weight;
    int64_t stride, size;
    float eps;
    float *out;
    const float *cos, *sin; /* NULL for a norm alone */
    int64_t rotary;
    float *k_pe;
} norm_job;

static void run_norm(const void *context, int64_t row)
{
    const norm_job *job = context;
    const float *x = job->x + row * job->stride;
    const int64_t pairs = job->rotary / 2;
    job->with->norm(x, job->weight, job->size, job->eps, job->out + row * job->size);
    if (job->k_pe != NULL)
        rotate(x + job->size, job->cos + row * pairs, job->sin + row * pairs, pairs, job->k_pe + row * job->rotary, 1);
}

/* Each row over the root of its mean square, times the weight; rows of x lie `stride` numbers apart. */
void rk_norm(const float *x, int64_t rows, int64_t stride, const float *weight, int64_t size, float eps, float *out)
{
    pthread_mutex_lock(&pool.caller);
    const norm_job job = {chosen_steps(), x, weight, stride, size, eps, out, NULL, NULL, 0, NULL};
    run_chunks(run_norm, &job, rows, rows * size * (int64_t)sizeof *x);
    pthread_mutex_unlock(&pool.caller);
}

/* What the cache keeps of [tokens, latent + rotary]: the norm of the latents, and the rotated rest. */
void rk_latents(
    const float *x, int64_t tokens, const float *weight, int64_t latent, float eps, const float *cos, const float *sin,
    int64_t rotary, float *c, float *k_pe)
{
    pthread_mutex_lock(&pool.caller);
    const norm_job job = {chosen_steps(), x, weight, latent + rotary, latent, eps, c, cos, sin, rotary, k_pe};
    run_chunks(run_norm, &job, tokens, tokens * (latent + rotary) * (int64_t)sizeof *x);
    pthread_mutex_unlock(&pool.caller);
}
