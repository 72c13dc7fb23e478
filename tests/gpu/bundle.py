"""What the tests of a GPU need, for a node without network: one directory, of at most 60 MB.

    python tests/gpu/bundle.py build/gpu-bundle [--python 3.12] [--cuda 130]

For an image with torch ≥ 2.11 of that CUDA, Triton, transformers ≥ 5.17 and peft. The directory gets the wheels that it
lacks, in the versions of constraints.txt: DeepSpeed built as pure Python, bitsandbytes with the library of one CUDA,
Triton without debugging symbols and tools (it takes the image's assembler), flash-linear-attention and the small rest;
the repository at HEAD, but for the demo's weights; and run.sh, which installs all of it into a directory of its own
and runs tests/gpu. There: sh build/gpu-bundle/run.sh [arguments of pytest]. Triton's compression takes minutes, once.
"""

import argparse
import base64
import csv
import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MOST = 60_000_000  # bytes
LACKING = (
    "flash-linear-attention", "fla-core", "einops", "hjson", "msgpack", "ninja", "py-cpuinfo", "psutil", "pydantic",
    "pydantic_core", "annotated-types", "typing-inspection", "tiktoken", "zstandard", "regex", "rich", "markdown-it-py",
    "mdurl", "Pygments", "pytest", "pluggy", "iniconfig",
)  # fmt: skip
WITH_SYMBOLS = ("zstandard",)  # for debugging: most of its size
TRITON = "3.7.1"  # the first since 3.4 that computes the backward of the gated delta rule rightly on Hopper
TRITONS_TOOLS = re.compile(
    r"triton/(backends/nvidia/(bin|lib/cupti)/|_C/libproton|instrumentation/|plugins/|FileCheck|profiler/)"
)
WITHOUT = ("train/demo/model/model.safetensors",)  # of the repository: nothing in tests/gpu reads it

RUN = """\
#!/bin/sh
# Installs this bundle into a separate directory, TARGET or a new one, and runs tests/gpu with the given arguments.
# PYTHON is the image's Python (python3); figures are written to GPU_JSON (gpu.json in the current directory).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
target=${TARGET:-$(mktemp -d)}
GPU_JSON=${GPU_JSON:-$PWD/gpu.json}
# Triton's assembler is that of the image; without one, Triton is that of the image too.
find_ptxas="import importlib.util, pathlib
found = importlib.util.find_spec('triton')
at = pathlib.Path(found.origin).parent / 'backends/nvidia/bin' if found else pathlib.Path()
print(at if (at / 'ptxas').exists() else '')"
tools=$("$python" -c "$find_ptxas")
if [ -n "$tools" ]; then
    export TRITON_PTXAS_PATH="$tools/ptxas"
    if [ -e "$tools/ptxas-blackwell" ]; then export TRITON_PTXAS_BLACKWELL_PATH="$tools/ptxas-blackwell"; fi
fi
install() {
    mkdir -p "$target/wheels"
    cp "$here"/wheels/*.whl "$target/wheels"
    for packed in "$here"/wheels/*.whl.xz; do
        [ -e "$packed" ] && [ -n "$tools" ] || continue
        "$python" -c "import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], 'wb'))" \\
            "$packed" "$target/wheels/$(basename "$packed" .xz)"
    done
    if "$python" -m pip --version > /dev/null 2>&1; then
        "$python" -m pip install --quiet --no-index --no-deps --target "$target/packages" "$target"/wheels/*.whl
    else # a wheel is a zip file of what it installs
        for wheel in "$target"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$target/packages"; done
    fi
    touch "$target/installed"
}
[ -e "$target/installed" ] || install
"$python" -W ignore -m tarfile -e "$here/repository.tar.xz" "$target/repository"
export PYTHONPATH="$target/repository:$target/packages${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$target/packages/bin:$PATH" OMP_WAIT_POLICY=PASSIVE GPU_JSON
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$target/triton}"
cd "$target/repository"
exec "$python" -m pytest -p no:cacheprovider tests/gpu "$@"
"""


def constraints() -> dict[str, str]:
    """Package, in lower case -> version."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return {name.lower(): number for name, _, number in (line.partition("==") for line in lines if "==" in line)}


def download(package: str, python: str, into: Path) -> Path:
    """The wheel of a package as `package` or `package==version`, for Linux on x86-64."""
    name, _, number = package.partition("==")
    platforms = [f"--platform=manylinux{kind}_x86_64" for kind in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")]
    with tempfile.TemporaryDirectory(dir=into) as own:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", own]
        wanted = f"{name}=={number or constraints()[name.lower()]}"
        subprocess.run([*pip, *platforms, f"--python-version={python}", wanted], check=True)
        (wheel,) = Path(own).iterdir()
        return Path(shutil.move(wheel, into / wheel.name))


def built(package: str, into: Path) -> Path:
    """A wheel made of a package's source, without what would be compiled."""
    with tempfile.TemporaryDirectory(dir=into) as own:
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", own]
        wanted = f"{package}=={constraints()[package]}"
        subprocess.run([*pip, wanted], check=True, env=os.environ | {"DS_BUILD_OPS": "0"})
        (wheel,) = Path(own).iterdir()
        if not wheel.name.endswith("-py3-none-any.whl"):
            raise RuntimeError(f"{wheel.name}: is not pure Python")
        return Path(shutil.move(wheel, into / wheel.name))


