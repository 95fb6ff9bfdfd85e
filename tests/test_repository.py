"""Check the repository: a trustworthy lock, equal versions, nothing of one machine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = {
    "vessa": ROOT / "shared",
    "vessa-server": ROOT / "services" / "vessa",
    "vessa-trainer": ROOT / "trainer",
}
COMPOSE_FILES = ("docker-compose.yml", "docker-compose.gpu.yml")


def project(name: str) -> dict[str, Any]:
    """Return the [project] table of a distribution."""
    return tomllib.loads((DISTRIBUTIONS[name] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lock_entries() -> dict[str, list[str]]:
    """Return the lines of each locked package by its name."""
    entries: dict[str, list[str]] = {}
    name = ""
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if re.match(r"[a-z0-9]", line):
            name = re.split(r"[=\[]", line)[0]
            assert name not in entries, f"{name} is locked twice: a fork of versions between Pythons"
        if line and not line.startswith("#"):
            entries.setdefault(name, []).append(line)
    return entries


def compose_services(name: str) -> dict[str, Any]:
    """Return the services of a compose file."""
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))["services"]


def normalized(requirement: str) -> str:
    """Return a requirement's name as package indexes compare it: 'PyYAML>=6 ; marker' gives 'pyyaml'."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement.strip())[0]).lower()


