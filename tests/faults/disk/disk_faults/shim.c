/* Preloaded before libc: fails, shortens, delays, kills at or records the calls that change files.

   Rules are lines of five fields, separated by tabs:

       calls    names separated by commas, or * for every call below
       glob     of a path; of a rename, either path; of a descriptor, the path that it was opened with
       count    the rule acts at the count-th call that it fits
       repeat   once: at that one alone; always: at that one and at all later ones
       action   errno <n>   the call does nothing and fails (close closes, and fails)
                short       half of a write is written, and its length returned
                delay <ms>  the call is made after so many milliseconds
                kill        the process is killed, the call is not made
                tear        half of a write is written, then the process is killed; other calls: as kill
                skip        fsync alone: it is not made, and succeeds
                log         the call is made and recorded, with what it wrote

   The first rule that acts decides; log decides nothing. Rules and the record come from FAULTS_RULES and
   FAULTS_LOG, or from faults_set() in a process that has started. faults_acted() is the name of the call that a
   rule other than log has acted on, the first one since the rules were set; empty where none has. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum action { NOTHING, FAIL, SHORT, DELAY, KILL, TEAR, SKIP, LOG };

struct rule {
    char calls[128], glob[PATH_MAX];
    long count, seen, value;
    int always;
    enum action action;
};

enum { MOST_RULES = 8, MOST_DESCRIPTORS = 1024 };

static struct rule rules[MOST_RULES];
static int rule_count, log_descriptor = -1;
static char acted[16];
static char *opened[MOST_DESCRIPTORS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static enum action action_of(const char *word) {
    static const char *words[] = {"", "errno", "short", "delay", "kill", "tear", "skip", "log"};
    for (int action = FAIL; action <= LOG; action++)
        if (!strcmp(word, words[action])) return action;
    fprintf(stderr, "unknown action: %s\n", word);
    abort();
}

void faults_set(const char *text, const char *log_path) {
    rule_count = 0;
    acted[0] = 0;
    for (const char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        struct rule *rule = &rules[rule_count];
        char repeat[16], action[16];
        memset(rule, 0, sizeof *rule);
        int found = sscanf(line, "%127[^\t]\t%4095[^\t]\t%ld\t%15[^\t]\t%15s %ld", rule->calls, rule->glob,
                           &rule->count, repeat, action, &rule->value);
        if (found < 5 || rule_count + 1 == MOST_RULES) {
            fprintf(stderr, "bad rule: %s\n", line);
            abort();
        }
        rule->always = !strcmp(repeat, "always");
        rule->action = action_of(action);
        rule_count++;
    }
    if (log_descriptor >= 0) syscall(SYS_close, log_descriptor);
    log_descriptor = -1;
    if (log_path && *log_path)
        log_descriptor = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

const char *faults_acted(void) { return acted; }

__attribute__((constructor)) static void begin(void) {
    if (getenv("FAULTS_RULES")) faults_set(getenv("FAULTS_RULES"), getenv("FAULTS_LOG"));
}

static int is_named(const char *calls, const char *call) {
    size_t length = strlen(call);
    if (!strcmp(calls, "*")) return 1;
    for (const char *at = strstr(calls, call); at; at = strstr(at + 1, call))
        if ((at == calls || at[-1] == ',') && (at[length] == ',' || !at[length])) return 1;
    return 0;
}

struct decision {
    enum action action;
    long value;
    int logged;
};

static struct decision decide(const char *call, const char *path, const char *other) {
    struct decision made = {NOTHING, 0, 0};
    if (!path || !rule_count) return made;
    pthread_mutex_lock(&lock);
    for (int index = 0; index < rule_count; index++) {
        struct rule *rule = &rules[index];
        if (!is_named(rule->calls, call)) continue;
        if (fnmatch(rule->glob, path, 0) && (!other || fnmatch(rule->glob, other, 0))) continue;
        rule->seen++;
        if (rule->seen < rule->count || (rule->seen > rule->count && !rule->always)) continue;
        if (rule->action == LOG) {
            made.logged = log_descriptor >= 0;
        } else if (made.action == NOTHING) {
            made.action = rule->action;
            made.value = rule->value;
        }
    }
    if (made.action != NOTHING && !acted[0]) strncpy(acted, call, sizeof acted - 1);
    pthread_mutex_unlock(&lock);
    if (made.action == KILL) kill(getpid(), SIGKILL);
    if (made.action == DELAY) {
        struct timespec pause = {made.value / 1000, made.value % 1000 * 1000000};
        nanosleep(&pause, NULL);
    }
    return made;
}

static void put(const void *bytes, size_t length) {
    while (length) {
        ssize_t written = syscall(SYS_write, log_descriptor, bytes, length);
        if (written <= 0) return;
        bytes = (const char *)bytes + written;
        length -= written;
    }
}

struct entry {
    char call[16];
    int64_t result, at;
    uint32_t path_length, other_length;
    uint64_t data_length;
} __attribute__((packed));

static void record(struct decision made, const char *call, const char *path, const char *other, int64_t result,
                   int64_t at, const struct iovec *data, int pieces) {
    int error = errno;
    if (!made.logged) return;
    struct entry entry = {"", result, at, strlen(path), other ? strlen(other) : 0, 0};
    strncpy(entry.call, call, sizeof entry.call - 1);
    if (data && result > 0) entry.data_length = result;
    pthread_mutex_lock(&lock);
    put(&entry, sizeof entry);
    put(path, entry.path_length);
    if (other) put(other, entry.other_length);
    size_t left = entry.data_length;
    for (int index = 0; left && index < pieces; index++) {
        size_t length = data[index].iov_len < left ? data[index].iov_len : left;
        put(data[index].iov_base, length);
        left -= length;
    }
    pthread_mutex_unlock(&lock);
    errno = error;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const char *path_of(int descriptor) {
    return descriptor >= 0 && descriptor < MOST_DESCRIPTORS ? opened[descriptor] : NULL;
}

static void forget(int descriptor) {
    if (!path_of(descriptor)) return;
    free(opened[descriptor]);
    opened[descriptor] = NULL;
}

static int open_as(int (*real)(int, const char *, int, ...), int folder, const char *path, int flags, mode_t mode) {
    struct decision made = decide("open", path, NULL);
    if (made.action == TEAR) kill(getpid(), SIGKILL);
    if (made.action == FAIL) {
        errno = made.value;
        return -1;
    }
    int descriptor = real(folder, path, flags, mode);
    if (descriptor >= 0 && descriptor < MOST_DESCRIPTORS) {
        forget(descriptor);
        opened[descriptor] = strdup(path);
    }
    record(made, "open", path, NULL, descriptor, flags, NULL, 0);
    return descriptor;
}

#define MODE(flags, mode)                            \
    mode_t mode = 0;                                 \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {         \
        va_list arguments;                           \
        va_start(arguments, flags);                  \
        mode = va_arg(arguments, mode_t);            \
        va_end(arguments);                           \
    }

int open(const char *path, int flags, ...) {
    MODE(flags, mode)
    return open_as(REAL(openat), AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE(flags, mode)
    return open_as(REAL(openat64), AT_FDCWD, path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...) {
    MODE(flags, mode)
    return open_as(REAL(openat), folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags, mode)
    return open_as(REAL(openat64), folder, path, flags, mode);
}

/* Every way of writing ends here: pieces of memory at an offset, -1 for the descriptor's own place. */
static ssize_t write_as(const char *call, int descriptor, const struct iovec *data, int pieces, off64_t at, int flags) {
    ssize_t (*real)(int, const struct iovec *, int, off64_t, int) = REAL(pwritev64v2);
    const char *path = path_of(descriptor);
    struct decision made = decide(call, path, NULL);
    if (made.action == FAIL) {
        errno = made.value;
        return -1;
    }
    off64_t place = made.logged && at < 0 ? lseek64(descriptor, 0, SEEK_CUR) : at;
    ssize_t result;
    if (made.action == SHORT || made.action == TEAR) {
        size_t total = 0, half;
        for (int index = 0; index < pieces; index++) total += data[index].iov_len;
        half = total > 1 ? total / 2 : total;
        struct iovec cut[pieces];
        int count = 0;
        for (size_t left = half; left && count < pieces; count++) {
            cut[count] = data[count];
            if (cut[count].iov_len > left) cut[count].iov_len = left;
            left -= cut[count].iov_len;
        }
        result = real(descriptor, cut, count, at, flags);
        if (made.action == TEAR) kill(getpid(), SIGKILL);
    } else {
        result = real(descriptor, data, pieces, at, flags);
    }
    record(made, call, path, NULL, result, place, data, pieces);
    return result;
}

