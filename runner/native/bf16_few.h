/* Products of bf16.h for a few tokens: weights are expanded into registers and never written, as in panel.h, and a lane
   is a column.

   64 codes become two vectors as their bytes are unpacked, without a permutation: the activations are packed in the
   order that this gives. A tile of rows and tokens adds up a piece in the registers. Then the lanes of four tokens are
   added to those of one vector, quarters of it each, so that one multiplication by the scale does for four; else those
   multiplications, and reading and writing what they add to, take a quarter of the time. The quarters are added last. A
   row's sums depend on its own numbers and the count of tokens, not on the rows beside it. */

#define FEW_TOKENS 8          /* more take bf16.h's other way: measured from 10 on */
#define FEW_ROWS 16           /* that share a segment of the activations */
#define FEW_ACTIVATIONS 8192  /* of a segment: they stay in the L1 cache beside the weights */
#define FEW_FOURS (FEW_TOKENS / 4)

/* Rows whose sums with so many tokens fit the registers, with their weights. */
#define FEW_TILE_ROWS(tokens) ((tokens) <= 4 ? 4 : (tokens) <= 6 ? 3 : 2)

/* LINE weights at w, as two vectors of bfloat16. */
INLINE_BF16 void expand_line_bf16(const int kind, table_vbmi table, const uint8_t *w, __m512i *out)
{
    if (kind == BF16) {
        out[0] = _mm512_loadu_si512(w);
        out[1] = _mm512_loadu_si512(w + 64);
        return;
    }
    const __m512i codes = _mm512_loadu_si512(w);
    const __m512i upper = upper_bytes_vbmi(table, codes), lower = lower_bytes_vbmi(table, codes);
    out[0] = _mm512_unpacklo_epi8(lower, upper);
    out[1] = _mm512_unpackhi_epi8(lower, upper);
}

/* Where 16 columns of a line lie among the packed activations: the first 8, and how far behind them the others. */
static inline int64_t few_place(int64_t column) { return column / LINE * LINE + column % LINE / 2; }
#define FEW_APART (LINE / 2)

/* Each four lanes of the sum of a, b, c and d are one of each. */
INLINE_BF16 __m512 add_pair_bf16(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
INLINE_BF16 __m512 add_four_bf16(__m512 a, __m512 b, __m512 c, __m512 d)
{
    const __m512d ab = _mm512_castps_pd(add_pair_bf16(a, b)), cd = _mm512_castps_pd(add_pair_bf16(c, d));
    return _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}

/* Add the products of `pieces` pieces of `rows` rows with `tokens` tokens to their sums. Row r begins at w[r]; `next`
   is what to ask memory for on the way, `stride` bytes for each row. */
INLINE_BF16 void few_tile_bf16(
    const int kind, const int rows, const int tokens, const uint8_t *const *w, int64_t pieces,
    const uint8_t *const *scales, const int64_t *blocks, const uint16_t *x, float (*total)[FEW_FOURS][LANES],
    const uint8_t *next, int64_t stride)
{
    const table_vbmi table = table_load_vbmi();
    const int64_t bytes = element_bytes(kind);
    __m512 sum[4][FEW_FOURS];
#define EACH_ROW _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++)
#define EACH_FOUR _Pragma("GCC unroll 2") for (int t = 0; t < tokens; t += 4)
    EACH_ROW EACH_FOUR sum[r][t / 4] = _mm512_load_ps(total[r][t / 4]);
    for (int64_t p = 0; p < pieces; p++, x += tokens * PIECE) {
        __m512 part[4][FEW_TOKENS];
        EACH_ROW
#pragma GCC unroll 8
            for (int t = 0; t < FEW_TOKENS; t++)
                part[r][t] = _mm512_setzero_ps();
#pragma GCC unroll 2
        for (int c = 0; c < PIECE; c += LINE) {
            __m512i v[4][2];
            EACH_ROW {
                const int64_t at = (p * PIECE + c) * bytes;
                prefetch(next + r * stride + at, LINE * bytes);
                expand_line_bf16(kind, table, w[r] + at, v[r]);
            }
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++)
#pragma GCC unroll 8
                for (int t = 0; t < tokens; t++) {
                    const __m512bh some = (__m512bh)_mm512_loadu_si512(x + t * PIECE + c + j * FEW_APART);
                    EACH_ROW part[r][t] = _mm512_dpbf16_ps(part[r][t], (__m512bh)v[r][j], some);
                }
        }
        EACH_ROW {
            const __m512 scale = _mm512_set1_ps(scale_of(scales[r], blocks[p]));
            EACH_FOUR {
                const __m512 four = add_four_bf16(part[r][t], part[r][t + 1], part[r][t + 2], part[r][t + 3]);
                sum[r][t / 4] = _mm512_fmadd_ps(four, scale, sum[r][t / 4]);
            }
        }
    }
    EACH_ROW EACH_FOUR _mm512_store_ps(total[r][t / 4], sum[r][t / 4]);
#undef EACH_ROW
#undef EACH_FOUR
}

