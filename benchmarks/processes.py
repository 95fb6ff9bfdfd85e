"""Child processes that never outlive the process that started them."""

import shutil

_SETPRIV = shutil.which("setpriv")  # of util-linux: every Linux has it, other systems do without


def bound(command: list[str]) -> list[str]:
    """Return a command whose process gets SIGTERM when the thread that starts it ends, for any reason.

    A killed test run cannot end the servers of its fixtures, and pytest-xdist kills its workers on Ctrl-C.
    The kernel still delivers this signal. The process keeps its id, since setpriv replaces itself by the
    command. Start such a process from a thread that lives as long as the process is needed.
    """
    return command if _SETPRIV is None else [_SETPRIV, "--pdeathsig", "TERM", "--", *command]
