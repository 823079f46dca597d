/* MLPs, down(silu(gate x) * (up x)): those of one call in two parallel steps, not in three for each; then their sum. */

typedef struct {
    rk_matrix gate, up, down;
    const int64_t *token; /* which rows of x it is for; NULL for all of them in order */
    int64_t tokens;
    float *y; /* [tokens, hidden] */
} rk_expert;

typedef struct {
    const rk_expert *experts;
    const int64_t *first; /* chunks before each expert's own; the last is their number */
    const float *const *x;
    float *const *h, *const *up;
    uint16_t *const *packed; /* two for each expert, for gate and up and for down; NULL: not packed */
    const float *all; /* what x has rows of */
    int64_t pieces;   /* of each expert that are packed */
    int rounds;
} experts_job;

static inline float round_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) /* a NaN stays one */
        return value;
    return float_of_bits((bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u);
}

static int64_t find_expert(const experts_job *job, int64_t chunk)
{
    int64_t e = 0;
    while (chunk >= job->first[e + 1])
        e++;
    return e;
}

static void run_pack_x(const void *context, int64_t chunk)
{
    const experts_job *job = context;
    const rk_expert *expert = job->experts + chunk / job->pieces;
    uint16_t *packed = job->packed[2 * (chunk / job->pieces)];
    if (packed != NULL)
        pack(&expert->gate, job->all, expert->token, expert->tokens, chunk % job->pieces, packed);
}

static void run_pack_h(const void *context, int64_t chunk)
{
    const experts_job *job = context;
    const int64_t e = chunk / job->pieces, piece = chunk % job->pieces;
    const rk_expert *expert = job->experts + e;
    uint16_t *packed = job->packed[2 * e + 1];
    if (packed != NULL && piece < count_pieces(expert->down.columns))
        pack(&expert->down, job->h[e], NULL, expert->tokens, piece, packed);
}

/* silu(gate x) * (up x), a few rows of one expert. */
static void run_gate_up(const void *context, int64_t chunk)
{
    const experts_job *job = context;
    const int64_t e = find_expert(job, chunk);
    const rk_expert *expert = job->experts + e;
    const int64_t width = expert->gate.rows, size = chunk_rows(&expert->gate, job->packed[2 * e] != NULL);
    const int64_t begin = (chunk - job->first[e]) * size;
    int64_t end = begin + size;
    end = end < width ? end : width;
    float *h = job->h[e], *up = job->up[e];
    multiply_either(&expert->gate, begin, end, job->x[e], job->packed[2 * e], expert->tokens, h);
    multiply_either(&expert->up, begin, end, job->x[e], job->packed[2 * e], expert->tokens, up);
    for (int64_t t = 0; t < expert->tokens; t++)
        for (int64_t i = t * width + begin; i < t * width + end; i++) {
            const float value = h[i] / (1.0f + expf(-h[i])) * up[i];
            h[i] = job->rounds ? round_to_bf16(value) : value;
        }
}

static void run_down(const void *context, int64_t chunk)
{
    const experts_job *job = context;
    const int64_t e = find_expert(job, chunk);
    const rk_expert *expert = job->experts + e;
    const int64_t size = chunk_rows(&expert->down, job->packed[2 * e + 1] != NULL);
    const int64_t begin = (chunk - job->first[e]) * size, end = begin + size;
    multiply_either(&expert->down, begin, end, job->h[e], job->packed[2 * e + 1], expert->tokens, expert->y);
}

/* Floats of working memory that one expert's rows of x take: they are packed, gathered, or used where they are. */
static int64_t x_room(const rk_expert *expert, int is_packed_x)
{
    if (is_packed_x)
        return packed_room(expert->tokens, expert->gate.columns);
    return expert->token ? expert->tokens * expert->gate.columns : 0;
}

/* Once for gate and up, whose kind says how. */
static int is_packed_x(const rk_expert *expert, int rounds)
{
    return rounds && expert->gate.kind == expert->up.kind && is_packed(&expert->gate, expert->tokens)
        && is_packed(&expert->up, expert->tokens);
}

static int is_packed_h(const rk_expert *expert, int rounds)
{
    return rounds && is_packed(&expert->down, expert->tokens);
}

/* Floats of working memory that rk_experts needs. */
int64_t rk_experts_room(const rk_expert *experts, int64_t count, int rounds)
{
    int64_t room = 0;
    for (const rk_expert *expert = experts; expert < experts + count; expert++) {
        room += x_room(expert, is_packed_x(expert, rounds)) + 2 * expert->tokens * expert->gate.rows;
        if (is_packed_h(expert, rounds))
            room += packed_room(expert->tokens, expert->down.columns);
    }
    return room;
}

