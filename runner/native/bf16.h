/* Products with activations that are rounded to bfloat16, where the processor multiplies such numbers: twice as many
   columns at a time as with float32. e4m3 is exact in bfloat16 and the products are exact in float32; the sums are
   float32, as is each block's scale, which is multiplied with the sum of a piece.

   A lane is a row here, so there are no lanes to add: 16 rows of weights are transposed while they are expanded, pairs
   of columns stay together, and a pair of one token's activations goes to all lanes. A lane adds the columns of a piece
   from the left, then the pieces. A few tokens have a way of their own, in bf16_few.h, and fewer are multiplied as
   float32. These are three orders of additions, so that counts of tokens may differ in a bit. */

#define PACKED_FROM 3     /* tokens; fewer take panel.h's way, which is as fast as memory is read */
#define PACKED_TOKENS 192 /* that share one expansion */
#define PACKED_TILE 12    /* tokens whose sums with PACKED_ROWS rows fit the registers */
#define PACKED_ROWS 32

static inline int64_t count_pieces(int64_t columns) { return (columns + PIECE - 1) / PIECE; }

/* Floats of room for packed activations: [pieces, tokens, PIECE] bfloat16, zeros behind the columns. For a few tokens
   and FP8 the columns of each line are in the order of bf16_few.h. */
static inline int64_t packed_room(int64_t tokens, int64_t columns)
{
    return tokens * count_pieces(columns) * PIECE / 2;
}

#if defined(X86) && (__GNUC__ >= 10 || defined(__clang__))

#define TARGET_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,fma,f16c")))
#define INLINE_BF16 TARGET_BF16 static inline __attribute__((always_inline))

/* Whether this many tokens' activations are packed for a matrix. */
static int is_packed(const rk_matrix *a, int64_t tokens)
{
    if (panel != panel_vbmi || !__builtin_cpu_supports("avx512bf16") || tokens < PACKED_FROM)
        return 0;
    return a->kind == BF16 || (a->kind == FP8_E4M3 && a->block_columns % PIECE == 0);
}

#include "bf16_few.h"

/* One piece of x, [.., columns] float32, rows `token` of it or all in order, for a product with `a` or a matrix of its
   kind. */
TARGET_BF16 static void pack(
    const rk_matrix *a, const float *x, const int64_t *token, int64_t tokens, int64_t piece, uint16_t *packed)
{
    const int64_t begin = piece * PIECE, columns = a->columns;
    const int is_split = tokens <= FEW_TOKENS && a->kind == FP8_E4M3;
    for (int64_t t = 0; t < tokens; t++) {
        const float *from = x + (token ? token[t] : t) * columns;
        uint16_t *to = packed + (piece * tokens + t) * PIECE;
        for (int64_t c = begin; c < begin + PIECE; c += LANES) {
            const int64_t left = columns - c;
            const __mmask16 some = left >= LANES ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, from + c));
            if (is_split) {
                uint16_t *half = to + few_place(c - begin);
                memcpy(half, &rounded, sizeof rounded / 2);
                memcpy(half + FEW_APART, (const char *)&rounded + sizeof rounded / 2, sizeof rounded / 2);
            } else {
                memcpy(to + c - begin, &rounded, sizeof rounded);
            }
        }
    }
}

/* 16 bytes at w of each of 16 rows, as pairs of columns: lane r of a pair's vector is row r's. */
INLINE_BF16 void expand_rows_bf16(
    const int kind, table_vbmi table, const uint8_t *w, int64_t stride, __m512i (*pairs)[PACKED_ROWS / LANES])
{
    __m512i v[4]; /* the i-th quarter of v[k] is of row 4 i + k */
#define QUARTER(i) _mm_loadu_si128((const __m128i *)(w + (4 * (i) + k) * stride))
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        v[k] = _mm512_inserti32x4(_mm512_castsi128_si512(QUARTER(0)), QUARTER(1), 1);
        v[k] = _mm512_inserti32x4(_mm512_inserti32x4(v[k], QUARTER(2), 2), QUARTER(3), 3);
    }
