"""Worklists: images that wait for a person's review, their labels and decisions, kept on disk."""
