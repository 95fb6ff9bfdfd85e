"""Name the person at the command line for the audit log."""

import getpass
import secrets
import socket

from vessa_server.auth.audit_log import Actor


def command_line_actor() -> Actor:
    """Return the user and the machine that run this command."""
    return Actor(getpass.getuser(), f"command line on {socket.gethostname()}", secrets.token_hex(16))
