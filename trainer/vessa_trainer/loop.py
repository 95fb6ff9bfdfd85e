"""A training run from start to report, wherever it was stopped."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from vessa.datasets import Case, Dataset
from vessa.errors import InvalidConfig, InvalidWeights, Unreachable, VessaError
from vessa.metrics import Scores
from vessa.report.cases import annotated, score_labels
from vessa_trainer import checkpoint
from vessa_trainer.annotations import AnnotationFeed
from vessa_trainer.config import Config, save_config
from vessa_trainer.curves import read_metrics
from vessa_trainer.data import Frame, Order, Prepared, cases_of, read_splits, slices_of
from vessa_trainer.feedback import FeedbackRounds
from vessa_trainer.schedule import ema_decay, poly, update_teacher
from vessa_trainer.step import UnlabeledViews, compute_loss, labeled_batch, unlabeled_views
from vessa_trainer.student import DPT, build_student, logits_of


class Interrupted(Unreachable):
    """The run was stopped and saved; its message ends with the line that resumes it."""

    code = "interrupted"


@dataclass(frozen=True)
class RunResult:
    """What a finished run is worth. val, test: scores of the best teacher by validation Dice."""

    out: Path
    steps: int
    best_step: int
    val: Scores
    test: Scores
    seconds: float


@torch.no_grad()
def predict_slice(
    model: nn.Module, images: Sequence[np.ndarray], config: Config, channels: int
) -> list[Tensor]:
    """Class probabilities (C, H, W) of images uint8 (H, W[, 3]), each at its own size."""
    model.eval()
    size, device = config.student.size, next(model.parameters()).device
    frames = [Frame(i.shape[0], i.shape[1], size) for i in images]
    batch = torch.stack(
        [
            f.enter(_channels(image, channels), "bilinear") / 255
            for f, image in zip(frames, images, strict=True)
        ]
    )
    padding = -size % config.student.multiple
    batch = nn.functional.pad(batch, (0, padding, 0, padding)).to(device)
    probability = logits_of(model, batch, bf16=config.bf16).softmax(1)[..., :size, :size].cpu()
    return [f.leave(p) for f, p in zip(frames, probability, strict=True)]


def _channels(image: np.ndarray, channels: int) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float()
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if channels == 1:
        return pixels.mean(0, keepdim=True)
    return pixels.expand(channels, -1, -1)


def predict_labels(
    model: nn.Module, dataset: Dataset, cases: Sequence[Case], config: Config, channels: int
) -> dict[str, list[np.ndarray]]:
    """Class ids uint8 (H, W) of every slice of some cases, each at its own size, by the case's name."""
    labels: dict[str, list[np.ndarray]] = {}
    for case in cases:
        found = labels[case.name] = []
        for start in range(0, len(case.slices), config.batch_eval):
            images = [dataset.image(s) for s in case.slices[start : start + config.batch_eval]]
            found += [p.argmax(0).byte().numpy() for p in predict_slice(model, images, config, channels)]
    return labels


def evaluate(
    model: nn.Module, dataset: Dataset, cases: Sequence[Case], config: Config, channels: int
) -> Scores:
    """Score a model on volumes; slices without a mask are left out."""
    cases = annotated(dataset, cases)
    return score_labels(dataset, cases, predict_labels(model, dataset, cases, config, channels))


