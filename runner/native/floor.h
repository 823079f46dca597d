/* Reading memory and nothing else: what no product can be faster than. */

#define READ_AHEAD 8192 /* bytes between asking memory for a line and reading it */

typedef struct {
    const uint8_t *memory;
    int64_t size;
    atomic_uint_fast64_t *sum;
} read_job;

static uint64_t read_c(const uint8_t *at, int64_t size)
{
    uint64_t sum[8] = {0};
    for (int64_t i = 0; i + 64 <= size; i += 64) {
        uint64_t words[8];
        __builtin_prefetch(at + i + READ_AHEAD, 0, 3);
        memcpy(words, at + i, sizeof words);
        for (int j = 0; j < 8; j++)
            sum[j] += words[j];
    }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

#ifdef X86
TARGET_AVX2 static uint64_t read_avx2(const uint8_t *at, int64_t size)
{
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int64_t i = 0; i + 64 <= size; i += 64) {
        __builtin_prefetch(at + i + READ_AHEAD, 0, 3);
        low = _mm256_add_epi64(low, _mm256_loadu_si256((const __m256i *)(at + i)));
        high = _mm256_add_epi64(high, _mm256_loadu_si256((const __m256i *)(at + i + 32)));
    }
    uint64_t words[4];
    _mm256_storeu_si256((__m256i *)words, _mm256_add_epi64(low, high));
    return words[0] + words[1] + words[2] + words[3];
}
#endif

static void run_read(const void *context, int64_t chunk)
{
    const read_job *job = context;
    const uint8_t *at = job->memory + chunk * CHUNK_BYTES;
    const int64_t left = job->size - chunk * CHUNK_BYTES, size = left < CHUNK_BYTES ? left : CHUNK_BYTES;
#ifdef X86
    if (panel != panel_c) {
        atomic_fetch_add(job->sum, read_avx2(at, size));
        return;
    }
#endif
    atomic_fetch_add(job->sum, read_c(at, size));
}

/* Read memory as the products do, and nothing else: no product can be faster. The sum of its whole 64-byte lines, as
   64-bit numbers, keeps it from being left out. */
uint64_t rk_read(const void *memory, int64_t size)
{
    atomic_uint_fast64_t sum = 0;
    const read_job job = {memory, size, &sum};
    pthread_mutex_lock(&pool.caller);
    run_chunks(run_read, &job, count_chunks(size, CHUNK_BYTES), size);
    pthread_mutex_unlock(&pool.caller);
    return atomic_load(&sum);
}
