/* The product of a matrix's rows with activations, for one instruction set. kernels.c includes this once for each,
   with these names defined:

     NAME(x)             x with the instruction set's suffix
     TARGET              the function attribute that allows its instructions
     V                   16 floats
     ZERO() SET(f)       all zero; all f
     LOAD(p) STORE(p, v) 16 floats of memory, not aligned
     FMA(a, b, c)        a * b + c, rounded once where the instruction set can
     SUM(v)              the 16 floats added: halves, quarters, eighths, pairs
     DECODE(kind, w, n, out)
                         n stored weights at w, at most PIECE, as floats in out, zeros behind them up to a multiple of 16

   One order of additions for every count of tokens, rows and threads: lane l of a piece adds its columns l, l + 16, ...
   from the left; the pieces of a row follow each other, each multiplied by its scale; the lanes are added last. */

#define ROWS 4

TARGET static inline __attribute__((always_inline)) void NAME(group)(
    const rk_matrix *a, int64_t row, int count, const float *x, int64_t tokens, float *y)
{
    alignas(64) float weights[ROWS][PIECE];
    alignas(64) float total[ROWS][TOKENS][LANES];
    const int64_t width = element_bytes(a->kind), block_columns = a->scale ? a->block_columns : a->columns;
    const uint8_t *scales[ROWS];
    for (int r = 0; r < count; r++)
        scales[r] = scales_of(a, row + r);
    memset(total, 0, sizeof total[0] * (size_t)count);
    /* No division in here: one takes as long as the sum of a piece. */
    for (int64_t begin = 0, block = 0, block_end = block_columns; begin < a->columns;) {
        const int64_t end = block_end < a->columns ? block_end : a->columns;
        const int64_t size = end - begin < PIECE ? end - begin : PIECE, lanes = size & ~(int64_t)(LANES - 1);
        for (int r = 0; r < count; r++) {
            const uint8_t *w = (const uint8_t *)a->weight + ((row + r) * a->columns + begin) * width;
            /* One row: the next rows follow in memory. Several: the same place of the next group. */
            prefetch(w + (count == 1 ? AHEAD : count * a->columns * width), size * width);
            DECODE(a->kind, w, size, weights[r]);
        }
        float scale[ROWS];
        for (int r = 0; r < count; r++)
            scale[r] = scale_of(scales[r], block);
        for (int64_t t = 0; t < tokens; t += ROWS) {
            const int some = tokens - t < ROWS ? (int)(tokens - t) : ROWS;
            const float *from = x + t * a->columns + begin;
            if (count == 1 && some == 1) {
                V part = ZERO();
                for (int64_t i = 0; i < lanes; i += LANES)
                    part = FMA(LOAD(weights[0] + i), LOAD(from + i), part);
                if (lanes < size)
                    part = FMA(LOAD(weights[0] + lanes), NAME(load_some)(from + lanes, size - lanes), part);
                STORE(total[0][t], FMA(part, SET(scale[0]), LOAD(total[0][t])));
                continue;
            }
            for (int s = 0; s < some; s += 2) {
                const int pair = some - s < 2 ? 1 : 2;
                const float *x0 = from + s * a->columns, *x1 = from + (s + pair - 1) * a->columns;
                V part[ROWS][2];
                for (int r = 0; r < ROWS; r++)
                    part[r][0] = part[r][1] = ZERO();
                for (int64_t i = 0; i < size; i += LANES) {
                    const V v0 = i < lanes ? LOAD(x0 + i) : NAME(load_some)(x0 + i, size - i);
                    const V v1 = i < lanes ? LOAD(x1 + i) : NAME(load_some)(x1 + i, size - i);
                    for (int r = 0; r < ROWS; r++) {
                        const V w = LOAD(weights[r] + i);
                        part[r][0] = FMA(w, v0, part[r][0]);
                        part[r][1] = FMA(w, v1, part[r][1]);
                    }
                }
                for (int r = 0; r < count; r++)
                    for (int p = 0; p < pair; p++) {
                        float *sum = total[r][t + s + p];
                        STORE(sum, FMA(part[r][p], SET(scale[r]), LOAD(sum)));
                    }
            }
        }
        begin += size;
        if (begin == block_end) {
            block++;
            block_end += block_columns;
        }
    }
    for (int r = 0; r < count; r++)
        for (int64_t t = 0; t < tokens; t++)
            y[t * a->rows + row + r] = SUM(LOAD(total[r][t]));
}

/* Rows begin to end of y = a x for tokens at most TOKENS: x is [tokens, columns], y is [tokens, rows]. */
TARGET static void NAME(panel)(
    const rk_matrix *a, int64_t begin, int64_t end, const float *x, int64_t tokens, float *y)
{
    if (tokens == 1) {
        for (int64_t row = begin; row < end; row++)
            NAME(group)(a, row, 1, x, 1, y);
        return;
    }
    for (int64_t row = begin; row < end; row += ROWS)
        NAME(group)(a, row, end - row < ROWS ? (int)(end - row) : ROWS, x, tokens, y);
}

#undef ROWS
#undef NAME
#undef TARGET
#undef V
#undef ZERO
#undef SET
#undef LOAD
#undef STORE
#undef FMA
#undef SUM
#undef DECODE
