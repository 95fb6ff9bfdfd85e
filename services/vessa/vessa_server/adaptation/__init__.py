"""Bank adaptation (beyond the paper): a bank's own segmenter, trained on its templates and unlabeled images.

It is kept only if it improves Dice on held-out templates. The rest of the server uses it through
`AdaptationRunner` and `load_segmenter` alone.
"""

from vessa_server.adaptation.runner import AdaptationRunner
from vessa_server.adaptation.segmenters import load_segmenter

__all__ = ["AdaptationRunner", "load_segmenter"]