#undef QUARTER
    if (kind == BF16) {
        const __m512i low0 = _mm512_unpacklo_epi32(v[0], v[1]), high0 = _mm512_unpackhi_epi32(v[0], v[1]);
        const __m512i low1 = _mm512_unpacklo_epi32(v[2], v[3]), high1 = _mm512_unpackhi_epi32(v[2], v[3]);
        pairs[0][0] = _mm512_unpacklo_epi64(low0, low1);
        pairs[1][0] = _mm512_unpackhi_epi64(low0, low1);
        pairs[2][0] = _mm512_unpacklo_epi64(high0, high1);
        pairs[3][0] = _mm512_unpackhi_epi64(high0, high1);
        return;
    }
    const __m512i low0 = _mm512_unpacklo_epi16(v[0], v[1]), high0 = _mm512_unpackhi_epi16(v[0], v[1]);
    const __m512i low1 = _mm512_unpacklo_epi16(v[2], v[3]), high1 = _mm512_unpackhi_epi16(v[2], v[3]);
    const __m512i codes[4] = {_mm512_unpacklo_epi32(low0, low1), _mm512_unpackhi_epi32(low0, low1),
                              _mm512_unpacklo_epi32(high0, high1), _mm512_unpackhi_epi32(high0, high1)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const __m512i upper = upper_bytes_vbmi(table, codes[k]), lower = lower_bytes_vbmi(table, codes[k]);
        pairs[2 * k][0] = _mm512_unpacklo_epi8(lower, upper);
        pairs[2 * k + 1][0] = _mm512_unpackhi_epi8(lower, upper);
    }
}

/* `size` bytes of each of `count` rows, at most a piece of PACKED_ROWS; zeros stand for what is missing. */
INLINE_BF16 void expand_piece_bf16(
    const int kind, const uint8_t *w, int64_t stride, int64_t count, int64_t size,
    __m512i (*pairs)[PACKED_ROWS / LANES])
{
    const table_vbmi table = table_load_vbmi();
    const int64_t whole = count == PACKED_ROWS ? size & ~(int64_t)15 : 0;
    for (int g = 0; g < PACKED_ROWS / LANES; g++)
        for (int64_t i = 0; i < size; i += 16) {
            const uint8_t *from = w + g * LANES * stride + i;
            int64_t step = stride;
            uint8_t rest[LANES][16];
            if (i >= whole) {
                memset(rest, 0, sizeof rest);
                for (int64_t r = 0; r < LANES && g * LANES + r < count; r++)
                    memcpy(rest[r], from + r * stride, (size_t)(size - i < 16 ? size - i : 16));
                from = rest[0];
                step = 16;
            }
            __m512i *to = &pairs[i / (2 * element_bytes(kind))][g];
            expand_rows_bf16(kind, table, from, step, (__m512i(*)[PACKED_ROWS / LANES])to);
        }
}

/* Add the products of a piece of PACKED_ROWS rows with `count` tokens to their sums, and ask for memory on the way. */
INLINE_BF16 void tile_bf16(
    __m512i (*pairs)[PACKED_ROWS / LANES], int64_t size, const float *scale, const uint16_t *x, const int count,
    float (*total)[PACKED_ROWS], const uint8_t *next, int64_t step)
{
    __m512 part[2][PACKED_TILE];
#pragma GCC unroll 12
    for (int t = 0; t < count; t++)
        part[0][t] = part[1][t] = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i++, next += step) {
        const __m512bh w0 = (__m512bh)pairs[i][0], w1 = (__m512bh)pairs[i][1];
        __builtin_prefetch(next, 0, 3);
#pragma GCC unroll 12
        for (int t = 0; t < count; t++) {
            int32_t both;
            memcpy(&both, x + t * PIECE + 2 * i, sizeof both);
            const __m512bh v = (__m512bh)_mm512_set1_epi32(both);
            part[0][t] = _mm512_dpbf16_ps(part[0][t], w0, v);
            part[1][t] = _mm512_dpbf16_ps(part[1][t], w1, v);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < count; t++)
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            float *sum = total[t] + g * LANES;
            _mm512_storeu_ps(
                sum, _mm512_fmadd_ps(part[g][t], _mm512_loadu_ps(scale + g * LANES), _mm512_loadu_ps(sum)));
        }
    __asm__ volatile("" ::: "memory"); /* as in panel.h */
}

