"""Which annotator answers, and whether it is the one that a config names."""

from collections.abc import Sequence

from vessa.client import AnnotatorClient
from vessa.errors import InvalidConfig, Unreachable
from vessa.schemas import ServiceInfo
from vessa_trainer.config import AnnotatorConfig

# Parts that take part, and whether Stage 1 must not have been there.
_SERVES: dict[str, tuple[list[str], bool]] = {
    "vessa": (["language", "memory"], False),
    "no_language": (["memory"], False),
    "no_memory": (["language"], False),
    "sam2": (["memory"], True),
    "prompts_only": ([], False),
}


def refusal(info: ServiceInfo, serves: str | None) -> str | None:
    """Say why a service is not what a config names, None when it is; see `AnnotatorConfig`."""
    if serves is None:
        return None
    parts, untrained = _SERVES[serves]
    if sorted(info.parts) != parts:
        ours, theirs = (" and ".join(p) or "prompts alone" for p in (parts, info.parts))
        left_out = ",".join(sorted({"language", "memory"} - set(parts)))
        how = f": start one with VESSA_WITHOUT={left_out}" if left_out else ""
        return f"it answers by {theirs}, '{serves}' means {ours}{how}"
    if untrained and info.trained_on is not None:
        data = ", ".join(info.trained_on)
        return f"its weights went through Stage 1 ({data}), '{serves}' means official SAM 2.1 weights alone"
    return None


def check_served(client: AnnotatorClient, config: AnnotatorConfig) -> ServiceInfo:
    """Ask a service who it is. Raises InvalidConfig when it is not what the config names; VessaError."""
    info = client.info()
    if (why := refusal(info, config.serves)) is not None:
        raise InvalidConfig(f"the annotator at {client.url} is not the one of this config: {why}")
    return info


def choose(urls: Sequence[str | None], config: AnnotatorConfig) -> tuple[str | None, ServiceInfo]:
    """Return the first of several addresses whose service is what the config names, and what it says.

    Raises InvalidConfig that tells of each why not; VessaError when the only one does not answer.
    """
    if len(urls) == 1:
        with AnnotatorClient(urls[0], config.api_key) as client:
            return urls[0], check_served(client, config)
    reasons = []
    for url in urls:
        try:
            with AnnotatorClient(url, config.api_key) as client:
                info = client.info()
        except Unreachable as error:
            reasons.append(error.message)
            continue
        if (why := refusal(info, config.serves)) is None:
            return url, info
        reasons.append(f"{url}: {why}")
    raise InvalidConfig("no annotator is the one of this config: " + "; ".join(reasons))
