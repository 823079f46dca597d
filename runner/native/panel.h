/* The product of a matrix's rows with activations, for one instruction set. kernels.c includes this once for each,
   with these names defined:

     NAME(x)             x with the instruction set's suffix
     TARGET              the function attribute that allows its instructions
     V, WIDTH            so many floats, 16 or a divisor of it
     ZERO() SET(f)       all zero; all f
     LOAD(p) STORE(p, v) WIDTH floats of memory, not aligned
     LOAD_SOME(p, n)     the first n of them, zeros behind; touches no other memory
     ADD(a, b)
     FMA(a, b, c)        a * b + c, rounded once where the instruction set can
     SUM(p)              the 16 floats at p added: halves, quarters, eighths, pairs
     STREAMS             rows that the product with one token goes over side by side
     TILE_TOKENS         tokens whose sums with TILE_ROWS rows fit the registers
     UNIT                numbers that DECODE takes: 16, 32 or 64
     TABLE, TABLE_LOAD() what DECODE keeps in registers
     DECODE(kind, table, w, scale, out)
                         UNIT stored numbers at w as V's at out, times `scale`, a V, if they are FP8
     HAS_NAN(table)      whether a DECODE met FP8 codes of NaN, which it need not get right then

   One order of additions for every count of tokens, rows and threads: a weight is multiplied by its scale; lane l of a
   segment adds its columns l, l + 16, ... from the left; the segments of a row are added from the left; the lanes are
   added last. */

#define PARTS (LANES / WIDTH)
#define INLINE TARGET static inline __attribute__((always_inline))

/* Columns begin to end of a row, times their scales, to out; whether there were codes of NaN that came out wrong. */
INLINE int NAME(expand_columns)(
    const rk_matrix *a, const int kind, int64_t row, int64_t begin, int64_t end, int64_t block, const int is_exact, float *out)
{
    const int64_t width = element_bytes(kind), block_columns = a->scale ? a->block_columns : a->columns;
    const uint8_t *w = (const uint8_t *)a->weight + row * a->columns * width, *scales = scales_of(a, row);
    TABLE table = TABLE_LOAD();
    for (int64_t c = begin; c < end; block++) {
        const int64_t block_end = (block + 1) * block_columns, stop = block_end < end ? block_end : end;
        const float factor = scale_of(scales, block);
        const V scale = SET(factor);
        for (; c + UNIT <= stop && !is_exact; c += UNIT) {
            V some[UNIT / WIDTH];
            DECODE(kind, table, w + c * width, scale, some);
            for (int j = 0; j < UNIT / WIDTH; j++)
                STORE(out + (c - begin) + j * WIDTH, some[j]);
        }
        decode_some(kind, w + c * width, stop - c, factor, out + (c - begin));
        c = stop;
    }
    return HAS_NAN(table);
}

/* The same, right in every case, with zeros behind up to a multiple of 16. */
TARGET static void NAME(expand)(const rk_matrix *a, int64_t row, int64_t begin, int64_t end, int64_t block, float *out)
{
    int is_wrong = 0;
    switch (a->kind) {
    case FP8_E4M3:
        is_wrong = NAME(expand_columns)(a, FP8_E4M3, row, begin, end, block, 0, out);
        break;
    case BF16:
        NAME(expand_columns)(a, BF16, row, begin, end, block, 0, out);
        break;
    case F16:
        NAME(expand_columns)(a, F16, row, begin, end, block, 0, out);
        break;
    default:
        NAME(expand_columns)(a, F32, row, begin, end, block, 0, out);
    }
    if (is_wrong)
        NAME(expand_columns)(a, FP8_E4M3, row, begin, end, block, 1, out);
    for (int64_t i = end - begin; i % LANES; i++)
        out[i] = 0.0f;
}

