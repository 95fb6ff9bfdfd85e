"""One step: VESSA's labels replayed onto the views, and the objective's terms by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from vessa.datasets import Case, Dataset, Slice
from vessa_trainer.config import load_config
from vessa_trainer.data import augmentation
from vessa_trainer.data.prepared import PreparedSlices
from vessa_trainer.pseudo_labels.types import LabelBatch, PseudoLabel
from vessa_trainer.semi_supervised.batches import (
    UnlabeledViews,
    labeled_batch,
    on_squares,
    unlabeled_views,
)
from vessa_trainer.semi_supervised.losses import StrongView, vessa_loss
from vessa_trainer.semi_supervised.objective import compute_loss
from vessa_trainer.students.networks import build_student

ROWS = [0, 1, 2, 3]


class Shapes(Dataset):
    """Four images of differing sizes, each white where its label is 1: image and label are one thing."""

    classes = {1: "shape"}

    def __init__(self, root):
        super().__init__(root)
        self._slices = tuple(Slice(f"s{i}", f"s{i}", f"s{i}", 0) for i in range(4))
        self.sizes = [(40, 60), (60, 40), (48, 48), (90, 70)]

    def cases(self):
        return tuple(Case(s.name, s.group, (s,)) for s in self._slices)

    def mask(self, item):
        index = int(item.name[1:])
        height, width = self.sizes[index]
        y, x = np.mgrid[:height, :width]
        ellipse = ((y - height * 0.45) / height) ** 2 + ((x - width * (0.3 + 0.1 * index)) / width) ** 2
        return (ellipse < 0.04).astype(np.uint8)

    def image(self, item):
        return self.mask(item) * 255


class Truth:
    """A source that labels each image by its truth, with confidence 200 inside and 100 outside."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.asked = []

    def take(self, names):
        self.asked.append(names)
        masks = [self.dataset.mask(s) for n in names for s in self.dataset.slices() if s.name == n]
        return LabelBatch([PseudoLabel(m, np.where(m, 200, 100).astype(np.uint8)) for m in masks])


@pytest.fixture
def shapes(tmp_path):
    return Shapes(tmp_path)


@pytest.fixture
def data(shapes):
    return PreparedSlices(shapes, shapes.slices(), 64, need_masks=True)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def config_of(*overrides):
    plain = ["student.size=64", "student.crop=48", "views.jitter_p=0", "views.blur_p=0", "views.noise_p=0"]
    plain += ["semi.unlabeled_loss=ce", "semi.vessa_loss=ce", "semi.channel_dropout=true"]
    return load_config(None, [*plain, *overrides])


def agreement(image, labels, valid):
    """Dice of what is white in the image and what is labeled."""
    ours, theirs = (image > 0.5) & valid, (labels == 1) & valid
    return (2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())).item()


def test_a_label_lies_on_the_square_as_the_image_does(shapes, data):
    labels, confidence = on_squares(data, ROWS, Truth(shapes).take(["s0", "s1", "s2", "s3"]).labels)
    assert torch.equal(labels, data.masks.long())
    assert confidence[labels == 1].mean() == pytest.approx(200 / 255, abs=0.02)  # the border is interpolated
    assert (confidence[~data.valid] == 0).all()  # padding was never labeled


def test_a_late_label_passes_no_gate(shapes, data):
    taken = Truth(shapes).take(["s1", "s2", "s3"]).labels
    labels, confidence = on_squares(data, ROWS, [None, *taken])
    assert (labels[0] == 0).all()
    assert (confidence[0] == 0).all()
    assert torch.equal(labels[1:], data.masks[1:].long())
    logits = torch.randn(1, 2, 64, 64)
    view = StrongView(logits, data.valid[:1], logits.softmax(1), (labels[:1], confidence[:1]))
    for gate in ("own", "teacher"):
        for kind in ("ce_dice", "ce", "dice"):
            term = vessa_loss(view, kind, gate=gate, vessa_threshold=0.0, conf_threshold=0.9)
            assert term.item() == pytest.approx(0, abs=1e-4)


def test_labels_replayed_stay_aligned_through_resize_crop_and_flip(shapes, data, generator):
    source = Truth(shapes)
    for _ in range(5):
        drawn = unlabeled_views(data, ROWS, config_of("views.scale=[0.6,1.6]"), source, generator)
        labels, confidence = drawn.vessa
        assert agreement(drawn.weak[:, 0], labels, drawn.valid) > 0.97
        assert ((confidence > 0.6) == (labels == 1)).float().mean() > 0.97
        assert (confidence[~drawn.valid] == 0).all()
    assert source.asked[0] == ["s0", "s1", "s2", "s3"]


