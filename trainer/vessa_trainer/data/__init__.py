"""Splits, prepared images and their augmented views."""
