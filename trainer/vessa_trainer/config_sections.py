"""Hold the settings of one experiment by section; `vessa_trainer.config` puts them together."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Data folder and splits. A split file holds one group (patient) per line.

    Split files are searched in the data folder first, then in the working directory. Where none of the four
    exists, the data set's own lists are read, else annotated groups are drawn by `split_seed`.

    root: data folder
    labeled: split file of the labeled patients
    unlabeled: split file of the training patients
    val: split file of the validation patients, which choose the checkpoint
    test: split file of the test patients, which are scored once
    channel: name or number of the channel to learn from, for nnU-Net data sets with several
    split_seed: seed of the drawn splits
    labeled_groups: labeled patients of drawn splits; null takes all annotated ones where others are not
    annotated, else 1
    val_share: share of the annotated patients for validation in drawn splits
    test_share: share of the annotated patients for the test in drawn splits
    folds: parts of a cross-validation, 0 for none. The annotated patients of the labeled and validation
        splits (of drawn splits: all but the test's) are divided into so many parts; `fit` trains a student
        for each, with another part for validation and other labeled patients, as many as the labeled split
        has. Test patients stay the same
    fold: which of the folds a run is, from 0
    prepared: folder of decoded and resized images, for sets larger than memory; null keeps them in memory
    prepared_gb: size limit of that folder, GB
    """

    root: str = ""
    labeled: str = "splits/labeled_1.txt"
    unlabeled: str = "splits/train.txt"
    val: str = "splits/val.txt"
    test: str = "splits/test.txt"
    channel: str | None = None
    split_seed: int = 0
    labeled_groups: int | None = None
    val_share: float = 0.1
    test_share: float = 0.2
    folds: int = 0
    fold: int = 0
    prepared: str | None = None
    prepared_gb: float = 50.0


@dataclass(frozen=True)
class StudentConfig:
    """The network that is trained.

    name: architecture
    size: long side of the resized images, px; a multiple of 14 for dpt
    crop: side of the square training crop, px; a multiple of 14 for dpt
    encoder: of a U-Net, a timm network with features at strides 2 to 32, such as tf_efficientnet_lite0; null
        trains a U-Net from scratch
    widths: channels of the U-Net's levels from scratch, each half the size of the one before
    backbone: size of the DINOv2 backbone of dpt
    pretrained: whether backbone or encoder starts from published weights; false starts from noise
    weights: local safetensors file of the backbone or encoder, under timm's names; null takes the installed
        vessa-trainer[pretrained] for tf_efficientnet_lite0, else timm's hub copy
    neighbors: slices above and below each slice that are shown as further channels (2.5D), 0 for none. A
        pretrained encoder and dpt take 1, which makes three channels. Images must be gray
    window: side of a square region of interest, as a multiple of the box around all structures of the volume,
        resized to `crop`; 0 shows the whole image. In training VESSA's cleaned labels or the masks give the
        box, at prediction the student's own first pass on the whole image
    init: run directory whose best teacher the student starts from; its last layer starts from noise where
        the number of classes differs
    """

    name: Literal["unet", "dpt"] = "unet"
    size: int = 160
    crop: int = 160
    encoder: str | None = None
    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    backbone: Literal["tiny", "small", "base", "large"] = "small"
    pretrained: bool = True
    weights: str | None = None
    neighbors: int = 0
    window: float = 0.0
    init: str | None = None

    @property
    def multiple(self) -> int:
        """What the sides of the network's input are multiples of, px."""
        if self.name == "dpt":
            return 14
        return 2 ** (len(self.widths) - 1) if self.encoder is None else 32


