"""What no code of the project may do: run what a file from elsewhere says, in any way that Python has for it."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.checkpoints.reader import Checkpoint
from train.runtime.errors import UserError
from train.runtime.local import deepspeed_command

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("train", "launch", "tests") for path in (REPOSITORY / package).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that could run foreign code, or give a shell a string."""
    safe = {  # loaders made of YAML's safe one
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in map(ast.unparse, node.bases)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((line, name) for name in names if name.split(".")[0] in UNPICKLERS)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called == "torch.load" and given.get("weights_only") != "True":
            yield line, "torch.load without weights_only=True"
        if given.get("trust_remote_code", "False") != "False":
            yield line, "trust_remote_code"
        loaders = {given.get("Loader"), *map(ast.unparse, node.args[1:])}
        if called in ("yaml.load", "yaml.load_all", "yaml.unsafe_load") and not loaders & safe:
            yield line, f"{called}: use yaml.safe_load"
        if called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            yield line, "allow_pickle"
        if given.get("shell", "False") != "False" or called in ("os.system", "os.popen"):
            yield line, "a shell"
        if called in ("eval", "exec"):
            yield line, called


def test_nothing_unpickles_runs_remote_code_or_starts_a_shell():
    assert len(SOURCES) > 100
    found = [
        (path.relative_to(REPOSITORY).as_posix(), *what)
        for path in SOURCES
        for what in offences(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from dill import loads", "torch.load(path)", "torch.load(path, weights_only=False)",
        "AutoConfig.from_pretrained(p, trust_remote_code=True)", "AutoModel.from_pretrained(p, trust_remote_code=flag)",
        "yaml.load(text)", "np.load(p, allow_pickle=True)", "subprocess.run(text, shell=True)", "os.system(text)",
        "eval(text)",
    ],
)  # fmt: skip
def test_each_such_way_is_seen(code):
    assert len(list(offences(ast.parse(code)))) == 1


def test_a_checkpoint_that_is_a_pickle_is_not_opened(tmp_path):
    """A directory with pytorch_model.bin alone is refused, and what the pickle says is not done."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / "done").encode() + b"\ntR.")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        _ = Checkpoint(tmp_path).tensors
    assert not (tmp_path / "done").exists()


def test_a_script_gets_its_arguments_through_the_launcher_as_they_are(tmp_path):
    odd = ["a b", 'it\'s "quoted"', "two\nlines", "$HOME `id` ; * \\", "--mask=ü"]
    place = tmp_path / 'a "b"\nc\'s $HOME'
    place.mkdir()
    (place / "show.py").write_text(
        "import os, sys, json\n"
        "words = [word for word in sys.argv[1:] if not word.startswith('--local_rank')]\n"
        "open(f'said-{os.environ[\"RANK\"]}', 'w').write(json.dumps(words))\n"
    )
    command = deepspeed_command(place / "show.py", *odd, ranks=2)
    subprocess.run(
        command,
        cwd=place,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
    )
    assert [json.loads((place / f"said-{rank}").read_text()) for rank in (0, 1)] == [odd, odd]
