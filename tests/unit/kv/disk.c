#include "tests/unit/kv/disk.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define FOLDER_FD 1
#define FIRST_FD  100

static void need(bool holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "disk: %s\n", what);
        exit(99);
    }
}

/* ---- files --------------------------------------------------------------------------------- */

static uint32_t add_file(struct disk *d)
{
    need(d->n_files < DISK_MAX_FILES, "too many files");
    struct disk_file *f = &d->all[d->n_files];
    if (f->data == NULL) {
        f->data = mmap(NULL, DISK_FILE_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        need(f->data != MAP_FAILED, "mmap");
    }
    f->bytes = 0;
    return d->n_files++;
}

static void set_size(struct disk_file *f, uint64_t bytes)
{
    need(bytes <= DISK_FILE_BYTES, "a file gets too long");
    if (bytes < f->bytes) {
        memset(f->data + bytes, 0, f->bytes - bytes);
    }
    f->bytes = bytes;
}

static void put(struct disk_file *f, uint64_t offset, const void *data, size_t bytes)
{
    need(offset + bytes <= DISK_FILE_BYTES, "a file gets too long");
    if (data != NULL) {
        memcpy(f->data + offset, data, bytes);
        f->bytes = offset + bytes > f->bytes ? offset + bytes : f->bytes;
    } else {
        memset(f->data + offset, 0, bytes);
    }
}

static struct disk_name *find_name(const struct disk *d, const char *name)
{
    for (uint32_t i = 0; i < d->n_names; i++) {
        if (strcmp(d->names[i].name, name) == 0) {
            return (struct disk_name *)&d->names[i];
        }
    }
    return NULL;
}

static void set_name(struct disk *d, const char *name, uint32_t file)
{
    struct disk_name *n = find_name(d, name);
    if (n == NULL) {
        need(d->n_names < DISK_MAX_NAMES, "too many names");
        n = &d->names[d->n_names++];
        snprintf(n->name, sizeof(n->name), "%s", name);
    }
    n->file = file;
}

static void remove_name(struct disk *d, const char *name)
{
    struct disk_name *n = find_name(d, name);
    if (n != NULL) {
        *n = d->names[--d->n_names];
    }
}

static struct disk_file *file_of(struct disk *d, int fd)
{
    need(fd >= FIRST_FD && (uint32_t)(fd - FIRST_FD) < d->n_files, "no such descriptor");
    return &d->all[fd - FIRST_FD];
}

/* ---- the log ------------------------------------------------------------------------------- */

static struct disk_op *log_op(struct disk *d, enum disk_op_kind kind, int fd)
{
    static struct disk_op nowhere;
    if (!d->recording) {
        return &nowhere;
    }
    if (d->n_ops == d->ops_capacity) {
        d->ops_capacity = d->ops_capacity == 0 ? 256 : 2 * d->ops_capacity;
        d->ops = realloc(d->ops, d->ops_capacity * sizeof(d->ops[0]));
        need(d->ops != NULL, "memory");
    }
    struct disk_op *op = &d->ops[d->n_ops++];
    *op = (struct disk_op){.kind = kind, .file = fd >= FIRST_FD ? (uint32_t)(fd - FIRST_FD) : 0};
    return op;
}

void disk_mark(struct disk *d, long mark)
{
    log_op(d, DISK_MARK, 0)->mark = mark;
}

static int fault(struct disk *d, enum disk_fault kind)
{
    if ((d->fail_mask & 1u << kind) == 0 || d->countdown < 0) {
        return 0;
    }
    if (d->countdown > 0) {
        d->countdown--;
        return 0;
    }
    d->n_failed++;
    if (--d->n_failures <= 0) {
        d->countdown = -1;
    }
    return d->code;
}

static uint64_t bytes_of_all(const struct disk *d)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < d->n_names; i++) {
        bytes += d->all[d->names[i].file].bytes;
    }
    return bytes;
}

/* -ENOSPC when the file cannot become that long. */
static int check_space(struct disk *d, const struct disk_file *f, uint64_t end)
{
    uint64_t more = end > f->bytes ? end - f->bytes : 0;
    return d->bytes_max != 0 && more > 0 && bytes_of_all(d) + more > d->bytes_max ? -ENOSPC : 0;
}

