/* ggml's block types, by their definition: a row is blocks of 32 or 256 columns, each with scales of its own. What is
   expanded here, and in quantised_x86.h, is bit for bit what gguf.quants makes of it: a product of a scale with a whole
   number is exact in float32, so that only the subtraction of a minimum rounds, once.

   STRETCH columns are expanded at a time: a small block, or an eighth of a large one. What they have in common:

     Q4_0 Q5_0 Q8_0 IQ4_NL   d, a float16; then codes. Numbers are d * code
     Q4_1 Q5_1               d and m, float16; then codes. Numbers are d * code + m
     Q4_K Q5_K               d and dmin, float16; 8 scales and 8 minima of 6 bits, a pair for each stretch; then codes.
                             Numbers are (d * scale) * code - dmin * minimum
     Q6_K                    codes; 16 scales of 8 bits, a pair for each stretch; d, a float16.
                             Numbers are (d * scale) * code

   Source: ggml's block structs, as the python package gguf describes them. */

#define STRETCH 32
#define FACTORS 16 /* of a large block: scales of stretches and their minima, or scales of half stretches */

static inline int is_quantised(int kind) { return kind >= Q4_0; }
static inline int is_large(int kind) { return kind >= Q4_K; }

/* Columns and bytes of a block. */
static inline __attribute__((always_inline)) int64_t columns_of_block(int kind) { return is_large(kind) ? 256 : STRETCH; }
static inline __attribute__((always_inline)) int64_t bytes_of_block(int kind)
{
    switch (kind) {
    case Q4_1:
        return 20;
    case Q5_0:
        return 22;
    case Q5_1:
        return 24;
    case Q8_0:
        return 34;
    case Q4_K:
        return 144;
    case Q5_K:
        return 176;
    case Q6_K:
        return 210;
    default:
        return 18; /* Q4_0, IQ4_NL */
    }
}

/* Bytes that so many columns of a row take: whole blocks, or pieces of them. */
static inline int64_t bytes_of(int kind, int64_t columns)
{
    return is_quantised(kind) ? columns * bytes_of_block(kind) / columns_of_block(kind) : columns * element_bytes(kind);
}

/* Where the codes of a small block begin, and their upper bits if they have 5. */
static inline __attribute__((always_inline)) int codes_at(int kind)
{
    return kind == Q4_1 ? 4 : kind == Q5_0 ? 6 : kind == Q5_1 ? 8 : 2;
}
static inline __attribute__((always_inline)) int bits_at(int kind) { return codes_at(kind) - 4; }

static const int8_t IQ4_NL_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* Eight scales, then eight minima, of the 12 bytes that Q4_K and Q5_K keep them in: the lower four of each have their 6
   bits in one byte; the upper four have 4 bits in the last bytes, and 2 above those of the lower ones. */
static inline __attribute__((always_inline)) void unpack_scales(const uint8_t *at, uint8_t *to)
{
    uint32_t scales, minima, both, out[4];
    memcpy(&scales, at, 4);
    memcpy(&minima, at + 4, 4);
    memcpy(&both, at + 8, 4);
    out[0] = scales & 0x3f3f3f3f;
    out[1] = (both & 0x0f0f0f0f) | (scales >> 2 & 0x30303030);
    out[2] = minima & 0x3f3f3f3f;
    out[3] = (both >> 4 & 0x0f0f0f0f) | (minima >> 2 & 0x30303030);
    memcpy(to, out, sizeof out);
}

/* The factors of a large block. */
static inline void factors_c(const int kind, const uint8_t *block, float *factor)
{
    if (kind == Q6_K) {
        const float d = f16(block + 208);
        for (int i = 0; i < FACTORS; i++)
            factor[i] = d * (float)(int8_t)block[192 + i];
        return;
    }
    uint8_t scales[FACTORS];
    const float d = f16(block), minimum = f16(block + 2);
    unpack_scales(block + 4, scales);
    for (int i = 0; i < FACTORS; i++)
        factor[i] = (i < 8 ? d : minimum) * (float)scales[i];
}

/* The codes of stretch j of a block, as whole numbers. */
static inline void codes_c(const int kind, const uint8_t *block, int j, int8_t *codes)
{
    const uint8_t *q = block + codes_at(kind), *high = block;
    const int shift = j % 2 * 4;
    uint32_t bits = 0;
    switch (kind) {
    case Q8_0:
        memcpy(codes, q, STRETCH);
        return;
    case Q4_K:
        for (int i = 0; i < STRETCH; i++)
            codes[i] = block[16 + j / 2 * 32 + i] >> shift & 15;
        return;
    case Q5_K:
        for (int i = 0; i < STRETCH; i++)
            codes[i] = (block[48 + j / 2 * 32 + i] >> shift & 15) | (block[16 + i] >> j & 1) << 4;
        return;
    case Q6_K:
        /* Half a block: 64 bytes of lower halves, those of stretches 2 and 3 above 0 and 1; 32 bytes with all four's
           upper two bits. */
        q = block + j / 4 * 64 + j % 2 * 32;
        high = block + 128 + j / 4 * 32;
        for (int i = 0; i < STRETCH; i++)
            codes[i] = (int8_t)((q[i] >> j % 4 / 2 * 4 & 15) | (high[i] >> j % 4 * 2 & 3) << 4) - 32;
        return;
    case Q5_0:
    case Q5_1:
        memcpy(&bits, block + bits_at(kind), sizeof bits);
    }
    for (int i = 0; i < STRETCH; i++) {
        const int code = (i < 16 ? q[i] & 15 : q[i - 16] >> 4) | (bits >> i & 1) << 4;
        codes[i] = (int8_t)(kind == IQ4_NL ? IQ4_NL_VALUES[code] : kind == Q4_0 ? code - 8 : kind == Q5_0 ? code - 16 : code);
    }
}

/* Stretch j of a block as floats; `factor` holds a large block's. */
static inline __attribute__((always_inline)) void stretch_c(
    const int kind, const uint8_t *block, int j, const float *factor, lanes_c *out)
{
    int8_t codes[STRETCH];
    codes_c(kind, block, j, codes);
    const float low = kind == Q6_K ? factor[2 * j] : is_large(kind) ? factor[j] : f16(block);
    const float high = kind == Q6_K ? factor[2 * j + 1] : low;
    const float add = kind == Q4_1 || kind == Q5_1 ? f16(block + 2) : is_large(kind) && kind != Q6_K ? -factor[8 + j] : 0;
    for (int i = 0; i < STRETCH; i += 4) {
        const lanes_c some = {codes[i], codes[i + 1], codes[i + 2], codes[i + 3]};
        out[i / 4] = some * set_c(i < STRETCH / 2 ? low : high);
        if (kind == Q4_1 || kind == Q5_1 || kind == Q4_K || kind == Q5_K)
            out[i / 4] += set_c(add);
    }
}

static inline __attribute__((always_inline)) void small_block_c(const int kind, const uint8_t *block, lanes_c *out)
{
    const float none[FACTORS] = {0};
    stretch_c(kind, block, 0, none, out);
}