class Run:
    """One run's state. feed: of labels, where the method has an annotator; resume: how to go on."""

    def __init__(
        self, config: Config, dataset: Dataset, feed: AnnotationFeed | None, resume_line: str
    ) -> None:
        if config.annotated != (feed is not None):
            raise ValueError("a feed of labels belongs to the methods that learn from one, and to no other")
        self.config, self.dataset, self.feed, self.resume_line = config, dataset, feed, resume_line
        self.device = _device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        save_config(config, self.out / "config.yaml")
        self.splits = read_splits(dataset, config.data)
        size = config.student.size
        self.labeled = Prepared(dataset, slices_of(dataset, self.splits.labeled), size, need_masks=True)
        self.unlabeled: Prepared | None = None
        if config.semi.method != "supervised":
            self.unlabeled = Prepared(
                dataset, slices_of(dataset, self.splits.unlabeled), size, need_masks=False
            )
        parts = [p for p in (self.labeled, self.unlabeled) if p is not None]
        self.channels = max(p.channels for p in parts)
        for part in parts:
            part.show_as(self.channels)
        self.student = build_student(config.student, self.channels, max(dataset.classes) + 1).to(self.device)
        if config.student.init is not None:
            checkpoint.start_from(self.student, Path(config.student.init))
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.student, config), fused=True)
        self.rates = [g["lr"] for g in self.optimizer.param_groups]
        self.generator = torch.Generator().manual_seed(config.seed)
        self._drawn_from: Tensor | None = None  # the generator's state before the step under way
        self.order = Order(len(self.labeled), config.batch_labeled, config.seed)
        self.unlabeled_order = (
            Order(len(self.unlabeled), config.batch_unlabeled, config.seed + 1) if self.unlabeled else None
        )
        self.feedback = FeedbackRounds(config) if feed is not None and config.feedback.enabled else None
        self.step, self.best, self.best_step, self.seconds, self.waited = 0, -1.0, -1, 0.0, 0.0
        self.validated = 0  # the last step that was
        self.val_cases = cases_of(dataset, self.splits.val)

    def resume(self) -> bool:
        """Take up the last checkpoint; False when there is none."""
        path = self.out / checkpoint.LAST
        found = path.is_file()
        if found:
            tensors, metadata = checkpoint.read(path)
            try:
                state, generator, torch_rng = metadata["state"], tensors["generator"], tensors["torch_rng"]
            except KeyError as error:
                raise InvalidWeights(f"{path} is not the checkpoint of a run: it holds no {error}") from None
            checkpoint.load_module(self.student, tensors, "student")
            checkpoint.load_module(self.teacher, tensors, "teacher")
            checkpoint.load_optimizer(self.optimizer, tensors)
            self.generator.set_state(generator)
            torch.set_rng_state(torch_rng)
            self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
            self.seconds, self.waited = state["seconds"], state["waited"]
            self.validated = state.get("validated", self.step)
        _truncate(self.out, self.step)
        return found

    def save(self) -> None:
        """Write the checkpoint that `resume` takes up."""
        tensors = checkpoint.module_state(self.student, "student")
        tensors |= checkpoint.module_state(self.teacher, "teacher")
        tensors |= checkpoint.optimizer_state(self.optimizer)
        tensors |= {"generator": self.generator.get_state(), "torch_rng": torch.get_rng_state()}
        state = {"step": self.step, "best": self.best, "best_step": self.best_step}
        state |= {"seconds": self.seconds, "waited": self.waited, "validated": self.validated}
        checkpoint.write(self.out / checkpoint.LAST, tensors, {"state": state})

    def train(self, on_step: Callable[[int], None] | None = None) -> RunResult:
        """Train to the end. Raises Interrupted, after saving, when stopped or left by the annotator."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        try:
            with (
                Progress(*columns, console=Console(stderr=True)) as bar,
                SummaryWriter(str(self.out / "tensorboard")) as board,
            ):
                task = bar.add_task(self.config.semi.method, total=self.config.steps, completed=self.step)
                self._validate_if_due(board)  # where the run was stopped before it
                while self.step < self.config.steps:
                    figures = self._step()
                    bar.update(task, completed=self.step, description=_describe(self, figures))
                    if self.step % 10 == 0 or self.step == self.config.steps:
                        self._log(figures, board)
                    self._validate_if_due(board)
                    if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                        self.save()
                    if on_step is not None:
                        on_step(self.step)
        except Interrupted:
            raise
        except (VessaError, KeyboardInterrupt) as error:
            if self._drawn_from is not None:  # in the middle of a step: it will be drawn again
                self.generator.set_state(self._drawn_from)
            self.save()
            why = error.message if isinstance(error, VessaError) else "stopped by Ctrl-C or SIGTERM"
            raise Interrupted(f"{why}; saved at step {self.step}. Resume with: {self.resume_line}") from error
        return self._result()

    def _step(self) -> dict[str, float]:
        started = time.perf_counter()
        config = self.config
        self._drawn_from = self.generator.get_state()
        self.student.train()
        unlabeled = None
        waited = 0.0
        if self.unlabeled is not None and self.unlabeled_order is not None:
            rows = self.unlabeled_order.rows(self.step)
            if self.feed is not None:
                self._look_ahead(rows)
                before = self.feed.stats()["wait_seconds"]
            unlabeled = unlabeled_views(self.unlabeled, rows, config, self.feed, self.generator)
            if self.feed is not None:
                waited = self.feed.stats()["wait_seconds"] - before
        labeled = labeled_batch(self.labeled, self.order.rows(self.step), config, self.generator)
        factor = poly(self.step, config.steps, config.optim.power)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        with _undisturbed():
            figures = self._learn(labeled, unlabeled)
            self.seconds += time.perf_counter() - started
            self.waited += waited
        return {**figures, "lr": self.optimizer.param_groups[-1]["lr"], "wait_seconds": waited}

    def _learn(
        self, labeled: tuple[Tensor, Tensor, Tensor], unlabeled: UnlabeledViews | None
    ) -> dict[str, float]:
        """Move student, teacher and the count of steps, all of them."""
        images, masks, valid = (t.to(self.device) for t in labeled)
        loss, figures = compute_loss(
            self.student,
            self.teacher.eval(),
            (images, masks, valid),
            None if unlabeled is None else unlabeled.to(self.device),
            self.config,
            self.step,
            self.generator,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self._drawn_from = None
        update_teacher(self.teacher, self.student, ema_decay(self.step, self.config.ema_decay))
        return figures

    def _look_ahead(self, rows: list[int]) -> None:
        """Ask for the labels of the coming batches; send the teacher's feedback when it is due."""
        assert self.feed is not None
        assert self.unlabeled is not None
        assert self.unlabeled_order is not None
        coming = self.unlabeled_order.ahead(self.step, self.config.annotator.lookahead_batches + 1)
        self.feed.prefetch([self.unlabeled.slices[r].name for batch in coming for r in batch])
        if self.feedback is not None:
            self.feedback.send_if_due(self)

    def _log(self, figures: dict[str, float], board: SummaryWriter) -> None:
        row: dict[str, Any] = {"step": self.step, **{k: round(v, 6) for k, v in figures.items()}}
        if self.feed is not None:
            row["feed"] = self.feed.stats()
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in figures.items():
            board.add_scalar(f"train/{key}", value, self.step)

    def _validate_if_due(self, board: SummaryWriter) -> None:
        ends = self.step == self.config.steps or (self.step > 0 and self.step % self.config.eval_every == 0)
        if ends and self.validated < self.step:
            self._validate(board)
            self.validated = self.step

    def _validate(self, board: SummaryWriter) -> None:
        row: dict[str, Any] = {"step": self.step}
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            scores = evaluate(model, self.dataset, self.val_cases, self.config, self.channels)
            row[f"val_{name}"] = {"mean": scores.mean, "by_class": scores.by_class}
            board.add_scalar(f"val/{name}_dice", scores.mean["dice"] or 0.0, self.step)
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        dice = row["val_teacher"]["mean"]["dice"] or 0.0
        if dice > self.best:
            self.best, self.best_step = dice, self.step
            metadata = {
                "channels": self.channels,
                "classes": {str(c): n for c, n in self.dataset.classes.items()},
            }
            checkpoint.write(
                self.out / checkpoint.BEST, checkpoint.module_state(self.teacher, "teacher"), metadata
            )

    def _result(self) -> RunResult:
        tensors, _ = checkpoint.read(self.out / checkpoint.BEST)
        model = deepcopy(self.teacher)
        checkpoint.load_module(model, tensors, "teacher")
        val = evaluate(model, self.dataset, self.val_cases, self.config, self.channels)
        test_cases = cases_of(self.dataset, self.splits.test)
        test = evaluate(model, self.dataset, test_cases, self.config, self.channels)
        return RunResult(self.out, self.step, self.best_step, val, test, self.seconds)


