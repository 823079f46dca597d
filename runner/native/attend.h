/* The steps of attention over latents, and the norm, for one instruction set. attention.h includes this once for each,
   with panel.h's names NAME, TARGET, V, WIDTH, ZERO, SET, LOAD, STORE, FMA, SUM, UNIT, TABLE, TABLE_LOAD, DECODE,
   FP8_UNIT and HAS_NAN defined, and these:

     SUM_ROWS, SUM_VECS  sums that are held in registers, rows times 16 numbers
     LONE_VECS           the same for a single row

   Every number is a sum in one order that knows neither the tokens nor the heads beside it. */


#define PARTS (LANES / WIDTH)

/* part[r][v] = the sum over k of a[r, k] * b[k, 16 v ...]; rows from `real` on repeat the last, and mean nothing. */
TARGET INLINE void NAME(sums)(
    const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step, int64_t b_vec, int64_t count,
    int rows, int64_t real, int vecs, V *part)
{
    const float *from[SUM_ROWS];
    UNROLLED for (int r = 0; r < rows; r++) {
        from[r] = a + (r < real ? r : real - 1) * a_row;
        UNROLLED for (int v = 0; v < vecs * PARTS; v++)
            part[r * vecs * PARTS + v] = ZERO();
    }
    for (int64_t k = 0; k < count; k++) {
        V right[LONE_VECS * PARTS];
        UNROLLED for (int v = 0; v < vecs * PARTS; v++)
            right[v] = LOAD(b + k * b_step + v / PARTS * b_vec + v % PARTS * WIDTH);
        UNROLLED for (int r = 0; r < rows; r++) {
            const V left = SET(from[r][k * a_step]);
            UNROLLED for (int v = 0; v < vecs * PARTS; v++)
                part[r * vecs * PARTS + v] = FMA(left, right[v], part[r * vecs * PARTS + v]);
        }
    }
}

/* to += part * factor, its first `count` numbers. */
TARGET INLINE void NAME(add_some)(float *to, int64_t count, V part, float factor)
{
    if (count >= WIDTH) {
        STORE(to, FMA(part, SET(factor), LOAD(to)));
        return;
    }
    float some[WIDTH] = {0};
    memcpy(some, to, (size_t)count * sizeof *to);
    STORE(some, FMA(part, SET(factor), LOAD(some)));
    memcpy(to, some, (size_t)count * sizeof *to);
}

TARGET INLINE void NAME(add_slab)(
    const float (*weights)[PIECE], int64_t deep, int64_t size, float scale, const float *q, int64_t q_stride,
    int64_t tokens, float *out, int64_t out_stride, int rows, int vecs)
{
    for (int64_t t = 0; t < tokens; t += rows) {
        const int64_t real = tokens - t < rows ? tokens - t : rows;
        for (int64_t i = 0; i < size; i += vecs * LANES) {
            V part[SUM_ROWS * LONE_VECS * PARTS];
            NAME(sums)(q + t * q_stride, q_stride, 1, weights[0] + i, PIECE, LANES, deep, rows, real, vecs, part);
            UNROLLED for (int r = 0; r < rows; r++)
                UNROLLED for (int v = 0; v < vecs * PARTS; v++)
                    if (r < real && i + v * WIDTH < size)
                        NAME(add_some)(out + (t + r) * out_stride + i + v * WIDTH, size - i - v * WIDTH,
                                       part[r * vecs * PARTS + v], scale);
        }
    }
}

