"""The VESSA annotator: template bank, inference, Stage-1 pretraining and the HTTP service."""

__version__ = "0.2.0"
