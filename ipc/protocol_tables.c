/* protocol-tables - the tables of docs/protocol.md, made from protocol.h.
 *
 *   protocol-tables print         writes them to standard output
 *   protocol-tables check FILE    fails unless FILE holds exactly them between its markers
 *   protocol-tables update FILE   puts them there
 *
 * For developers and the tests; not installed. */
#include "ipc/protocol.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char begin_marker[] = "<!-- tables: begin (protocol-tables update) -->\n";
static const char end_marker[] = "<!-- tables: end -->\n";

static void print_bound(FILE *out, enum proto_field_type type, union proto_bound bound)
{
    switch (type) {
    case PROTO_BOOL:
        fputs(bound.u != 0 ? "true" : "false", out);
        break;
    case PROTO_I32:
        fprintf(out, "%" PRId64, bound.i);
        break;
    case PROTO_F32:
        fprintf(out, "%.9g", bound.f);
        break;
    default:
        fprintf(out, "%" PRIu64, bound.u);
        break;
    }
}

static void print_field(FILE *out, const struct proto_field *f)
{
    fprintf(out, "| `%s` | %s | ", f->name, proto_field_type_name(f->type));
    if (f->type != PROTO_BOOL) {
        print_bound(out, f->type, f->min);
        fputs(" to ", out);
        print_bound(out, f->type, f->max);
        if (!proto_field_type_is_scalar(f->type)) {
            fprintf(out, " (%s)", proto_field_type_bounds(f->type));
        }
    }
    fputs(" | ", out);
    if (f->required) {
        fputs("required", out);
    } else if (proto_field_type_is_scalar(f->type)) {
        print_bound(out, f->type, f->fallback);
    }
    fprintf(out, " | %s |\n", f->doc);
}

static void print_tables(FILE *out)
{
    for (int m = 0; m < PROTO_METHOD_COUNT; m++) {
        const struct proto_method_info *info = proto_method_info((enum proto_method)m);
        fprintf(out, "### %s\n\n%c%s. Access: %s.\n\n", info->name,
                toupper((unsigned char)info->doc[0]), info->doc + 1,
                proto_access_name(info->access));
        if (info->n_fields == 0) {
            fputs("No parameters.\n\n", out);
            continue;
        }
        fputs("| parameter | type | range | default | meaning |\n|---|---|---|---|---|\n", out);
        for (size_t i = 0; i < info->n_fields; i++) {
            print_field(out, &info->fields[i]);
        }
        fputc('\n', out);
    }
    fputs("### Errors\n\n| code | name | meaning |\n|---|---|---|\n", out);
    for (size_t i = 0; proto_error_at(i) != PROTO_OK; i++) {
        enum proto_error_code code = proto_error_at(i);
        fprintf(out, "| %d | `%s` | %s |\n", (int)code, proto_error_name(code),
                proto_error_doc(code));
    }
}

/* The tables in memory, to be freed; NULL without memory. */
static char *make_tables(void)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    if (out == NULL) {
        return NULL;
    }
    print_tables(out);
    return fclose(out) == 0 ? text : NULL;
}

/* A whole file in memory, terminated, to be freed; NULL with errno. */
static char *read_file(const char *path)
{
    char *text = NULL;
    size_t capacity = 0;
    FILE *in = fopen(path, "re");
    if (in == NULL) {
        return NULL;
    }
    /* Up to a NUL, which no text has. */
    ssize_t n = getdelim(&text, &capacity, '\0', in);
    fclose(in);
    if (n < 0) {
        free(text);
        return NULL;
    }
    return text;
}

static int write_file(const char *path, const char *head, size_t head_bytes, const char *tables,
                      const char *tail)
{
    FILE *out = fopen(path, "we");
    if (out == NULL) {
        perror(path);
        return 1;
    }
    fwrite(head, 1, head_bytes, out);
    fputs(tables, out);
    fputs(tail, out);
    if (fclose(out) != 0) {
        perror(path);
        return 1;
    }
    return 0;
}

static int check_or_update(bool update, const char *path, const char *document, const char *tables)
{
    const char *begin = strstr(document, begin_marker);
    const char *end = begin != NULL ? strstr(begin, end_marker) : NULL;
    if (end == NULL) {
        fprintf(stderr, "%s: no markers for the tables\n", path);
        return 1;
    }
    begin += strlen(begin_marker);
    if ((size_t)(end - begin) == strlen(tables) && memcmp(begin, tables, strlen(tables)) == 0) {
        return 0;
    }
    if (update) {
        return write_file(path, document, (size_t)(begin - document), tables, end);
    }
    fprintf(stderr, "%s: the tables are not protocol.h's; run: protocol-tables update %s\n", path,
            path);
    return 1;
}

int main(int argc, char **argv)
{
    bool update = argc == 3 && strcmp(argv[1], "update") == 0;
    if (argc == 2 && strcmp(argv[1], "print") == 0) {
        print_tables(stdout);
        return fflush(stdout) == 0 ? 0 : 1;
    }
    if (!update && (argc != 3 || strcmp(argv[1], "check") != 0)) {
        fputs("usage: protocol-tables print | check FILE | update FILE\n", stderr);
        return 64;
    }
    char *tables = make_tables();
    char *document = read_file(argv[2]);
    int rc = 1;
    if (tables == NULL || document == NULL) {
        perror(argv[2]);
    } else {
        rc = check_or_update(update, argv[2], document, tables);
    }
    free(document);
    free(tables);
    return rc;
}
