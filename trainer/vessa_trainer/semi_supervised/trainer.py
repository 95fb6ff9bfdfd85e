"""A training run from start to report, wherever it was stopped."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from vessa import atomic_write
from vessa.client import Prompts
from vessa.datasets import Dataset, Slice
from vessa.errors import InvalidConfig, VessaError
from vessa.metrics import Scores
from vessa.report.cases import annotated, score_labels
from vessa_trainer.config import Config, save_config
from vessa_trainer.data.examination import examine
from vessa_trainer.data.geometry import geometry_of
from vessa_trainer.data.overview import shows_class
from vessa_trainer.data.prepared import Order, prepare_splits
from vessa_trainer.data.splits import cases_of, read_splits
from vessa_trainer.outages import TRAINER, Incidents
from vessa_trainer.pseudo_labels.prefetcher import COUNTS, AnnotationFeed
from vessa_trainer.reporting.diagnostics import Advice, advise, never_labeled
from vessa_trainer.reporting.plots import append_metrics, read_metrics, truncate_metrics
from vessa_trainer.reporting.trackers import Tracking
from vessa_trainer.semi_supervised.batches import UnlabeledViews, labeled_batch, unlabeled_views
from vessa_trainer.semi_supervised.distributed import ALONE, Processes
from vessa_trainer.semi_supervised.divergence import (
    Diverged,
    require_finite_loss,
    require_finite_weights,
)
from vessa_trainer.semi_supervised.feedback import FeedbackRounds, predict_prompts
from vessa_trainer.semi_supervised.objective import compute_loss
from vessa_trainer.semi_supervised.results import (
    Interrupted,
    RunResult,
    describe,
    evaluate,
    judged_cases,
    score_annotator,
)
from vessa_trainer.semi_supervised.run_checkpoint import RunCheckpoint
from vessa_trainer.semi_supervised.schedule import ema_decay, poly, source_weights, update_teacher
from vessa_trainer.semi_supervised.signals import noted, undisturbed
from vessa_trainer.students import checkpoint
from vessa_trainer.students.inference import open_device, predict_labels
from vessa_trainer.students.networks import build_student, parameter_groups

_log = logging.getLogger(__name__)

Batch = tuple[tuple[Tensor, Tensor, Tensor], UnlabeledViews | None]  # labeled, unlabeled


class Run:
    """One run's state, or one process's part of it, which then has the whole model and its rows of batches.

    feed: of labels, where the method has an annotator; resume_line: how to go on
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        feed: AnnotationFeed | None,
        resume_line: str,
        processes: Processes = ALONE,
    ) -> None:
        if config.annotated != (feed is not None):
            raise ValueError("a feed of labels belongs to the methods that learn from one, and to no other")
        self.config, self.dataset, self.feed, self.resume_line = config, dataset, feed, resume_line
        self.processes = processes
        for batch in (config.batch_labeled, config.batch_unlabeled):
            processes.places(batch)  # before anything is decoded
        self.device = open_device(config.device if processes.count == 1 else processes.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may sum in any order
        torch.use_deterministic_algorithms(config.deterministic)
        torch.manual_seed(config.seed)
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        if processes.first:
            save_config(config, self.out / "config.yaml")
        self.splits = read_splits(dataset, config.data)
        self.labeled, self.unlabeled = prepare_splits(dataset, self.splits, config, self.out)
        self.channels = self.labeled.channels
        student = build_student(config.student, self.channels, max(dataset.classes) + 1).to(self.device)
        self.student = processes.share_statistics(student)
        if config.student.init is not None:
            checkpoint.start_from(self.student, Path(config.student.init))
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student, config.optim), fused=True)
        self.rates = [g["lr"] for g in self.optimizer.param_groups]
        self.generator = torch.Generator().manual_seed(config.seed)
        self.checkpoint = RunCheckpoint(
            self.out / checkpoint.LAST, self.student, self.teacher, self.optimizer, self.generator
        )
        self._signals: list[int] = []  # that came, where there are several processes
        self._drawn_from: Tensor | None = None  # the generator's state before the step under way
        self.order = Order(len(self.labeled), config.batch_labeled, config.seed)
        self.unlabeled_order = (
            Order(len(self.unlabeled), config.batch_unlabeled, config.seed + 1) if self.unlabeled else None
        )
        # the region of interest of images whose structures are not known
        self.usual_window = self.labeled.usual_window(config.student.window)
        self.feedback: FeedbackRounds | None = None
        if feed is not None and config.feedback.enabled and self.unlabeled is not None:
            self.feedback = FeedbackRounds(
                config, self.out / "feedback", feed, self.unlabeled.slices, self._prompts, processes
            )
        self.step, self.best_step, self.seconds, self.waited = 0, -1, 0.0, 0.0
        # validation Dice of the teacher that is kept; None while none was scored
        self.best: float | None = None
        self._said: set[tuple[str, str]] = set()  # advice that was given
        if processes.first:
            self._say(never_labeled(self.labeled.masks.unique().tolist(), dataset.classes))
        self.validated = 0  # the last step that was
        self.val_cases = cases_of(dataset, self.splits.val)
        self.geometry = geometry_of(dataset, cases_of(dataset, self.splits.labeled))
        self.selects = shows_class(self.splits.val, examine(dataset)) if processes.first else False

    def resume(self) -> bool:
        """Take up the last checkpoint; False when there is none."""
        if self.processes.first:
            atomic_write.remove_leftovers(self.out)
        found = self.checkpoint.path.is_file()
        if found:
            saved_at = datetime.fromtimestamp(self.checkpoint.path.stat().st_mtime, UTC)
            state = self.checkpoint.restore()
            self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
            self.seconds, self.waited = state["seconds"], state["waited"]
            self.validated = state.get("validated", self.step)
            self._take_up_best()
        if self.processes.first:
            truncate_metrics(self.out, self.step)
            if found:
                incidents = Incidents(self.out)
                incidents.away(TRAINER, f"stopped after it was saved at step {self.step}", saved_at)
                incidents.back(TRAINER)
        if self.feedback is not None:
            self.feedback.resume(self.step, self)
        self.processes.wait()  # nobody writes what another has yet to read
        return found

    def _take_up_best(self) -> None:
        """Believe the file: it may be of a validation after the checkpoint, which will come again."""
        if (self.out / checkpoint.BEST).is_file():
            _, metadata = checkpoint.read(self.out / checkpoint.BEST)
            self.best, self.best_step = metadata.get("best", (self.best, self.best_step))

    def save(self) -> None:
        """Write the checkpoint that `resume` takes up; the first process does it for all."""
        if not self.processes.first:
            return
        self._require_finite_weights()
        state = {"step": self.step, "best": self.best, "best_step": self.best_step}
        state |= {"seconds": self.seconds, "waited": self.waited, "validated": self.validated}
        self.checkpoint.save(state)
        if self.feedback is not None:
            self.feedback.forget_older(self.step)

    def train(self, on_step: Callable[[int], None] | None = None) -> RunResult | None:
        """Train to the end; the first process scores, the others return None.

        Raises Interrupted, after saving, when stopped or left by the annotator.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        try:
            with (
                ExitStack() as stack,
                Progress(*columns, console=Console(stderr=True), disable=not self.processes.first) as bar,
                Tracking(self.config, self.step, first=self.processes.first) as board,
            ):
                task = bar.add_task(self.config.semi.method, total=self.config.steps, completed=self.step)
                if self.processes.count > 1:  # none of several may leave a step by itself
                    self._signals = stack.enter_context(noted())
                self._validate_if_due(board)  # where the run was stopped before it
                while self.step < self.config.steps:
                    figures = self._step()
                    bar.update(
                        task,
                        completed=self.step,
                        description=describe(self.config, self.step, self.best, self.waited, figures),
                    )
                    if self.step % 10 == 0 or self.step == self.config.steps:
                        self._log(figures, board)
                    self._validate_if_due(board)
                    if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                        self.save()
                    if on_step is not None:
                        on_step(self.step)
        except (Interrupted, InvalidConfig, Diverged):
            raise
        except OSError as error:
            raise Interrupted(
                f"cannot write to {self.out}: {error.strerror or error}; the last checkpoint is of step "
                f"{self.checkpoint.step()}. Mend that, then resume with: {self.resume_line}"
            ) from error
        except (VessaError, KeyboardInterrupt) as error:
            if self._drawn_from is not None:  # in the middle of a step: it will be drawn again
                self.generator.set_state(self._drawn_from)
            self.save()
            why = error.message if isinstance(error, VessaError) else "stopped by Ctrl-C or SIGTERM"
            raise Interrupted(f"{why}; saved at step {self.step}. Resume with: {self.resume_line}") from error
        return self._result() if self.processes.first else None

    def _step(self) -> dict[str, float]:
        started = time.perf_counter()
        config = self.config
        labeled, unlabeled = self._drawn()
        waited = 0.0 if unlabeled is None else unlabeled.waited
        factor = poly(self.step, config.steps, config.optim.power)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        with undisturbed():
            figures = self._learn(labeled, unlabeled)
            self.seconds += time.perf_counter() - started
            self.waited += waited
        return {**figures, "lr": self.optimizer.param_groups[-1]["lr"], "wait_seconds": waited}

    def _drawn(self) -> Batch:
        """Draw a step's batch. What stops one process stops all of them, before the same step."""
        self._drawn_from = self.generator.get_state()
        if self.processes.count == 1:
            return self._draw()
        batch, problem = None, None
        try:
            batch = self._draw()
        except (VessaError, KeyboardInterrupt) as error:
            problem = error
        if self.processes.any(problem is not None or bool(self._signals)):
            raise problem or KeyboardInterrupt
        assert batch is not None
        return batch

    def _draw(self) -> Batch:
        config = self.config
        self.student.train()
        unlabeled = None
        if self.unlabeled is not None and self.unlabeled_order is not None:
            rows = self.unlabeled_order.rows(self.step)
            self._look_ahead()
            parts = (self.feed, self.generator, self.processes, self.device, self.usual_window)
            unlabeled = unlabeled_views(self.unlabeled, rows, config, *parts)
        rows = self.order.rows(self.step)
        labeled = labeled_batch(self.labeled, rows, config, self.generator, self.processes, self.device)
        return labeled, unlabeled

    def _learn(
        self, labeled: tuple[Tensor, Tensor, Tensor], unlabeled: UnlabeledViews | None
    ) -> dict[str, float]:
        """Move student, teacher and the count of steps, all of them."""
        teacher, config = self.teacher.eval(), self.config
        loss, figures = compute_loss(
            self.student, teacher, labeled, unlabeled, config, self.step, self.generator, self.processes
        )
        require_finite_loss(figures, self.config, self.step + 1, self.checkpoint.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.add_gradients(self.student)
        self.optimizer.step()
        self.step += 1
        self._drawn_from = None
        update_teacher(self.teacher, self.student, ema_decay(self.step, self.config.ema_decay))
        return figures

    def _require_finite_weights(self) -> None:
        models = {"student": self.student, "teacher": self.teacher}
        require_finite_weights(models, self.config, self.step, self.checkpoint.step)

    def names_ahead(self, steps: int) -> list[str]:
        """Return the names of the images of this process's part of the coming steps, in their order."""
        assert self.unlabeled is not None
        assert self.unlabeled_order is not None
        mine = self.processes.places(self.config.batch_unlabeled)
        batches = self.unlabeled_order.ahead(self.step, steps)
        return [self.unlabeled.slices[rows[place]].name for rows in batches for place in mine]

    def items_ahead(self, steps: int) -> list[Slice]:
        """Return the images of the coming steps of all processes, each once, in their order."""
        assert self.unlabeled is not None
        assert self.unlabeled_order is not None
        batches = self.unlabeled_order.ahead(self.step, steps)
        return [self.unlabeled.slices[r] for r in dict.fromkeys(r for batch in batches for r in batch)]

    def _look_ahead(self) -> None:
        """Prefetch the labels of the coming batches; send the teacher's feedback when it is due."""
        if self.feed is None:
            return
        self.feed.prefetch(self.names_ahead(self.config.annotator.lookahead_batches + 1))
        if self.feedback is not None and self.feedback.send_if_due(self.step, self):
            self.student.train()

    def _prompts(self, items: Sequence[Slice]) -> list[Prompts]:
        """Predict prompts for some images by the source of feedback."""
        assert self.feed is not None
        model = self.teacher if self.config.feedback.source == "teacher" else self.student
        return predict_prompts(model, self.dataset, items, self.feed.class_ids, self.config, self.channels)

    def _log(self, figures: dict[str, float], board: Tracking) -> None:
        row: dict[str, Any] = {"step": self.step, **{k: round(v, 6) for k, v in figures.items()}}
        if self.feed is not None:
            stats = self.feed.stats()
            row["feed"] = stats | self.processes.total({k: stats[k] for k in COUNTS})
        if not self.processes.first:
            return
        append_metrics(self.out, row)
        board.add("train", figures, self.step)

    def _validate_if_due(self, board: Tracking) -> None:
        ends = self.step == self.config.steps or (self.step > 0 and self.step % self.config.eval_every == 0)
        if ends and self.validated < self.step:
            if self.processes.first:
                self._validate(board)
            self.validated = self.step

    def _validate(self, board: Tracking) -> None:
        """Score student, teacher and VESSA; keep the best teacher, or the last where none can be scored."""
        if not self.selects:
            self._keep_teacher(None)
            return
        row: dict[str, Any] = {"step": self.step}
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            scores = evaluate(model, self.dataset, self.val_cases, self.config, self.channels)
            self._add_scores(row, name, scores, board)
        if (vessa := self._score_vessa()) is not None:
            row["alpha_v"] = source_weights(self.step, self.config.steps, self.config.semi.alpha_v_floor)[1]
            self._add_scores(row, "vessa", vessa, board)
        append_metrics(self.out, row)
        self._say(advise(read_metrics(self.out), self.dataset.classes))
        dice = row["val_teacher"]["mean"]["dice"]
        if dice is not None and (self.best is None or dice > self.best):
            self._keep_teacher(dice)

    def _add_scores(self, row: dict[str, Any], name: str, scores: Scores, board: Tracking) -> None:
        row[f"val_{name}"] = {"mean": scores.mean, "by_class": scores.by_class}
        if scores.mean["dice"] is not None:
            board.add("val", {f"{name}_dice": scores.mean["dice"]}, self.step)

    def _keep_teacher(self, dice: float | None) -> None:
        """Write the teacher as the one that the run delivers. dice: on validation, None when not scored."""
        self._require_finite_weights()
        self.best, self.best_step = dice, self.step
        metadata = {
            "best": [self.best, self.best_step],
            "channels": self.channels,
            "classes": {str(c): n for c, n in self.dataset.classes.items()},
            "geometry": self.geometry.to_dict(),
        }
        checkpoint.write(
            self.out / checkpoint.BEST, checkpoint.module_state(self.teacher, "teacher"), metadata
        )

    def _score_vessa(self) -> Scores | None:
        """Score VESSA's labels of the validation images: with the teacher's prompts once feedback has begun.

        Nothing is learned from them. None for methods that VESSA does not teach.
        """
        if self.feed is None or self.config.semi.method != "vessa":
            return None
        cases = annotated(self.dataset, self.val_cases)
        items = [item for case in cases for item in case.slices]
        if self.feedback is not None and self.step >= self.feedback.first:
            self.feed.refresh([s.name for s in items], self._prompts(items))
        else:
            self.feed.prefetch([s.name for s in items])
        return score_annotator(self.dataset, cases, self.feed)

    def _say(self, advice: Sequence[Advice]) -> None:
        """Warn of what was not warned of yet."""
        for one in advice:
            if (one.kind, one.about) not in self._said:
                self._said.add((one.kind, one.about))
                _log.warning("%s: %s", one.kind, one.text)

    def _result(self) -> RunResult:
        tensors, _ = checkpoint.read(self.out / checkpoint.BEST)
        teacher = deepcopy(self.teacher)
        checkpoint.load_module(teacher, tensors, "teacher")
        cases = judged_cases(self.dataset, self.splits, selects=self.selects)
        labels = {
            part: predict_labels(teacher, self.dataset, some, self.config, self.channels)
            for part, some in cases.items()
        }
        scores = {part: score_labels(self.dataset, cases[part], labels[part]) for part in cases}
        return RunResult(
            self.out, self.step, self.best_step, self.selects, teacher, cases, labels, scores, self.seconds
        )
