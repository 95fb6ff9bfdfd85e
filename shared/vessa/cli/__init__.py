"""The command line `vessa`."""

from vessa.cli.main import app, main

__all__ = ["app", "main"]
