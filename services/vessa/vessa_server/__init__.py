"""The VESSA annotator: template bank, retrieval-to-mask inference, Stage-1 pretraining and the HTTP service."""

__version__ = "0.1.0"