/* Add the products of TILE_ROWS rows of expanded weights with `count` tokens to their sums. */
INLINE void NAME(tile)(
    const float weights[][SEGMENT], int64_t size, const float *x, int64_t columns, const int count,
    float total[][TOKENS][LANES])
{
    const int64_t lanes = size & ~(int64_t)(LANES - 1);
    for (int part = 0; part < LANES; part += WIDTH) {
        V sum[TILE_ROWS][TILE_TOKENS];
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 8
            for (int t = 0; t < count; t++)
                sum[r][t] = ZERO();
        for (int64_t i = part; i < lanes; i += LANES) {
            V w[TILE_ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < TILE_ROWS; r++)
                w[r] = LOAD(weights[r] + i);
#pragma GCC unroll 8
            for (int t = 0; t < count; t++) {
                const V v = LOAD(x + t * columns + i);
#pragma GCC unroll 8
                for (int r = 0; r < TILE_ROWS; r++)
                    sum[r][t] = FMA(w[r], v, sum[r][t]);
            }
        }
        if (lanes < size) {
#pragma GCC unroll 8
            for (int t = 0; t < count; t++) {
                const V v = LOAD_SOME(x + t * columns + lanes + part, size - lanes - part);
#pragma GCC unroll 8
                for (int r = 0; r < TILE_ROWS; r++)
                    sum[r][t] = FMA(LOAD(weights[r] + lanes + part), v, sum[r][t]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 8
            for (int t = 0; t < count; t++)
                STORE(total[r][t] + part, ADD(LOAD(total[r][t] + part), sum[r][t]));
    }
}

/* A few rows with any tokens: each segment of the weights is expanded once, to memory that stays in the cache. */
TARGET static void NAME(group)(const rk_matrix *a, int64_t row, int count, const float *x, int64_t tokens, float *y)
{
    alignas(64) float weights[GROUP][SEGMENT];
    alignas(64) float total[GROUP][TOKENS][LANES];
    const int64_t bytes = element_bytes(a->kind), block_columns = a->scale ? a->block_columns : a->columns;
    const int rows = (count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    for (int r = 0; r < rows; r++)
        memset(total[r], 0, (size_t)tokens * sizeof total[r][0]);
    for (int r = count; r < rows; r++)
        memset(weights[r], 0, sizeof weights[r]);
    for (int64_t begin = 0; begin < a->columns; begin += SEGMENT) {
        const int64_t end = begin + SEGMENT < a->columns ? begin + SEGMENT : a->columns, block = begin / block_columns;
        for (int r = 0; r < count; r++) {
            prefetch((const uint8_t *)a->weight + ((row + count + r) * a->columns + begin) * bytes, (end - begin) * bytes);
            NAME(expand)(a, row + r, begin, end, block, weights[r]);
        }
        const int64_t tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
        for (int64_t t = 0, tile = 0; tile < tiles; tile++) {
            const int64_t some = tokens * (tile + 1) / tiles - t;
            const float *from = x + t * a->columns + begin;
            for (int r = 0; r < rows; r += TILE_ROWS) {
                float(*sums)[TOKENS][LANES] = (float(*)[TOKENS][LANES])total[r][t];
                switch (some) {
#define CASE(n)                                                                                      \
    case n:                                                                                          \
        if (n <= TILE_TOKENS)                                                                        \
            NAME(tile)(weights + r, end - begin, from, a->columns, n <= TILE_TOKENS ? n : 1, sums);  \
        break;
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
                }
            }
            t += some;
        }
    }
    for (int r = 0; r < count; r++)
        for (int64_t t = 0; t < tokens; t++)
            y[t * a->rows + row + r] = SUM(total[r][t]);
}

/* STREAMS rows with one token, expanded into registers; whether there were codes of NaN that came out wrong. */
INLINE int NAME(streams)(const rk_matrix *a, const int kind, int64_t row, const float *x, float *y)
{
    const int64_t bytes = element_bytes(kind), columns = a->columns, whole = columns & ~(int64_t)(LINE - 1);
    const int64_t block_columns = a->scale ? a->block_columns : columns;
    const uint8_t *w[STREAMS], *scales[STREAMS];
    alignas(64) float sums[STREAMS][LANES], rest[STREAMS][LINE];
    V total[STREAMS][PARTS];
    TABLE table = TABLE_LOAD();
#pragma GCC unroll 8
    for (int r = 0; r < STREAMS; r++) {
        w[r] = (const uint8_t *)a->weight + (row + r) * columns * bytes;
        scales[r] = scales_of(a, row + r);
#pragma GCC unroll 2
        for (int p = 0; p < PARTS; p++)
            total[r][p] = ZERO();
    }
    for (int64_t c = 0, block = 0; c < columns;) {
        const int64_t end = c + SEGMENT < columns ? c + SEGMENT : columns, whole_end = end < whole ? end : whole;
        V sum[STREAMS][PARTS];
#pragma GCC unroll 8
        for (int r = 0; r < STREAMS; r++)
#pragma GCC unroll 2
            for (int p = 0; p < PARTS; p++)
                sum[r][p] = ZERO();
        while (c < whole_end) {
            const int64_t block_end = (block + 1) * block_columns, stop = block_end < whole_end ? block_end : whole_end;
            V scale[STREAMS];
#pragma GCC unroll 8
            for (int r = 0; r < STREAMS; r++)
                scale[r] = SET(scale_of(scales[r], block));
            for (; c + LINE <= stop; c += LINE) {
#pragma GCC unroll 8
                for (int r = 0; r < STREAMS; r++) {
                    prefetch(w[r] + c * bytes + AHEAD, LINE * bytes);
#pragma GCC unroll 4
                    for (int u = 0; u < LINE; u += UNIT) {
                        V some[UNIT / WIDTH];
                        DECODE(kind, table, w[r] + (c + u) * bytes, scale[r], some);
#pragma GCC unroll 8
                        for (int j = 0; j < UNIT / WIDTH; j++)
                            sum[r][j % PARTS] = FMA(some[j], LOAD(x + c + u + j * WIDTH), sum[r][j % PARTS]);
                    }
                }
            }
            if (stop == block_end)
                block++;
        }
        if (c < end) {
            for (int r = 0; r < STREAMS; r++)
                NAME(expand)(a, row + r, c, end, block, rest[r]);
            for (int64_t i = 0; i < end - c; i += WIDTH)
                for (int r = 0; r < STREAMS; r++) {
                    const int p = i / WIDTH % PARTS;
                    sum[r][p] = FMA(LOAD(rest[r] + i), LOAD_SOME(x + c + i, end - c - i), sum[r][p]);
                }
            c = end;
        }
#pragma GCC unroll 8
        for (int r = 0; r < STREAMS; r++)
#pragma GCC unroll 2
            for (int p = 0; p < PARTS; p++)
                total[r][p] = ADD(total[r][p], sum[r][p]);
    }
    for (int r = 0; r < STREAMS; r++) {
        for (int p = 0; p < PARTS; p++)
            STORE(sums[r] + p * WIDTH, total[r][p]);
        y[row + r] = SUM(sums[r]);
    }
    return HAS_NAN(table);
}

/* Rows begin to end with one token; returns the first that is left: too few of them, or blocks that are not of LINEs. */
TARGET static int64_t NAME(one)(const rk_matrix *a, int64_t begin, int64_t end, const float *x, float *y)
{
    if (a->scale != NULL && a->block_columns % LINE)
        return begin;
    for (; begin + STREAMS <= end; begin += STREAMS) {
        int is_wrong = 0;
        switch (a->kind) {
        case FP8_E4M3:
            is_wrong = NAME(streams)(a, FP8_E4M3, begin, x, y);
            break;
        case BF16:
            NAME(streams)(a, BF16, begin, x, y);
            break;
        case F16:
            NAME(streams)(a, F16, begin, x, y);
            break;
        default:
            NAME(streams)(a, F32, begin, x, y);
        }
        if (is_wrong)
            NAME(group)(a, begin, STREAMS, x, 1, y);
    }
    return begin;
}

/* Rows begin to end of y = a x for tokens at most TOKENS: x is [tokens, columns], y is [tokens, rows]. */
TARGET static void NAME(panel)(
    const rk_matrix *a, int64_t begin, int64_t end, const float *x, int64_t tokens, float *y)
{
    if (tokens == 1)
        begin = NAME(one)(a, begin, end, x, y);
    const int64_t size = tokens <= TILE_TOKENS ? TILE_ROWS : GROUP;
    for (; begin < end; begin += size)
        NAME(group)(a, begin, (int)(end - begin < size ? end - begin : size), x, tokens, y);
}

#undef PARTS
#undef INLINE
#undef NAME
#undef TARGET
#undef V
#undef WIDTH
#undef ZERO
#undef SET
#undef LOAD
#undef STORE
#undef LOAD_SOME
#undef ADD
#undef FMA
#undef SUM
#undef STREAMS
#undef TILE_TOKENS
#undef UNIT
#undef TABLE
#undef TABLE_LOAD
#undef DECODE
#undef HAS_NAN