/* ---- io_files ------------------------------------------------------------------------------ */

static int do_open_folder(void *self, const char *path, int *ret)
{
    int rc = fault(self, DISK_FAULT_OPEN);
    if (rc == 0) {
        *ret = FOLDER_FD;
    }
    return rc;
}

static int do_list(void *self, int folder,
                   int (*on_name)(void *arg, const char *name, uint64_t bytes), void *arg)
{
    struct disk *d = self;
    int rc = fault(d, DISK_FAULT_LIST);
    for (uint32_t i = 0; i < d->n_names && rc == 0; i++) {
        rc = on_name(arg, d->names[i].name, d->all[d->names[i].file].bytes);
    }
    return rc;
}

static int do_open(void *self, int folder, const char *name, enum io_open how, int *ret)
{
    struct disk *d = self;
    struct disk_name *n = find_name(d, name);
    int rc = fault(d, DISK_FAULT_OPEN);
    if (rc < 0) {
        return rc;
    }
    if (n == NULL && how == IO_OPEN_EXISTING) {
        return -ENOENT;
    }
    if (n == NULL) {
        uint32_t file = add_file(d);
        set_name(d, name, file);
        *ret = FIRST_FD + (int)file;
        struct disk_op *op = log_op(d, DISK_NAME, *ret);
        snprintf(op->name, sizeof(op->name), "%s", name);
        return 0;
    }
    *ret = FIRST_FD + (int)n->file;
    if (how == IO_OPEN_EMPTY && d->all[n->file].bytes > 0) {
        set_size(&d->all[n->file], 0);
        log_op(d, DISK_SIZE, *ret)->offset = 0;
    }
    return 0;
}

static void do_close(void *self, int fd)
{
}

static int do_lock(void *self, int fd)
{
    return 0;
}

static int do_size(void *self, int fd, uint64_t *ret)
{
    int rc = fault(self, DISK_FAULT_SIZE);
    if (rc == 0) {
        *ret = file_of(self, fd)->bytes;
    }
    return rc;
}

static int do_read(void *self, int fd, void *data, size_t bytes, uint64_t offset)
{
    const struct disk_file *f = file_of(self, fd);
    int rc = fault(self, DISK_FAULT_READ);
    if (rc == 0 && offset + bytes > f->bytes) {
        rc = -EIO;
    }
    if (rc == 0) {
        memcpy(data, f->data + offset, bytes);
    }
    return rc;
}

static void write_bytes(struct disk *d, int fd, const void *data, size_t bytes, uint64_t offset)
{
    put(file_of(d, fd), offset, data, bytes);
    if (d->recording) {
        struct disk_op *op = log_op(d, DISK_WRITE, fd);
        op->offset = offset;
        op->bytes = bytes;
        if (data != NULL) {
            op->data = malloc(bytes);
            need(op->data != NULL, "memory");
            memcpy(op->data, data, bytes);
        }
    }
}

static int do_write(void *self, struct io_span *spans, size_t n)
{
    struct disk *d = self;
    int first = 0;
    for (size_t i = 0; i < n; i++) {
        struct io_span *s = &spans[i];
        if (s->on_piece != NULL) { /* in two pieces, so that streaming is needed */
            size_t half = s->bytes / 3;
            s->on_piece(s->arg, s->data, half);
            s->on_piece(s->arg, (const char *)s->data + half, s->bytes - half);
        }
        s->result = fault(d, DISK_FAULT_WRITE);
        size_t bytes = s->bytes;
        if (s->result == 0) {
            s->result = check_space(d, file_of(d, s->fd), s->offset + s->bytes);
        } else {
            bytes /= 2; /* a write that fails may have got somewhere */
        }
        if (s->result != -ENOSPC) {
            write_bytes(d, s->fd, s->data, bytes, s->offset);
        }
        first = first == 0 ? s->result : first;
    }
    return first;
}

static int do_sync(void *self, int fd)
{
    int rc = fault(self, DISK_FAULT_SYNC);
    if (rc == 0 || !((struct disk *)self)->killed) {
        log_op(self, rc < 0 ? DISK_SYNC_BAD : DISK_SYNC, fd);
    }
    return rc;
}

