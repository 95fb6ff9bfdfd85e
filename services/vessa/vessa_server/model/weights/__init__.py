"""Weights directories: read, written, converted from official files, downloaded."""