ssize_t write(int descriptor, const void *bytes, size_t length) {
    struct iovec data = {(void *)bytes, length};
    if (!rule_count || !path_of(descriptor)) return syscall(SYS_write, descriptor, bytes, length);
    return write_as("write", descriptor, &data, 1, -1, 0);
}

ssize_t writev(int descriptor, const struct iovec *data, int pieces) {
    return write_as("write", descriptor, data, pieces, -1, 0);
}

#define PWRITE(name)                                                                   \
    ssize_t name(int descriptor, const void *bytes, size_t length, off_t at) {         \
        struct iovec data = {(void *)bytes, length};                                   \
        return write_as("write", descriptor, &data, 1, at, 0);                         \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define PWRITEV(name)                                                                  \
    ssize_t name(int descriptor, const struct iovec *data, int pieces, off_t at) {     \
        return write_as("write", descriptor, data, pieces, at, 0);                     \
    }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define PWRITEV2(name)                                                                       \
    ssize_t name(int descriptor, const struct iovec *data, int pieces, off_t at, int flags) { \
        return write_as("write", descriptor, data, pieces, at, flags);                       \
    }
PWRITEV2(pwritev2)
PWRITEV2(pwritev64v2)

#define ON_DESCRIPTOR(name, call)                                      \
    int name(int descriptor) {                                         \
        const char *path = path_of(descriptor);                        \
        struct decision made = decide(call, path, NULL);               \
        if (made.action == TEAR) kill(getpid(), SIGKILL);              \
        if (made.action == SKIP) return 0;                             \
        if (made.action == FAIL) {                                     \
            errno = made.value;                                        \
            return -1;                                                 \
        }                                                              \
        int result = REAL(name)(descriptor);                           \
        record(made, call, path, NULL, result, 0, NULL, 0);            \
        return result;                                                 \
    }
ON_DESCRIPTOR(fsync, "fsync")
ON_DESCRIPTOR(fdatasync, "fsync")

int close(int descriptor) {
    const char *path = path_of(descriptor);
    if (!path) return syscall(SYS_close, descriptor);
    struct decision made = decide("close", path, NULL);
    if (made.action == TEAR) kill(getpid(), SIGKILL);
    int result = syscall(SYS_close, descriptor);
    record(made, "close", path, NULL, result, 0, NULL, 0);
    forget(descriptor);
    if (made.action == FAIL) {
        errno = made.value;
        return -1;
    }
    return result;
}

#define TRUNCATE(name)                                                  \
    int name(int descriptor, off_t length) {                            \
        const char *path = path_of(descriptor);                         \
        struct decision made = decide("ftruncate", path, NULL);         \
        if (made.action == TEAR) kill(getpid(), SIGKILL);               \
        if (made.action == FAIL) {                                      \
            errno = made.value;                                         \
            return -1;                                                  \
        }                                                               \
        int result = REAL(name)(descriptor, length);                    \
        record(made, "ftruncate", path, NULL, result, length, NULL, 0); \
        return result;                                                  \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define ALLOCATE(name)                                                          \
    int name(int descriptor, off_t at, off_t length) {                          \
        const char *path = path_of(descriptor);                                 \
        struct decision made = decide("fallocate", path, NULL);                 \
        if (made.action == TEAR) kill(getpid(), SIGKILL);                       \
        if (made.action == FAIL) return made.value;                             \
        int result = REAL(name)(descriptor, at, length);                        \
        record(made, "fallocate", path, NULL, result, at + length, NULL, 0);    \
        return result;                                                          \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

static int rename_as(int from_folder, const char *from, int to_folder, const char *to) {
    struct decision made = decide("rename", from, to);
    if (made.action == TEAR) kill(getpid(), SIGKILL);
    if (made.action == FAIL) {
        errno = made.value;
        return -1;
    }
    int result = syscall(SYS_renameat2, from_folder, from, to_folder, to, 0);
    record(made, "rename", from, to, result, 0, NULL, 0);
    return result;
}

int rename(const char *from, const char *to) { return rename_as(AT_FDCWD, from, AT_FDCWD, to); }

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return rename_as(from_folder, from, to_folder, to);
}

static int unlink_as(int folder, const char *path, int flags) {
    struct decision made = decide("unlink", path, NULL);
    if (made.action == TEAR) kill(getpid(), SIGKILL);
    if (made.action == FAIL) {
        errno = made.value;
        return -1;
    }
    int result = syscall(SYS_unlinkat, folder, path, flags);
    record(made, "unlink", path, NULL, result, 0, NULL, 0);
    return result;
}

int unlink(const char *path) { return unlink_as(AT_FDCWD, path, 0); }

int unlinkat(int folder, const char *path, int flags) { return unlink_as(folder, path, flags); }
