/* daemon/model/weights_format.h - files of packed weights, byte by byte.
 *
 *   0      | struct weights_header, zeros | struct weights_mark, zeros |     a page
 *            0                              2048
 *   4096   | u64 checksum of piece 0 | of piece 1 | ... | zeros              the table
 *   data   | packed weights, as they lie in memory |                         data_offset on
 *
 * All numbers are little-endian. The data is cut into pieces of WEIGHTS_PIECE_BYTES, the last one
 * shorter; a checksum is XXH3-64 of a piece. Where a weight lies, and how long it is, stands
 * nowhere: the key is a hash over the list of weights, and whoever looks for the file has that
 * list. All sizes follow from data_bytes; those in the header must be what follows.
 *
 * Everything but the mark is written once. docs/weights-cache.md tells the whole story. */
#ifndef DAEMON_MODEL_WEIGHTS_FORMAT_H
#define DAEMON_MODEL_WEIGHTS_FORMAT_H

#include "format/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WEIGHTS_VERSION      1u
#define WEIGHTS_PAGE_BYTES   4096u
#define WEIGHTS_MARK_OFFSET  2048u
#define WEIGHTS_TABLE_OFFSET 4096u
#define WEIGHTS_PIECE_BYTES  (4u << 20)
#define WEIGHTS_HUGE_BYTES   (2u << 20) /* data of that size and more starts at a multiple of it */
#define WEIGHTS_NAME_BYTES   32u        /* of backend and pack id, with the zero at the end */

/* What somebody wants: which weights, laid out by whom, and how many bytes that is. */
struct weights_want {
    uint8_t key[16];    /* hash over all that decides the bytes */
    uint8_t digest[16]; /* of the model's weights */
    char backend[WEIGHTS_NAME_BYTES], pack_id[WEIGHTS_NAME_BYTES];
    uint64_t data_bytes; /* whole pages */
};

struct weights_header {
    char magic[8];
    uint32_t version, header_bytes;
    uint8_t key[16], digest[16];
    char backend[WEIGHTS_NAME_BYTES], pack_id[WEIGHTS_NAME_BYTES];
    uint64_t file_bytes, data_offset, data_bytes;
    uint32_t piece_bytes, n_pieces;
    uint64_t table_checksum;
    uint64_t checksum; /* of everything before it */
};
_Static_assert(sizeof(struct weights_header) == 160, "the header has no gaps");

/* The data was found good: while the kernel ran that had started at boot_ns (in the clock of file
 * times), and the file had this time of its last writing. Written in place; a torn one is none. */
struct weights_mark {
    int64_t boot_ns, written_ns;
    uint64_t checksum; /* of the two */
};

struct weights_layout { /* what follows from data_bytes */
    uint32_t n_pieces;
    uint64_t table_bytes, data_offset, file_bytes;
};

/* -EFBIG: no file can be so large, or data_bytes is 0 or no whole number of pages. */
int weights_layout_of(uint64_t data_bytes, struct weights_layout *ret);

void weights_header_make(const struct weights_want *want, const uint64_t *table,
                         struct weights_header *ret);

/* Whether a file of file_bytes that begins with this header is the wanted one. -EBADMSG with a
 * sentence. table_checksum is then still to be compared with the table's. */
int weights_header_check(const struct weights_header *h, const struct weights_want *want,
                         uint64_t file_bytes, struct fmt_error *err);

uint64_t weights_checksum(const void *data, size_t bytes);

void weights_mark_make(int64_t boot_ns, int64_t written_ns, struct weights_mark *ret);
/* Whether the mark says so of this kernel's start and this time of writing. */
bool weights_mark_holds(const struct weights_mark *m, int64_t boot_ns, int64_t written_ns);

#endif