/* The same for one token, by UNITs of columns that never leave the registers; returns how many columns were done. */
TARGET INLINE int64_t NAME(add_lone_kind)(
    const int kind, const uint8_t *w, int64_t row_bytes, int64_t deep, int64_t size, float scale, const float *q,
    float *out)
{
    TABLE table = TABLE_LOAD();
    int64_t i = 0;
    for (; i + UNIT <= size; i += UNIT) {
        V part[UNIT / WIDTH];
        UNROLLED for (int v = 0; v < UNIT / WIDTH; v++)
            part[v] = ZERO();
        const uint8_t *from = w + i * element_bytes(kind);
        for (int64_t r = 0; r < deep; r++, from += row_bytes) {
            V some[UNIT / WIDTH];
            const V left = SET(q[r]);
            prefetch(from + SLAB * row_bytes, UNIT * element_bytes(kind));
            DECODE(kind, table, from, some);
            UNROLLED for (int v = 0; v < UNIT / WIDTH; v++)
                part[v] = FMA(left, some[v], part[v]);
        }
        if (HAS_NAN(table))
            break;
        UNROLLED for (int v = 0; v < UNIT / WIDTH; v++) {
            float *to = out + i + v * WIDTH;
            STORE(to, FMA(part[v], SET(scale), LOAD(to)));
        }
    }
    return i;
}

TARGET static int64_t NAME(add_lone)(
    int kind, const uint8_t *w, int64_t row_bytes, int64_t deep, int64_t size, float scale, const float *q, float *out)
{
    switch (kind) {
    case FP8_E4M3:
        return NAME(add_lone_kind)(FP8_E4M3, w, row_bytes, deep, size, scale, q, out);
    case BF16:
        return NAME(add_lone_kind)(BF16, w, row_bytes, deep, size, scale, q, out);
    case F16:
        return NAME(add_lone_kind)(F16, w, row_bytes, deep, size, scale, q, out);
    default:
        return NAME(add_lone_kind)(F32, w, row_bytes, deep, size, scale, q, out);
    }
}

/* out[t] = the sum over n of q[t, n] * row begin + n of a: the transposed product, with `rows` of its rows. */
TARGET static void NAME(transposed)(
    const rk_matrix *a, int64_t begin, int64_t rows, const float *q, int64_t q_stride, int64_t tokens, float *out,
    int64_t out_stride)
{
    /* Vectors behind the last number are multiplied too, and dropped. */
    alignas(64) float weights[SLAB][PIECE];
    int is_clean = 0;
    const int64_t row_bytes = bytes_of(a->kind, a->columns);
    const int64_t block_columns = a->scale ? a->block_columns : a->columns;
    for (int64_t t = 0; t < tokens; t++)
        memset(out + t * out_stride, 0, (size_t)a->columns * sizeof *out);
    for (int64_t n = 0, deep; n < rows; n += deep) {
        const int64_t row = begin + n;
        deep = rows - n < SLAB ? rows - n : SLAB;
        if (a->scale && a->block_rows - row % a->block_rows < deep)
            deep = a->block_rows - row % a->block_rows;
        const uint8_t *scales = scales_of(a, row);
        for (int64_t first = 0, block = 0, block_end = block_columns; first < a->columns;) {
            const int64_t end = block_end < a->columns ? block_end : a->columns;
            const int64_t size = end - first < PIECE ? end - first : PIECE;
            const uint8_t *w = (const uint8_t *)a->weight + row * row_bytes;
            const float scale = scale_of(scales, block) / (a->kind == FP8_E4M3 ? FP8_UNIT : 1.0f);
            float *to = out + first;
            int64_t done = 0;
            if (tokens == 1 && !is_quantised(a->kind))
                done = NAME(add_lone)(a->kind, w + bytes_of(a->kind, first), row_bytes, deep, size, scale, q + n, to);
            const int64_t left = size - done;
            to += done;
            if (left && !is_clean) {
                memset(weights, 0, sizeof weights);
                is_clean = 1;
            }
            for (int64_t r = 0; r < deep && left; r++) {
                const uint8_t *from = w + r * row_bytes;
                prefetch(from + SLAB * row_bytes + bytes_of(a->kind, first + done), bytes_of(a->kind, left));
                NAME(expand)(a->kind, from, first + done, left, weights[r]);
            }
            if (tokens == 1)
                NAME(add_slab)(weights, deep, left, scale, q + n, q_stride, 1, to, out_stride, 1, LONE_VECS);
            else if (tokens <= SUM_ROWS / 2)
                NAME(add_slab)(weights, deep, left, scale, q + n, q_stride, tokens, to, out_stride, SUM_ROWS / 2,
                               2 * SUM_VECS);
            else
                NAME(add_slab)(weights, deep, left, scale, q + n, q_stride, tokens, to, out_stride, SUM_ROWS, SUM_VECS);
            first += size;
            if (first == block_end) {
                block++;
                block_end += block_columns;
            }
        }
    }
}

