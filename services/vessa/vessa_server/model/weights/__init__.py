"""Read, write, convert and download weights."""
