#include "tests/unit/engine/folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void need(bool holds, const char *what)
{
    if (!holds) {
        perror(what);
        exit(99);
    }
}

void folder_init(struct folder *f)
{
    strcpy(f->path, "/tmp/gqad-test-XXXXXX");
    need(mkdtemp(f->path) != NULL, f->path);
}

void folder_finish(struct folder *f)
{
    DIR *d = opendir(f->path);
    need(d != NULL, f->path);
    for (struct dirent *file; (file = readdir(d)) != NULL;) {
        unlinkat(dirfd(d), file->d_name, 0);
    }
    closedir(d);
    rmdir(f->path);
}

const char *folder_path(const struct folder *f, const char *name)
{
    static char paths[2][PATH_MAX];
    static unsigned turn;
    turn = !turn;
    snprintf(paths[turn], sizeof(paths[turn]), "%s/%s", f->path, name);
    return paths[turn];
}

void folder_write(const struct folder *f, const char *name, const void *data, size_t bytes,
                  mode_t mode)
{
    char temporary[PATH_MAX];
    snprintf(temporary, sizeof(temporary), "%s/new", f->path);
    int fd = open(temporary, O_CREAT | O_TRUNC | O_WRONLY, 0600);
    need(fd >= 0, temporary);
    for (size_t done = 0; done < bytes;) {
        ssize_t n = write(fd, (const char *)data + done, bytes - done);
        need(n > 0, temporary);
        done += (size_t)n;
    }
    need(fchmod(fd, mode) == 0, temporary);
    close(fd);
    need(rename(temporary, folder_path(f, name)) == 0, name);
}

unsigned char *file_read(const char *path, size_t *ret_bytes)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    need(fd >= 0 && fstat(fd, &st) == 0, path);
    size_t bytes = (size_t)st.st_size;
    unsigned char *data = malloc(bytes + 1);
    need(data != NULL, path);
    for (size_t done = 0; done < bytes;) {
        ssize_t n = read(fd, data + done, bytes - done);
        need(n > 0, path);
        done += (size_t)n;
    }
    close(fd);
    *ret_bytes = bytes;
    return data;
}
