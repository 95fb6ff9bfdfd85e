"""`python -m vessa_server` is `vessa-server`."""

from vessa_server.cli import main

if __name__ == "__main__":  # the device process imports this too
    main()
