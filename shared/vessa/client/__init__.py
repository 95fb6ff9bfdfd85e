"""The annotator's clients: AnnotatorClient, and AsyncAnnotatorClient for asyncio."""

from vessa.answers.labeled_volume import LabeledVolume
from vessa.client.async_client import AsyncAnnotatorClient
from vessa.client.sync_client import AnnotatorClient
from vessa.client.transport import default_key_file
from vessa.client.types import Annotation, Prompts

__all__ = [
    "Annotation",
    "AnnotatorClient",
    "AsyncAnnotatorClient",
    "LabeledVolume",
    "Prompts",
    "default_key_file",
]
