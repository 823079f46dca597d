/* The product of a matrix's rows with activations, for one instruction set. kernels.c includes this once for each,
   with these names defined:

     NAME(x)             x with the instruction set's suffix
     TARGET              the function attribute that allows its instructions
     V, WIDTH            so many floats, 16 or a divisor of it
     ZERO() SET(f)       all zero; all f
     LOAD(p) STORE(p, v) WIDTH floats of memory, not aligned
     LOAD_SOME(p, n)     the first n of them, zeros behind; touches no other memory
     FMA(a, b, c)        a * b + c, rounded once where the instruction set can
     SUM(p)              the 16 floats at p added: halves, quarters, eighths, pairs
     STREAMS             FP8 rows that a product with at most STREAM_TOKENS tokens goes over side by side
     TILE_TOKENS         tokens whose sums with TILE_ROWS rows fit the registers
     UNIT                numbers that DECODE takes: 16, 32 or 64
     TABLE, TABLE_LOAD() what DECODE keeps in registers
     DECODE(kind, table, w, out)
                         UNIT stored numbers at w as V's at out, FP8 times FP8_UNIT
     FP8_UNIT            a power of two
     BLOCKS(x)           x of quantised_rows.h with the suffix of those that it uses
     HAS_NAN(table)      whether a DECODE met FP8 codes of NaN, which it need not get right then

   One order of additions for every count of tokens, rows and threads: lane l of a piece adds its columns l, l + 16, ...
   from the left; the pieces of a row follow each other, each multiplied by its scale; the lanes are added last. */

#define PARTS (LANES / WIDTH)
#define INLINE TARGET static inline __attribute__((always_inline))

/* `count` numbers at w, as they are DECODEd, at out; whether there were codes of NaN that came out wrong. */
INLINE int NAME(expand_kind)(const int kind, const uint8_t *w, int64_t count, const int is_exact, float *out)
{
    TABLE table = TABLE_LOAD();
    int64_t i = 0;
    for (; i + UNIT <= count && !is_exact; i += UNIT) {
        V some[UNIT / WIDTH];
        DECODE(kind, table, w + i * element_bytes(kind), some);
#pragma GCC unroll 8
        for (int j = 0; j < UNIT / WIDTH; j++)
            STORE(out + i + j * WIDTH, some[j]);
    }
    if (i < count)
        decode_some(kind, w + i * element_bytes(kind), count - i, FP8_UNIT, out + i);
    return HAS_NAN(table);
}

/* `count` columns of a row from `first` on, right in every case, with zeros behind up to a multiple of 16. */
TARGET static __attribute__((noinline)) void NAME(expand)(
    int kind, const uint8_t *row, int64_t first, int64_t count, float *out)
{
    if (is_quantised(kind)) {
        BLOCKS(expand_blocks)(kind, row, first, count, out);
        return;
    }
    const uint8_t *w = row + first * element_bytes(kind);
    switch (kind) {
    case FP8_E4M3:
        if (NAME(expand_kind)(FP8_E4M3, w, count, 0, out))
            NAME(expand_kind)(FP8_E4M3, w, count, 1, out);
        break;
    case BF16:
        NAME(expand_kind)(BF16, w, count, 0, out);
        break;
    case F16:
        NAME(expand_kind)(F16, w, count, 0, out);
        break;
    default:
        NAME(expand_kind)(F32, w, count, 0, out);
    }
    for (int64_t i = count; i % LANES; i++)
        out[i] = 0.0f;
}

/* Add the products of TILE_ROWS rows of `size` expanded weights with `count` tokens to their sums, and ask for memory
   from `next` on on the way, `step` bytes for each LANES columns. */
INLINE void NAME(tile)(
    const float weights[][SEGMENT], const float scale[][SEGMENT / PIECE], int64_t size, const float *x, int64_t columns,
    const int count, float total[][TOKENS][LANES], const uint8_t *next, int64_t step)
{
    for (int64_t begin = 0; begin < size; begin += PIECE) {
        const int64_t end = begin + PIECE < size ? begin + PIECE : size, lanes = end & ~(int64_t)(LANES - 1);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            V part[TILE_ROWS][TILE_TOKENS];
#pragma GCC unroll 8
            for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 8
                for (int t = 0; t < count; t++)
                    part[r][t] = ZERO();
            int64_t i = begin + p * WIDTH;
            for (; i < lanes; i += LANES, next += step) {
                V w[TILE_ROWS];
                __builtin_prefetch(next, 0, 3);
#pragma GCC unroll 8
                for (int r = 0; r < TILE_ROWS; r++)
                    w[r] = LOAD(weights[r] + i);
#pragma GCC unroll 8
                for (int t = 0; t < count; t++) {
                    const V v = LOAD(x + t * columns + i);
#pragma GCC unroll 8
                    for (int r = 0; r < TILE_ROWS; r++)
                        part[r][t] = FMA(w[r], v, part[r][t]);
                }
            }
            if (i < end)
#pragma GCC unroll 8
                for (int t = 0; t < count; t++) {
                    const V v = LOAD_SOME(x + t * columns + i, end - i);
#pragma GCC unroll 8
                    for (int r = 0; r < TILE_ROWS; r++)
                        part[r][t] = FMA(LOAD(weights[r] + i), v, part[r][t]);
                }
#pragma GCC unroll 8
            for (int r = 0; r < TILE_ROWS; r++) {
                const V factor = SET(scale[r][begin / PIECE]);
#pragma GCC unroll 8
                for (int t = 0; t < count; t++) {
                    float *sum = total[r][t] + p * WIDTH;
                    STORE(sum, FMA(part[r][t], factor, LOAD(sum)));
                }
            }
            __asm__ volatile("" ::: "memory"); /* or the sums are kept on the stack as well */
        }
    }
}

