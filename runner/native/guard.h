/* Bus errors in mapped files: a page behind the end of a file that was cut while it was mapped. The part of the region
   that holds it becomes zeros, and a flag says so; the products end, and whoever asked for them looks at the flag. */

#include <signal.h>
#include <sys/mman.h>

#define MAX_GUARDS 256

typedef struct {
    atomic_uintptr_t begin; /* 0: unused */
    size_t size, part;
    uint8_t *broken;
} guard;

static guard guards[MAX_GUARDS];
static struct sigaction bus_before;

/* In a signal handler: no locks, and nothing but a system call. */
static void on_bus_error(int number, siginfo_t *info, void *context)
{
    (void)context;
    const uintptr_t at = (uintptr_t)info->si_addr;
    const int is_fault = info->si_code > 0; /* and was not sent by a process */
    for (int i = 0; i < MAX_GUARDS && is_fault; i++) {
        const uintptr_t begin = atomic_load(&guards[i].begin);
        if (begin == 0 || at < begin || at - begin >= guards[i].size)
            continue;
        const size_t which = (at - begin) / guards[i].part;
        void *const part = (void *)(begin + which * guards[i].part);
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
        if (mmap(part, guards[i].part, PROT_READ, flags, -1, 0) == MAP_FAILED)
            break;
        guards[i].broken[which] = 1;
        return;
    }
    /* Not ours: as before, at the next try of the same instruction. */
    sigaction(number, &bus_before, NULL);
    if (!is_fault)
        raise(number);
}

/* Watch a region in parts; returns its number, or -1 when there are too many. */
int rk_guard(const void *begin, int64_t size, int64_t part, uint8_t *broken)
{
    int found = -1;
    pthread_mutex_lock(&pool.caller);
    /* Again for every region: somebody else may have taken the signal since. */
    struct sigaction action = {0}, before;
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    const int is_installed = sigaction(SIGBUS, &action, &before) == 0;
    if (is_installed && before.sa_sigaction != on_bus_error)
        bus_before = before;
    for (int i = 0; i < MAX_GUARDS && is_installed && found < 0; i++)
        if (atomic_load(&guards[i].begin) == 0) {
            guards[i].size = (size_t)size;
            guards[i].part = (size_t)part;
            guards[i].broken = broken;
            atomic_store(&guards[i].begin, (uintptr_t)begin);
            found = i;
        }
    pthread_mutex_unlock(&pool.caller);
    return found;
}

void rk_unguard(int number) { atomic_store(&guards[number].begin, 0); }