static int do_truncate(void *self, int fd, uint64_t bytes)
{
    int rc = fault(self, DISK_FAULT_TRUNCATE);
    if (rc == 0) {
        set_size(file_of(self, fd), bytes);
        log_op(self, DISK_SIZE, fd)->offset = bytes;
    }
    return rc;
}

static int do_allocate(void *self, int fd, uint64_t offset, uint64_t bytes)
{
    struct disk_file *f = file_of(self, fd);
    int rc = fault(self, DISK_FAULT_ALLOCATE);
    rc = rc < 0 ? rc : check_space(self, f, offset + bytes);
    if (rc == 0 && offset + bytes > f->bytes) {
        set_size(f, offset + bytes);
        log_op(self, DISK_SIZE, fd)->offset = offset + bytes;
    }
    return rc;
}

static int do_punch(void *self, int fd, uint64_t offset, uint64_t bytes)
{
    int rc = fault(self, DISK_FAULT_PUNCH);
    if (rc == 0) {
        write_bytes(self, fd, NULL, (size_t)bytes, offset);
    }
    return rc;
}

static int do_rename(void *self, int folder, const char *from, const char *to)
{
    struct disk *d = self;
    const struct disk_name *n = find_name(d, from);
    int rc = n == NULL ? -ENOENT : fault(d, DISK_FAULT_RENAME);
    if (rc == 0) {
        uint32_t file = n->file;
        set_name(d, to, file);
        remove_name(d, from);
        struct disk_op *op = log_op(d, DISK_NAME, FIRST_FD + (int)file);
        snprintf(op->name, sizeof(op->name), "%s", to);
        snprintf(op->from, sizeof(op->from), "%s", from);
    }
    return rc;
}

static int do_unlink(void *self, int folder, const char *name)
{
    int rc = find_name(self, name) == NULL ? -ENOENT : fault(self, DISK_FAULT_UNLINK);
    if (rc == 0) {
        remove_name(self, name);
        struct disk_op *op = log_op(self, DISK_UNNAME, 0);
        snprintf(op->name, sizeof(op->name), "%s", name);
    }
    return rc;
}

static int do_sync_folder(void *self, int folder)
{
    int rc = fault(self, DISK_FAULT_SYNC_FOLDER);
    if (rc == 0) {
        log_op(self, DISK_SYNC_FOLDER, 0);
    }
    return rc;
}

static int do_map(void *self, int fd, uint64_t offset, size_t bytes, void *at, void **ret)
{
    int rc = fault(self, DISK_FAULT_MAP);
    need(offset + bytes <= DISK_FILE_BYTES && at == NULL, "a mapping is too long");
    if (rc == 0) {
        *ret = file_of(self, fd)->data + offset;
    }
    return rc;
}

static void do_unmap(void *self, void *memory, size_t bytes)
{
}

/* ---- making -------------------------------------------------------------------------------- */

struct disk *disk_create(void)
{
    struct disk *d = calloc(1, sizeof(*d));
    need(d != NULL, "memory");
    d->countdown = -1;
    d->files = (struct io_files){
        .self = d,
        .open_folder = do_open_folder,
        .list = do_list,
        .open = do_open,
        .close = do_close,
        .lock = do_lock,
        .size = do_size,
        .read = do_read,
        .write = do_write,
        .sync = do_sync,
        .allocate = do_allocate,
        .truncate = do_truncate,
        .punch = do_punch,
        .rename = do_rename,
        .unlink = do_unlink,
        .sync_folder = do_sync_folder,
        .map = do_map,
        .unmap = do_unmap,
    };
    return d;
}

static void forget_log(struct disk *d)
{
    for (size_t i = 0; i < d->n_ops; i++) {
        free(d->ops[i].data);
    }
    d->n_ops = 0;
}

void disk_destroy(struct disk *d)
{
    for (uint32_t i = 0; i < DISK_MAX_FILES; i++) {
        if (d->all[i].data != NULL) {
            munmap(d->all[i].data, DISK_FILE_BYTES);
        }
    }
    forget_log(d);
    free(d->ops);
    free(d);
}

