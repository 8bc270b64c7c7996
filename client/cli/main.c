/* client/cli/main.c - gqa, the command line of gqad: finds the verb and runs it. */
#include "client/cli/cli.h"

#include <fcntl.h>
#include <locale.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct cli_verb verbs[] = {
    {"run", cli_verb_run, "continue a prompt"},
    {"ps", cli_verb_ps, "models that are loaded"},
    {"list", cli_verb_list, "models that are there"},
    {"show", cli_verb_show, "everything about a loaded model"},
    {"load", cli_verb_load, "load a model"},
    {"unload", cli_verb_unload, "unload a model"},
    {"tokenize", cli_verb_tokenize, "text to token ids"},
    {"detokenize", cli_verb_detokenize, "token ids to text, byte for byte"},
    {"logits", cli_verb_logits, "write the logits after every token to a file"},
    {"embed", cli_verb_embed, "texts as vectors"},
    {"eval", cli_verb_eval, "how well a model answers questions and predicts texts"},
    {"perplexity", cli_verb_perplexity, "how well a model predicts a text"},
    {"bench", cli_verb_bench, "measure speed, against the machine's own limits"},
    {"kv", cli_verb_kv, "what is kept of prompts: list, pin, drop, purge, export, import"},
    {"backend", cli_verb_backend, "backends and what they can do here"},
    {"ping", cli_verb_ping, "measure the daemon's latency"},
    {"top", cli_verb_top, "what the daemon does, for whom, and how fast, all the time"},
    {"info", cli_verb_info, "about the daemon"},
    {"call", cli_verb_call, "any method, with params as JSON"},
    {"stop", cli_verb_stop, "drain the daemon: running work ends, then it exits"},
};

#define N_VERBS (sizeof(verbs) / sizeof(verbs[0]))

/* The list of verbs for --help. */
static const char *make_doc(char *doc, size_t bytes)
{
    size_t n = (size_t)snprintf(doc, bytes,
                                "Talks to gqad, the inference daemon.\v"
                                "Verbs (gqa VERB --help tells more):\n");
    for (size_t i = 0; i < N_VERBS && n < bytes; i++) {
        n += (size_t)snprintf(doc + n, bytes - n, "  %-12s %s\n", verbs[i].name, verbs[i].doc);
    }
    return doc;
}

/* Where one of the standard descriptors is closed ("gqa run >&-") the next file that is opened
 * would get its number: text for a terminal would go to the daemon as if it were a message. In its
 * place is one that cannot be used as meant, so that reading and writing fail as they would have.
 */
static int fill_standard_fds(void)
{
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++) {
        if (fcntl(fd, F_GETFD) < 0 &&
            open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) < 0) {
            return EX_OSERR;
        }
    }
    return CLI_OK;
}

static bool is_done; /* and its output is flushed */

/* Help is printed, and the program ended, by argp: what could not be written is told all the same.
 */
static void flush_help(void)
{
    if (!is_done && cli_flush() != CLI_OK) {
        _exit(EX_IOERR);
    }
}

int main(int argc, char **argv)
{
    static struct cli c;
    char doc[2048], tool[] = "gqa";
    if (fill_standard_fds() != CLI_OK) {
        return EX_OSERR; /* there may be nowhere to say why */
    }
    setlocale(LC_CTYPE, "");
    atexit(flush_help);
    cli_normalise(argc, argv);
    argv[0] = tool;
    int first = cli_parse_common(&c, make_doc(doc, sizeof(doc)), argc, argv);
    const struct cli_verb *verb = NULL;
    for (size_t i = 0; i < N_VERBS && verb == NULL; i++) {
        verb = strcmp(argv[first], verbs[i].name) == 0 ? &verbs[i] : NULL;
    }
    if (verb == NULL) {
        return cli_error(EX_USAGE, "%s: no such verb; gqa --help lists them", argv[first]);
    }
    char name[32];
    snprintf(name, sizeof(name), "gqa: %s", verb->name); /* getopt's messages begin with it */
    argv[first] = name;
    int code = verb->run(&c, argc - first, argv + first);
    gqa_close(c.g);
    int flushed = cli_flush();
    is_done = true;
    return code != CLI_OK ? code : flushed;
}