def test_labels_replayed_stay_aligned_through_cutmix(shapes, data, generator):
    drawn = unlabeled_views(data, ROWS, config_of("views.cutmix_p=1"), Truth(shapes), generator)
    for strong, boxes in zip(drawn.strong, drawn.boxes, strict=True):
        assert boxes.flatten(1).any(1).all()
        labels, valid = (augmentation.paste(v, boxes) for v in (drawn.vessa[0], drawn.valid))
        assert agreement(strong[:, 0], labels, valid) > 0.97
    # had the box not been replayed, they would differ
    assert agreement(drawn.strong[0][:, 0], drawn.vessa[0], drawn.valid) < 0.97


def test_masks_of_labeled_images_stay_aligned(data, generator):
    images, masks, valid = labeled_batch(data, ROWS, config_of(), generator)
    assert images.shape == (4, 1, 48, 48)
    assert agreement(images[:, 0], masks, valid) > 0.97


def test_without_a_source_there_are_no_labels(data, generator):
    assert unlabeled_views(data, ROWS, config_of(), None, generator).vessa is None


class Constant(nn.Module):
    """A network that says the same everywhere; its logits are what it learns."""

    feature_channels = [4]

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.dropout = []

    def forward(self, x, dropout=None):
        self.dropout.append(dropout)
        return self.logits[None, :, None, None].expand(x.shape[0], -1, *x.shape[-2:])


def log(*probabilities):
    return [float(np.log(p)) for p in probabilities]


@pytest.fixture
def hand_made():
    """Two images of 4x4 px: the student says (.5, .5); labeled 0; VESSA says 1 with .9 on the left half."""
    labeled = (
        torch.zeros(2, 1, 4, 4),
        torch.zeros(2, 4, 4, dtype=torch.long),
        torch.ones(2, 4, 4, dtype=torch.bool),
    )
    confidence = torch.zeros(2, 4, 4)
    confidence[:, :, :2] = 0.9
    nowhere = torch.zeros(2, 4, 4, dtype=torch.bool)
    strong = torch.zeros(2, 1, 4, 4)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    vessa = (torch.ones(2, 4, 4, dtype=torch.long), confidence)
    return labeled, UnlabeledViews(strong, (strong, strong), (nowhere, nowhere), valid, vessa)


SUPERVISED = 0.5 * np.log(2) + 0.5 * 1.0  # nothing is foreground: Dice is lost wholly
OBJECTIVE = ("steps=100", "semi.method=vessa", "semi.lambda_u=0.5", "semi.alpha_v_floor=0")


def test_the_supervised_objective_is_equation_4(hand_made, generator):
    student = Constant(*log(0.5, 0.5))
    loss, figures = compute_loss(student, student, hand_made[0], None, config_of(*OBJECTIVE), 0, generator)
    assert loss.item() == pytest.approx(SUPERVISED, rel=1e-4)
    assert figures == {"loss": loss.item(), "loss_sup": loss.item()}


@pytest.mark.parametrize(("step", "alpha_t", "alpha_v"), [(0, 0, 1), (25, 0.1464, 0.8536), (100, 1, 0)])
def test_the_weights_of_the_terms_are_those_of_equations_8_and_9(
    hand_made, generator, step, alpha_t, alpha_v
):
    student, teacher = Constant(*log(0.5, 0.5)), Constant(*log(0.98, 0.02))
    loss, figures = compute_loss(student, teacher, *hand_made, config_of(*OBJECTIVE), step, generator)
    by_teacher, by_vessa = np.log(2), np.log(2) / 2  # VESSA is confident on half of the pixels
    assert figures["loss_teacher"] == pytest.approx(by_teacher, rel=1e-4)
    assert figures["loss_vessa"] == pytest.approx(by_vessa, rel=1e-4)
    assert figures["eta"] == pytest.approx(alpha_t, abs=1e-4)
    assert figures["loss_unsup"] == pytest.approx(alpha_t * by_teacher + alpha_v * by_vessa, rel=1e-3)
    assert loss.item() == pytest.approx(SUPERVISED + 0.5 * figures["loss_unsup"], rel=1e-4)
    assert figures["confident"] == 1
    assert figures["vessa_confident"] == 0.5
    assert figures["agreement"] == 0  # the teacher sees no foreground, VESSA nothing else