@dataclass(frozen=True)
class ViewsConfig:
    """Random views. Ranges are (low, high) of a uniform draw; `*_p` are probabilities per image.

    Gamma, contrast, brightness, blur and noise act on gray images; RGB images get color jitter and grayscale.

    scale: factor of the long side in the weak view; UniMatch V2 draws from (0.5, 2.0), slices of one scanner
        vary less
    flip_p: horizontal flip in the weak view
    rotate_p: rotation in the weak view
    rotate: largest angle of the rotation, degrees
    whole_p: the whole image in place of the region of interest (`student.window`), so that the student also
        learns the first pass
    jitter_p: change of intensities in a strong view
    gamma: exponent of the intensities
    contrast: factor of the contrast
    brightness: factor of the brightness
    blur_p: Gaussian blur in a strong view
    blur_sigma: sigma of the blur, px
    noise_p: Gaussian noise in a strong view
    noise_std: standard deviation of the noise, of intensities in [0, 1]
    grayscale_p: conversion of a color image to gray in a strong view
    cutmix_p: CutMix in a strong view
    """

    scale: tuple[float, float] = (0.8, 1.25)
    flip_p: float = 0.5
    rotate_p: float = 0.0
    rotate: float = 15.0
    whole_p: float = 0.25
    jitter_p: float = 0.8
    gamma: tuple[float, float] = (0.6, 1.6)
    contrast: tuple[float, float] = (0.5, 1.5)
    brightness: tuple[float, float] = (0.5, 1.5)
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    noise_p: float = 0.5
    noise_std: tuple[float, float] = (0.0, 0.1)
    grayscale_p: float = 0.2
    cutmix_p: float = 0.5


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with poly decay.

    lr: learning rate of everything except a backbone and an encoder
    backbone_lr: learning rate of a DINOv2 backbone
    encoder_lr: learning rate of a U-Net's timm encoder, as a share of `lr`
    weight_decay: decay of AdamW
    power: exponent of the poly decay
    lambda_ce: weight of the cross-entropy in Eq. 4
    lambda_dice: weight of Dice in Eq. 4
    """

    lr: float = 1e-3
    backbone_lr: float = 5e-6
    encoder_lr: float = 0.5
    weight_decay: float = 0.01
    power: float = 0.9
    lambda_ce: float = 0.5
    lambda_dice: float = 0.5


@dataclass(frozen=True)
class SemiConfig:
    """Learning from unlabeled images.

    lambda_u: weight of the unlabeled loss, Eq. 6 and 9
    conf_threshold: confidence of the teacher at which a pixel counts
    adaptive_threshold: for unlabeled_loss 'ce' and 'dice', a threshold for each class: of the pixels that the
        teacher gives to a class the same share counts as reaches `conf_threshold` over all classes. With one
        threshold background passes and structures shrink (docs/decisions/training.md)
    vessa_threshold: confidence of VESSA at which a pixel counts, for the gate 'own'
    method: supervised, from nothing; unimatch_v2, from the teacher; vessa, from the teacher and the
    annotator; semisam, a mean teacher beside an annotator that is asked with the teacher's prompts (see
    `vessa_trainer.semi_supervised.semisam`); vessa_alone trains nothing and scores the annotator.
    vessa_gate: 'own' gates VESSA's term with its own confidence >= `vessa_threshold`, 'teacher' with the
    teacher's confidence as Eq. 8 of the paper has it. alpha_v_floor: below which VESSA's weight never falls;
    0 is the hand-over of Eq. 9, 1 keeps the whole weight to the end.
    ema_decay: None is UniMatch V2's 0.996, or less in a short run, where the teacher would still average over
    the student's first steps when it has to teach.
    unlabeled_loss: loss of the teacher's labels. 'soft' compares all pixels with the teacher's probabilities
        by cross-entropy and Dice; 'ce' is Eq. 5 and UniMatch V2; 'dice' is UniMatch v1's recipe for medical
        images. null takes 'soft' for a U-Net on a pretrained encoder; 'dice' for other U-Nets, which would
        predict background everywhere at first; 'ce' for a DPT
    vessa_loss: loss of VESSA's labels. 'ce_dice' is cross-entropy and Dice on all pixels, weighted by VESSA's
        confidence; 'ce' and 'dice' are gated as in Eq. 8, and the gate settings act on them alone
    channel_dropout: complementary dropout of feature channels in the strong views; null applies it to a DPT
        and not to a U-Net, whose narrow levels lose by it
    """

    method: Literal["supervised", "unimatch_v2", "vessa", "semisam", "vessa_alone"] = "unimatch_v2"
    lambda_u: float = 1.0
    unlabeled_loss: Literal["soft", "ce", "dice"] | None = None
    vessa_loss: Literal["ce_dice", "ce", "dice"] = "ce_dice"
    channel_dropout: bool | None = None
    conf_threshold: float = 0.95
    adaptive_threshold: bool = False
    ema_decay: float | None = None
    vessa_gate: Literal["own", "teacher"] = "own"
    vessa_threshold: float = 0.8
    alpha_v_floor: float = 1.0


@dataclass(frozen=True)
class AnnotatorConfig:
    """The VESSA service.

    url: its address; null takes VESSA_URL, else port 8700 here
    api_key: its key; null takes VESSA_API_KEY, else the local key file; never saved
    bank: template bank; null derives a name from the data folder and the labeled split
    batch: images per request
    lookahead_batches: batches whose labels are requested ahead of the training step
    template_choice: top1 takes the most similar template, top3 puts three in memory, sample draws one (Eq. 1)
    clean: whether labels are cleaned volume by volume before use: smoothed along z, islands removed of the
        classes that form one component in every labeled volume
    adapt: minutes for which the annotator trains on the labeled slices and on unlabeled training images
        before it gives the first labels; 0 uses the common weights. The adapted bank has a name of its own
    views: average each label over the image and four views of it, turned by 10 degrees and scaled by 0.85 and
        1.2, with a confidence that falls where they disagree. Takes five times the annotator's time
    serves: what the annotator must be; null takes any. vessa: language model and memory; no_language,
    no_memory:
        Stage 1's annotator without one of them; sam2: SAM 2.1's memory with official weights, no language
        model and no Stage 1; prompts_only: neither, it segments only classes that have a prompt
    patience_s: how long the annotator may be unreachable before the run stops, s
    max_wait_s: how long a step waits for late labels, s; it continues without them, and later steps use them.
    Null
        waits for the first label of each image: then, without feedback, a seed gives the same run again; with
        feedback `deterministic` does
    labels: folder that `vessa-trainer labels` filled; training then needs no service, and no feedback is
    possible
    allow_change: continue when the annotator's weights, parts, label version or bank change during a run; the
        report lists the changes
    """

    url: str | None = None
    api_key: str | None = None
    bank: str | None = None
    serves: Literal["vessa", "no_language", "no_memory", "sam2", "prompts_only"] | None = None
    batch: int = 8
    lookahead_batches: int = 4
    template_choice: Literal["top1", "top3", "sample"] = "top1"
    clean: bool = True
    adapt: float = 0.0
    views: bool = False
    patience_s: float = 300.0
    max_wait_s: float | None = None
    labels: str | None = None
    allow_change: bool = False


@dataclass(frozen=True)
class CacheConfig:
    """The label cache.

    url: 'folder:PATH' or 'redis://HOST:PORT/DB'
    expire_s: age at which a label expires, s; null keeps labels for ever
    """

    url: str = "folder:~/.cache/vessa/labels"
    expire_s: float | None = None


@dataclass(frozen=True)
class FeedbackConfig:
    """Teacher-to-VESSA feedback, for method vessa.

    enabled: whether predictions are sent back as prompts
    start: share of the run before the first round
    every: steps between two rounds
    prompts: kinds of prompts: boxes, points, mask_logits
    source: whose predictions are sent back
    min_confidence: confidence at which a pixel of the source counts
    """

    enabled: bool = True
    start: float = 0.5
    every: int = 500
    prompts: tuple[str, ...] = ("boxes",)
    source: Literal["teacher", "student"] = "teacher"
    min_confidence: float = 0.8
