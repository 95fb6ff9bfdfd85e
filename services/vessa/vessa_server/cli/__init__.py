"""The command line of the annotator."""

from vessa_server.cli.main import main

__all__ = ["main"]
