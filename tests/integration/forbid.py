#!/usr/bin/env python3
"""forbid.py SYSCALL COMMAND...: runs the command where that system call answers EPERM, as a unit's filter would have it.

The filter is classic BPF over struct seccomp_data: it compares the number and answers an error or lets pass."""
import ctypes
import errno
import os
import struct
import sys

NUMBERS = {"x86_64": {"sched_setattr": 314}, "aarch64": {"sched_setattr": 274}}
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_NUMBER = (0x20, 0, 0, 0)        # BPF_LD | BPF_W | BPF_ABS: seccomp_data.nr
SKIP_UNLESS_EQUAL, ANSWER = 0x15, 0x06
ERROR, ALLOW = 0x00050000, 0x7FFF0000


def forbid(number):
    program = [LOAD_NUMBER, (SKIP_UNLESS_EQUAL, 0, 1, number), (ANSWER, 0, 0, ERROR | errno.EPERM), (ANSWER, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, *arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header)):
        if libc.prctl(option, *arguments, 0, 0) < 0:
            sys.exit(f"forbid.py: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    forbid(NUMBERS[os.uname().machine][sys.argv[1]])
    os.execvp(sys.argv[2], sys.argv[2:])
