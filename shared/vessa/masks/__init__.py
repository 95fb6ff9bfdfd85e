"""Masks of classes: files, geometry, cleaning, colors and overlays."""
