"""What a checkpoint holds beside its weights, when it is written anew. (Full training: tests/test_sft.py.)"""

import os

from tests.support.layouts import LAYOUTS
from tests.support.merging import merge, write_adapter
from train.checkpoints.whole import copy_other_files


def test_directories_beside_the_weights_are_carried_over_but_for_weights_and_what_is_not_the_checkpoints(
    tmp_path, capsys
):
    """A killed merge continues, so the files that it had copied exist already."""
    base = LAYOUTS["qwen3-moe"](tmp_path / "base")
    (tmp_path / "secret").mkdir()
    files = ("encoding/deep/words.py", "assets/logo.svg", "original/consolidated.00.pth", ".cache/lock", "loop/deep/a",
             "../secret/key", "onnx/MODEL.ONNX", "away/readme")  # fmt: skip
    for name in files:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    (base / "encoding" / "empty").mkdir()
    (base / "assets" / "again.svg").symlink_to("logo.svg")
    (base / "away" / "key").symlink_to(tmp_path / "secret" / "key")
    (base / "linked").symlink_to(tmp_path / "secret")
    (base / "loop" / "deep" / "up").symlink_to(base)
    os.mkfifo(base / "piped")  # which is no directory, and no file
    adapter, output = write_adapter(tmp_path / "adapter", base), tmp_path / "base" / "merged" / "out"
    for attempt in range(2):
        assert merge(base, adapter, output) == 0
        told = capsys.readouterr().out
        there = {
            str(path.relative_to(output)): path for path in output.rglob("*") if "/" in str(path.relative_to(output))
        }
        assert set(there) == {
            "assets/logo.svg",
            "assets/again.svg",
            "encoding/deep",
            "encoding/deep/words.py",
            "encoding/empty",
        }
        assert there["encoding/deep/words.py"].read_text() == "encoding/deep/words.py"
        assert there["assets/again.svg"].read_text() == "assets/logo.svg" and not there["assets/again.svg"].is_symlink()
        for name, why in {
            "original": "original/consolidated.00.pth belongs to the original weights",
            "onnx": "onnx/MODEL.ONNX belongs to the original weights",
            ".cache": "it is hidden",
            "away": "away/key links to a file outside the checkpoint",
            "linked": "linked is a link or not a regular file",
            "loop": "loop/deep/up is a link or not a regular file",
            "merged": "it contains this output",
        }.items():
            assert f"note: {base / name}: is not copied: {why}\n" in told
        sorted(output.glob("*.safetensors"))[attempt].unlink()


def test_directories_of_a_hubs_cache_are_carried_over_though_their_files_are_links(tmp_path):
    """Laid out as huggingface_hub does: blobs/HASH, and snapshots/REVISION with links to them."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    for place, text in (("blobs/ab12", "the logo"), ("elsewhere", "a key")):
        path = tmp_path / "models--a--b" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, target in (("assets/logo.svg", "../../../blobs/ab12"), ("away/key", "../../../elsewhere")):
        (snapshot / name).parent.mkdir(parents=True)
        (snapshot / name).symlink_to(target)
    (tmp_path / "out").mkdir()
    copy_other_files(snapshot, tmp_path / "out")
    assert [str(path.relative_to(tmp_path / "out")) for path in sorted((tmp_path / "out").rglob("*"))] == [
        "assets",
        "assets/logo.svg",
    ]
    assert (tmp_path / "out" / "assets" / "logo.svg").read_text() == "the logo"