/* Scores of `count` positions against the heads of `vecs` vectors, or what `width` more numbers add to them. */
TARGET INLINE void NAME(add_scores)(
    const float *keys, int64_t width, int64_t count, const float *q, int64_t q_vec, int vecs, int is_first,
    float (*score)[HEADS])
{
    for (int64_t k = 0; k < width; k += DEEP) {
        const int64_t size = width - k < DEEP ? width - k : DEEP;
        for (int64_t j = 0; j < count; j += SUM_ROWS) {
            const int64_t real = count - j < SUM_ROWS ? count - j : SUM_ROWS;
            V part[SUM_ROWS * SUM_VECS * PARTS];
            const float *from = keys + j * width + k;
            /* The same place of the next positions. */
            for (int64_t r = 0; r < real; r++)
                for (int64_t i = 0; i < size; i += 16)
                    __builtin_prefetch(from + (BLOCK + r) * width + i, 0, 2);
            NAME(sums)(from, width, 1, q + k * LANES, LANES, q_vec, size, SUM_ROWS, real, vecs, part);
            UNROLLED for (int r = 0; r < SUM_ROWS; r++)
                UNROLLED for (int v = 0; v < vecs * PARTS; v++)
                    if (r < real) {
                        float *to = score[j + r] + v * WIDTH;
                        const V new = part[r * vecs * PARTS + v];
                        STORE(to, is_first && k == 0 ? new : FMA(new, SET(1.0f), LOAD(to)));
                    }
        }
    }
}

/* Scores to exp(score - the largest so far), in place; what was summed before has to fade by as much. */
TARGET INLINE void NAME(weigh)(
    float (*score)[HEADS], int64_t count, float scale, float *most, float *sum, float *fade)
{
    float largest[LANES], total[LANES];
    for (int l = 0; l < LANES; l++) {
        largest[l] = most[l];
        total[l] = 0.0f;
    }
    for (int64_t j = 0; j < count; j++)
        for (int l = 0; l < LANES; l++) {
            const float scaled = score[j][l] * scale;
            score[j][l] = scaled;
            largest[l] = scaled > largest[l] ? scaled : largest[l];
        }
    for (int64_t j = 0; j < count; j++)
        for (int l = 0; l < LANES; l++) {
            const float weight = exp_of(score[j][l] - largest[l]);
            score[j][l] = weight;
            total[l] += weight;
        }
    for (int l = 0; l < LANES; l++) {
        fade[l] = exp_of(most[l] - largest[l]);
        sum[l] = sum[l] * fade[l] + total[l];
        most[l] = largest[l];
    }
}

/* out = out * fade + the sum over positions of weight * latent; out is [heads, padded], its first value not read. */
TARGET INLINE void NAME(mix)(
    const float *c, int64_t latent, int64_t count, float (*weight)[HEADS], int64_t heads, const float *fade,
    int is_first, float *out, int64_t padded)
{
    /* Columns side by side: in the cache they lie a power of two apart, where few of them fit the L1 at a time. */
    alignas(64) float some[BLOCK][SUM_VECS * LANES];
    memset(some, 0, sizeof some);
    for (int64_t column = 0; column < latent; column += SUM_VECS * LANES) {
        const int64_t left = latent - column, size = left < SUM_VECS * LANES ? left : SUM_VECS * LANES;
        for (int64_t j = 0; j < count; j++) {
            const float *from = c + j * latent + column;
            if (size == SUM_VECS * LANES)
                for (int v = 0; v < SUM_VECS * PARTS; v++)
                    STORE(some[j] + v * WIDTH, LOAD(from + v * WIDTH));
            else
                memcpy(some[j], from, (size_t)size * sizeof *from);
        }
        for (int64_t h = 0; h < heads; h += SUM_ROWS) {
            const int64_t real = heads - h < SUM_ROWS ? heads - h : SUM_ROWS;
            V part[SUM_ROWS * SUM_VECS * PARTS];
            NAME(sums)(weight[0] + h, 1, HEADS, some[0], SUM_VECS * LANES, LANES, count, SUM_ROWS, real, SUM_VECS,
                       part);
            UNROLLED for (int r = 0; r < SUM_ROWS; r++)
                UNROLLED for (int v = 0; v < SUM_VECS * PARTS; v++)
                    if (r < real) {
                        float *to = out + (h + r) * padded + column + v * WIDTH;
                        const V new = part[r * SUM_VECS * PARTS + v];
                        STORE(to, is_first ? new : FMA(LOAD(to), SET(fade[h + r]), new));
                    }
        }
    }
}

