"""Jobs that segment volumes in the background, stored on disk across restarts."""