def tracked() -> list[Path]:
    """Return the files that git tracks."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = listed.stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_every_locked_file_is_exact_and_hashed() -> None:
    entries = lock_entries()
    assert len(entries) > 50
    for name, lines in entries.items():
        assert re.match(rf"{re.escape(name)}(\[[a-z,-]+\])?==[0-9][^ ]*( ; .+)? \\$", lines[0]), lines[0]
        hashes = lines[1:]
        assert hashes, name
        for line in hashes:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line


def test_lock_names_no_index_and_no_local_path() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"://|--(extra-)?index|--find-links|^-e|@ ", text, flags=re.MULTILINE)


def test_lock_holds_every_direct_dependency_and_tool() -> None:
    wanted = {normalized(item) for name in DISTRIBUTIONS for item in project(name)["dependencies"]}
    for line in (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", "-e")):
            wanted.add(normalized(line))
    assert wanted - lock_entries().keys() == {"vessa"}


def test_images_leave_out_the_tools_and_keep_every_dependency() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    (left_out,) = re.findall(r"^# Only the tools need: (.+)$", text, flags=re.MULTILINE)
    assert {"pytest", "mkdocs-material", "twine"} <= set(left_out.split()) <= lock_entries().keys()
    needed = {normalized(item) for name in DISTRIBUTIONS for item in project(name)["dependencies"]}
    assert needed.isdisjoint(left_out.split())


def test_torch_family_is_pinned_alike_in_server_and_lock() -> None:
    pinned = [item for item in project("vessa-server")["dependencies"] if "==" in item]
    assert {normalized(item) for item in pinned} == {"torch", "torchvision", "sam2"}
    for item in pinned:
        assert lock_entries()[normalized(item)][0].startswith(item.replace(" ", ""))


def test_distributions_agree_on_version_license_and_python() -> None:
    projects = [project(name) for name in DISTRIBUTIONS]
    assert [item["name"] for item in projects] == list(DISTRIBUTIONS)
    for key in ("version", "requires-python", "license"):
        assert len({item[key] for item in projects}) == 1, key
    assert projects[0]["requires-python"] == ">=3.11,<3.14"


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_package_and_changelog_carry_the_version_of_the_distribution(name: str) -> None:
    package = DISTRIBUTIONS[name] / name.replace("-", "_") / "__init__.py"
    version = project(name)["version"]
    assert f'__version__ = "{version}"' in package.read_text(encoding="utf-8")
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_each_distribution_has_its_command(name: str) -> None:
    assert project(name)["scripts"] == {name: f"{name.replace('-', '_')}.cli:main"}


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_file_is_yaml_with_services(name: str) -> None:
    services = compose_services(name)
    assert {"annotator", "trainer"} <= services.keys()


def test_compose_services_are_hardened_and_probed() -> None:
    services = compose_services("docker-compose.yml")
    for name, service in services.items():
        assert service["read_only"] is True, name
    for name in ("annotator", "trainer", "phantoms"):
        assert services[name]["cap_drop"] == ["ALL"], name
    assert services["trainer"]["networks"] == ["internal"]
    assert services["redis"]["networks"] == ["internal"]
    assert "ports" not in services["redis"]
    assert all(port.startswith("127.0.0.1:") for port in services["annotator"]["ports"])
    assert services["redis"]["command"] == ["sh", "/start.sh"]
    start = (ROOT / "deploy" / "redis" / "start.sh").read_text(encoding="utf-8")
    assert all(words in start for words in ("user default off", "--aclfile", "--maxmemory "))


def test_gpu_override_adds_devices_and_nothing_else_to_the_trainer_command() -> None:
    plain, gpu = (
        yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))["services"] for name in COMPOSE_FILES
    )
    assert gpu["trainer"]["command"] == [*plain["trainer"]["command"], "--set", "device=cuda:0"]
    for name in ("annotator", "trainer"):
        (device,) = gpu[name]["deploy"]["resources"]["reservations"]["devices"]
        assert len(device["device_ids"]) == 1, name


def test_dockerfiles_share_their_lower_layers_and_run_as_nobody_special() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("Dockerfile.vessa", "Dockerfile.trainer")]
    lower = [text.split("ARG PYTHON_IMAGE", 1)[1].split("FROM dependencies AS wheels")[0] for text in texts]
    images = [text.split("\nFROM ${PYTHON_IMAGE}\n", 1)[1].split("RUN useradd")[0] for text in texts]
    assert lower[0] == lower[1]
    assert images[0] == images[1]
    assert "COPY --from=dependencies" in images[0]
    for text in texts:
        assert "# syntax" not in text
        assert text.index("\nUSER vessa\n") < text.index("\nHEALTHCHECK ") < text.index("\nENTRYPOINT ")


def test_the_bill_of_materials_holds_what_the_images_hold() -> None:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "scripts" / "sbom.py")
    assert spec is not None
    assert spec.loader is not None
    sbom = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sbom)
    names = sbom.in_images()
    assert {"torch", "redis", "pydicom", "vessa-server", "vessa-trainer"} <= names
    assert not {"pytest", "ruff", "mypy", "uv"} & names
    part = {"bom-ref": "Torch==1", "name": "Torch"}
    bom = {"components": [part, {"bom-ref": "uv==1", "name": "uv"}]}
    bom["dependencies"] = [{"ref": "Torch==1", "dependsOn": ["uv==1"]}, {"ref": "uv==1"}]
    assert sbom.keep(bom, names) == 1
    assert bom == {"components": [part], "dependencies": [{"ref": "Torch==1", "dependsOn": []}]}
    assert {c["name"] for c in sbom.vendored()} >= {"htm", "uplot"}


def test_no_file_names_this_machine_or_holds_a_secret() -> None:
    folders = [re.escape(str(ROOT)) + "/", "/home/[a-z]+/", "/Users/[A-Za-z]+/"]
    if str(ROOT.parent) not in {"/", "/tmp", "/opt", "/srv", "/root", "/usr/src", "/var/tmp"}:
        folders.append(re.escape(str(ROOT.parent)) + "/")
    secret = re.compile(rf"(?<![\w.$}}])({'|'.join(folders)})|-----BEGIN [A-Z ]*PRIVATE KEY")
    found = []
    for path in tracked():
        data = path.read_bytes()
        if path == Path(__file__) or b"\0" in data[:8192]:
            continue
        match = secret.search(data.decode("utf-8", errors="replace"))
        if match:
            found.append(f"{path.relative_to(ROOT)}: {match.group()}")
    assert found == []


def test_no_tracked_file_is_a_build_product_or_huge() -> None:
    for path in tracked():
        assert path.suffix not in {".pyc", ".pkl", ".pt", ".pth"}, path
        assert path.stat().st_size < 40_000_000, path


def test_modules_stay_readable() -> None:
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked()
        if path.suffix == ".py" and (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert too_long == {}