def test_vessas_weight_keeps_its_floor(hand_made, generator):
    student, teacher = Constant(*log(0.5, 0.5)), Constant(*log(0.98, 0.02))
    config = config_of(*OBJECTIVE, "semi.alpha_v_floor=0.2")
    _, figures = compute_loss(student, teacher, *hand_made, config, 100, generator)
    shares = 1 / 1.2, 0.2 / 1.2  # the unlabeled loss keeps its weight
    assert figures["loss_unsup"] == pytest.approx(shares[0] * np.log(2) + shares[1] * np.log(2) / 2, rel=1e-3)


def test_an_unsure_teacher_teaches_nothing(hand_made, generator):
    student, teacher = Constant(*log(0.5, 0.5)), Constant(*log(0.9, 0.1))
    labeled, unlabeled = hand_made
    alone = UnlabeledViews(unlabeled.weak, unlabeled.strong, unlabeled.boxes, unlabeled.valid, None)
    loss, figures = compute_loss(student, teacher, labeled, alone, config_of(*OBJECTIVE), 50, generator)
    assert figures["loss_unsup"] == figures["confident"] == 0
    assert loss.item() == pytest.approx(SUPERVISED, rel=1e-4)
    _, by_teacher = compute_loss(
        student, teacher, *hand_made, config_of(*OBJECTIVE, "semi.vessa_gate=teacher"), 50, generator
    )
    assert by_teacher["loss_vessa"] == 0  # Eq. 8 as printed
    _, own = compute_loss(student, teacher, *hand_made, config_of(*OBJECTIVE), 50, generator)
    assert own["loss_vessa"] > 0


def test_equation_6_averages_both_strong_views(hand_made, generator):
    student, teacher = Constant(*log(0.5, 0.5)), Constant(*log(0.98, 0.02))
    labeled, unlabeled = hand_made
    alone = UnlabeledViews(unlabeled.weak, unlabeled.strong, unlabeled.boxes, unlabeled.valid, None)
    loss, figures = compute_loss(student, teacher, labeled, alone, config_of("semi.lambda_u=2"), 0, generator)
    assert figures["loss_unsup"] == pytest.approx(np.log(2), rel=1e-4)
    assert loss.item() == pytest.approx(SUPERVISED + 2 * np.log(2), rel=1e-4)
    assert set(figures) == {"loss", "loss_sup", "loss_unsup", "confident", "share_teacher_1"}


def test_a_unet_learns_from_unlabeled_pixels_by_dice(hand_made, generator):
    student, teacher = Constant(*log(0.5, 0.5)), Constant(*log(0.02, 0.98))
    labeled, unlabeled = hand_made
    alone = UnlabeledViews(unlabeled.weak, unlabeled.strong, unlabeled.boxes, unlabeled.valid, None)
    config = config_of("semi.unlabeled_loss=null")
    assert config.unlabeled_loss == "dice"
    _, figures = compute_loss(student, teacher, labeled, alone, config, 0, generator)
    dice = 1 - 2 * 0.5 / (0.5 + 1)
    assert figures["loss_unsup"] == pytest.approx(dice, rel=1e-3)
    assert load_config(None, ["student.name=dpt", "student.crop=14"]).unlabeled_loss == "ce"


def test_the_unlabeled_loss_keeps_its_weight_over_the_run(hand_made, generator):
    """Teacher and VESSA agree: however they share the weight, the loss stays the same."""
    student, teacher = Constant(*log(0.5, 0.5)), Constant(*log(0.02, 0.98))
    labeled, unlabeled = hand_made
    sure = replace(unlabeled, vessa=(unlabeled.vessa[0], torch.ones(2, 4, 4)))
    config = config_of("steps=100", "semi.method=vessa", "semi.alpha_v_floor=1")
    for step in (0, 50, 99):
        _, figures = compute_loss(student, teacher, labeled, sure, config, step, generator)
        assert figures["loss_unsup"] == pytest.approx(np.log(2), rel=1e-4)


def test_channel_dropout_is_a_switch(hand_made, generator):
    student, teacher = Constant(*log(0.5, 0.5)), Constant(*log(0.98, 0.02))
    assert not load_config(None).channel_dropout
    assert load_config(None, ["student.name=dpt", "student.crop=14"]).channel_dropout
    config = config_of(*OBJECTIVE, "semi.channel_dropout=false")
    compute_loss(student, teacher, *hand_made, config, 10, generator)
    assert student.dropout == [None, None]


