#include "daemon/backend/image.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <unistd.h>

#define MAX_PROGRAM_HEADERS 128u
#define MAX_NOTE_BYTES      65536u

int reason_fail(struct gqa_reason *reason, int rc, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(reason->text, sizeof(reason->text), format, args);
    va_end(args);
    return rc;
}

/* ---- the ELF note: read with pread from the sealed copy, every offset checked ------------ */

static bool read_at(int fd, uint64_t file_bytes, uint64_t offset, void *data, size_t bytes)
{
    if (offset > file_bytes || bytes > file_bytes - offset) {
        return false;
    }
    return pread(fd, data, bytes, (off_t)offset) == (ssize_t)bytes;
}

/* Looks for our note in one segment of notes: entries of {name size, desc size, type, name, desc},
 * name and desc padded to 4 bytes. */
static bool find_in_segment(int fd, uint64_t file_bytes, const Elf64_Phdr *segment,
                            struct gqa_note_desc *ret)
{
    uint64_t size = segment->p_filesz < MAX_NOTE_BYTES ? segment->p_filesz : MAX_NOTE_BYTES;
    for (uint64_t at = 0; at + sizeof(Elf64_Nhdr) <= size;) {
        Elf64_Nhdr head;
        char name[sizeof(GQA_NOTE_NAME)];
        if (!read_at(fd, file_bytes, segment->p_offset + at, &head, sizeof(head))) {
            return false;
        }
        uint64_t name_at = at + sizeof(head);
        uint64_t desc_at = name_at + (((uint64_t)head.n_namesz + 3) & ~3ull);
        bool ours = head.n_type == GQA_NOTE_TYPE && head.n_namesz == sizeof(GQA_NOTE_NAME) &&
                    head.n_descsz == sizeof(*ret) &&
                    read_at(fd, file_bytes, segment->p_offset + name_at, name, sizeof(name)) &&
                    memcmp(name, GQA_NOTE_NAME, sizeof(name)) == 0;
        if (ours) {
            return read_at(fd, file_bytes, segment->p_offset + desc_at, ret, sizeof(*ret));
        }
        at = desc_at + (((uint64_t)head.n_descsz + 3) & ~3ull);
    }
    return false;
}

static int read_note(int fd, uint64_t file_bytes, struct gqa_note_desc *ret,
                     struct gqa_reason *reason)
{
    Elf64_Ehdr elf;
    if (!read_at(fd, file_bytes, 0, &elf, sizeof(elf)) ||
        memcmp(elf.e_ident, ELFMAG, SELFMAG) != 0 || elf.e_ident[EI_CLASS] != ELFCLASS64 ||
        elf.e_type != ET_DYN || elf.e_phentsize != sizeof(Elf64_Phdr) ||
        elf.e_phnum > MAX_PROGRAM_HEADERS) {
        return reason_fail(reason, -ENOEXEC, "not a 64-bit shared object");
    }
    for (uint32_t i = 0; i < elf.e_phnum; i++) {
        Elf64_Phdr segment;
        if (!read_at(fd, file_bytes, elf.e_phoff + i * sizeof(segment), &segment,
                     sizeof(segment))) {
            return reason_fail(reason, -ENOEXEC, "program header %u lies outside the file", i);
        }
        if (segment.p_type == PT_NOTE && find_in_segment(fd, file_bytes, &segment, ret)) {
            return 0;
        }
    }
    return reason_fail(reason, -ENOEXEC, "no ELF note of a gqa plugin");
}

