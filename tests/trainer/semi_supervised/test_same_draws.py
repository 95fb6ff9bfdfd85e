"""Our steps beside a plain transcription of UniMatch V2's: losses, gradients, weights and teacher agree.

Both get the same views, masks and drop-out draws, in float64. Three constants differ from upstream's, and
the transcription has ours:
- Upstream halves the sum of labeled and unlabeled loss; Eq. 6 of the paper does not. All gradients are
  twice upstream's, which AdamW, whose update does not depend on their scale, does not see.
- Upstream sets the learning rate of iteration `it` after its step, so that it holds for the next one.
- We count `it` in the decay of the average from 1, upstream from 0: there the first step copies the student.
The Dice term, which the paper adds to Eq. 4, is off.
"""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from vessa_trainer.data import augmentation
from vessa_trainer.semi_supervised import trainer
from vessa_trainer.semi_supervised.trainer import Run

STEPS, IGNORED, CLOSE = 4, 255, 1e-6
OVERRIDES = (
    "optim.lambda_dice=0",
    "optim.lambda_ce=1",
    "semi.conf_threshold=0.27",
    "semi.channel_dropout=true",
    "views.cutmix_p=1",
    "batch_unlabeled=4",
)


class Published:
    """UniMatch V2's step, written out. given: what the step under way drew."""

    def __init__(self, student, config):
        self.student, self.teacher, self.config = deepcopy(student), deepcopy(student), config
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), config.optim.lr, betas=(0.9, 0.999), weight_decay=0.01
        )

    def step(self, it, given):
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optim.lr * (1 - it / self.config.steps) ** 0.9
        image_x, mask_x, valid_x = given["labeled"]
        mask_x = mask_x.masked_fill(~valid_x, IGNORED)
        drawn = given["unlabeled"]
        ignore = torch.where(drawn.valid, 0, IGNORED)
        self.teacher.eval()
        with torch.no_grad():
            confidence_w, label_w = self.teacher(drawn.weak).softmax(1).max(1)
        self.student.train()
        loss_x = F.cross_entropy(self.student(image_x), mask_x, ignore_index=IGNORED)
        mixed = []
        for image, box in zip(given["strong"], drawn.boxes, strict=True):
            one = [v.clone() for v in (image, label_w, confidence_w, ignore)]
            for row in range(len(box)):
                for pasted, source in zip(one, (image, label_w, confidence_w, ignore), strict=True):
                    pasted[row][..., box[row]] = source[len(box) - 1 - row][..., box[row]]
            mixed.append(one)
        both = self.student(
            torch.cat([mixed[0][0], mixed[1][0]]), [torch.cat(pair) for pair in given["dropout"]]
        )
        loss_u = []
        for logits, (_, label, confidence, ignored) in zip(both.chunk(2), mixed, strict=True):
            loss = F.cross_entropy(logits, label, reduction="none")
            loss = loss * ((confidence >= self.config.semi.conf_threshold) & (ignored != IGNORED))
            loss_u.append(loss.sum() / (ignored != IGNORED).sum())
        loss = loss_x + (loss_u[0] + loss_u[1]) / 2
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        decay = min(1 - 1 / (it + 1 + 1), 0.996)
        with torch.no_grad():
            for state in ("parameters", "buffers"):
                pairs = zip(getattr(self.teacher, state)(), getattr(self.student, state)(), strict=True)
                for slow, fast in pairs:
                    if slow.is_floating_point():
                        slow.copy_(slow * decay + fast * (1 - decay))
        return {"loss": loss.item(), "loss_sup": loss_x.item(), "loss_unsup": (sum(loss_u) / 2).item()}


@pytest.fixture
def given(monkeypatch):
    """What our step draws, in float64, as it draws it."""
    drawn = {}

    def noting(module, name, key, *, many=False):
        real = getattr(module, name)

        def call(*arguments, **options):
            result = in_double(real(*arguments, **options))
            drawn[key] = [*drawn.get(key, []), result] if many else result
            return result

        monkeypatch.setattr(module, name, call)

    noting(trainer, "labeled_batch", "labeled")
    noting(trainer, "unlabeled_views", "unlabeled")
    noting(augmentation, "strong_view", "strong", many=True)
    noting(augmentation, "complementary_dropout", "dropout", many=True)
    noting(augmentation.CropGrid, "image", "images")
    return drawn


def in_double(value):
    if isinstance(value, tuple):
        return tuple(in_double(v) for v in value)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def apart(ours, theirs):
    return max((o - t).abs().max().item() for o, t in zip(ours, theirs, strict=True))


def test_our_steps_are_those_of_unimatch_v2(tiny, dataset, given):
    config = tiny(
        "semi.method=unimatch_v2", "semi.unlabeled_loss=ce", "semi.ema_decay=0.996", *OVERRIDES, steps=STEPS
    )
    run = Run(config, dataset, None, "")
    run.student.double()
    run.teacher.double()
    published = Published(run.student, config)
    start = [p.detach().clone() for p in run.student.parameters()]
    for it in range(STEPS):
        given.clear()
        figures = run._step()
        expected = published.step(it, given)
        assert not given["unlabeled"].valid.all()  # padding is there to be left out
        assert 0 < figures["confident"] < 1
        for key, value in expected.items():
            assert figures[key] == pytest.approx(value, abs=CLOSE)
        gradients = [[p.grad for p in m.parameters()] for m in (run.student, published.student)]
        assert apart(*gradients) < CLOSE
        for ours, theirs in ((run.student, published.student), (run.teacher, published.teacher)):
            assert apart(ours.parameters(), theirs.parameters()) < CLOSE
            floats = ([b for b in m.buffers() if b.is_floating_point()] for m in (ours, theirs))
            assert apart(*floats) < CLOSE
    assert apart(run.student.parameters(), start) > 1e-4
    assert apart(run.teacher.parameters(), run.student.parameters()) > 1e-4
