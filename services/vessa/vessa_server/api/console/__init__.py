"""Routes of the console: its pages, sessions and worklists."""
