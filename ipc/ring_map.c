#include "ipc/ring_map.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8u
#endif

#define PAGE_BYTES 4096u
#define SEALS      (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static bool is_part(uint64_t bytes)
{
    return bytes >= PAGE_BYTES && bytes <= RING_AREA_PART_MAX && bytes % PAGE_BYTES == 0;
}

bool ring_sizes_are_sound(const struct ring_sizes *s)
{
    bool ring = s->ring_bytes >= RING_BYTES_MIN && s->ring_bytes <= RING_BYTES_MAX &&
                (s->ring_bytes & (s->ring_bytes - 1)) == 0;
    return ring && is_part(s->in_bytes) && is_part(s->out_bytes);
}

static uint64_t ring_file_bytes(const struct ring_sizes *s)
{
    return RING_CONTROL_BYTES + 2 * (uint64_t)s->ring_bytes;
}

static uint64_t data_file_bytes(const struct ring_sizes *s)
{
    return s->in_bytes + s->out_bytes;
}

uint64_t ring_sizes_total(const struct ring_sizes *s)
{
    return ring_file_bytes(s) + data_file_bytes(s);
}

/* A memfd of a size that nobody can change any more. */
static int make_sealed(const char *name, uint64_t bytes, int *ret)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL) { /* a kernel before 6.3 */
        fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    }
    if (fd < 0) {
        return -errno;
    }
    if (ftruncate(fd, (off_t)bytes) < 0 || fcntl(fd, F_ADD_SEALS, SEALS) < 0) {
        int rc = -errno;
        close(fd);
        return rc;
    }
    *ret = fd;
    return 0;
}

/* Prompts pass through it: never part of a core dump. */
static int map_shared(int fd, uint64_t bytes, void **ret)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        return -errno;
    }
    madvise(at, bytes, MADV_DONTDUMP);
    *ret = at;
    return 0;
}

static int map_both(const int fds[2], const struct ring_sizes *sizes, struct ring_map *ret)
{
    struct ring_map m = {.sizes = *sizes};
    void *at = NULL;
    int rc = map_shared(fds[0], ring_file_bytes(sizes), &at);
    if (rc < 0) {
        return rc;
    }
    m.control = at;
    rc = map_shared(fds[1], data_file_bytes(sizes), &at);
    if (rc < 0) {
        ring_map_finish(&m);
        return rc;
    }
    m.data = at;
    *ret = m;
    return 0;
}

int ring_map_create(const struct ring_sizes *sizes, struct ring_map *ret, int ret_fds[2])
{
    int fds[2];
    if (!ring_sizes_are_sound(sizes)) {
        return -EINVAL;
    }
    int rc = make_sealed("gqad-ring", ring_file_bytes(sizes), &fds[0]);
    if (rc < 0) {
        return rc;
    }
    rc = make_sealed("gqad-data", data_file_bytes(sizes), &fds[1]);
    if (rc < 0) {
        goto err_ring;
    }
    rc = map_both(fds, sizes, ret);
    if (rc < 0) {
        goto err_data;
    }
    ret->control->magic = RING_MAGIC;
    ret->control->version = RING_VERSION;
    ret->control->ring_bytes = sizes->ring_bytes;
    ret_fds[0] = fds[0];
    ret_fds[1] = fds[1];
    return 0;

err_data:
    close(fds[1]);
err_ring:
    close(fds[0]);
    return rc;
}

static int check_sealed(int fd, uint64_t bytes)
{
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || fstat(fd, &st) < 0) {
        return -EPROTO;
    }
    return (seals & SEALS) == SEALS && st.st_size >= 0 && (uint64_t)st.st_size == bytes ? 0
                                                                                        : -EPROTO;
}

int ring_map_open(const int fds[2], const struct ring_sizes *sizes, struct ring_map *ret)
{
    struct ring_map m;
    if (!ring_sizes_are_sound(sizes) || check_sealed(fds[0], ring_file_bytes(sizes)) < 0 ||
        check_sealed(fds[1], data_file_bytes(sizes)) < 0) {
        return -EPROTO;
    }
    int rc = map_both(fds, sizes, &m);
    if (rc < 0) {
        return rc;
    }
    if (m.control->magic != RING_MAGIC || m.control->version != RING_VERSION ||
        m.control->ring_bytes != sizes->ring_bytes) {
        ring_map_finish(&m);
        return -EPROTO;
    }
    *ret = m;
    return 0;
}

void ring_map_discard(struct ring_map *m)
{
    /* Works on a sealed memfd: only F_SEAL_WRITE and F_SEAL_FUTURE_WRITE would forbid it. */
    madvise(m->control, ring_file_bytes(&m->sizes), MADV_REMOVE);
    madvise(m->data, data_file_bytes(&m->sizes), MADV_REMOVE);
}

void ring_map_finish(struct ring_map *m)
{
    if (m->control != NULL) {
        munmap(m->control, ring_file_bytes(&m->sizes));
    }
    if (m->data != NULL) {
        munmap(m->data, data_file_bytes(&m->sizes));
    }
    memset(m, 0, sizeof(*m));
}

static uint8_t *submission(const struct ring_map *m)
{
    return (uint8_t *)m->control + RING_CONTROL_BYTES;
}

static uint8_t *completion(const struct ring_map *m)
{
    return submission(m) + m->sizes.ring_bytes;
}

void ring_map_daemon_ends(const struct ring_map *m, struct ring_in *ret_in,
                          struct ring_out *ret_out)
{
    struct ring_control *c = m->control;
    ring_in_init(ret_in, &c->sub_tail, &c->sub_head, submission(m), m->sizes.ring_bytes);
    ring_out_init(ret_out, &c->comp_tail, &c->comp_head, completion(m), m->sizes.ring_bytes);
}

void ring_map_client_ends(const struct ring_map *m, struct ring_in *ret_in,
                          struct ring_out *ret_out)
{
    struct ring_control *c = m->control;
    ring_in_init(ret_in, &c->comp_tail, &c->comp_head, completion(m), m->sizes.ring_bytes);
    ring_out_init(ret_out, &c->sub_tail, &c->sub_head, submission(m), m->sizes.ring_bytes);
}
