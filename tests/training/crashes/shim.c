/* Counts the calls that change files under a folder, and at the Nth kills the process or lets the call fail.

   Put before libc by LD_PRELOAD, armed from Python through ctypes. Calls that a library makes past libc (safetensors'
   own rename) are not seen; a process that is killed before the next call that is seen is as one killed after them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { COUNT, KILL_BEFORE, KILL_AFTER, KILL_HALFWAY, FAIL_ONCE, FAIL_FROM_THEN_ON };

static char folder[PATH_MAX];
static size_t folder_length;
static long target;
static int action, error_number;
static atomic_long calls;
static char names[1 << 16]; /* of the calls, a line each */
static size_t names_length;

void shim_arm(const char *path, long at, int what, int error)
{
    action = what;
    target = at;
    error_number = error;
    atomic_store(&calls, 0);
    names_length = 0;
    names[0] = 0;
    snprintf(folder, sizeof folder, "%s", path);
    folder_length = strlen(folder);
}

const char *shim_names(void) { return names; }

static int inside(const char *path)
{
    return folder_length && !strncmp(path, folder, folder_length) &&
           (path[folder_length] == '/' || path[folder_length] == 0);
}

static int fd_inside(int fd)
{
    char link[64], path[PATH_MAX];
    if (!folder_length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

static int at_inside(int fd, const char *path)
{
    return path[0] == '/' || fd == AT_FDCWD ? inside(path) : fd_inside(fd);
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Whether the call is to fail; *number becomes its number, or 0 for a call elsewhere. */
static int begin(int counts, const char *name, long *number)
{
    *number = 0;
    if (!counts) return 0;
    *number = atomic_fetch_add(&calls, 1) + 1;
    if (action == COUNT && names_length + strlen(name) + 2 < sizeof names)
        names_length += sprintf(names + names_length, "%s\n", name);
    if (*number == target && action == KILL_BEFORE) die();
    if ((*number == target && action == FAIL_ONCE) || (*number >= target && action == FAIL_FROM_THEN_ON)) {
        errno = error_number;
        return 1;
    }
    return 0;
}

static void end(long number)
{
    if (number && number == target && (action == KILL_AFTER || action == KILL_HALFWAY)) die();
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define CALL(type, name, counts, parameters, arguments) \
    type name parameters \
    { \
        REAL(name); \
        long number; \
        if (begin(counts, #name, &number)) return -1; \
        type result = real arguments; \
        int kept = errno; \
        end(number); \
        errno = kept; \
        return result; \
    }

/* A write that is cut in half writes the first half of its bytes. */
#define HALF(size) (number && number == target && action == KILL_HALFWAY ? (size) / 2 : (size))

CALL(ssize_t, write, fd_inside(fd), (int fd, const void *bytes, size_t size), (fd, bytes, HALF(size)))
CALL(ssize_t, pwrite, fd_inside(fd), (int fd, const void *bytes, size_t size, off_t at), (fd, bytes, HALF(size), at))
CALL(ssize_t, pwrite64, fd_inside(fd), (int fd, const void *bytes, size_t size, off64_t at),
     (fd, bytes, HALF(size), at))
CALL(ssize_t, writev, fd_inside(fd), (int fd, const struct iovec *parts, int count), (fd, parts, HALF(count)))
CALL(ssize_t, sendfile, fd_inside(out), (int out, int in, off_t *at, size_t size), (out, in, at, HALF(size)))
CALL(ssize_t, copy_file_range, fd_inside(out),
     (int in, off64_t *in_at, int out, off64_t *out_at, size_t size, unsigned flags),
     (in, in_at, out, out_at, HALF(size), flags))

CALL(int, fsync, fd_inside(fd), (int fd), (fd))
CALL(int, fdatasync, fd_inside(fd), (int fd), (fd))
CALL(int, ftruncate, fd_inside(fd), (int fd, off_t size), (fd, size))
CALL(int, ftruncate64, fd_inside(fd), (int fd, off64_t size), (fd, size))
CALL(int, truncate, inside(path), (const char *path, off_t size), (path, size))
CALL(int, fchmod, fd_inside(fd), (int fd, mode_t mode), (fd, mode))
CALL(int, chmod, inside(path), (const char *path, mode_t mode), (path, mode))
CALL(int, fchmodat, at_inside(fd, path), (int fd, const char *path, mode_t mode, int flags), (fd, path, mode, flags))
CALL(int, rename, inside(from) || inside(to), (const char *from, const char *to), (from, to))
CALL(int, renameat, at_inside(a, from) || at_inside(b, to), (int a, const char *from, int b, const char *to),
     (a, from, b, to))
CALL(int, renameat2, at_inside(a, from) || at_inside(b, to),
     (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags))
CALL(int, link, inside(to), (const char *from, const char *to), (from, to))
CALL(int, linkat, at_inside(b, to), (int a, const char *from, int b, const char *to, int flags),
     (a, from, b, to, flags))
CALL(int, unlink, inside(path), (const char *path), (path))
CALL(int, unlinkat, at_inside(fd, path), (int fd, const char *path, int flags), (fd, path, flags))
CALL(int, rmdir, inside(path), (const char *path), (path))
CALL(int, mkdir, inside(path), (const char *path, mode_t mode), (path, mode))
CALL(int, mkdirat, at_inside(fd, path), (int fd, const char *path, mode_t mode), (fd, path, mode))

#define MODE \
    mode_t mode = 0; \
    if (flags & O_CREAT) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }

/* Only what makes or empties a file changes anything. */
#define OPEN(name, counts, parameters, arguments) \
    int name parameters \
    { \
        MODE; \
        REAL(name); \
        long number; \
        if (begin(flags & (O_CREAT | O_TRUNC) && counts, "open", &number)) return -1; \
        int result = real arguments; \
        int kept = errno; \
        end(number); \
        errno = kept; \
        return result; \
    }

OPEN(open, inside(path), (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, inside(path), (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, at_inside(fd, path), (int fd, const char *path, int flags, ...), (fd, path, flags, mode))
OPEN(openat64, at_inside(fd, path), (int fd, const char *path, int flags, ...), (fd, path, flags, mode))
