"""Hold the settings of one experiment, read from one YAML file and `a.b=c` overrides.

No setting is read from the environment. An unknown key, a wrong type or a value out of range raises
`InvalidConfig`, which names the key. The resolved config is saved in the run directory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import yaml

from vessa import atomic_write
from vessa.errors import InvalidConfig
from vessa.redaction import redacted
from vessa_trainer.config_parsing import build, merge, put
from vessa_trainer.config_sections import (
    AnnotatorConfig,
    CacheConfig,
    DataConfig,
    FeedbackConfig,
    OptimConfig,
    SemiConfig,
    StudentConfig,
    ViewsConfig,
)

__all__ = [
    "DEFAULT_METHODS",
    "AnnotatorConfig",
    "CacheConfig",
    "DataConfig",
    "FeedbackConfig",
    "OptimConfig",
    "SemiConfig",
    "StudentConfig",
    "ViewsConfig",
    "Config",
    "load_config",
    "overlaid",
    "read_tree",
    "save_config",
    "shareable",
    "shipped",
    "to_dict",
]

DEFAULT_METHODS = ("unimatch_v2", "vessa", "vessa_alone")  # of a comparison: names of configs


@dataclass(frozen=True)
class Config:
    """One experiment.

    title: name in tables
    steps: training iterations
    batch_labeled: labeled images per step
    batch_unlabeled: unlabeled images per step
    batch_eval: images per batch in validation and prediction
    seed: seed of everything random
    device: cpu, cuda or cuda:N
    threads: CPU threads of torch; 0 leaves the choice to torch
    eval_every: steps between validations
    checkpoint_every: steps between checkpoints
    out: run directory
    bf16: compute the networks in bfloat16 where autocast allows it; weights and losses stay float32
    trackers: services that receive the figures besides TensorBoard; each is an extra of this distribution
    deterministic: repeat a run bit by bit from its seed, on the same machine; torch avoids operations that
        depend on the order of threads, and steps wait for labels that are requested again with feedback
    """

    title: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    semi: SemiConfig = field(default_factory=SemiConfig)
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    steps: int = 3000
    batch_labeled: int = 8
    batch_unlabeled: int = 8
    batch_eval: int = 16
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    deterministic: bool = False
    threads: int = 0
    eval_every: int = 250
    checkpoint_every: int = 250
    out: str = "runs/run"
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        """Check ranges that types cannot express."""
        _check(self)

    @property
    def annotated(self) -> bool:
        """Whether the method uses an annotator."""
        return self.semi.method in ("vessa", "semisam", "vessa_alone")

    @property
    def ema_decay(self) -> float:
        """Limit of the teacher's decay; by default it averages over a twentieth of the run at most."""
        given = self.semi.ema_decay
        return min(0.996, max(0.0, 1 - 20 / max(self.steps, 1))) if given is None else given

    @property
    def unlabeled_loss(self) -> str:
        """The loss of the teacher's labels, with the default that suits the student."""
        if self.semi.unlabeled_loss is not None:
            return self.semi.unlabeled_loss
        if self.student.name == "dpt":
            return "ce"
        return "soft" if self.student.encoder is not None and self.student.pretrained else "dice"

    @property
    def channel_dropout(self) -> bool:
        """Whether strong views drop feature channels, with the default that suits the student."""
        given = self.semi.channel_dropout
        return self.student.name == "dpt" if given is None else given


def shipped(name: str) -> Path:
    """Return the file of a shipped config by its name. Raises InvalidConfig."""
    folder = Path(str(resources.files("vessa_trainer"))) / "configs"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise InvalidConfig(f"no shipped config is called '{name}'. Shipped configs: {known}")
    return path


