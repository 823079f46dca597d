/* A few threads that share out calls and wait for each other. They sleep between jobs that are far apart, and look for
   the next one without sleep where a token's products follow each other. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#endif

#define MAX_THREADS 64
#define WORTH_SHARING (1 << 18) /* bytes of weights; fewer are gone over before another thread has begun */
#define SPINS 2000 /* looks for the next job before a thread sleeps */

typedef void job_fn(const void *context, int64_t chunk);

static struct {
    pthread_mutex_t caller, lock;
    pthread_cond_t wake;
    int threads; /* the caller's included */
    int sleeping;
    atomic_uint job;
    atomic_int working;
    atomic_int_fast64_t next;
    int64_t chunks;
    job_fn *run;
    const void *context;
    int is_ending;
    pthread_t started[MAX_THREADS];
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER,
          .threads = 1};

static inline void pause_briefly(void)
{
#ifdef X86
    _mm_pause();
#endif
}

/* Products of denormal numbers take thirty times as long, and are nothing: they are zeros here, in every thread. */
static inline unsigned flush_denormals(void)
{
#ifdef X86
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}

static inline void restore_denormals(unsigned before)
{
#ifdef X86
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

static void take_chunks(void)
{
    for (int64_t chunk; (chunk = atomic_fetch_add(&pool.next, 1)) < pool.chunks;)
        pool.run(pool.context, chunk);
}

static void *serve(void *seen_job)
{
    unsigned seen = (unsigned)(uintptr_t)seen_job;
    flush_denormals();
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&pool.job, memory_order_acquire) == seen; i++)
            pause_briefly();
        if (atomic_load(&pool.job) == seen) {
            pthread_mutex_lock(&pool.lock);
            pool.sleeping++;
            while (atomic_load(&pool.job) == seen)
                pthread_cond_wait(&pool.wake, &pool.lock);
            pool.sleeping--;
            pthread_mutex_unlock(&pool.lock);
        }
        seen = atomic_load(&pool.job);
        if (pool.is_ending)
            return NULL;
        take_chunks();
        atomic_fetch_sub(&pool.working, 1);
    }
}

static void publish(void)
{
    atomic_store(&pool.working, pool.threads - 1);
    atomic_fetch_add(&pool.job, 1);
    pthread_mutex_lock(&pool.lock);
    if (pool.sleeping)
        pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

/* Make `chunks` calls on all threads, that go over `bytes` of weights; they end before this does. */
static void run_chunks(job_fn *run, const void *context, int64_t chunks, int64_t bytes)
{
    const unsigned before = flush_denormals();
    if (pool.threads == 1 || chunks == 1 || bytes < WORTH_SHARING) {
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            run(context, chunk);
    } else {
        pool.run = run;
        pool.context = context;
        pool.chunks = chunks;
        atomic_store(&pool.next, 0);
        publish();
        take_chunks();
        for (int spins = 0; atomic_load(&pool.working) != 0; spins++) {
            pause_briefly();
            if (spins % 1024 == 1023)
                sched_yield(); /* the machine has fewer cores than there are threads */
        }
    }
    restore_denormals(before);
}

static void end_threads(void)
{
    if (pool.threads > 1) {
        pool.is_ending = 1;
        publish();
        for (int i = 1; i < pool.threads; i++)
            pthread_join(pool.started[i], NULL);
        pool.is_ending = 0;
    }
    pool.threads = 1;
}

static void forget_threads(void)
{
    /* A forked child has none of them. */
    pool.threads = 1;
    pool.sleeping = 0;
    pthread_mutex_init(&pool.caller, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
}

