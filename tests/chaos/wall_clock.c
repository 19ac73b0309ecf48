/* Moves the wall clock of one process by the microseconds that stand in a file, and nothing else of its time.
 *
 * To be preloaded. Deadlines of waits are given in the time that was read, so they are moved back: the kernel's clock
 * stands where it stood. (libfaketime 0.9.10 does not do that for cnd_timedwait, with which librdkafka waits: after a
 * jump of an hour forward its poll takes an hour. And it makes time.sleep of Python 3.11 fail.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

static const int64_t nowhere;
static const volatile int64_t *offset_us = &nowhere;
static int (*real_clock_gettime)(clockid_t, struct timespec *);
static int (*real_cnd_timedwait)(cnd_t *, mtx_t *, const struct timespec *);

__attribute__((constructor)) static void open_clock(void) {
    *(void **)&real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    *(void **)&real_cnd_timedwait = dlsym(RTLD_NEXT, "cnd_timedwait");
    const char *path = getenv("CHAOS_CLOCK_FILE");
    int file = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    void *page = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED)
        offset_us = page;
    close(file);
}

static struct timespec moved(struct timespec time, int64_t by_us) {
    int64_t us = time.tv_nsec / 1000 + by_us;
    int64_t seconds = us / 1000000 - (us % 1000000 < 0);
    time.tv_sec += seconds;
    time.tv_nsec = (us - seconds * 1000000) * 1000 + time.tv_nsec % 1000;
    return time;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (real_clock_gettime == NULL) /* another library's constructor was first */
        *(void **)&real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real_clock_gettime(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        *now = moved(*now, *offset_us);
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &precise))
        return -1;
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *kept) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (kept != NULL)
        *kept = precise.tv_sec;
    return precise.tv_sec;
}

int timespec_get(struct timespec *now, int base) {
    return base == TIME_UTC && clock_gettime(CLOCK_REALTIME, now) == 0 ? base : 0;
}

int cnd_timedwait(cnd_t *restrict condition, mtx_t *restrict mutex, const struct timespec *restrict until) {
    struct timespec real = moved(*until, -*offset_us);
    return real_cnd_timedwait(condition, mutex, &real);
}