/* Some of the tokens, at most PACKED_TOKENS, with `count` rows; `x` is where their first piece begins. */
INLINE_BF16 void group_bf16(
    const rk_matrix *a, const int kind, int64_t row, int64_t count, const uint16_t *x, int64_t stride, int64_t tokens,
    float *y)
{
    alignas(64) __m512i pairs[PIECE / 2][PACKED_ROWS / LANES];
    alignas(64) float total[PACKED_TOKENS][PACKED_ROWS], scale[PACKED_ROWS];
    const int64_t columns = a->columns, bytes = element_bytes(kind), tiles = (tokens + PACKED_TILE - 1) / PACKED_TILE;
    const uint8_t *w = (const uint8_t *)a->weight + row * columns * bytes, *scales[PACKED_ROWS];
    for (int64_t r = 0; r < PACKED_ROWS; r++)
        scales[r] = scales_of(a, row + (r < count ? r : count - 1));
    memset(total, 0, (size_t)tokens * sizeof total[0]);
    for (int64_t begin = 0; begin < columns; begin += PIECE, x += stride) {
        const int64_t size = begin + PIECE < columns ? PIECE : columns - begin;
        const uint8_t *next = w + (count * columns + PACKED_ROWS * begin) * bytes; /* in the order of memory */
        expand_piece_bf16(kind, w + begin * bytes, columns * bytes, count, size * bytes, pairs);
        for (int r = 0; r < PACKED_ROWS; r++)
            scale[r] = r && scales[r] == scales[r - 1] ? scale[r - 1]
                                                       : scale_of(scales[r], a->scale ? begin / a->block_columns : 0);
        for (int64_t t = 0, n = 1; n <= tiles; n++) {
            const int64_t some = tokens * n / tiles - t, step = n == 1 ? 64 * bytes : 0;
            switch (some) {
#define CASE(n) \
    case n: \
        tile_bf16(pairs, (size + 1) / 2, scale, x + t * PIECE, n, total + t, next, step); \
        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
            }
            t += some;
        }
    }
    for (int64_t t = 0; t < tokens; t++)
        memcpy(y + t * a->rows + row, total[t], (size_t)count * sizeof(float));
}

/* Rows begin to end of y = a x for packed activations. */
TARGET_BF16 static void multiply_packed(
    const rk_matrix *a, int64_t begin, int64_t end, const uint16_t *x, int64_t tokens, float *y)
{
    end = end < a->rows ? end : a->rows;
    if (tokens <= FEW_TOKENS) {
        multiply_few(a, begin, end, x, tokens, y);
        return;
    }
    for (int64_t t = 0; t < tokens; t += PACKED_TOKENS) {
        const int64_t some = tokens - t < PACKED_TOKENS ? tokens - t : PACKED_TOKENS;
        for (int64_t row = begin; row < end; row += PACKED_ROWS) {
            const int64_t count = end - row < PACKED_ROWS ? end - row : PACKED_ROWS;
            if (a->kind == BF16)
                group_bf16(a, BF16, row, count, x + t * PIECE, tokens * PIECE, some, y + t * a->rows);
            else
                group_bf16(a, FP8_E4M3, row, count, x + t * PIECE, tokens * PIECE, some, y + t * a->rows);
        }
    }
}

#else

static int is_packed(const rk_matrix *a, int64_t tokens) { return (void)a, (void)tokens, 0; }
static void pack(
    const rk_matrix *a, const float *x, const int64_t *token, int64_t tokens, int64_t piece, uint16_t *packed)
{
    (void)a, (void)x, (void)token, (void)tokens, (void)piece, (void)packed;
}
static void multiply_packed(
    const rk_matrix *a, int64_t begin, int64_t end, const uint16_t *x, int64_t tokens, float *y)
{
    (void)a, (void)begin, (void)end, (void)x, (void)tokens, (void)y;
}

#endif
