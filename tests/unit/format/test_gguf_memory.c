/* Every allocation of reader and writer fails once: each time the call says so and nothing leaks
 * (the sanitizers look at that). The linker wraps the allocator for this program. */
#include "format/gguf_write.h"
#include "image.h"

#include <errno.h>
#include <stdio.h>
#include <unistd.h>

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t n, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
char *__real_strdup(const char *text);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);
char *__wrap_strdup(const char *text);

/* Of the address sanitizer; absent from other builds. Nonzero when something leaked. */
int __lsan_do_recoverable_leak_check(void) __attribute__((weak));

static void expect_no_leaks(void)
{
    if (__lsan_do_recoverable_leak_check != NULL) {
        cr_expect_eq(__lsan_do_recoverable_leak_check(), 0, "memory leaked");
    }
}

/* Allocations until one fails; negative: none does. */
static int countdown = -1;

static bool fails_now(void)
{
    return countdown >= 0 && countdown-- == 0;
}

void *__wrap_malloc(size_t bytes)
{
    return fails_now() ? NULL : __real_malloc(bytes);
}

void *__wrap_calloc(size_t n, size_t bytes)
{
    return fails_now() ? NULL : __real_calloc(n, bytes);
}

void *__wrap_realloc(void *old, size_t bytes)
{
    return fails_now() ? NULL : __real_realloc(old, bytes);
}

char *__wrap_strdup(const char *text)
{
    return fails_now() ? NULL : __real_strdup(text);
}

Test(gguf_memory, opening_survives_every_failed_allocation)
{
    struct image image = {0};
    put_valid(&image);
    int n_failed = 0;
    for (;; n_failed++) {
        struct gguf *g = NULL;
        struct fmt_error err = {""};
        countdown = n_failed;
        int rc = gguf_open_memory(image.bytes, image.n, &g, &err);
        bool reached = countdown < 0;
        countdown = -1;
        if (!reached) {
            cr_expect_eq(rc, 0, "%s", err.text);
            gguf_close(g);
            break;
        }
        cr_expect_eq(rc, -ENOMEM, "allocation %d: %d", n_failed, rc);
        cr_expect_null(g);
        cr_expect_not_null(strstr(err.text, "out of memory"), "allocation %d", n_failed);
    }
    cr_expect_geq(n_failed, 8, "only %d allocations were seen", n_failed);
    free(image.bytes);
    expect_no_leaks();
}

static int write_part(const char *folder, int no)
{
    char path[128], tensor[8];
    struct gguf_writer *w = NULL;
    const struct gguf_string words[] = {{"one", 3}, {"two", 3}};
    snprintf(path, sizeof(path), "%s/m-%05d-of-00002.gguf", folder, no + 1);
    snprintf(tensor, sizeof(tensor), "t%d", no);
    int rc = gguf_writer_create(path, &w);
    if (rc == 0) {
        gguf_writer_add_u32(w, "split.no", (uint32_t)no);
        gguf_writer_add_u32(w, "split.count", 2);
        gguf_writer_add_strings(w, "words", words, 2);
        gguf_writer_add_tensor(w, tensor, FMT_TYPE_F32, 1, (uint64_t[]){1});
        gguf_writer_begin_data(w);
        gguf_writer_write(w, "1234", 4);
        rc = gguf_writer_finish(w);
    }
    gguf_writer_destroy(w);
    return rc;
}

Test(gguf_memory, writing_and_opening_parts_survives_every_failed_allocation)
{
    char folder[] = "/tmp/gqad-format-XXXXXX", first[128], second[128];
    struct gguf *g = NULL;
    int n_writing = 0, n_opening = 0, rc;
    cr_assert_not_null(mkdtemp(folder));
    snprintf(first, sizeof(first), "%s/m-00001-of-00002.gguf", folder);
    snprintf(second, sizeof(second), "%s/m-00002-of-00002.gguf", folder);
    for (;; n_writing++) {
        countdown = n_writing;
        rc = write_part(folder, 0);
        bool reached = countdown < 0;
        countdown = -1;
        if (!reached) {
            break;
        }
        cr_expect_eq(rc, -ENOMEM, "allocation %d: %d", n_writing, rc);
    }
    cr_expect_eq(rc, 0);
    cr_expect_geq(n_writing, 8, "only %d allocations were seen", n_writing);
    cr_assert_eq(write_part(folder, 1), 0);
    for (;; n_opening++) {
        countdown = n_opening;
        rc = gguf_open(first, &g, NULL);
        bool reached = countdown < 0;
        countdown = -1;
        if (!reached) {
            break;
        }
        cr_expect_eq(rc, -ENOMEM, "allocation %d: %d", n_opening, rc);
        cr_expect_null(g);
    }
    cr_expect_eq(rc, 0);
    cr_expect_geq(n_opening, 12, "only %d allocations were seen", n_opening);
    gguf_close(g);
    unlink(first);
    unlink(second);
    rmdir(folder);
    expect_no_leaks();
}