/* A few rows with any tokens: each segment of the weights is expanded once, to memory that stays in the cache. */
TARGET static __attribute__((noinline)) void NAME(group)(const rk_matrix *a, int64_t row, int count, const float *x, int64_t tokens, float *y)
{
    alignas(64) float weights[GROUP][SEGMENT];
    alignas(64) float total[GROUP][TOKENS][LANES];
    float scale[GROUP][SEGMENT / PIECE];
    const int64_t columns = a->columns, stride = bytes_of(a->kind, columns);
    const int64_t tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    const int64_t block_columns = a->scale ? a->block_columns : columns;
    const int has_whole_pieces = a->scale == NULL || block_columns % PIECE == 0;
    const int rows = (count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    const uint8_t *w = (const uint8_t *)a->weight + row * stride;
    const uint8_t *scales[GROUP];
    for (int r = 0; r < count; r++)
        scales[r] = scales_of(a, row + r);
    for (int r = 0; r < rows; r++) {
        memset(total[r], 0, (size_t)tokens * sizeof total[r][0]);
        if (r >= count) {
            memset(weights[r], 0, sizeof weights[r]);
            memset(scale[r], 0, sizeof scale[r]);
        }
    }
    for (int64_t begin = 0, end, block = 0, block_end = block_columns; begin < columns; begin = end) {
        end = has_whole_pieces ? begin + SEGMENT : begin + PIECE < block_end ? begin + PIECE : block_end;
        end = end < columns ? end : columns;
        const int64_t size = end - begin;
        for (int64_t c = begin, piece = 0; c < end; c += PIECE, piece++) {
            for (int r = 0; r < count; r++)
                scale[r][piece] = scale_of(scales[r], block) / (a->scale ? FP8_UNIT : 1.0f);
            if (c + PIECE >= block_end) {
                block++;
                block_end += block_columns;
            }
        }
        const uint8_t *behind = w + count * (stride + bytes_of(a->kind, begin));
        const int64_t bytes = bytes_of(a->kind, size);
        for (int r = 0; r < count; r++) {
            if (a->kind != FP8_E4M3) /* as in streams; FP8 is asked for evenly, in the first tiles */
                prefetch(behind + r * bytes, bytes);
            NAME(expand)(a->kind, w + r * stride, begin, size, weights[r]);
        }
        for (int64_t t = 0, n = 1; n <= tiles; n++) {
            const int64_t some = tokens * n / tiles - t;
            const float *from = x + t * columns + begin;
            const int64_t step = n == 1 && a->kind == FP8_E4M3 ? TILE_ROWS * LANES / PARTS : 0;
            for (int r = 0; r < rows; r += TILE_ROWS) {
                const uint8_t *next = behind + r * bytes;
                const float(*const w_r)[SEGMENT] = (const float(*)[SEGMENT])weights[r];
                const float(*const scale_r)[SEGMENT / PIECE] = (const float(*)[SEGMENT / PIECE])scale[r];
                float(*const sums)[TOKENS][LANES] = (float(*)[TOKENS][LANES])total[r][t];
                switch (some) {
#define CASE(n) \
    case n: \
        if (n <= TILE_TOKENS) \
            NAME(tile)(w_r, scale_r, size, from, columns, n <= TILE_TOKENS ? n : 1, sums, next, step); \
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

/* `count` rows with a few tokens, expanded into registers; whether there were codes of NaN that came out wrong. */
INLINE int NAME(streams)(
    const rk_matrix *a, const int kind, const int count, int64_t row, const float *x, const int tokens, float *y)
{
    const int64_t bytes = element_bytes(kind), columns = a->columns, block_columns = a->scale ? a->block_columns : columns;
    const uint8_t *const w = (const uint8_t *)a->weight + row * columns * bytes;
    const uint8_t *scales[STREAMS];
    alignas(64) float sums[LANES], rest[LINE];
    V total[STREAMS][STREAM_TOKENS][PARTS];
    TABLE table = TABLE_LOAD();
#define EACH_SUM \
    _Pragma("GCC unroll 8") for (int r = 0; r < count; r++) \
        _Pragma("GCC unroll 8") for (int t = 0; t < tokens; t++) \
            _Pragma("GCC unroll 4") for (int p = 0; p < PARTS; p++)
    EACH_SUM total[r][t][p] = ZERO();
    for (int r = 0; r < count; r++)
        scales[r] = scales_of(a, row + r);
    for (int64_t begin = 0, block = 0, block_end = block_columns; begin < columns;) {
        const int64_t end = begin + PIECE < columns ? begin + PIECE : columns;
        V part[STREAMS][STREAM_TOKENS][PARTS];
        EACH_SUM part[r][t][p] = ZERO();
        int64_t c = begin;
        for (; c + LINE <= end; c += LINE)
#pragma GCC unroll 8
            for (int r = 0; r < count; r++) {
                /* The next rows, in the order of memory. */
                prefetch(w + (count * (columns + c) + r * LINE) * bytes, LINE * bytes);
#pragma GCC unroll 4
                for (int u = 0; u < LINE; u += UNIT) {
                    V some[UNIT / WIDTH];
                    DECODE(kind, table, w + (r * columns + c + u) * bytes, some);
#pragma GCC unroll 8
                    for (int j = 0; j < UNIT / WIDTH; j++)
#pragma GCC unroll 8
                        for (int t = 0; t < tokens; t++)
                            part[r][t][j % PARTS] =
                                FMA(some[j], LOAD(x + t * columns + c + u + j * WIDTH), part[r][t][j % PARTS]);
                }
            }
        if (c < end)
#pragma GCC unroll 8
            for (int r = 0; r < count; r++) {
                NAME(expand)(kind, w + r * columns * bytes, c, end - c, rest);
                for (int64_t i = 0; i < end - c; i += LANES)
#pragma GCC unroll 8
                    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
                        for (int p = 0; p < PARTS; p++) {
                            const int64_t at = i + p * WIDTH;
                            const V v = LOAD_SOME(x + t * columns + c + at, end - c - at);
                            part[r][t][p] = FMA(LOAD(rest + at), v, part[r][t][p]);
                        }
            }
        V scale[STREAMS];
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            scale[r] = SET(scale_of(scales[r], block) / (kind == FP8_E4M3 ? FP8_UNIT : 1.0f));
        EACH_SUM total[r][t][p] = FMA(part[r][t][p], scale[r], total[r][t][p]);
        if (end == block_end) {
            block++;
            block_end += block_columns;
        }
        begin = end;
    }
#undef EACH_SUM
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++)
                STORE(sums + p * WIDTH, total[r][t][p]);
            y[t * a->rows + row + r] = SUM(sums);
        }
    return HAS_NAN(table);
}

/* Rows begin to end with `tokens` tokens; returns the first that is left, for there are too few for another step, or
   the kind is too rare to be compiled for several tokens. */
INLINE int64_t NAME(few)(
    const rk_matrix *a, int64_t begin, int64_t end, const float *x, const int tokens, float *y)
{
    /* Rows of more bytes are fewer, so that the next ones are not asked for too far ahead. */
    enum { WIDE = STREAMS < 2 ? 1 : STREAMS / 2, WIDEST = STREAMS < 4 ? 1 : STREAMS / 4 };
    switch (a->kind) {
    case FP8_E4M3:
        for (; begin + STREAMS <= end; begin += STREAMS)
            if (NAME(streams)(a, FP8_E4M3, STREAMS, begin, x, tokens, y))
                NAME(group)(a, begin, STREAMS, x, tokens, y);
        break;
    case BF16:
        for (; begin + WIDE <= end; begin += WIDE)
            NAME(streams)(a, BF16, WIDE, begin, x, tokens, y);
        break;
    case F16:
        for (; tokens == 1 && begin + WIDE <= end; begin += WIDE)
            NAME(streams)(a, F16, WIDE, begin, x, 1, y);
        break;
    default:
        for (; tokens == 1 && begin + WIDEST <= end; begin += WIDEST)
            NAME(streams)(a, F32, WIDEST, begin, x, 1, y);
    }
    return begin;
}

/* Rows begin to end of y = a x for tokens at most TOKENS: x is [tokens, columns], y is [tokens, rows]. */
TARGET static void NAME(panel)(
    const rk_matrix *a, int64_t begin, int64_t end, const float *x, int64_t tokens, float *y)
{
    if (is_quantised(a->kind)) {
        if (tokens <= STREAM_TOKENS)
            begin = BLOCKS(block_few)(a, begin, end, x, tokens, y);
    } else if (a->scale == NULL || a->block_columns % PIECE == 0) {
        switch (tokens) {
#define CASE(n) \
    case n: \
        if (n <= STREAM_TOKENS) \
            begin = NAME(few)(a, begin, end, x, n <= STREAM_TOKENS ? n : 1, y); \
        break;
            CASE(1) CASE(2) CASE(3)
#undef CASE
        }
    }
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
#undef FMA
#undef SUM
#undef STREAMS
#undef STREAM_TOKENS
#undef TILE_TOKENS
#undef UNIT
#undef TABLE
#undef TABLE_LOAD
#undef DECODE
#undef FP8_UNIT
#undef HAS_NAN
#undef BLOCKS
