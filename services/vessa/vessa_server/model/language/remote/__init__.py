"""The language model served by vLLM instead of in process (experimental: correct, no speed-up measured)."""

from vessa_server.model.language.remote.service import LanguageService, VllmAddress, serve_command

__all__ = ["LanguageService", "VllmAddress", "serve_command"]
