/* tools/convert/hf_write.c - a folder of Hugging Face out: the same files, with other heads.
 *
 * Everything is written into a folder beside the wanted one, synced, and renamed at the end. */
#include "tools/convert/hf_checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

struct ck_output {
    const struct hf_checkpoint *from;
    const struct ck_outcome *outcomes;
    const char *path;
    char *temporary; /* the folder */
    int folder_fd;
    /* The file that is being written, and what is left of its data. */
    size_t file;
    FILE *out;
    uint64_t left;
    uint64_t total; /* of all data */
};

static int fail(const struct ck_output *o, const char *what, int rc, struct fmt_error *err)
{
    return fmt_fail(err, rc, "%s: %s: %s", o->path, what, strerror(-rc));
}

/* ---- one file of tensors ----------------------------------------------------------------- */

static uint64_t outcome_bytes(const struct ck_tensor *t, const struct ck_outcome *to)
{
    return to->type == NULL ? t->bytes : fmt_type_bytes(to->type, to->n_rows * t->row_values);
}

/* The header of a file: the source's, with the shapes, dtypes and places of what is written. */
static json_t *new_header(const struct ck_output *o, const struct hf_file *f, uint64_t *ret_bytes)
{
    json_t *header = json_deep_copy(f->weights.header);
    uint64_t at = 0;
    for (size_t i = 0; header != NULL && i < f->weights.n_tensors; i++) {
        const struct ck_tensor *t = &o->from->base.tensors[f->first_tensor + i];
        const struct ck_outcome *to = &o->outcomes[f->first_tensor + i];
        json_t *about = json_object_get(header, t->name);
        uint64_t bytes = outcome_bytes(t, to);
        if (to->type != NULL) {
            json_object_set_new(about, "dtype", json_string(safetensors_dtype(to->type)));
        }
        if (to->n_rows != t->n_rows) {
            json_array_set_new(json_object_get(about, "shape"), 0,
                               json_integer((json_int_t)to->n_rows));
        }
        json_object_set_new(about, "data_offsets",
                            json_pack("[I, I]", (json_int_t)at, (json_int_t)(at + bytes)));
        at += bytes;
    }
    *ret_bytes = at;
    return header;
}

