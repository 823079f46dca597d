/* The steps of attention over latents, and the norm, for one instruction set. attention.h includes this once for each,
   with panel.h's names V, ZERO, SET, LOAD, STORE, FMA, SUM, DECODE, NAME and TARGET defined, and these:

     TILE_ROWS, TILE_VECS  sums that are held in registers, rows times 16 numbers
     LONE_VECS             the same for a single row

   Every number is a sum in one order that knows neither the tokens nor the heads beside it. */


/* part[r][v] = the sum over k of a[r, k] * b[k, 16 v ...]; rows from `real` on repeat the last, and mean nothing. */
TARGET INLINE void NAME(tile)(
    const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step, int64_t b_vec, int64_t count,
    int rows, int64_t real, int vecs, V *part)
{
    const float *from[TILE_ROWS];
    UNROLLED for (int r = 0; r < rows; r++) {
        from[r] = a + (r < real ? r : real - 1) * a_row;
        UNROLLED for (int v = 0; v < vecs; v++)
            part[r * vecs + v] = ZERO();
    }
    for (int64_t k = 0; k < count; k++) {
        V right[LONE_VECS];
        UNROLLED for (int v = 0; v < vecs; v++)
            right[v] = LOAD(b + k * b_step + v * b_vec);
        UNROLLED for (int r = 0; r < rows; r++) {
            const V left = SET(from[r][k * a_step]);
            UNROLLED for (int v = 0; v < vecs; v++)
                part[r * vecs + v] = FMA(left, right[v], part[r * vecs + v]);
        }
    }
}

/* to += part * factor, its first `count` numbers. */
TARGET INLINE void NAME(add_some)(float *to, int64_t count, V part, float factor)
{
    if (count >= LANES) {
        STORE(to, FMA(part, SET(factor), LOAD(to)));
        return;
    }
    float some[LANES] = {0};
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
            V part[TILE_ROWS * LONE_VECS];
            NAME(tile)(q + t * q_stride, q_stride, 1, weights[0] + i, PIECE, LANES, deep, rows, real, vecs, part);
            UNROLLED for (int r = 0; r < rows; r++)
                UNROLLED for (int v = 0; v < vecs; v++)
                    if (r < real && i + v * LANES < size)
                        NAME(add_some)(out + (t + r) * out_stride + i + v * LANES, size - i - v * LANES,
                                       part[r * vecs + v], scale);
        }
    }
}

/* out[t] = the sum over n of q[t, n] * row begin + n of a: the transposed product, with `rows` of its rows. */
TARGET static void NAME(transposed)(
    const rk_matrix *a, int64_t begin, int64_t rows, const float *q, int64_t q_stride, int64_t tokens, float *out,
    int64_t out_stride)
{
    /* Vectors behind the last number are multiplied too, and dropped. */
    alignas(64) float weights[SLAB][PIECE];
    memset(weights, 0, sizeof weights);
    const int64_t width = element_bytes(a->kind), block_columns = a->scale ? a->block_columns : a->columns;
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
            for (int64_t r = 0; r < deep; r++) {
                const uint8_t *w = (const uint8_t *)a->weight + ((row + r) * a->columns + first) * width;
                prefetch(w + SLAB * a->columns * width, size * width);
                DECODE(a->kind, w, size, weights[r]);
            }
            const float scale = scale_of(scales, block);
            if (tokens == 1)
                NAME(add_slab)(weights, deep, size, scale, q + n, q_stride, 1, out + first, out_stride, 1, LONE_VECS);
            else if (tokens <= TILE_ROWS / 2)
                NAME(add_slab)(weights, deep, size, scale, q + n, q_stride, tokens, out + first, out_stride,
                               TILE_ROWS / 2, 2 * TILE_VECS);
            else
                NAME(add_slab)(weights, deep, size, scale, q + n, q_stride, tokens, out + first, out_stride,
                               TILE_ROWS, TILE_VECS);
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
        for (int64_t j = 0; j < count; j += TILE_ROWS) {
            const int64_t real = count - j < TILE_ROWS ? count - j : TILE_ROWS;
            V part[TILE_ROWS * TILE_VECS];
            const float *from = keys + j * width + k;
            /* The same place of the next positions. */
            for (int64_t r = 0; r < real; r++)
                for (int64_t i = 0; i < size; i += 16)
                    __builtin_prefetch(from + (BLOCK + r) * width + i, 0, 2);
            NAME(tile)(from, width, 1, q + k * LANES, LANES, q_vec, size, TILE_ROWS, real, vecs, part);
            UNROLLED for (int r = 0; r < TILE_ROWS; r++)
                UNROLLED for (int v = 0; v < vecs; v++)
                    if (r < real) {
                        float *to = score[j + r] + v * LANES;
                        const V new = part[r * vecs + v];
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
    alignas(64) float some[BLOCK][TILE_VECS * LANES];
    memset(some, 0, sizeof some);
    for (int64_t column = 0; column < latent; column += TILE_VECS * LANES) {
        const int64_t left = latent - column, size = left < TILE_VECS * LANES ? left : TILE_VECS * LANES;
        for (int64_t j = 0; j < count; j++) {
            const float *from = c + j * latent + column;
            if (size == TILE_VECS * LANES)
                for (int v = 0; v < TILE_VECS; v++)
                    STORE(some[j] + v * LANES, LOAD(from + v * LANES));
            else
                memcpy(some[j], from, (size_t)size * sizeof *from);
        }
        for (int64_t h = 0; h < heads; h += TILE_ROWS) {
            const int64_t real = heads - h < TILE_ROWS ? heads - h : TILE_ROWS;
            V part[TILE_ROWS * TILE_VECS];
            NAME(tile)(weight[0] + h, 1, HEADS, some[0], TILE_VECS * LANES, LANES, count, TILE_ROWS, real, TILE_VECS,
                       part);
            UNROLLED for (int r = 0; r < TILE_ROWS; r++)
                UNROLLED for (int v = 0; v < TILE_VECS; v++)
                    if (r < real) {
                        float *to = out + (h + r) * padded + column + v * LANES;
                        const V new = part[r * TILE_VECS + v];
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
        for (int v = 0; v < vecs; v += TILE_VECS) {
            const float *from = q + v * q_vec, *from_pe = from + latent * LANES;
            float (*to)[HEADS] = (float(*)[HEADS])(score[0] + v * LANES);
            if (vecs - v < TILE_VECS) {
                NAME(add_scores)(c, latent, count, from, q_vec, 1, 1, to);
                NAME(add_scores)(k_pe, of->rotary, count, from_pe, q_vec, 1, 0, to);
            } else {
                NAME(add_scores)(c, latent, count, from, q_vec, TILE_VECS, 1, to);
                NAME(add_scores)(k_pe, of->rotary, count, from_pe, q_vec, TILE_VECS, 0, to);
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
    V squares = ZERO();
    const int64_t lanes = size & ~(int64_t)(LANES - 1);
    for (int64_t i = 0; i < lanes; i += LANES) {
        const V v = LOAD(x + i);
        squares = FMA(v, v, squares);
    }
    if (lanes < size) {
        float some[LANES] = {0};
        memcpy(some, x + lanes, (size_t)(size - lanes) * sizeof *x);
        squares = FMA(LOAD(some), LOAD(some), squares);
    }
    const float factor = 1.0f / sqrtf(SUM(squares) / (float)size + eps);
    for (int64_t i = 0; i < size; i++)
        out[i] = x[i] * factor * weight[i];
}

static const steps NAME(steps) = {NAME(transposed), NAME(span), NAME(norm)};

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
#undef TILE_ROWS
#undef TILE_VECS
#undef LONE_VECS