/* Up to FEW_ROWS rows, `count`, with `tokens` tokens. */
INLINE_BF16 void few_rows_bf16(
    const rk_matrix *a, const int kind, const int tokens, int64_t row, int64_t count, const uint16_t *x, float *y)
{
    enum { ROOM = FEW_ROWS + 3 }; /* the last tile may be larger than what is left for it */
    alignas(64) float total[ROOM][FEW_FOURS][LANES];
    alignas(64) uint8_t rest[ROOM][2 * PIECE];
    const uint8_t *w[ROOM], *scales[ROOM];
    int64_t blocks[FEW_ACTIVATIONS / PACKED_FROM / PIECE];
    const int rows = FEW_TILE_ROWS(tokens);
    const int64_t columns = a->columns, bytes = element_bytes(kind), whole = columns - columns % PIECE;
    const int64_t segment = FEW_ACTIVATIONS / tokens / PIECE * PIECE;
    const uint8_t *const first = (const uint8_t *)a->weight + row * columns * bytes;
    memset(total, 0, sizeof total);
    for (int64_t r = 0; r < count + rows - 1; r++)
        scales[r] = scales_of(a, row + (r < count ? r : count - 1));
    for (int64_t begin = 0, end; begin < columns; begin = end) {
        const int is_rest = begin == whole;
        end = is_rest ? columns : begin + segment < whole ? begin + segment : whole;
        const int64_t size = end - begin, pieces = count_pieces(size);
        for (int64_t r = 0; r < count + rows - 1; r++) {
            w[r] = first + ((r < count ? r : count - 1) * columns + begin) * bytes;
            if (is_rest) {
                memset(rest[r], 0, sizeof rest[r]);
                memcpy(rest[r], w[r], (size_t)(size * bytes));
                w[r] = rest[r];
            }
        }
        for (int64_t p = 0; p < pieces; p++)
            blocks[p] = a->scale ? (begin + p * PIECE) / a->block_columns : 0;
        for (int64_t r = 0; r < count; r += rows) {
            const uint8_t *next = first + (count * (columns + begin) + r * size) * bytes; /* in the order of memory */
            few_tile_bf16(
                kind, rows, tokens, w + r, pieces, scales + r, blocks, x + begin * tokens, total + r, next,
                size * bytes);
        }
    }
    float sums[FEW_TOKENS][FEW_ROWS];
    for (int64_t r = 0; r < count; r++)
        for (int t = 0; t < tokens; t += 4) {
            const __m512 v = _mm512_load_ps(total[r][t / 4]);
            const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
            const __m128 one = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
            for (int i = 0; i < 4; i++)
                sums[t + i][r] = one[i];
        }
    for (int t = 0; t < tokens; t++)
        memcpy(y + t * a->rows + row, sums[t], (size_t)count * sizeof(float));
}

/* Rows begin to end of y = a x for the packed activations of PACKED_FROM to FEW_TOKENS tokens. */
TARGET_BF16 static void multiply_few(
    const rk_matrix *a, int64_t begin, int64_t end, const uint16_t *x, int64_t tokens, float *y)
{
    const int64_t size = FEW_ROWS - FEW_ROWS % FEW_TILE_ROWS(tokens);
    for (int64_t row = begin; row < end; row += size) {
        const int64_t count = end - row < size ? end - row : size;
        switch (tokens) {
#define CASE(n) \
    case n: \
        if (a->kind == BF16) \
            few_rows_bf16(a, BF16, n, row, count, x, y); \
        else \
            few_rows_bf16(a, FP8_E4M3, n, row, count, x, y); \
        break;
            CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
    }
}
