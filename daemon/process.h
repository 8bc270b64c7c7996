/* daemon/process.h - what gqad asks of the system for its process, before it has threads. */
#ifndef DAEMON_PROCESS_H
#define DAEMON_PROCESS_H

/* 0, or -EPERM and a line in the log: users of this host cannot be told apart in here. */
int process_check_identity(void);

/* Opens /dev/null where one of the standard descriptors is closed: the next file or socket would
 * get its number, and the log would be written into it. First of all; 0 or -errno. */
int process_fill_standard_fds(void);

/* No core files, all the descriptors that it may have, short time slices for the calling thread,
 * which becomes the loop's, and a handler for mapped files that shrink. What the system refuses is
 * logged, and the daemon does without. */
void process_prepare(void);

#endif
