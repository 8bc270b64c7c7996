/* client/cli/input.c - files, token lists, model names. */
#include "client/cli/cli.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FILE_BYTES_MAX (256u << 20)

int cli_read_file(const char *path, char **ret_data, size_t *ret_bytes)
{
    bool is_stdin = strcmp(path, "-") == 0;
    FILE *f = is_stdin ? stdin : fopen(path, "rbe");
    if (f == NULL) {
        return cli_error(EX_NOINPUT, "%s: %s", path, strerror(errno));
    }
    char *data = NULL;
    size_t bytes = 0, room = 0;
    int err = 0;
    errno = 0;
    do {
        if (bytes + 1 >= room) {
            room = room > 0 ? 2 * room : 64u << 10;
            char *more = room <= 2 * (size_t)FILE_BYTES_MAX ? realloc(data, room) : NULL;
            if (more == NULL) {
                err = room > FILE_BYTES_MAX ? EFBIG : ENOMEM;
                break;
            }
            data = more;
        }
        bytes += fread(data + bytes, 1, room - bytes - 1, f);
    } while (!feof(f) && !ferror(f));
    if (err == 0 && ferror(f)) {
        err = errno != 0 ? errno : EIO; /* a directory, for one, is only found out by reading */
    }
    if (!is_stdin) {
        fclose(f);
    }
    if (err != 0) {
        free(data);
        return cli_error(EX_NOINPUT, "%s: %s", path, strerror(err));
    }
    data[bytes] = '\0';
    *ret_data = data;
    *ret_bytes = bytes;
    return CLI_OK;
}

/* Ids in any of the usual dresses: "[1, 2]", "1 2", "1\n2\n", "1,2". */
static int parse_tokens(const char *path, const char *text, int32_t *ids, size_t *ret_count)
{
    size_t n = 0;
    const char *at = text + strspn(text, " \t\r\n[");
    while (*at != '\0' && *at != ']') {
        char *end;
        errno = 0;
        long id = strtol(at, &end, 10);
        if (end == at || errno != 0 || id < INT32_MIN || id > INT32_MAX ||
            strchr(" \t\r\n,]", *end) == NULL) {
            return cli_error(EX_DATAERR, "%s: at byte %zu: not a token id", path,
                             (size_t)(at - text));
        }
        ids[n++] = (int32_t)id;
        at = end + strspn(end, " \t\r\n,");
    }
    at += *at == ']';
    at += strspn(at, " \t\r\n");
    if (*at != '\0') {
        return cli_error(EX_DATAERR, "%s: at byte %zu: more than one list of tokens", path,
                         (size_t)(at - text));
    }
    *ret_count = n;
    return CLI_OK;
}

int cli_read_tokens(const char *path, int32_t **ret_ids, size_t *ret_count)
{
    char *text;
    size_t bytes;
    int code = cli_read_file(path, &text, &bytes);
    if (code != CLI_OK) {
        return code;
    }
    int32_t *ids = malloc((bytes / 2 + 1) * sizeof(*ids)); /* an id and what parts it from others */
    if (ids == NULL) {
        code = cli_error(EX_OSERR, "%s: no memory", path);
    } else {
        code = parse_tokens(path, text, ids, ret_count);
    }
    free(text);
    if (code != CLI_OK) {
        free(ids);
        return code;
    }
    *ret_ids = ids;
    return CLI_OK;
}

char *cli_model_name(const char *given)
{
    size_t n = strlen(given);
    bool is_path = strchr(given, '/') != NULL || (n > 5 && strcmp(given + n - 5, ".gguf") == 0);
    char *name = is_path ? realpath(given, NULL) : NULL;
    if (name == NULL && strchr(given, '/') != NULL && given[0] != '/') {
        exit(cli_error(EX_NOINPUT, "%s: %s", given, strerror(errno))); /* no name has a '/' */
    }
    name = name != NULL ? name : strdup(given);
    if (name == NULL) {
        exit(cli_error(EX_OSERR, "model: no memory"));
    }
    return name;
}

static int text_param(const char *path, struct gqa_params *params)
{
    char *text;
    size_t bytes;
    int code = cli_read_file(path, &text, &bytes);
    if (code == CLI_OK) {
        gqa_params_text(params, "prompt", text, bytes);
        free(text);
    }
    return code;
}

int cli_prompt_params(const struct cli_prompt *prompt, struct gqa_params *params)
{
    if ((prompt->text != NULL) + (prompt->file != NULL) + (prompt->tokens_file != NULL) > 1) {
        return cli_error(EX_USAGE, "prompt: give only one of PROMPT, --prompt-file and --tokens");
    }
    if (prompt->text != NULL) {
        gqa_params_str(params, "prompt", prompt->text);
        return CLI_OK;
    }
    if (prompt->file != NULL) {
        return text_param(prompt->file, params);
    }
    if (prompt->tokens_file == NULL) {
        return isatty(STDIN_FILENO) ? cli_error(EX_USAGE, "prompt: none was given")
                                    : text_param("-", params);
    }
    int32_t *ids;
    size_t n;
    int code = cli_read_tokens(prompt->tokens_file, &ids, &n);
    if (code == CLI_OK) {
        gqa_params_tokens(params, "tokens", ids, n);
        free(ids);
    }
    return code;
}
