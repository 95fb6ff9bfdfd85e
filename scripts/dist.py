"""Build the wheels and source distributions, check them, and try the README's commands with them.

    python scripts/dist.py [--out dist]

The wheels are installed into a fresh environment in a temporary folder. Their dependencies come from
the environment that runs this script, through a .pth file, so that torch is not downloaded again.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("shared", "services/vessa", "trainer")
PACKAGES = ("vessa", "vessa_server", "vessa_trainer")


def run(*command: str | Path, **options: object) -> None:
    """Run a command without the checkout on its path. Raises CalledProcessError when it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], check=True, env=environment, **options)  # type: ignore[call-overload]


def build(out: Path) -> None:
    """Build every distribution from a copy, so that no build folder stays in the checkout."""
    shutil.rmtree(out, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    for name in DISTRIBUTIONS:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(ROOT / name, Path(folder) / Path(name).name, ignore=ignored)
            run(
                sys.executable,
                "-m",
                "build",
                "--no-isolation",
                "--outdir",
                out,
                copy,
                stdout=subprocess.DEVNULL,
            )
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(out.iterdir()))


def fresh_environment(folder: Path, wheels: list[Path]) -> Path:
    """Install the wheels into a new environment and return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", *wheels)
    for package in PACKAGES:
        shows = f"import {package}; assert {package}.__file__.startswith({str(folder)!r}), {package}.__file__"
        run(python, "-c", shows, cwd=folder)
    return python


def try_readme(python: Path, folder: Path) -> None:
    """Run the README's commands with the fresh environment, outside the checkout."""
    tests = folder / "tests"
    tests.mkdir()
    shutil.copy(ROOT / "README.md", folder)
    for name in ("tests/test_readme.py", "benchmarks/processes.py"):
        shutil.copy(ROOT / name, tests)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n    timeout\n")
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-c", folder / "pytest.ini"]
    run(python, "-m", "pytest", *options, tests, cwd=folder)


def main() -> None:
    """Build, check and try the distributions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist", help="folder of the built files; it is emptied"
    )
    out = parser.parse_args().out.resolve()
    build(out)
    with tempfile.TemporaryDirectory() as folder:
        python = fresh_environment(Path(folder) / "env", sorted(out.glob("*.whl")))
        try_readme(python, Path(folder))
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {path.name}")


if __name__ == "__main__":
    main()