def test_dropout_is_for_the_strong_views_alone(hand_made, generator):
    student, teacher = Constant(*log(0.5, 0.5)), Constant(*log(0.98, 0.02))
    loss, _ = compute_loss(student, teacher, *hand_made, config_of(*OBJECTIVE), 10, generator)
    loss.backward()
    labeled, strong = student.dropout
    assert labeled is None
    assert teacher.dropout == [None]
    assert strong[0].shape == (4, 4)  # both views of two images, four channels
    assert torch.equal(strong[0][:2] + strong[0][2:], torch.full((2, 4), 2.0))
    assert torch.isfinite(student.logits.grad).all()
    assert teacher.logits.grad is None


class Reader(nn.Module):
    """A network that reads the label off the image: white is class 1."""

    feature_channels = [4]

    def forward(self, x, dropout=None):
        white = 20 * (x - 0.5)
        return torch.cat([-white, white], 1)


def test_labels_meet_the_strong_views_they_belong_to(shapes, data, generator):
    """From the prepared square to the loss: whoever reads the views right is hardly told otherwise."""
    config = config_of(*OBJECTIVE, "views.cutmix_p=1", "semi.vessa_threshold=0.1")
    labeled = labeled_batch(data, ROWS, config, generator)
    drawn = unlabeled_views(data, ROWS, config, Truth(shapes), generator)
    _, right = compute_loss(Reader(), Reader(), labeled, drawn, config, 50, generator)
    assert right["loss_vessa"] < 0.05
    assert right["loss_teacher"] < 0.05
    swapped = replace(drawn, boxes=(drawn.boxes[1], drawn.boxes[0]))
    _, wrong = compute_loss(Reader(), Reader(), labeled, swapped, config, 50, generator)
    assert wrong["loss_vessa"] > 5 * right["loss_vessa"]
    assert wrong["loss_teacher"] > 5 * right["loss_teacher"]


def test_what_padding_is_pasted_does_not_count(generator):
    """Image 1 is padding; the box pastes it over the half of image 0 that the student reads otherwise."""
    labeled = (
        torch.zeros(2, 1, 4, 4),
        torch.zeros(2, 4, 4, dtype=torch.long),
        torch.ones(2, 4, 4, dtype=torch.bool),
    )
    strong, valid = torch.zeros(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    strong[0, :, :2] = 1
    valid[1] = False
    box = torch.zeros(2, 4, 4, dtype=torch.bool)
    box[0, :2] = True
    nowhere = torch.zeros_like(box)
    drawn = UnlabeledViews(torch.zeros(2, 1, 4, 4), (strong, strong), (box, nowhere), valid, None)
    _, figures = compute_loss(Reader(), Reader(), labeled, drawn, config_of(*OBJECTIVE), 0, generator)
    assert figures["loss_unsup"] == pytest.approx((0 + 20 / 2) / 2, rel=1e-4)


@pytest.mark.parametrize("method", ["supervised", "unimatch_v2", "vessa"])
def test_a_real_student_gets_a_finite_loss_by_each_method(shapes, data, generator, method):
    config = config_of("student.widths=[4,8,16]", f"semi.method={method}")
    student = build_student(config.student, 1, 2)
    teacher = build_student(config.student, 1, 2).eval()
    source = Truth(shapes) if method == "vessa" else None
    labeled = labeled_batch(data, ROWS, config, generator)
    unlabeled = None
    if method != "supervised":
        unlabeled = unlabeled_views(data, ROWS, config, source, generator)
    loss, figures = compute_loss(student, teacher, labeled, unlabeled, config, 10, generator)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.item() == figures["loss"] > 0
    expected = {"loss", "loss_sup"}
    if method != "supervised":
        expected |= {"loss_unsup", "confident", "share_teacher_1"}
    if method == "vessa":
        expected |= {"loss_teacher", "loss_vessa", "eta", "vessa_confident", "agreement", "share_vessa_1"}
    assert set(figures) == expected


def test_bfloat16_changes_the_losses_a_little(shapes, data):
    figures = []
    for bf16 in (False, True):
        config = config_of("student.widths=[4,8,16]", f"bf16={str(bf16).lower()}", "semi.conf_threshold=0.3")
        torch.manual_seed(0)
        student = build_student(config.student, 1, 2)
        teacher = build_student(config.student, 1, 2).eval()
        same = torch.Generator().manual_seed(0)
        labeled = labeled_batch(data, ROWS, config, same)
        unlabeled = unlabeled_views(data, ROWS, config, None, same)
        loss, one = compute_loss(student, teacher, labeled, unlabeled, config, 10, same)
        loss.backward()
        assert loss.dtype == student.head.weight.grad.dtype == torch.float32
        figures.append(one)
    exact, short = figures
    for key in ("loss_sup", "loss_unsup"):
        assert short[key] != exact[key]
        assert short[key] == pytest.approx(exact[key], rel=0.05)
