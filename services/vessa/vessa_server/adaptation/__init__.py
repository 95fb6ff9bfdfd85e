"""Bank adaptation (experimental, beyond the paper): a bank's own mask decoder, trained on its templates.

It is kept only if it improves Dice on held-out templates; on acdc it has not yet (docs/results.md). The rest
of the server uses it through `AdaptationRunner` alone.
"""

from vessa_server.adaptation.runner import AdaptationRunner

__all__ = ["AdaptationRunner"]
