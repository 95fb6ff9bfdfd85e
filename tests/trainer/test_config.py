"""Configs: one YAML file and overrides, checked key by key."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vessa.errors import InvalidConfig
from vessa_trainer.config import Config, load_config, overlaid, read_tree, save_config, shipped, to_dict

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "trainer" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_that_ships_loads(path):
    config = load_config(path)
    assert config.semi.method in ("supervised", "unimatch_v2", "vessa", "semisam", "vessa_alone")
    assert (config.student.name == "dpt") == (path.stem == "dpt")
    assert shipped(path.stem).read_bytes() == path.read_bytes()


def test_there_are_configs_to_load():
    assert {"supervised", "unimatch_v2", "vessa"} <= {p.stem for p in CONFIGS}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("supervised_bound", "data.labeled", "splits/train.txt"),
        ("vessa_no_feedback", "feedback.enabled", False),
        ("vessa_raw_labels", "annotator.clean", False),
        ("vessa_gated_dice", "semi.vessa_loss", "dice"),
        ("vessa_no_language", "annotator.serves", "no_language"),
        ("vessa_no_memory", "annotator.serves", "no_memory"),
        ("sam2", "annotator.serves", "sam2"),
        ("unimatch_v2_init", "student.init", "runs/stage1_student"),
    ],
)
def test_a_baseline_differs_from_its_method_by_one_key(name, key, value):
    (path,) = (p for p in CONFIGS if p.stem == name)
    config = replace(load_config(path), title="")
    plain = load_config(None, [f"semi.method={config.semi.method}"])
    assert config == load_config(None, [f"semi.method={config.semi.method}", f"{key}={json.dumps(value)}"])
    assert config != plain


def test_equation_8_as_printed_is_a_config():
    (path,) = (p for p in CONFIGS if p.stem == "vessa_gate_teacher")
    semi = load_config(path).semi
    assert (semi.method, semi.vessa_loss, semi.vessa_gate) == ("vessa", "ce", "teacher")


@pytest.mark.parametrize(("name", "steps"), [("quick", 400), ("standard", 4000), ("full", 30_000)])
def test_schedules_share_the_student_and_leave_the_method_open(name, steps):
    config = load_config(shipped(name))
    assert config.steps == steps
    assert (config.student.encoder, config.student.window) == ("tf_efficientnet_lite0", 1.6)
    assert config.semi == load_config(None).semi
    assert config.unlabeled_loss == "soft"
    assert not config.channel_dropout


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vessa_scratch", {"encoder": None}),
        ("vessa_whole_image", {"window": 0.0, "size": 128, "crop": 128}),
    ],
)
def test_ablations_of_the_student_change_the_schedules_student(name, changes):
    quick = load_config(shipped("quick"))
    assert overlaid(quick, read_tree(shipped(name))).student == replace(quick.student, **changes)


def test_every_method_has_a_title_of_its_own():
    titles = [t for p in CONFIGS if (t := load_config(p).title)]
    assert len(set(titles)) == len(titles)
    assert {"UniMatch V2", "VESSA-assisted", "VESSA alone", "SemiSAM+", "w/o VLM"} <= set(titles)


def test_a_config_that_does_not_ship_is_refused_with_those_that_do():
    with pytest.raises(
        InvalidConfig,
        match=r"no shipped config is called 'vesa'. Shipped configs: .*vessa, .*vessa_no_memory",
    ):
        shipped("vesa")


def test_keys_of_a_tree_go_before_those_of_a_config():
    base = load_config(None, ["optim.lr=0.1", "semi.vessa_gate=teacher", "annotator.api_key=secret"])
    over = overlaid(base, {"semi": {"method": "vessa"}, "steps": 7}, {"semi": {"lambda_u": 2}})
    assert (over.semi.method, over.semi.lambda_u, over.semi.vessa_gate) == ("vessa", 2.0, "teacher")
    assert (over.steps, over.optim, over.annotator) == (7, base.optim, base.annotator)
    with pytest.raises(InvalidConfig, match="unknown key semi.lamda_u"):
        overlaid(base, {"semi": {"lamda_u": 1}})


def test_semisam_needs_prompts():
    with pytest.raises(InvalidConfig, match="feedback.enabled must be true"):
        load_config(None, ["semi.method=semisam", "feedback.enabled=false"])


def test_no_file_means_the_defaults():
    assert load_config(None) == Config()


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("semi.lamda_u=1", "semi.lambda_u"),
        ("semy.lambda_u=1", "semi$"),
        ("lambda_u=1", "semi.lambda_u"),
        ("step=1", "steps"),
        ("optim.weight_decey=1", "optim.weight_decay"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(override, nearest):
    with pytest.raises(InvalidConfig, match=f"unknown key .*; the nearest known key is {nearest}"):
        load_config(None, [override])


def test_a_key_like_no_other_is_unknown_all_the_same():
    with pytest.raises(InvalidConfig, match="unknown key xyzzy$"):
        load_config(None, ["xyzzy=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=ten", "steps must be of type int, got 'ten'"),
        ("steps=true", "steps must be of type int, got True"),
        ("steps=1.5", "steps must be of type int"),
        ("optim.lr=fast", "optim.lr must be a number, got 'fast'"),
        ("feedback.enabled=1", "feedback.enabled must be of type bool"),
        ("semi.method=unimatch", "semi.method must be one of 'supervised', 'unimatch_v2', 'vessa'"),
        ("views.scale=1", "views.scale must be a list of 2, got 1"),
        ("views.scale=[1,2,3]", r"views.scale must be a list of 2, got \[1, 2, 3\]"),
        ("student.widths=[a]", "student.widths must be of type int, got 'a'"),
        ("out=1", "out must be of type str, got 1"),
        ("semi=vessa", "semi must be a section of keys, got 'vessa'"),
        ("out.x=1", "unknown key|must be of type str"),
    ],
)
def test_a_wrong_type_names_the_key_and_what_came(override, message):
    with pytest.raises(InvalidConfig, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps must be above 0, got 0"),
        ("optim.lr=.nan", "optim.lr must be above 0, got nan"),
        ("annotator.max_wait_s=-1", "annotator.max_wait_s must be 0 or above"),
        ("annotator.patience_s=-1", "annotator.patience_s must be above 0"),
        ("annotator.lookahead_batches=-1", "annotator.lookahead_batches must be 0 or above, got -1"),
        ("cache.expire_s=0", "cache.expire_s must be above 0"),
        ("semi.lambda_u=-1", "semi.lambda_u must be 0 or above"),
        ("semi.conf_threshold=1.5", r"semi.conf_threshold must be in \[0, 1\], got 1.5"),
        ("semi.ema_decay=.nan", r"semi.ema_decay must be in \[0, 1\]"),
        ("views.blur_p=2", r"views.blur_p must be in \[0, 1\]"),
        ("views.scale=[0,1]", r"views.scale must be \(low, high\) with 0 < low <= high"),
        ("views.gamma=[2,1]", r"views.gamma must be \(low, high\)"),
        ("student.widths=[]", "student.widths must be channels above 0"),
        ("student.crop=100", "student.crop must be a multiple of 16, got 100"),
        ("feedback.prompts=[boxes,scribbles]", "feedback.prompts knows .*; got 'scribbles'"),
    ],
)
def test_a_value_out_of_its_range_names_the_key(override, message):
    with pytest.raises(InvalidConfig, match=message):
        load_config(None, [override])


def test_the_crop_fits_the_student():
    assert load_config(None, ["student.widths=[4,8]", "student.crop=98"]).student.multiple == 2
    with pytest.raises(InvalidConfig, match="student.crop must be a multiple of 14, got 160"):
        load_config(None, ["student.name=dpt"])


def test_the_teacher_of_a_short_run_averages_over_less():
    decays = [load_config(None, [f"steps={n}"]).ema_decay for n in (10, 400, 5000, 100_000)]
    assert decays == pytest.approx([0, 0.95, 0.996, 0.996])
    assert load_config(None, ["steps=400", "semi.ema_decay=0.996"]).ema_decay == 0.996


def test_feedback_needs_something_to_send():
    with pytest.raises(InvalidConfig, match="feedback.prompts must name at least one"):
        load_config(None, ["feedback.prompts=[]"])


def test_overrides_come_after_the_file_and_the_last_one_wins(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 7\noptim: {lr: 1e-2}\nviews:\n")
    config = load_config(file, ["steps=8", "views.scale=[1,2]", "steps=9"])
    assert (config.steps, config.optim.lr, config.views.scale) == (9, 0.01, (1.0, 2.0))


@pytest.mark.parametrize("override", ["steps", "=3", ""])
def test_an_override_that_is_none_says_how_one_reads(override):
    with pytest.raises(InvalidConfig, match="an override reads section.key=value"):
        load_config(None, [override])


def test_an_override_below_a_value_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 7\n")
    with pytest.raises(InvalidConfig, match="steps holds a value, not a section"):
        load_config(file, ["steps.more=1"])
    with pytest.raises(InvalidConfig, match="is not YAML"):
        load_config(file, ["steps=[1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1", "is not YAML"),
        ("- 1\n", "must hold keys and values, it holds a list"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InvalidConfig, match=message):
        load_config(file)
    with pytest.raises(InvalidConfig, match="cannot read the config file .*No such file"):
        load_config(tmp_path / "missing.yaml")


def test_a_saved_config_reads_back_equal(tmp_path):
    config = load_config(None, ["views.scale=[0.5,2]", "semi.method=vessa", "cache.expire_s=60", "out=ä"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert to_dict(config)["views"]["scale"] == [0.5, 2.0]


def test_the_api_key_is_never_saved(tmp_path):
    config = load_config(None, ["annotator.api_key=a-secret-of-mine"])
    assert config.annotator.api_key == "a-secret-of-mine"
    save_config(config, tmp_path / "config.yaml")
    assert "a-secret-of-mine" not in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml").annotator.api_key is None


def test_a_tilde_means_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/someone")
    assert load_config(None, ["data.root=~/data"]).data.root == "/homes/someone/data"
