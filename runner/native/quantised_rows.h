/* Rows of ggml's blocks, for one instruction set. It is included once for each that expands them in a way of its own, with
   panel.h's names NAME, TARGET, V, WIDTH, ZERO, SET, LOAD, STORE, FMA, SUM and STREAM_TOKENS defined, and these:

     BLOCK_FACTORS(kind, block, factor)       the FACTORS of a large block
     SPAN                                     STRETCH, or more columns that are expanded at once, up to PIECE
     SPAN_OF(kind, block, j, factor, out)     so many from stretch j of a block on as V's at out, also over several blocks
     STRETCH_OF(kind, block, out)             a small block
     BLOCK_STREAMS                            rows that a product with few tokens goes over side by side

   Numbers are expanded in full before they are multiplied, and added up in panel.h's one order, so that a product has the
   bits of the one with the same numbers stored as float32. */

#define PARTS (LANES / WIDTH)
#define INLINE TARGET static inline __attribute__((always_inline))
#define EACH_SUM \
    _Pragma("GCC unroll 8") for (int r = 0; r < count; r++) \
        _Pragma("GCC unroll 8") for (int t = 0; t < tokens; t++) \
            _Pragma("GCC unroll 4") for (int p = 0; p < PARTS; p++)
#define EACH_BLOCK_KIND \
    CASE(Q4_0) CASE(Q4_1) CASE(Q5_0) CASE(Q5_1) CASE(Q8_0) CASE(IQ4_NL) CASE(Q4_K) CASE(Q5_K) CASE(Q6_K)

/* `count` columns of a row from `first` on: whole stretches, and whole spans of large blocks. */
INLINE void NAME(expand_blocks_kind)(const int kind, const uint8_t *row, int64_t first, int64_t count, float *out)
{
    alignas(64) float factor[FACTORS];
    const int in_span = is_large(kind) ? SPAN : STRETCH;
    const uint8_t *block = row + first / columns_of_block(kind) * bytes_of_block(kind);
    for (int64_t skipped = first % columns_of_block(kind); count > 0; skipped = 0, block += bytes_of_block(kind)) {
        if (is_large(kind))
            BLOCK_FACTORS(kind, block, factor);
#pragma GCC unroll 8
        for (int c = 0; c < columns_of_block(kind); c += in_span)
            if (c >= skipped && count > 0) {
                V some[SPAN / WIDTH];
                if (is_large(kind))
                    SPAN_OF(kind, block, c / STRETCH, factor, some);
                else
                    STRETCH_OF(kind, block, some);
#pragma GCC unroll 32
                for (int v = 0; v < in_span / WIDTH; v++)
                    STORE(out + v * WIDTH, some[v]);
                out += in_span;
                count -= in_span;
            }
    }
}

TARGET static void NAME(expand_blocks)(int kind, const uint8_t *row, int64_t first, int64_t count, float *out)
{
    switch (kind) {
#define CASE(kind) \
    case kind: \
        NAME(expand_blocks_kind)(kind, row, first, count, out); \
        break;
        EACH_BLOCK_KIND
#undef CASE
    }
}

/* Add the products of some expanded weights of a row with a few tokens to their sums. */
INLINE void NAME(add_block)(
    const V *some, const int vecs, const float *x, int64_t columns, const int tokens, V (*part)[PARTS])
{
#pragma GCC unroll 32
    for (int v = 0; v < vecs; v++)
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++)
            part[t][v % PARTS] = FMA(some[v], LOAD(x + t * columns + v * WIDTH), part[t][v % PARTS]);
}

/* Add the products of `count` rows with a piece of x to their sums. Row r's blocks begin at w + r * stride; the piece
   begins at their column `from`. */
INLINE void NAME(block_piece)(
    const int kind, const int count, const uint8_t *w, int64_t stride, const int from, const float (*factor)[FACTORS],
    const float *x, int64_t columns, const int tokens, V (*total)[STREAM_TOKENS][PARTS])
{
    V part[BLOCK_STREAMS][STREAM_TOKENS][PARTS];
    EACH_SUM part[r][t][p] = ZERO();
#pragma GCC unroll 4
    for (int c = 0; c < PIECE; c += SPAN)
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            V some[SPAN / WIDTH];
            const int column = from + c, size = (int)columns_of_block(kind);
            const uint8_t *block = w + r * stride + column / size * bytes_of_block(kind);
            SPAN_OF(kind, block, column % size / STRETCH, factor[r], some);
            NAME(add_block)(some, SPAN / WIDTH, x + c, columns, tokens, part[r]);
        }
    EACH_SUM total[r][t][p] = FMA(part[r][t][p], SET(1.0f), total[r][t][p]);
}