def read_tree(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of keys and values. Raises InvalidConfig."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InvalidConfig(f"cannot read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise InvalidConfig(f"{path} must hold keys and values, it holds a {type(tree).__name__}")
    return tree


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `a.b=c` overrides, whose values are YAML too (`student.crop=96`).

    path None starts from the defaults. Raises InvalidConfig naming the key, and for an unknown one the
    nearest known key.
    """
    tree: dict[str, Any] = {} if path is None else read_tree(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InvalidConfig(f"an override reads section.key=value, got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InvalidConfig(f"the value of the override {override!r} is not YAML") from None
        put(tree, key.split("."), value)
    config: Config = build(Config, tree)
    return config


def overlaid(config: Config, *trees: Mapping[str, Any]) -> Config:
    """Return a config whose settings some trees replace; later trees win."""
    tree = to_dict(config)
    for over in trees:
        tree = merge(tree, over)
    changed: Config = build(Config, tree)
    return changed


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config without its secrets, as YAML that `load_config` reads."""
    tree = shareable(config)
    atomic_write.write_text(Path(path), yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def shareable(config: Config) -> dict[str, Any]:
    """Return the config as plain data without keys and passwords, for files that people share."""
    tree: dict[str, Any] = redacted(to_dict(config))
    tree["annotator"]["api_key"] = None
    return tree


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as plain dictionaries, lists and scalars."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    tree: dict[str, Any] = plain(dataclasses.asdict(config))
    return tree


# Keys by range; a key that is null is not set.
_POSITIVE = (
    "steps",
    "batch_labeled",
    "batch_unlabeled",
    "batch_eval",
    "eval_every",
    "checkpoint_every",
    "student.size",
    "student.crop",
    "feedback.every",
    "annotator.batch",
    "annotator.patience_s",
    "cache.expire_s",
    "data.labeled_groups",
    "data.prepared_gb",
    "optim.lr",
)
_NOT_NEGATIVE = (
    "annotator.adapt",
    "annotator.lookahead_batches",
    "annotator.max_wait_s",
    "threads",
    "seed",
    "optim.backbone_lr",
    "optim.encoder_lr",
    "optim.weight_decay",
    "optim.power",
    "optim.lambda_ce",
    "optim.lambda_dice",
    "semi.lambda_u",
    "student.window",
    "student.neighbors",
    "views.rotate",
)
_SHARES = (
    "semi.conf_threshold",
    "semi.vessa_threshold",
    "semi.ema_decay",
    "semi.alpha_v_floor",
    "feedback.start",
    "feedback.min_confidence",
    "data.val_share",
    "data.test_share",
    *(f"views.{name}" for name in vars(ViewsConfig()) if name.endswith("_p")),
)


def _check(config: Config) -> None:
    _check_ranges(config)
    _check_student(config)
    _check_labels(config)
    folds, fold = config.data.folds, config.data.fold
    if folds == 1 or folds < 0 or not 0 <= fold < max(folds, 1):
        raise InvalidConfig(
            f"data.folds must be 0 or at least 2 and data.fold below it, got {folds} and {fold}"
        )


def _check_ranges(config: Config) -> None:
    def given(keys: Sequence[str]) -> Iterator[tuple[str, float]]:
        values = ((key, attrgetter(key)(config)) for key in keys)
        return ((key, value) for key, value in values if value is not None)

    for key, value in given(_POSITIVE):
        if not 0 < value < math.inf:  # NaN fails, too
            raise InvalidConfig(f"{key} must be above 0, got {value}")
    for key, value in given(_NOT_NEGATIVE):
        if not 0 <= value < math.inf:
            raise InvalidConfig(f"{key} must be 0 or above, got {value}")
    for key, value in given(_SHARES):
        if not 0 <= value <= 1:
            raise InvalidConfig(f"{key} must be in [0, 1], got {value}")
    for name in ("scale", "gamma", "contrast", "brightness", "blur_sigma", "noise_std"):
        low, high = getattr(config.views, name)
        above = name in ("scale", "gamma", "blur_sigma")
        if not 0 <= low <= high < math.inf or (above and low == 0):
            sign = "<" if above else "<="
            raise InvalidConfig(
                f"views.{name} must be (low, high) with 0 {sign} low <= high, got {(low, high)}"
            )


def _check_student(config: Config) -> None:
    student = config.student
    if not student.widths or min(student.widths) < 1:
        raise InvalidConfig(f"student.widths must be channels above 0, got {list(student.widths)}")
    if student.neighbors > 1 and (student.name == "dpt" or student.encoder is not None):
        raise InvalidConfig(
            "an encoder and dpt take three channels: student.neighbors must be 0 or 1, got "
            f"{student.neighbors}"
        )
    if 0 < student.window < 1:
        raise InvalidConfig(f"student.window must be 0 or at least 1, got {student.window}")
    if student.window and config.annotated and not config.annotator.clean:
        raise InvalidConfig("student.window needs the boxes of cleaned labels: annotator.clean must be true")
    if student.crop % student.multiple:
        raise InvalidConfig(f"student.crop must be a multiple of {student.multiple}, got {student.crop}")
    if student.name == "unet" and config.batch_labeled == 1 and student.crop == student.multiple:
        raise InvalidConfig(
            f"batch_labeled 1 with student.crop {student.crop} leaves one pixel at the U-Net's deepest "
            "level, of which BatchNorm has no statistics. Set batch_labeled=2 or more, or a larger crop"
        )


def _check_labels(config: Config) -> None:
    """Check how labels are requested, and which prompts are sent back."""
    annotator, feedback = config.annotator, config.feedback
    unknown = set(feedback.prompts) - {"boxes", "points", "mask_logits"}
    if unknown:
        raise InvalidConfig(f"feedback.prompts knows boxes, points, mask_logits; got {sorted(unknown)[0]!r}")
    if feedback.enabled and not feedback.prompts:
        raise InvalidConfig("feedback.prompts must name at least one of boxes, points, mask_logits")
    if config.semi.method == "semisam" and not feedback.enabled:
        raise InvalidConfig("method semisam sends prompts to the annotator: feedback.enabled must be true")
    if config.deterministic and annotator.max_wait_s is not None:
        raise InvalidConfig(
            "deterministic runs wait for every label: annotator.max_wait_s must be null, got "
            f"{annotator.max_wait_s}"
        )
    if annotator.labels is not None and config.annotated and feedback.enabled:
        raise InvalidConfig(
            "labels of a folder (annotator.labels) cannot be asked again with prompts: set "
            "feedback.enabled=false"
        )
