/* tests/unit/must.h - a check in a suite's .fini, where criterion prints what its own assertions
 * say and counts none of them: a process that ends in a signal is counted. */
#ifndef TESTS_UNIT_MUST_H
#define TESTS_UNIT_MUST_H

#include <stdio.h>
#include <stdlib.h>

#define must(condition)                                                                  \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            fprintf(stderr, "%s:%d: must hold after the test: %s\n", __FILE__, __LINE__, \
                    #condition);                                                         \
            abort();                                                                     \
        }                                                                                \
    } while (0)

#endif
