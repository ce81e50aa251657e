# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a command that dies with its parent: ``shim.py PARENT_PID SIGNAL UID COMMAND ...``.

UID other than 0 puts root into a user namespace of its own under that number, because PostgreSQL refuses to run as root.
Files stay the caller's, nobody is created and nothing is chmodded. An ordinary user's UID is 0 here: nothing to do.
"""

import ctypes
import os
import sys

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, death, uid = (int(word) for word in sys.argv[1:4])
    libc = ctypes.CDLL(None, use_errno=True)
    if uid:
        user, group = os.getuid(), os.getgid()
        if libc.unshare(CLONE_NEWUSER):
            sys.exit(f"user namespaces are refused here ({os.strerror(ctypes.get_errno())})")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {user} 1"), ("gid_map", f"{uid} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    # After the namespace: a change of credentials clears the signal.
    libc.prctl(PR_SET_PDEATHSIG, death, 0, 0, 0)
    if os.getppid() != parent:  # it died before the signal was set
        sys.exit(1)
    os.execv(sys.argv[4], sys.argv[4:])


main()
