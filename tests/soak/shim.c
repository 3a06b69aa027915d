/* Loaded before libc: lets calls that write below one folder fail, or write a part only, once `arm` was called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

static char prefix[4096], kind[32];
static long after = -1, failures;
static int number, armed, shortened;

/* From the call number `calls` on, `times` calls of this kind fail with errno `error`; 0 shortens writes instead. */
void arm(const char *folder, const char *what, long calls, int error, long times) {
    strncpy(prefix, folder, sizeof prefix - 1);
    strncpy(kind, what, sizeof kind - 1);
    after = calls, number = error, failures = times, shortened = error == 0, armed = 1;
}

static int below(const char *path) { return path && strncmp(path, prefix, strlen(prefix)) == 0; }

static int below_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

static int due(const char *what) {
    if (!armed || strcmp(kind, what) || failures <= 0) return 0;
    if (__atomic_fetch_sub(&after, 1, __ATOMIC_SEQ_CST) > 0) return 0;
    return __atomic_fetch_sub(&failures, 1, __ATOMIC_SEQ_CST) > 0;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(condition, what) \
    if (armed && (condition) && due(what)) { errno = number; return -1; }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (armed && fd > 2 && below_fd(fd) && due("write")) {
        if (shortened && size > 1) return real(fd, data, size / 2);
        if (!shortened) { errno = number; return -1; }
    }
    return real(fd, data, size);
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    REAL(sendfile);
    FAIL(!shortened && below_fd(out), "write");
    return real(out, in, offset, size);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range);
    FAIL(!shortened && below_fd(out), "write");
    return real(in, from, out, to, size, flags);
}

int fsync(int fd) {
    REAL(fsync);
    FAIL(below_fd(fd), "fsync");
    return real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    FAIL(below(to), "rename");
    return real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    FAIL(below(path), "mkdir");
    return real(path, mode);
}

#define OPEN(name, arguments, call) \
    int name arguments { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & O_CREAT) { va_list list; va_start(list, flags); mode = va_arg(list, int); va_end(list); } \
        FAIL((flags & O_CREAT) && below(path), "open"); \
        return real call; \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))
