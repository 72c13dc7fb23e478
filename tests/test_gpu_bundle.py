"""The bundle for a GPU node without network: what is in it, and that nothing else is needed there."""

import base64
import csv
import hashlib
import importlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.gpu import bundle

IMAGE = ("torch", "triton", "transformers", "peft", "accelerate")  # with all that they require
BUNDLED = (*bundle.LACKING, "deepspeed", "bitsandbytes")
PYTHON = ".".join(map(str, sys.version_info[:2]))


def required_by(names: tuple[str, ...]) -> set[str]:
    """These packages and what they require, and so on, of those that are installed."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            wanted = map(Requirement, requires)
            left += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment that has the image's packages and those of the bundle, and no others."""
    packages = tmp_path_factory.mktemp("packages")
    names = required_by(IMAGE) | {canonicalize_name(name) for name in BUNDLED}
    for name in names - {"flash-linear-attention", "fla-core"}:  # only where there is a GPU
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    path = f"{packages}{os.pathsep}{bundle.REPOSITORY}"
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_training_and_the_tests_of_a_gpu_import_nothing_that_a_node_lacks(node, tmp_path):
    """-S: without this environment's other packages."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which they would run")
    assert canonicalize_name("wandb") not in required_by(IMAGE)
    for names in ("train.sft, launch.preflight", "wandb"):
        done = subprocess.run([sys.executable, "-S", "-c", f"import {names}"], env=node, capture_output=True, text=True)
        assert (done.returncode == 0) == (names != "wandb"), done.stderr[-2000:]
    tests = [sys.executable, "-S", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(bundle.REPOSITORY / "tests/gpu")]
    done = subprocess.run(tests, env=node, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" in done.stdout.splitlines()[-1], done.stdout[-3000:]


def test_each_package_of_the_bundle_has_a_version_that_was_tested():
    missing = [name for name in BUNDLED if name.lower() not in bundle.constraints()]
    assert not missing


def test_a_wheel_is_cut_down_to_what_is_kept_and_installs(tmp_path):
    library = Path(importlib.import_module("markupsafe._speedups").__file__ or "")
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("thing/__init__.py", "value = 3\n")
        made.writestr("thing/unwanted.so", "no library")
        made.write(library, "thing/kept.so")
        made.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        made.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr("thing-1.0.dist-info/RECORD", "thing/unwanted.so,,\n")
    bundle.thin(wheel, lambda name: name != "thing/unwanted.so", strip=True)
    with zipfile.ZipFile(wheel) as cut:
        rows = list(csv.reader(io.StringIO(cut.read("thing-1.0.dist-info/RECORD").decode())))
        assert {row[0] for row in rows} == set(cut.namelist()) and "thing/unwanted.so" not in cut.namelist()
        for name, digest, size in rows[:-1]:
            data = cut.read(name)
            own = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={own}", str(len(data)))
        assert cut.read("thing/kept.so")[:4] == b"\x7fELF"
        assert b"\x00.symtab\x00" in library.read_bytes() and b"\x00.symtab\x00" not in cut.read("thing/kept.so")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", tmp_path / "there"]
    subprocess.run([*pip, wheel], check=True)
    assert (tmp_path / "there" / "thing" / "__init__.py").read_text() == "value = 3\n"


@pytest.mark.slow
def test_the_bundle_installs_into_an_empty_directory_and_its_tests_say_why_they_are_skipped(tmp_path, monkeypatch):
    """For this Python, and without Triton, whose 200 MB are compressed for minutes."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which its tests would run")
    if shutil.which("git") is None or not (bundle.REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    try:
        bundle.download("iniconfig", PYTHON, tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("no package registry is in reach")
    monkeypatch.setattr(bundle, "triton", lambda *_: None)
    made = tmp_path / "bundle"
    size = bundle.bundle(made, PYTHON, "130")
    assert size < bundle.MOST - 38_000_000  # which leaves room for Triton
    wheels = {canonicalize_name(path.name.split("-")[0]) for path in (made / "wheels").iterdir()}
    assert wheels == {canonicalize_name(name) for name in BUNDLED}
    (libraries,) = (made / "wheels").glob("bitsandbytes-*")
    found = {name for name in zipfile.ZipFile(libraries).namelist() if name.endswith(".so")}
    assert found == {f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda130")}

    target = tmp_path / "target"
    environment = os.environ | {"PYTHON": sys.executable, "TARGET": str(target), "PYTHONPATH": ""}
    done = subprocess.run(
        ["sh", str(made / "run.sh"), "-q"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "there is no GPU that torch can use" in done.stdout and "passed" not in done.stdout.splitlines()[-1]
    assert (target / "packages" / "deepspeed").is_dir() and (target / "repository" / "train" / "sft.py").is_file()
    assert not (target / "repository" / bundle.WITHOUT[0]).exists()
