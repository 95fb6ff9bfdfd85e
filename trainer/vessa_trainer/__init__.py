"""Semi-supervised segmentation with an EMA teacher and, when asked, labels from a VESSA annotator."""

__version__ = "0.2.0"
