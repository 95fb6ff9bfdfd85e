"""Serve viewers of other programs: sessions, volumes as stacks of slices, prompts. No HTTP here."""
