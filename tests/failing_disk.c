/* A disk that fails, fills up or loses its power, for one process: `tests/kills.py` loads it first.
 *
 * Every call of libc that writes, syncs or names files below one folder is counted. From a call of
 * choice on they fail, or the process is killed at it. Each is also written to a log, so that what was
 * written and not synced is known afterwards.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, FAIL_ONCE, FAIL_FROM, KILL };
static char below[4096];
static int mode, log_file = -1, error;
static long when, calls;

/* What happens to calls below `folder`: `how` is one of the modes, at the `at`th call from now on. */
void disk(const char *folder, int how, long at, int with, const char *log) {
    snprintf(below, sizeof below, "%s", folder);
    log_file = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    calls = 0, when = at, error = with, mode = how;
}

static int meets(const char *path) {
    size_t n = strlen(below);
    return n && !strncmp(path, below, n);
}

static int meets_fd(int fd, char *path, size_t size) {
    char link[64];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = below[0] ? readlink(link, path, size - 1) : -1;
    errno = before;
    path[n < 0 ? 0 : n] = 0;
    return n > 0 && meets(path);
}

/* Count and log a call; whether it fails. */
static int happens(const char *call, const char *path) {
    long n = __sync_add_and_fetch(&calls, 1);
    int fails = (mode == FAIL_ONCE && n == when) || (mode == FAIL_FROM && n >= when);
    if (log_file >= 0) {
        struct stat s = {0};
        char line[5000];
        stat(path, &s);
        int size = snprintf(line, sizeof line, "%s\t%lu\t%d\t%s\n", call, (unsigned long)s.st_ino,
                            fails, path);
        syscall(SYS_write, log_file, line, size);
    }
    if (mode == KILL && n == when) kill(getpid(), SIGKILL);
    if (fails) errno = error;
    return fails;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_FD(type, name, fd, parameters, arguments)                                     \
    type name parameters {                                                               \
        char path[4096];                                                                 \
        if (meets_fd(fd, path, sizeof path) && happens(#name, path)) return -1;          \
        return REAL(name) arguments;                                                     \
    }
#define ON_PATH(name, path, parameters, arguments)                                       \
    int name parameters {                                                                \
        if (meets(path) && happens(#name, path)) return -1;                              \
        return REAL(name) arguments;                                                     \
    }

ON_FD(ssize_t, write, fd, (int fd, const void *b, size_t n), (fd, b, n))
ON_FD(ssize_t, writev, fd, (int fd, const struct iovec *v, int n), (fd, v, n))
ON_FD(ssize_t, pwrite, fd, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(ssize_t, pwrite64, fd, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD(ssize_t, pwritev, fd, (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o))
ON_FD(ssize_t, sendfile, to, (int to, int from, off_t *o, size_t n), (to, from, o, n))
ON_FD(ssize_t, sendfile64, to, (int to, int from, off64_t *o, size_t n), (to, from, o, n))
ON_FD(ssize_t, copy_file_range, to, (int from, off64_t *a, int to, off64_t *b, size_t n, unsigned f),
      (from, a, to, b, n, f))
ON_FD(int, fsync, fd, (int fd), (fd))
ON_FD(int, fdatasync, fd, (int fd), (fd))
ON_FD(int, ftruncate, fd, (int fd, off_t n), (fd, n))
ON_FD(int, ftruncate64, fd, (int fd, off64_t n), (fd, n))
ON_FD(int, fchmod, fd, (int fd, mode_t m), (fd, m))
ON_PATH(mkdir, path, (const char *path, mode_t m), (path, m))
ON_PATH(chmod, path, (const char *path, mode_t m), (path, m))
ON_PATH(rename, to, (const char *from, const char *to), (from, to))
ON_PATH(renameat2, to, (int a, const char *from, int b, const char *to, unsigned f),
        (a, from, b, to, f))

/* Removing is counted, so that a process may be killed at it; it does not fail. */
static int fails_nothing(void) { return mode == NOTHING || mode == KILL; }
int unlink(const char *path) {
    if (fails_nothing() && meets(path)) happens("unlink", path);
    return REAL(unlink)(path);
}
int rmdir(const char *path) {
    if (fails_nothing() && meets(path)) happens("rmdir", path);
    return REAL(rmdir)(path);
}
int unlinkat(int fd, const char *name, int flags) {
    char path[8200];
    if (fails_nothing() && meets_fd(fd, path, 4096)) happens("unlinkat", path);
    return REAL(unlinkat)(fd, name, flags);
}

/* A page of a mapped file is written without a call, so its sync is what fails. */
int msync(void *p, size_t n, int flags) {
    if (below[0] && happens("msync", below)) return -1;
    return REAL(msync)(p, n, flags);
}

/* Opening to write is a call too: a folder may take no new name. */
static int opens(const char *path, int flags) {
    return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && meets(path) && happens("open", path);
}
#define OPEN(name, path, parameters, before)                                             \
    int name parameters {                                                                \
        va_list list;                                                                    \
        va_start(list, flags);                                                           \
        mode_t m = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;             \
        va_end(list);                                                                    \
        if (opens(path, flags)) return -1;                                               \
        return REAL(name) before;                                                        \
    }
OPEN(open, path, (const char *path, int flags, ...), (path, flags, m))
OPEN(open64, path, (const char *path, int flags, ...), (path, flags, m))
OPEN(openat, path, (int fd, const char *path, int flags, ...), (fd, path, flags, m))
OPEN(openat64, path, (int fd, const char *path, int flags, ...), (fd, path, flags, m))
