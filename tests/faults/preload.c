/* Put before libc by LD_PRELOAD. Between faults_arm and the end of the process it counts the calls by which a process changes
 * what others can see (writes to files and sockets, flushes, renames, removals), and at the chosen one
 *
 *     KILL   the process is gone, as by kill -9 (a long write may have been done by half)
 *     STOP   the process stops, as by SIGSTOP, until somebody lets it go on
 *     FULL   the disk is full: a write is cut short, and from then on every write to a file fails with ENOSPC
 *
 * faults_clock moves the time of day that the process sees. Standard output and error are not counted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { COUNT = 0, KILL = 1, FULL = 2, STOP = 3 };

static atomic_long seen, end = -1;
static atomic_int what = COUNT, armed;
static atomic_long shift;

void faults_arm(long at, int how) {
    seen = 0;
    end = at;
    what = how;
    armed = 1;
}

long faults_seen(void) { return seen; }

void faults_clock(long seconds) { shift = seconds; }

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* 0: go on. 1: this is the call. 2: the disk has been full since an earlier one. */
static int reached(int is_file_write) {
    if (!armed || (what == FULL && !is_file_write)) return 0;
    long now = atomic_fetch_add(&seen, 1) + 1;
    if (what == COUNT || now < end) return 0;
    if (what == KILL && now == end) return 1;
    if (what == STOP && now == end) raise(SIGSTOP);
    return what == FULL ? (now == end ? 1 : 2) : 0;
}

static int is_file(int descriptor) {
    struct stat status;
    return fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static ssize_t full(void) { errno = ENOSPC; return -1; }

/* A write of n bytes, of which `some` does the first `half`. */
#define WRITE(descriptor, n, all, some) \
    if (descriptor <= 2) return all; \
    switch (reached(is_file(descriptor))) { \
    case 0: return all; \
    case 2: return full(); \
    default: { \
        size_t half = (n) / 2 / 4096 * 4096; \
        ssize_t done = half ? some : 0; \
        if (what == KILL) die(); \
        return half ? done : full(); \
    } }

ssize_t write(int d, const void *b, size_t n) {
    REAL(write);
    WRITE(d, n, real(d, b, n), real(d, b, half))
}
ssize_t pwrite(int d, const void *b, size_t n, off_t o) {
    REAL(pwrite);
    WRITE(d, n, real(d, b, n, o), real(d, b, half, o))
}
ssize_t pwrite64(int d, const void *b, size_t n, off64_t o) {
    REAL(pwrite64);
    WRITE(d, n, real(d, b, n, o), real(d, b, half, o))
}
ssize_t writev(int d, const struct iovec *v, int n) {
    REAL(writev);
    struct iovec first = {v[0].iov_base, v[0].iov_len / 2 / 4096 * 4096};
    WRITE(d, v[0].iov_len, real(d, v, n), real(d, &first, 1))
}
ssize_t pwritev(int d, const struct iovec *v, int n, off_t o) {
    REAL(pwritev);
    struct iovec first = {v[0].iov_base, v[0].iov_len / 2 / 4096 * 4096};
    WRITE(d, v[0].iov_len, real(d, v, n, o), real(d, &first, 1, o))
}
ssize_t send(int d, const void *b, size_t n, int f) {
    REAL(send);
    WRITE(d, n, real(d, b, n, f), real(d, b, half, f))
}
ssize_t sendto(int d, const void *b, size_t n, int f, const struct sockaddr *a, socklen_t l) {
    REAL(sendto);
    WRITE(d, n, real(d, b, n, f, a, l), real(d, b, half, f, a, l))
}

/* What is done or not: killed before it. */
#define STEP(name, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        if (reached(0) == 1) die(); \
        return real arguments; \
    }

STEP(fsync, (int d), (d))
STEP(fdatasync, (int d), (d))
STEP(msync, (void *a, size_t n, int f), (a, n, f))
STEP(ftruncate, (int d, off_t n), (d, n))
STEP(ftruncate64, (int d, off64_t n), (d, n))
STEP(rename, (const char *a, const char *b), (a, b))
STEP(renameat, (int d, const char *a, int e, const char *b), (d, a, e, b))
STEP(renameat2, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f))
STEP(unlink, (const char *a), (a))
STEP(unlinkat, (int d, const char *a, int f), (d, a, f))
STEP(mkdir, (const char *a, mode_t m), (a, m))

int clock_gettime(clockid_t clock, struct timespec *t) {
    REAL(clock_gettime);
    int done = real(clock, t);
    if (done == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) t->tv_sec += shift;
    return done;
}
int gettimeofday(struct timeval *restrict t, void *restrict z) {
    REAL(gettimeofday);
    int done = real(t, z);
    if (done == 0) t->tv_sec += shift;
    return done;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