/* Each expert's y from rows of x, [.., hidden]. With `rounds` the products' other operands are rounded to bfloat16: h
   here, x by the caller. Returns 0, or -1 when there is no memory. */
int rk_experts(const rk_expert *experts, int64_t count, const float *x, float *room, int rounds)
{
    void *memory = malloc((size_t)(count + 1) * (2 * sizeof(int64_t) + 5 * sizeof(float *)));
    if (memory == NULL)
        return -1;
    const float **inputs = memory;
    float **h = (float **)(inputs + count), **up = h + count;
    uint16_t **packed = (uint16_t **)(up + count);
    int64_t *first = (int64_t *)(packed + 2 * count), *first_down = first + count + 1;
    int64_t bytes = 0, x_pieces = 0, h_pieces = 0, x_bytes = 0, h_bytes = 0;
    first[0] = first_down[0] = 0;
    for (int64_t e = 0; e < count; e++) {
        const rk_expert *expert = experts + e;
        const int64_t width = expert->gate.rows, hidden = expert->gate.columns;
        h[e] = room;
        up[e] = h[e] + expert->tokens * width;
        room = up[e] + expert->tokens * width;
        inputs[e] = x;
        packed[2 * e] = packed[2 * e + 1] = NULL;
        if (is_packed_x(expert, rounds)) {
            packed[2 * e] = (uint16_t *)room;
            room += x_room(expert, 1);
            x_pieces = count_pieces(hidden);
            x_bytes += expert->tokens * hidden * (int64_t)sizeof *x;
        } else if (expert->token != NULL) {
            inputs[e] = room;
            for (int64_t t = 0; t < expert->tokens; t++, room += hidden)
                memcpy(room, x + expert->token[t] * hidden, (size_t)hidden * sizeof *x);
        }
        if (is_packed_h(expert, rounds)) {
            packed[2 * e + 1] = (uint16_t *)room;
            room += packed_room(expert->tokens, width);
            h_pieces = h_pieces > count_pieces(width) ? h_pieces : count_pieces(width);
            h_bytes += expert->tokens * width * (int64_t)sizeof *x;
        }
        bytes += matrix_bytes(&expert->gate) * expert->tokens;
        first[e + 1] = first[e] + count_chunks(width, chunk_rows(&expert->gate, packed[2 * e] != NULL));
        first_down[e + 1] = first_down[e] + count_chunks(hidden, chunk_rows(&expert->down, packed[2 * e + 1] != NULL));
    }
    experts_job job = {experts, first, inputs, h, up, packed, x, x_pieces, rounds};
    pthread_mutex_lock(&pool.caller);
    if (x_pieces)
        run_chunks(run_pack_x, &job, count * x_pieces, x_bytes);
    run_chunks(run_gate_up, &job, first[count], 2 * bytes);
    job.pieces = h_pieces;
    if (h_pieces)
        run_chunks(run_pack_h, &job, count * h_pieces, h_bytes);
    job.first = first_down;
    run_chunks(run_down, &job, first_down[count], bytes);
    pthread_mutex_unlock(&pool.caller);
    free(memory);
    return 0;
}

typedef struct {
    const float *y;       /* [tokens, hidden] */
    const int64_t *token; /* which rows of the sum they belong to; NULL for all of them in order */
    const float *weight;  /* of each; NULL for 1 */
    int64_t tokens;
} rk_part;

typedef struct {
    const rk_part *parts;
    int64_t count, hidden;
    float *out;
} sum_job;

#define SUM_COLUMNS 512

static void run_sum(const void *context, int64_t chunk)
{
    const sum_job *job = context;
    const int64_t begin = chunk * SUM_COLUMNS, hidden = job->hidden;
    const int64_t end = begin + SUM_COLUMNS < hidden ? begin + SUM_COLUMNS : hidden;
    for (const rk_part *part = job->parts; part < job->parts + job->count; part++)
        for (int64_t t = 0; t < part->tokens; t++) {
            const float weight = part->weight ? part->weight[t] : 1.0f;
            float *out = job->out + (part->token ? part->token[t] : t) * hidden;
            const float *y = part->y + t * hidden;
            for (int64_t i = begin; i < end; i++)
                out[i] += weight * y[i];
        }
}

/* out += the sum of weight * y over the parts, in their order. */
void rk_sum(const rk_part *parts, int64_t count, int64_t hidden, float *out)
{
    const sum_job job = {parts, count, hidden, out};
    int64_t bytes = 0;
    for (int64_t p = 0; p < count; p++)
        bytes += parts[p].tokens * hidden * (int64_t)sizeof *out;
    pthread_mutex_lock(&pool.caller);
    run_chunks(run_sum, &job, count_chunks(hidden, SUM_COLUMNS), bytes);
    pthread_mutex_unlock(&pool.caller);
}
