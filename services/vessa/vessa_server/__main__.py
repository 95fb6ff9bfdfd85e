"""`python -m vessa_server` is `vessa-server`."""

from vessa_server.cli import main

main()