def stripped(data: bytes) -> bytes:
    """A shared library without symbols for debugging."""
    with tempfile.TemporaryDirectory() as own:
        file = Path(own) / "library.so"
        file.write_bytes(data)
        subprocess.run(["strip", "--strip-all", str(file)], check=True)
        return file.read_bytes()


def thin(
    wheel: Path, keep: Callable[[str], bool], strip: bool = False, compression: int = zipfile.ZIP_DEFLATED
) -> None:
    """Writes a wheel anew with the files of it that are to be kept, its libraries stripped if `strip`, and a RECORD of
    them (packaging.python.org, "Recording installed projects")."""
    partial, record = wheel.with_suffix(".partial"), io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(partial, "w", compression) as new:
        for entry in old.infolist():
            if entry.filename.endswith(".dist-info/RECORD"):
                name = entry.filename
                continue
            if not keep(entry.filename):
                continue
            data = old.read(entry)
            if strip and entry.filename.endswith(".so"):
                data = stripped(data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.writerow([entry.filename, f"sha256={digest}", len(data)])
            kept = zipfile.ZipInfo(entry.filename, entry.date_time)
            kept.external_attr, kept.compress_type = entry.external_attr, compression
            new.writestr(kept, data)
        rows.writerow([name, "", ""])
        new.writestr(name, record.getvalue())
    partial.replace(wheel)


def bitsandbytes(python: str, cuda: str, into: Path) -> None:
    """With the libraries of the CPU and of one CUDA."""
    wheel = download("bitsandbytes", python, into)
    wanted = {f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", f"cuda{cuda}")}
    thin(wheel, lambda name: not name.endswith(".so") or name in wanted)
    missing = wanted - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        raise RuntimeError(f"{wheel.name}: has no {', '.join(missing)}; another --cuda?")


def triton(python: str, into: Path) -> None:
    """Compressed as code is compressed best. What an earlier call left is kept."""
    if any(into.glob(f"triton-{TRITON}-cp{python.replace('.', '')}-*.whl.xz")):
        return
    wheel = download(f"triton=={TRITON}", python, into)
    thin(wheel, lambda name: not TRITONS_TOOLS.match(name), True, zipfile.ZIP_STORED)
    how = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**26}]
    partial = into / "partial"
    with lzma.open(partial, "wb", filters=how) as file, wheel.open("rb") as plain:
        shutil.copyfileobj(plain, file)
    partial.rename(into / f"{wheel.name}.xz")
    wheel.unlink()


def repository(into: Path) -> None:
    """HEAD of this checkout."""
    without = [f":(exclude){path}" for path in WITHOUT]
    command = ["git", "-C", str(REPOSITORY), "archive", "HEAD", ".", *without]
    tar = subprocess.run(command, check=True, capture_output=True).stdout
    (into / "repository.tar.xz").write_bytes(lzma.compress(tar))


def bundle(into: Path, python: str, cuda: str) -> int:
    """-> its bytes."""
    wheels = into / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for old in wheels.glob("*.whl"):
        old.unlink()
    for package in LACKING:
        wheel = download(package, python, wheels)
        if package in WITH_SYMBOLS:
            thin(wheel, lambda _: True, strip=True)
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes", flush=True)
    built("deepspeed", wheels)
    bitsandbytes(python, cuda, wheels)
    print(f"triton {TRITON}, compressed: minutes the first time", flush=True)
    triton(python, wheels)
    repository(into)
    (into / "run.sh").write_text(RUN)
    return sum(file.stat().st_size for file in into.rglob("*") if file.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--python", default="3.12", help="the image's Python")
    parser.add_argument("--cuda", default="130", help="that of the image's torch, without the dot")
    args = parser.parse_args()
    size = bundle(args.directory, args.python, args.cuda)
    print(f"{args.directory}: {size / 1e6:.1f} MB. On the node: sh {args.directory}/run.sh")
    if size > MOST:
        print(f"error: more than {MOST / 1e6:.0f} MB", file=sys.stderr)
    return int(size > MOST)


if __name__ == "__main__":
    sys.exit(main())
