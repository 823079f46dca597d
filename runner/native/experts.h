/* MLPs whose products follow each other in two parallel steps, not three calls each. */

typedef struct {
    rk_matrix gate, up, down;
    const int64_t *token; /* which rows of x it is for; NULL for all of them in order */
    const float *weight;  /* of each in the sum; NULL for 1 */
    int64_t tokens;
} rk_expert;

typedef struct {
    const rk_expert *experts;
    int64_t count, hidden, size;
    const int64_t *first; /* chunks before each expert's own; the last is their number */
    const float *const *x;
    float *const *h, *const *up, *const *y;
    float *out;
    int64_t tokens;
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

/* silu(gate x) * (up x), a few rows of one expert. */
static void run_gate_up(const void *context, int64_t chunk)
{
    const experts_job *job = context;
    int64_t e = 0;
    while (chunk >= job->first[e + 1])
        e++;
    const rk_expert *expert = job->experts + e;
    const int64_t width = expert->gate.rows, begin = (chunk - job->first[e]) * chunk_rows(&expert->gate);
    int64_t end = begin + chunk_rows(&expert->gate);
    end = end < width ? end : width;
    float *h = job->h[e], *up = job->up[e];
    multiply(&expert->gate, begin, end, job->x[e], expert->tokens, h);
    multiply(&expert->up, begin, end, job->x[e], expert->tokens, up);
    for (int64_t t = 0; t < expert->tokens; t++)
        for (int64_t i = t * width + begin; i < t * width + end; i++) {
            const float value = h[i] / (1.0f + expf(-h[i])) * up[i];
            h[i] = job->rounds ? round_to_bf16(value) : value;
        }
}

/* The weighted sum of the experts, in their order, of a few numbers of every token. */
static void run_down(const void *context, int64_t chunk)
{
    const experts_job *job = context;
    const int64_t begin = chunk * job->size, hidden = job->hidden;
    const int64_t end = begin + job->size < hidden ? begin + job->size : hidden;
    for (int64_t t = 0; t < job->tokens; t++)
        memset(job->out + t * hidden + begin, 0, (size_t)(end - begin) * sizeof(float));
    for (int64_t e = 0; e < job->count; e++) {
        const rk_expert *expert = job->experts + e;
        multiply(&expert->down, begin, end, job->h[e], expert->tokens, job->y[e]);
        for (int64_t t = 0; t < expert->tokens; t++) {
            const float weight = expert->weight ? expert->weight[t] : 1.0f;
            float *out = job->out + (expert->token ? expert->token[t] : t) * hidden;
            const float *y = job->y[e] + t * hidden;
            for (int64_t i = begin; i < end; i++)
                out[i] += weight * y[i];
        }
    }
}

/* Floats of working memory that rk_experts needs. */
int64_t rk_experts_room(const rk_expert *experts, int64_t count)
{
    int64_t room = 0;
    for (int64_t e = 0; e < count; e++)
        room += experts[e].tokens * (2 * experts[e].gate.rows + 2 * experts[e].gate.columns);
    return room;
}

/* out = the sum over experts of weight * down(silu(gate x) * up x), in their order; x and out are [tokens, hidden].

   With `rounds` the products' other operands are rounded to bfloat16: h here, x by the caller. Returns 0, or -1 when
   there is no memory. */
int rk_experts(const rk_expert *experts, int64_t count, const float *x, int64_t tokens, float *out, float *room, int rounds)
{
    const int64_t hidden = count ? experts[0].gate.columns : 0;
    void *memory = malloc((size_t)(count + 1) * (sizeof(int64_t) + 4 * sizeof(float *)));
    if (memory == NULL)
        return -1;
    float **inputs = memory, **h = inputs + count, **up = h + count, **y = up + count;
    int64_t *first = (int64_t *)(y + count);
    int64_t bytes = 0;
    first[0] = 0;
    for (int64_t e = 0; e < count; e++) {
        const rk_expert *expert = experts + e;
        const int64_t width = expert->gate.rows;
        h[e] = room;
        up[e] = h[e] + expert->tokens * width;
        y[e] = up[e] + expert->tokens * width;
        inputs[e] = y[e] + expert->tokens * hidden;
        room = inputs[e] + expert->tokens * hidden;
        bytes += matrix_bytes(&expert->gate) * expert->tokens;
        first[e + 1] = first[e] + count_chunks(width, chunk_rows(&expert->gate));
        for (int64_t t = 0; t < expert->tokens; t++)
            memcpy(inputs[e] + t * hidden, x + (expert->token ? expert->token[t] : t) * hidden, (size_t)hidden * sizeof *x);
    }
    experts_job job = {experts, count, hidden, 0, first, (const float *const *)inputs, h, up, y, out, tokens, rounds};
    pthread_mutex_lock(&pool.caller);
    run_chunks(run_gate_up, &job, first[count], 2 * bytes);
    job.size = count ? chunk_rows(&experts[0].down) : 1;
    run_chunks(run_down, &job, count_chunks(hidden, job.size), bytes);
    pthread_mutex_unlock(&pool.caller);
    free(memory);
    return 0;
}