def load_best(run: Path, config: Config) -> tuple[nn.Module, int, dict[int, str]]:
    """Return a finished run's best teacher, its channels and its classes."""
    tensors, metadata = checkpoint.read(run / checkpoint.BEST)
    classes = {int(c): n for c, n in metadata["classes"].items()}
    # its weights are in the checkpoint: neither the hub nor a local file is needed
    student = replace(config.student, pretrained=False, weights=None, init=None)
    model = build_student(student, metadata["channels"], max(classes) + 1)
    checkpoint.load_module(model, tensors, "teacher")
    return model.eval().to(_device(config.device)), metadata["channels"], classes


def _device(name: str) -> torch.device:
    """Return a device that tensors can be put on. Raises InvalidConfig."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InvalidConfig(
            f"device '{name}' cannot be used here: {why}; expected cpu or cuda[:N]"
        ) from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block: a step is taken wholly or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread only
        return
    came: list[int] = []
    before = {s: signal.signal(s, lambda n, _: came.append(n)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if came:
        signal.raise_signal(came[0])  # what it would have done


def _parameter_groups(student: nn.Module, config: Config) -> list[dict[str, Any]]:
    optim = config.optim
    if isinstance(student, DPT):
        backbone = list(student.backbone.parameters())
        ids = {id(p) for p in backbone}
        rest = [p for p in student.parameters() if id(p) not in ids]
        groups = [{"params": backbone, "lr": optim.backbone_lr}, {"params": rest, "lr": optim.lr}]
    else:
        groups = [{"params": list(student.parameters()), "lr": optim.lr}]
    return [{**g, "betas": (0.9, 0.999), "weight_decay": optim.weight_decay} for g in groups]


def _describe(run: Run, figures: dict[str, float]) -> str:
    parts = [f"{run.config.semi.method} {run.step}/{run.config.steps}", f"loss {figures['loss']:.3f}"]
    for key, text in (("eta", "eta"), ("confident", "confident"), ("agreement", "agree")):
        if key in figures:
            parts.append(f"{text} {figures[key]:.2f}")
    return " ".join([*parts, f"val {max(run.best, 0):.3f}", f"waited {run.waited:.0f}s"])


def _truncate(run: Path, step: int) -> None:
    """Drop the metrics after a step, and a line cut by a kill: a resumed run writes them again."""
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
