/* client/cli/kv_transfer.h - gqa kv export and import: prefixes in files.
 *
 * The file's format is in docs/kv-layout.md, "In a file that is carried". */
#ifndef CLI_KV_TRANSFER_H
#define CLI_KV_TRANSFER_H

#include "client/cli/cli.h"

/* Writes what is cached of the params' prompt to path ("-": standard output); a file that is there
 * is replaced when all has come, and only then. params are destroyed. */
int cli_kv_export(struct cli *c, struct gqa_params *params, const char *path);

/* Gives the daemon what path holds ("-": standard input). */
int cli_kv_import(struct cli *c, const char *model, const char *path);

#endif
