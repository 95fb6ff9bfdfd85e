"""VESSA core: what the annotator, the trainer and other labs' programs share. No torch."""

__version__ = "0.2.0"