/* Positions begin to end for the heads of `vecs` vectors: the weighted sums of the latents, the largest scores, and the
   sums of the weights. */
TARGET static void NAME(span)(
    const rk_attention *of, const float *q, int64_t q_vec, int vecs, int64_t begin, int64_t end, float *out,
    int64_t padded, float *most, float *sum)
{
    alignas(64) float score[BLOCK][HEADS], fade[HEADS];
    const int64_t latent = of->kv_b.columns;
    for (int l = 0; l < vecs * LANES; l++) {
        most[l] = -FLT_MAX;
        sum[l] = 0.0f;
    }
    for (int64_t at = begin; at < end; at += BLOCK) {
        const int64_t count = end - at < BLOCK ? end - at : BLOCK;
        const float *c = of->c + at * latent, *k_pe = of->k_pe + at * of->rotary;
        for (int v = 0; v < vecs; v += SUM_VECS) {
            const float *from = q + v * q_vec, *from_pe = from + latent * LANES;
            float (*to)[HEADS] = (float(*)[HEADS])(score[0] + v * LANES);
            if (vecs - v < SUM_VECS) {
                NAME(add_scores)(c, latent, count, from, q_vec, 1, 1, to);
                NAME(add_scores)(k_pe, of->rotary, count, from_pe, q_vec, 1, 0, to);
            } else {
                NAME(add_scores)(c, latent, count, from, q_vec, SUM_VECS, 1, to);
                NAME(add_scores)(k_pe, of->rotary, count, from_pe, q_vec, SUM_VECS, 0, to);
            }
        }
        for (int l = 0; l < vecs * LANES; l += LANES)
            NAME(weigh)((float(*)[HEADS])(score[0] + l), count, of->scale, most + l, sum + l, fade + l);
        NAME(mix)(c, latent, count, score, vecs * LANES, fade, at == begin, out, padded);
    }
}

/* x / its root mean square * weight. */
TARGET static void NAME(norm)(const float *x, const float *weight, int64_t size, float eps, float *out)
{
    V squares[PARTS];
    float some[LANES];
    UNROLLED for (int v = 0; v < PARTS; v++)
        squares[v] = ZERO();
    for (int64_t i = 0; i < size; i += LANES) {
        const float *from = x + i;
        if (size - i < LANES) {
            memset(some, 0, sizeof some);
            from = memcpy(some, from, (size_t)(size - i) * sizeof *x);
        }
        UNROLLED for (int v = 0; v < PARTS; v++) {
            const V these = LOAD(from + v * WIDTH);
            squares[v] = FMA(these, these, squares[v]);
        }
    }
    UNROLLED for (int v = 0; v < PARTS; v++)
        STORE(some + v * WIDTH, squares[v]);
    const float factor = 1.0f / sqrtf(SUM(some) / (float)size + eps);
    for (int64_t i = 0; i < size; i++)
        out[i] = x[i] * factor * weight[i];
}

static const steps NAME(steps) = {NAME(transposed), NAME(span), NAME(norm)};

#undef NAME
#undef TARGET
#undef V
#undef WIDTH
#undef PARTS
#undef ZERO
#undef SET
#undef LOAD
#undef STORE
#undef FMA
#undef SUM
#undef UNIT
#undef TABLE
#undef TABLE_LOAD
#undef DECODE
#undef FP8_UNIT
#undef HAS_NAN
#undef SUM_ROWS
#undef SUM_VECS
#undef LONE_VECS
