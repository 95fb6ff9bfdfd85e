"""`python -m vessa_server` is `vessa-server`."""

if __name__ == "__main__":  # the worker process imports this module too, and needs no commands
    from vessa_server.cli.main import main

    main()