/* The same with the small blocks that are left at the end of a row. */
INLINE void NAME(block_rest)(
    const int kind, const int count, const uint8_t *w, int64_t stride, int64_t stretches, const float *x,
    int64_t columns, const int tokens, V (*total)[STREAM_TOKENS][PARTS])
{
    V part[BLOCK_STREAMS][STREAM_TOKENS][PARTS];
    EACH_SUM part[r][t][p] = ZERO();
    for (int64_t s = 0; s < stretches; s++)
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            V some[STRETCH / WIDTH];
            STRETCH_OF(kind, w + r * stride + s * bytes_of_block(kind), some);
            NAME(add_block)(some, STRETCH / WIDTH, x + s * STRETCH, columns, tokens, part[r]);
        }
    EACH_SUM total[r][t][p] = FMA(part[r][t][p], SET(1.0f), total[r][t][p]);
}

/* `count` rows with a few tokens, expanded into registers. */
INLINE void NAME(block_streams)(
    const rk_matrix *a, const int kind, const int count, int64_t row, const float *x, const int tokens, float *y)
{
    const int64_t columns = a->columns, stride = bytes_of(kind, columns), step = is_large(kind) ? 2 * PIECE : PIECE;
    const int64_t size = step / columns_of_block(kind) * bytes_of_block(kind);
    const uint8_t *w = (const uint8_t *)a->weight + row * stride, *next = w + count * stride;
    alignas(64) float factor[BLOCK_STREAMS][FACTORS], sums[LANES];
    V total[BLOCK_STREAMS][STREAM_TOKENS][PARTS];
    EACH_SUM total[r][t][p] = ZERO();
    int64_t begin = 0;
    for (; begin + step <= columns; begin += step, w += size, x += step) {
#pragma GCC unroll 8
        for (int r = 0; r < count; r++, next += size) {
            prefetch(next, size); /* the next rows, in the order of memory */
            if (is_large(kind))
                BLOCK_FACTORS(kind, w + r * stride, factor[r]);
        }
#pragma GCC unroll 2
        for (int from = 0; from < step; from += PIECE)
            NAME(block_piece)(kind, count, w, stride, from, factor, x + from, columns, tokens, total);
    }
    if (begin < columns)
        NAME(block_rest)(kind, count, w, stride, (columns - begin) / STRETCH, x, columns, tokens, total);
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++)
                STORE(sums + p * WIDTH, total[r][t][p]);
            y[t * a->rows + row + r] = SUM(sums);
        }
}

INLINE int64_t NAME(block_few_kinds)(
    const rk_matrix *a, int64_t begin, int64_t end, const float *x, const int tokens, float *y)
{
    switch (a->kind) {
#define CASE(kind) \
    case kind: \
        for (; begin + BLOCK_STREAMS <= end; begin += BLOCK_STREAMS) \
            NAME(block_streams)(a, kind, BLOCK_STREAMS, begin, x, tokens, y); \
        break;
        EACH_BLOCK_KIND
#undef CASE
    }
    return begin;
}

/* Rows begin to end with at most STREAM_TOKENS tokens; returns the first that is left, for there are too few for another
   step. */
TARGET static int64_t NAME(block_few)(
    const rk_matrix *a, int64_t begin, int64_t end, const float *x, int64_t tokens, float *y)
{
    switch (tokens) {
#define COUNT(n) \
    case n: \
        return NAME(block_few_kinds)(a, begin, end, x, n, y);
        COUNT(1)
#if STREAM_TOKENS > 1
        COUNT(2)
#endif
#if STREAM_TOKENS > 2
        COUNT(3)
#endif
#undef COUNT
    }
    return begin;
}

#undef PARTS
#undef INLINE
#undef EACH_SUM
#undef EACH_BLOCK_KIND
#undef BLOCK_FACTORS
#undef SPAN
#undef SPAN_OF
#undef STRETCH_OF
#undef BLOCK_STREAMS
