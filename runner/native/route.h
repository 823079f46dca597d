/* The choice of experts, each token for itself: what runner/router.py says. */

typedef struct {
    const float *logits; /* [tokens, experts] */
    const float *bias;   /* [experts], for sigmoid scores; NULL for softmax */
    int64_t tokens, experts, groups, kept, top;
    int32_t normalise;   /* the chosen scores' sum to 1, before the factor */
    float factor;
    int64_t *ids;        /* [tokens, top] */
    float *weights;      /* [tokens, top] */
    float *room;         /* [tokens, 4, experts] */
} rk_routing;

/* A NaN is the largest, so that it is chosen and seen. */
static inline int is_better(float a, float b) { return a > b || (a != a && b == b); }

/* The best of `count`, the first of those that are equal; -1 where all are taken. */
static int64_t best_of(const float *score, const uint8_t *taken, int64_t count)
{
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || is_better(score[i], score[best])))
            best = i;
    return best;
}

static void score_experts(const rk_routing *of, const float *logits, float *score, float *choice)
{
    float most = -INFINITY, sum = 0.0f;
    if (of->bias != NULL) {
        for (int64_t e = 0; e < of->experts; e++) {
            score[e] = 1.0f / (1.0f + expf(-logits[e]));
            choice[e] = score[e] + of->bias[e];
        }
        return;
    }
    for (int64_t e = 0; e < of->experts; e++)
        most = logits[e] > most ? logits[e] : most;
    for (int64_t e = 0; e < of->experts; e++)
        sum += score[e] = expf(logits[e] - most);
    for (int64_t e = 0; e < of->experts; e++)
        choice[e] = score[e] /= sum;
}

/* A group is as good as its two best experts with sigmoid scores, and as its best with softmax. */
static float score_group(const rk_routing *of, const float *choice, int64_t size)
{
    float best = -INFINITY, second = -INFINITY;
    for (int64_t e = 0; e < size; e++) {
        if (is_better(choice[e], best)) {
            second = best;
            best = choice[e];
        } else if (is_better(choice[e], second)) {
            second = choice[e];
        }
    }
    return of->bias != NULL ? best + second : best;
}

static void run_route(const void *context, int64_t token)
{
    const rk_routing *of = context;
    const int64_t experts = of->experts, size = experts / of->groups;
    float *score = of->room + token * 4 * experts, *choice = score + experts, *group = choice + experts;
    uint8_t *taken = (uint8_t *)(group + experts), *kept = taken + experts;
    score_experts(of, of->logits + token * experts, score, choice);
    memset(kept, 0, (size_t)of->groups);
    for (int64_t g = 0; g < of->groups; g++)
        group[g] = score_group(of, choice + g * size, size);
    for (int64_t i = 0; i < of->kept; i++)
        kept[best_of(group, kept, of->groups)] = 1;
    for (int64_t e = 0; e < experts; e++)
        taken[e] = !kept[e / size];
    int64_t *ids = of->ids + token * of->top;
    for (int64_t i = 0; i < of->top; i++) {
        const int64_t best = best_of(choice, taken, experts);
        int64_t at = i;
        taken[best] = 1;
        for (; at > 0 && ids[at - 1] > best; at--)
            ids[at] = ids[at - 1];
        ids[at] = best;
    }
    float sum = 0.0f, *weights = of->weights + token * of->top;
    for (int64_t i = 0; i < of->top; i++)
        sum += weights[i] = score[ids[i]];
    for (int64_t i = 0; i < of->top; i++)
        weights[i] = (of->normalise ? weights[i] / (sum + 1e-20f) : weights[i]) * of->factor;
}

/* Choose `top` experts of the `kept` best groups for every token, by ascending id; there are as many. */
void rk_route(const rk_routing *of)
{
    pthread_mutex_lock(&pool.caller);
    run_chunks(run_route, of, of->tokens, of->tokens * of->experts * (int64_t)sizeof(float) * of->top);
    pthread_mutex_unlock(&pool.caller);
}