void disk_record(struct disk *d)
{
    forget_log(d);
    d->recording = true;
}

bool disk_holds(const struct disk *d, const void *bytes, size_t n)
{
    for (uint32_t i = 0; i < d->n_names; i++) {
        const struct disk_file *f = &d->all[d->names[i].file];
        if (memmem(f->data, f->bytes, bytes, n) != NULL) {
            return true;
        }
    }
    return false;
}

struct disk_file *disk_file(struct disk *d, const char *name)
{
    struct disk_name *n = find_name(d, name);
    return n != NULL ? &d->all[n->file] : NULL;
}

void disk_copy(const struct disk *from, struct disk *to)
{
    for (uint32_t i = 0; i < to->n_files; i++) {
        set_size(&to->all[i], 0);
    }
    to->n_files = 0;
    for (uint32_t i = 0; i < from->n_files; i++) {
        add_file(to);
        put(&to->all[i], 0, from->all[i].data, from->all[i].bytes);
    }
    memcpy(to->names, from->names, sizeof(to->names));
    to->n_names = from->n_names;
}

/* ---- crashes ------------------------------------------------------------------------------- */

static void apply(struct disk *d, const struct disk_op *op, size_t from, size_t to)
{
    while (op->kind != DISK_UNNAME && d->n_files <= op->file) {
        add_file(d);
    }
    switch (op->kind) {
    case DISK_WRITE:
        put(&d->all[op->file], op->offset + from, op->data != NULL ? op->data + from : NULL,
            (to < op->bytes ? to : op->bytes) - from);
        break;
    case DISK_SIZE:
        set_size(&d->all[op->file], op->offset);
        break;
    case DISK_NAME:
        set_name(d, op->name, op->file);
        remove_name(d, op->from);
        break;
    case DISK_UNNAME:
        remove_name(d, op->name);
        break;
    default:
        break;
    }
}

void disk_replay_init(struct disk_replay *r, const struct disk *log, struct disk *start)
{
    *r = (struct disk_replay){.log = log, .synced = start};
}

void disk_replay_finish(struct disk_replay *r)
{
    disk_destroy(r->synced);
}

/* What an operation settles: applied, or never to be. */
static void settle(struct disk_replay *r, const struct disk_op *sync)
{
    size_t kept = 0;
    for (size_t i = 0; i < r->n_pending; i++) {
        const struct disk_op *op = &r->log->ops[r->pending[i]];
        bool of_folder = op->kind == DISK_NAME || op->kind == DISK_UNNAME;
        bool settled =
            sync->kind == DISK_SYNC_FOLDER ? of_folder : !of_folder && op->file == sync->file;
        if (!settled) {
            r->pending[kept++] = r->pending[i];
        } else if (sync->kind != DISK_SYNC_BAD) {
            apply(r->synced, op, 0, SIZE_MAX);
        }
    }
    r->n_pending = kept;
}

bool disk_replay_step(struct disk_replay *r)
{
    if (r->at == r->log->n_ops) {
        return false;
    }
    const struct disk_op *op = &r->log->ops[r->at];
    switch (op->kind) {
    case DISK_SYNC:
    case DISK_SYNC_BAD:
    case DISK_SYNC_FOLDER:
        settle(r, op);
        break;
    case DISK_MARK:
        break;
    default:
        need(r->n_pending < sizeof(r->pending) / sizeof(r->pending[0]), "too much is pending");
        r->pending[r->n_pending++] = r->at;
    }
    r->at++;
    return true;
}

void disk_crash(const struct disk_replay *r, const struct disk_crash *c, struct disk *ret)
{
    disk_copy(r->synced, ret);
    for (size_t i = 0; i < r->n_pending; i++) {
        size_t index = c->swap == SIZE_MAX || i < c->swap || i > c->swap + 1 ? i
                       : i == c->swap                                        ? i + 1
                                                                             : i - 1;
        if (!c->survives(c->arg, index, r->n_pending)) {
            continue;
        }
        bool torn = index == c->torn;
        apply(ret, &r->log->ops[r->pending[index]], torn ? c->torn_from : 0,
              torn ? c->torn_to : SIZE_MAX);
    }
}