static int check_note(const struct gqa_note_desc *note, struct gqa_reason *reason)
{
    if (note->magic != GQA_PLUGIN_MAGIC) {
        return reason_fail(reason, -ENOEXEC, "the note's magic is 0x%08x, must be 0x%08x",
                           note->magic, GQA_PLUGIN_MAGIC);
    }
    /* Minor versions may differ either way: tables say how long they are. */
    if (note->abi_major != GQA_PLUGIN_ABI_MAJOR) {
        return reason_fail(reason, -ENOEXEC,
                           "built for ABI %u.%u, this daemon has %u.%u: the first number must be "
                           "the same",
                           note->abi_major, note->abi_minor, GQA_PLUGIN_ABI_MAJOR,
                           GQA_PLUGIN_ABI_MINOR);
    }
    if (note->plugin_struct_size < GQA_SIZE_TO(struct gqa_plugin, close)) {
        return reason_fail(reason, -ENOEXEC, "its gqa_plugin has %u bytes, must have %zu",
                           note->plugin_struct_size, GQA_SIZE_TO(struct gqa_plugin, close));
    }
    return 0;
}

/* ---- the copy ---------------------------------------------------------------------------- */

static int check_owner(const struct stat *st, struct gqa_reason *reason)
{
    if (!S_ISREG(st->st_mode)) {
        return reason_fail(reason, -EACCES, "not a regular file");
    }
    if (st->st_uid != 0 && st->st_uid != geteuid()) {
        return reason_fail(reason, -EACCES, "owned by uid %u, must be root or uid %u", st->st_uid,
                           geteuid());
    }
    if (st->st_mode & (S_IWGRP | S_IWOTH)) {
        return reason_fail(reason, -EACCES, "mode %04o lets others write to it",
                           (unsigned)(st->st_mode & 07777));
    }
    if ((uint64_t)st->st_size > PLUGIN_FILE_BYTES_MAX) {
        return reason_fail(reason, -EFBIG, "%lld bytes, limit %llu", (long long)st->st_size,
                           PLUGIN_FILE_BYTES_MAX);
    }
    return 0;
}

static int copy_sealed(int from, off_t bytes, int *ret_fd, struct gqa_reason *reason)
{
    int fd = memfd_create("gqa-plugin", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        return reason_fail(reason, -errno, "memfd_create: %s", strerror(errno));
    }
    off_t done = 0;
    while (done < bytes) {
        ssize_t n = sendfile(fd, from, &done, (size_t)(bytes - done));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            int rc = n < 0 ? -errno : -EIO;
            close(fd);
            return reason_fail(reason, rc, "cannot be read: %s", strerror(-rc));
        }
    }
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL;
    if (fcntl(fd, F_ADD_SEALS, seals) < 0) {
        int rc = -errno;
        close(fd);
        return reason_fail(reason, rc, "sealing: %s", strerror(-rc));
    }
    *ret_fd = fd;
    return 0;
}

int plugin_image_load(const char *path, struct plugin_image *ret, struct gqa_reason *reason)
{
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) {
        return reason_fail(reason, -errno, "cannot be opened: %s", strerror(errno));
    }
    struct stat st;
    int rc = fstat(file, &st) < 0 ? reason_fail(reason, -errno, "fstat: %s", strerror(errno)) : 0;
    rc = rc < 0 ? rc : check_owner(&st, reason);
    int fd = -1;
    rc = rc < 0 ? rc : copy_sealed(file, st.st_size, &fd, reason);
    close(file);
    if (rc < 0) {
        return rc;
    }
    struct plugin_image image = {
        .fd = fd,
        .device = st.st_dev,
        .inode = st.st_ino,
        .bytes = st.st_size,
        .modified = st.st_mtim,
    };
    rc = read_note(fd, (uint64_t)st.st_size, &image.note, reason);
    rc = rc < 0 ? rc : check_note(&image.note, reason);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    *ret = image;
    return 0;
}

void plugin_image_unload(struct plugin_image *image)
{
    if (image->fd >= 0) {
        close(image->fd);
        image->fd = -1;
    }
}

bool plugin_image_is_current(const struct plugin_image *image, const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && st.st_dev == image->device && st.st_ino == image->inode &&
           st.st_size == image->bytes && st.st_mtim.tv_sec == image->modified.tv_sec &&
           st.st_mtim.tv_nsec == image->modified.tv_nsec;
}
