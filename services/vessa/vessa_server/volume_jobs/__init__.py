"""Jobs that segment volumes, kept on disk across restarts."""