static int begin_file(struct ck_output *o, struct fmt_error *err)
{
    const struct hf_file *f = &o->from->files[o->file];
    json_t *header = new_header(o, f, &o->left);
    char *text = header != NULL ? json_dumps(header, JSON_COMPACT) : NULL;
    json_decref(header);
    if (text == NULL) {
        return fail(o, f->name, -ENOMEM, err);
    }
    int fd = openat(o->folder_fd, f->name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    o->out = fd < 0 ? NULL : fdopen(fd, "wb");
    int rc = o->out == NULL ? -errno : 0;
    if (o->out == NULL && fd >= 0) {
        close(fd);
    }
    /* Padded with spaces, so that the data begins aligned. */
    uint64_t n = strlen(text), padded = (n + 7) & ~(uint64_t)7;
    if (rc == 0 && (fwrite(&padded, sizeof(padded), 1, o->out) != 1 ||
                    fprintf(o->out, "%s%*s", text, (int)(padded - n), "") < 0)) {
        rc = -EIO;
    }
    free(text);
    o->total += o->left;
    return rc < 0 ? fail(o, f->name, rc, err) : 0;
}

static int end_file(struct ck_output *o, struct fmt_error *err)
{
    int rc = fflush(o->out) != 0 || fsync(fileno(o->out)) < 0 ? -errno : 0;
    rc = fclose(o->out) != 0 && rc == 0 ? -errno : rc;
    o->out = NULL;
    return rc < 0 ? fail(o, o->from->files[o->file].name, rc, err) : 0;
}

/* Goes on to the next file for as long as the present one is complete. */
static int advance(struct ck_output *o, struct fmt_error *err)
{
    int rc = 0;
    while (rc == 0 && o->left == 0 && o->file < o->from->n_files) {
        rc = end_file(o, err);
        o->file++;
        if (rc == 0 && o->file < o->from->n_files) {
            rc = begin_file(o, err);
        }
    }
    return rc;
}

int hf_write(struct ck_output *o, const void *data, size_t bytes, struct fmt_error *err)
{
    const uint8_t *at = data;
    while (bytes > 0) {
        if (o->file == o->from->n_files) {
            return fail(o, "more data than declared", -EINVAL, err);
        }
        size_t n = bytes < o->left ? bytes : (size_t)o->left;
        if (fwrite(at, 1, n, o->out) != n) {
            return fail(o, o->from->files[o->file].name, errno != 0 ? -errno : -EIO, err);
        }
        at += n;
        bytes -= n;
        o->left -= n;
        int rc = advance(o, err);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

/* ---- the other files --------------------------------------------------------------------- */

static int write_json(struct ck_output *o, const char *name, const json_t *j, struct fmt_error *err)
{
    int fd = openat(o->folder_fd, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    int rc = fd < 0 ? -errno : 0;
    if (rc == 0 && (json_dumpfd(j, fd, JSON_INDENT(2)) < 0 || fsync(fd) < 0)) {
        rc = errno != 0 ? -errno : -EIO;
    }
    if (fd >= 0) {
        close(fd);
    }
    return rc < 0 ? fail(o, name, rc, err) : 0;
}

static int copy_file(struct ck_output *o, int from_folder, const char *name, struct fmt_error *err)
{
    struct stat st;
    int rc = 0;
    int from = openat(from_folder, name, O_RDONLY | O_CLOEXEC);
    int to = openat(o->folder_fd, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (from < 0 || to < 0 || fstat(from, &st) < 0) {
        rc = -errno;
    }
    for (off_t left = rc == 0 ? st.st_size : 0; rc == 0 && left > 0;) {
        ssize_t n = sendfile(to, from, NULL, (size_t)left);
        rc = n < 0 ? -errno : n == 0 ? -EIO : 0;
        left -= n > 0 ? n : 0;
    }
    if (from >= 0) {
        close(from);
    }
    if (to >= 0) {
        close(to);
    }
    return rc < 0 ? fail(o, name, rc, err) : 0;
}

static bool is_written_anew(const char *name)
{
    const char *end = strrchr(name, '.');
    return (end != NULL && strcmp(end, ".safetensors") == 0) || strcmp(name, "config.json") == 0 ||
           strcmp(name, HF_INDEX_NAME) == 0;
}

/* Tokenizer, generation settings, licence: whatever else lies there as a file. */
static int copy_others(struct ck_output *o, struct fmt_error *err)
{
    int rc = 0;
    struct stat st;
    DIR *folder = opendir(o->from->path);
    if (folder == NULL) {
        return fail(o, "reading the source", -errno, err);
    }
    for (struct dirent *entry; rc == 0 && (entry = readdir(folder)) != NULL;) {
        if (!is_written_anew(entry->d_name) && fstatat(dirfd(folder), entry->d_name, &st, 0) == 0 &&
            S_ISREG(st.st_mode)) {
            rc = copy_file(o, dirfd(folder), entry->d_name, err);
        }
    }
    closedir(folder);
    return rc;
}

/* The list of which tensor lies where: names stay, their size does not. */
static int write_index(struct ck_output *o, struct fmt_error *err)
{
    char *path;
    if (asprintf(&path, "%s/" HF_INDEX_NAME, o->from->path) < 0) {
        return fail(o, HF_INDEX_NAME, -ENOMEM, err);
    }
    bool there = access(path, F_OK) == 0;
    json_t *index = there ? json_load_file(path, 0, NULL) : NULL;
    free(path);
    if (there && !json_is_object(index)) {
        json_decref(index);
        return fail(o, HF_INDEX_NAME, -EINVAL, err);
    }
    if (!there) {
        return 0;
    }
    if (!json_is_object(json_object_get(index, "metadata"))) {
        json_object_set_new(index, "metadata", json_object());
    }
    json_object_set_new(json_object_get(index, "metadata"), "total_size",
                        json_integer((json_int_t)o->total));
    int rc = write_json(o, HF_INDEX_NAME, index, err);
    json_decref(index);
    return rc;
}

static int write_config(struct ck_output *o, const struct ck_facts *facts, struct fmt_error *err)
{
    json_t *config = json_deep_copy(o->from->config);
    json_t *text = hf_text_config(config);
    json_object_set_new(text, "num_key_value_heads", json_integer(facts->n_kv_heads));
    if (facts->type != NULL) {
        const char *name = facts->type->type == FMT_TYPE_F32   ? "float32"
                           : facts->type->type == FMT_TYPE_F16 ? "float16"
                                                               : "bfloat16";
        json_object_set_new(text, "torch_dtype", json_string(name));
    }
    json_object_set_new(config, "gqad_converted", json_string(facts->how));
    int rc = write_json(o, "config.json", config, err);
    json_decref(config);
    return rc;
}

/* ---- the folder -------------------------------------------------------------------------- */

int hf_begin(const struct checkpoint *c, const char *path, const struct ck_outcome *outcomes,
             const struct ck_facts *facts, struct ck_output **ret, struct fmt_error *err)
{
    struct ck_output *o = calloc(1, sizeof(*o));
    if (o == NULL || access(path, F_OK) == 0) {
        free(o);
        return o == NULL ? fmt_fail(err, -ENOMEM, "%s: out of memory", path)
                         : fmt_fail(err, -EEXIST, "%s: is there already", path);
    }
    *o = (struct ck_output){.from = hf_of(c), .outcomes = outcomes, .path = path, .folder_fd = -1};
    int rc = asprintf(&o->temporary, "%s.%ld.tmp", path, (long)getpid()) < 0 ? -ENOMEM : 0;
    o->temporary = rc < 0 ? NULL : o->temporary;
    if (rc == 0 && mkdir(o->temporary, 0777) < 0) {
        rc = -errno;
        free(o->temporary); /* it is not ours to remove */
        o->temporary = NULL;
    }
    if (rc == 0) {
        o->folder_fd = open(o->temporary, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        rc = o->folder_fd < 0 ? -errno : 0;
    }
    rc = rc < 0 ? fail(o, "creating the folder", rc, err) : write_config(o, facts, err);
    rc = rc < 0 ? rc : copy_others(o, err);
    rc = rc < 0 ? rc : begin_file(o, err);
    rc = rc < 0 ? rc : advance(o, err);
    if (rc < 0) {
        hf_destroy(o);
        return rc;
    }
    *ret = o;
    return 0;
}

int hf_finish(struct ck_output *o, struct fmt_error *err)
{
    if (o->file < o->from->n_files) {
        return fail(o, "less data than declared", -EINVAL, err);
    }
    int rc = write_index(o, err);
    if (rc < 0) {
        return rc;
    }
    /* renameat2 would replace nothing either; an empty folder that came meanwhile is replaced. */
    if (fsync(o->folder_fd) < 0 || rename(o->temporary, o->path) < 0) {
        return fail(o, "renaming the folder", -errno, err);
    }
    free(o->temporary);
    o->temporary = NULL;
    return 0;
}

/* Removes what was begun: files of one folder, no deeper. */
static void remove_folder(const char *path)
{
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder != NULL && (entry = readdir(folder)) != NULL;) {
        unlinkat(dirfd(folder), entry->d_name, 0); /* "." and ".." refuse */
    }
    if (folder != NULL) {
        closedir(folder);
    }
    rmdir(path);
}

void hf_destroy(struct ck_output *o)
{
    if (o == NULL) {
        return;
    }
    if (o->out != NULL) {
        fclose(o->out);
    }
    if (o->folder_fd >= 0) {
        close(o->folder_fd);
    }
    if (o->temporary != NULL) {
        remove_folder(o->temporary);
    }
    free(o->temporary);
    free(o);
}
