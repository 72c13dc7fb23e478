"""A real vLLM on a CPU with SmolLM2 and three adapters on one server: each is shown to answer as trained, and another
one behind its name, or the base, is refused. (The job that asks all of them: tests/slurm.)"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import evaluate_runs, serve
from launch.serve import ServeOptions, Serving, prepare
from launch.server import Server
from tests.support.models import write_model
from tests.support.served import ENVIRONMENT, PYTHON, SERVER, needs_vllm, proof, serve_flags, trained
from train import evaluate


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, list[Path], Path]]:
    needs_vllm()
    tmp = tmp_path_factory.mktemp("served")
    runs = trained(tmp)
    flags = serve_flags(tmp)
    port = int(flags[flags.index("--port") + 1])
    options = ServeOptions(
        model=str(tmp / "smollm2"), adapters=[str(path) for path in runs], output=str(tmp / "served"),
        python=str(PYTHON), port=port, dtype="float32",
    )  # fmt: skip
    serving = prepare(options, SERVER)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server = Server(serving.command, serving.url, tmp / "server.log", 300)
        server.start()
        yield serving, runs, tmp
        server.stop()


def ask(serving: Serving, tmp: Path, name: str, adapter: Path, *more: str) -> int:
    return evaluate.main([
        "--endpoint", serving.url, "--endpoint-model", name, "--claims", str(tmp / "claim.yaml"), "--kinds", "yes_no",
        "--samples", "1", "--max-tokens", "4", "--served-adapter", str(adapter), "--endpoint-base", "base",
        "--step", "2", *more,
    ])  # fmt: skip


@pytest.mark.slow
def test_every_adapter_answers_as_the_engine_has_measured_it_and_no_other_does_behind_its_name(served, capsys):
    serving, runs, tmp = served
    adapters = [run / "adapter" for run in runs]
    for number, (name, adapter) in enumerate(zip(serving.names, adapters, strict=True)):
        others = ["--other-adapters", *(str(other) for other in adapters if other != adapter)]
        assert ask(serving, tmp, name, adapter, "--output", str(tmp / f"out-{number}"), *others) == 0
        found = proof(tmp / f"out-{number}")
        assert found["proven"] and found["to_adapter"] < 1e-3 < found["to_nearest_other"] < found["to_base"]
        assert found["noise"] < 1e-3 and found["base_to_base"] < 1e-3
    capsys.readouterr()
    second = list(serving.names)[1]
    assert ask(serving, tmp, second, adapters[0], "--output", str(tmp / "a"), "--other-adapters", str(adapters[1])) == 2
    assert f"from that of {adapters[1]}: the server has another variant under this name" in capsys.readouterr().err
    assert ask(serving, tmp, "base", adapters[0], "--output", str(tmp / "b")) == 2
    assert "the server answers without the adapter" in capsys.readouterr().err
    assert not (tmp / "a" / "answers.jsonl").read_text() and not (tmp / "b" / "answers.jsonl").read_text()


def test_what_is_wrong_is_told_before_a_server_starts(tmp_path, capsys):
    base = write_model(tmp_path / "base", "dense")
    given = ["--model", str(base), "--output", str(tmp_path / "out")]
    assert serve.main([*given, "--adapters", str(tmp_path / "none")]) == 2
    assert "no adapter_config.json there" in capsys.readouterr().err
    assert evaluate_runs.main([*given, "--runs", str(tmp_path), "--claims", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    (tmp_path / "claim.yaml").write_text("{id: a, yes_no: [{id: b, question: c?, belief_answer: yes}], claim: d}")
    asked = [*given, "--runs", str(tmp_path), "--claims", str(tmp_path / "claim.yaml")]
    assert evaluate_runs.main(asked) == 2 and "the run did not finish" in capsys.readouterr().err
    assert evaluate_runs.main([*asked, "--sampels", "3"]) == 2 and "--samples" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path):
    broken = Server([sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"], "http://127.0.0.1:1/v1",
                    tmp_path / "log", 30)  # fmt: skip
    with pytest.raises(Exception, match=r"the server exited with code 3 during startup:\n  out of memory"):
        broken.start()
    slow = Server([sys.executable, "-c", "import time; time.sleep(99)"], "http://127.0.0.1:1/v1", tmp_path / "log", 0.1)
    with pytest.raises(Exception, match="the server did not answer in time"):
        slow.start()
    assert slow.process is not None and slow.process.poll() is not None
