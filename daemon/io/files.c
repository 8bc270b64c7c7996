/* The system's files. */
#include "daemon/io/files.h"
#include "daemon/io/io_internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define ZERO_BYTES (64u << 10)

/* Files of the cache are prompts: nobody else's, and nobody else may read them. */
static int check_private(int fd, mode_t type)
{
    struct stat st;
    if (fstat(fd, &st) < 0) {
        return -errno;
    }
    if ((st.st_mode & S_IFMT) != type || st.st_uid != geteuid() || (st.st_mode & 077) != 0) {
        return -EPERM;
    }
    if (type == S_IFREG && st.st_nlink == 0) {
        return -ENOENT; /* removed since it was opened */
    }
    return type == S_IFREG && st.st_nlink > 1 ? -EPERM : 0;
}

static int open_private(int folder, const char *name, int flags, mode_t type)
{
    int fd = openat(folder, name, flags | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
    if (fd < 0) {
        return -errno;
    }
    int rc = check_private(fd, type);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    return fd;
}

static int sys_open_folder(void *self, const char *path, int *ret_folder)
{
    if (mkdir(path, 0700) < 0 && errno != EEXIST) {
        return -errno;
    }
    int fd = open_private(AT_FDCWD, path, O_RDONLY | O_DIRECTORY, S_IFDIR);
    if (fd < 0) {
        return fd;
    }
    *ret_folder = fd;
    return 0;
}

static int sys_list(void *self, int folder,
                    int (*on_name)(void *arg, const char *name, uint64_t bytes), void *arg)
{
    int fd = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) {
        return -errno;
    }
    DIR *d = fdopendir(fd);
    if (d == NULL) {
        int rc = -errno;
        close(fd);
        return rc;
    }
    int rc = 0;
    struct dirent *entry;
    while (rc == 0 && (errno = 0, entry = readdir(d)) != NULL) {
        struct stat st;
        if (fstatat(folder, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(st.st_mode)) {
            rc = on_name(arg, entry->d_name, (uint64_t)st.st_blocks * 512);
        }
    }
    rc = rc == 0 ? -errno : rc;
    closedir(d);
    return rc;
}

static int sys_open(void *self, int folder, const char *name, enum io_open how, int *ret_fd)
{
    bool creates = how == IO_OPEN_CREATE || how == IO_OPEN_EMPTY;
    int flags = how == IO_OPEN_READ ? O_RDONLY : O_RDWR | (creates ? O_CREAT : 0);
    int fd = open_private(folder, name, flags, S_IFREG);
    if (fd < 0) {
        return fd;
    }
    /* Cut only after it was found to be ours. */
    if (how == IO_OPEN_EMPTY && ftruncate(fd, 0) < 0) {
        int rc = -errno;
        close(fd);
        return rc;
    }
    *ret_fd = fd;
    return 0;
}

static void sys_close(void *self, int fd)
{
    close(fd);
}

static int sys_lock(void *self, int fd)
{
    while (flock(fd, LOCK_EX | LOCK_NB) < 0) {
        if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

static int sys_size(void *self, int fd, uint64_t *ret_bytes)
{
    struct stat st;
    if (fstat(fd, &st) < 0) {
        return -errno;
    }
    *ret_bytes = (uint64_t)st.st_size;
    return 0;
}

static int sys_allocated(void *self, int fd, uint64_t *ret_bytes)
{
    struct stat st;
    if (fstat(fd, &st) < 0) {
        return -errno;
    }
    *ret_bytes = (uint64_t)st.st_blocks * 512;
    return 0;
}

static int sys_read(void *self, int fd, void *data, size_t bytes, uint64_t offset)
{
    return io_pread_all(fd, data, bytes, offset);
}

static int sys_write(void *self, struct io_span *spans, size_t n_spans)
{
    if (io_on_thread(self)) {
        return io_write_spans(self, spans, n_spans);
    }
    int first = 0;
    for (size_t i = 0; i < n_spans; i++) {
        struct io_span *s = &spans[i];
        if (s->on_piece != NULL) {
            s->on_piece(s->arg, s->data, s->bytes);
        }
        s->result = io_pwrite_all(s->fd, s->data, s->bytes, s->offset);
        first = first == 0 ? s->result : first;
    }
    return first;
}

static int sys_sync(void *self, int fd)
{
    if (io_on_thread(self)) {
        return io_sync(self, fd);
    }
    return fdatasync(fd) < 0 ? -errno : 0;
}

static int sys_truncate(void *self, int fd, uint64_t bytes)
{
    while (ftruncate(fd, (off_t)bytes) < 0) {
        if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

/* Not posix_fallocate(): where the file system cannot, it would write into every block, at the
 * disk's speed. There the file only grows, and a full disk is found by the write. */
static int sys_allocate(void *self, int fd, uint64_t offset, uint64_t bytes)
{
    while (fallocate(fd, 0, (off_t)offset, (off_t)bytes) < 0) {
        if (errno == EOPNOTSUPP || errno == ENOSYS) {
            uint64_t size;
            int rc = sys_size(self, fd, &size);
            return rc < 0 || size >= offset + bytes ? rc : sys_truncate(self, fd, offset + bytes);
        }
        if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

static int write_zeros(int fd, uint64_t offset, uint64_t bytes)
{
    static const char zeros[ZERO_BYTES];
    int rc = 0;
    while (bytes > 0 && rc == 0) {
        size_t n = bytes < sizeof(zeros) ? (size_t)bytes : sizeof(zeros);
        rc = io_pwrite_all(fd, zeros, n, offset);
        offset += n;
        bytes -= n;
    }
    return rc;
}

static int sys_punch(void *self, int fd, uint64_t offset, uint64_t bytes)
{
    while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) <
           0) {
        if (errno == EOPNOTSUPP || errno == ENOSYS) {
            return write_zeros(fd, offset, bytes);
        }
        if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

static int sys_rename(void *self, int folder, const char *from, const char *to)
{
    return renameat(folder, from, folder, to) < 0 ? -errno : 0;
}

static int sys_unlink(void *self, int folder, const char *name)
{
    return unlinkat(folder, name, 0) < 0 ? -errno : 0;
}

static int sys_sync_folder(void *self, int folder)
{
    return fsync(folder) < 0 ? -errno : 0;
}

static int sys_map(void *self, int fd, uint64_t offset, size_t bytes, void *at, void **ret)
{
    void *memory =
        mmap(at, bytes, PROT_READ, MAP_SHARED | (at != NULL ? MAP_FIXED : 0), fd, (off_t)offset);
    if (memory == MAP_FAILED) {
        return -errno;
    }
    madvise(memory, bytes, MADV_DONTDUMP); /* advice: core files are forbidden as well */
    *ret = memory;
    return 0;
}

static void sys_unmap(void *self, void *memory, size_t bytes)
{
    munmap(memory, bytes);
}

static int64_t to_ns(struct timespec t)
{
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int sys_times(void *self, int fd, int64_t *ret_used_ns, int64_t *ret_written_ns)
{
    struct stat st;
    if (fstat(fd, &st) < 0) {
        return -errno;
    }
    *ret_used_ns = to_ns(st.st_atim);
    *ret_written_ns = to_ns(st.st_mtim);
    return 0;
}

static struct timespec from_ns(int64_t ns)
{
    if (ns == IO_TIME_KEEP) {
        return (struct timespec){.tv_nsec = UTIME_OMIT};
    }
    return (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
}

static int sys_set_times(void *self, int fd, int64_t used_ns, int64_t written_ns)
{
    const struct timespec times[2] = {from_ns(used_ns), from_ns(written_ns)};
    return futimens(fd, times) < 0 ? -errno : 0;
}

void io_files_system(struct io *io, struct io_files *ret)
{
    *ret = (struct io_files){
        .self = io,
        .open_folder = sys_open_folder,
        .list = sys_list,
        .open = sys_open,
        .close = sys_close,
        .lock = sys_lock,
        .size = sys_size,
        .allocated = sys_allocated,
        .read = sys_read,
        .write = sys_write,
        .sync = sys_sync,
        .allocate = sys_allocate,
        .truncate = sys_truncate,
        .punch = sys_punch,
        .rename = sys_rename,
        .unlink = sys_unlink,
        .sync_folder = sys_sync_folder,
        .map = sys_map,
        .unmap = sys_unmap,
        .times = sys_times,
        .set_times = sys_set_times,
    };
}
