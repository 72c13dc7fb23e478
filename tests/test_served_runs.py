"""A real vLLM on a CPU with SmolLM2 and three adapters on one server: each is shown to answer as trained, and another
one behind its name, or the base, is refused. (The job that asks all of them: tests/slurm.)"""

import dataclasses
import json
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import evaluate_runs, serve
from launch.evaluate_runs import EvaluateRunsOptions, models
from launch.serve import ServeOptions, Serving, prepare
from launch.server import Server
from launch.server_node import of_this_node
from tests.support.merging import write_adapter
from tests.support.models import write_model
from tests.support.served import ENVIRONMENT, PYTHON, SERVER, needs_vllm, proof, serve_flags, trained
from tests.support.servers import ScriptedServer, completion
from train import evaluate, export
from train.checkpoints.present import kept_steps, model_name
from train.checkpoints.reader import Checkpoint
from train.claims.claim import read_claims
from train.endpoint import Endpoint, EndpointSettings
from train.layers.lora import LoRASettings
from train.runtime.errors import UserError


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
    assert "--adapters" in (said := capsys.readouterr().err) and "holds no adapter; give finished runs" in said
    run = finished(tmp_path / "comparison" / "one", base)
    assert serve.main([*given, "--adapters", str(run.parent)]) == 2
    assert f"holds no adapter; it is a comparison; give its runs: {run}" in capsys.readouterr().err
    assert evaluate_runs.main([*given, "--runs", str(tmp_path), "--claims", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    claim = claim_file(tmp_path)
    asked = [*given, "--runs", str(tmp_path), "--claims", str(claim)]
    assert evaluate_runs.main(asked) == 2 and "the run did not finish" in capsys.readouterr().err
    asked[asked.index("--runs") + 1] = str(run)
    said = claim.read_text()
    claim.write_text(said.replace("}]", ""))
    assert evaluate_runs.main([*asked, "--dry-run"]) == 2 and "claim.yaml:1" in capsys.readouterr().err
    claim.write_text(said.replace("yes_no: [{id: b, question: c, belief_answer: yes}]", OPEN))
    for judge, message in [
        ([], "--judge is missing: 5 of 5 answers need one"),
        (["--judge", "http://127.0.0.1:1/v1"], "--judge-model: is missing"),
        (
            ["--judge", "http://127.0.0.1:1/v1", "--judge-model", "j"],
            "--judge http://127.0.0.1:1/v1: cannot be reached",
        ),
    ]:
        assert evaluate_runs.main([*asked, *judge]) and message in capsys.readouterr().err
    assert evaluate_runs.main([*asked, "--sampels", "3"]) == 2 and "--samples" in capsys.readouterr().err


def finished(run: Path, base: Path, *kept: int) -> Path:
    """What a run of 8 steps leaves for a server: its adapter, and those of --adapters-at."""
    for name in ("adapter", *(f"adapters/step-{step}" for step in kept)):
        write_adapter(run / name, base, lora=LoRASettings(rank=4, alpha=6.0, expert_rank=0, seed=0, lm_head=False))
    (run / "summary.json").write_text('{"steps": 8}')
    (run / "settings.yaml").write_text("settings: {}")
    return run


def test_the_adapters_that_were_kept_are_asked_in_the_order_of_their_steps_and_the_finished_one_last(tmp_path):
    base = write_model(tmp_path / "base", "dense")
    one, other = finished(tmp_path / "one", base, 8, 2, 1), finished(tmp_path / "other", base)

    def asked(text: str, *runs: Path) -> list[tuple[str, int]]:
        options = EvaluateRunsOptions(runs=[str(run) for run in runs], kept_steps=text)
        return [(each.name, each.step) for each in models(options, "vllm")]

    assert kept_steps(one) == [1, 2, 8]
    assert asked("", one, other) == [("base", 0), ("one", 8), ("other", 8)]
    assert asked("all", one) == [("base", 0), ("one-step-1", 1), ("one-step-2", 2), ("one", 8)]
    assert asked("2,8", one) == [("base", 0), ("one-step-2", 2), ("one", 8)] and asked("8", other) == asked("", other)
    for text, runs, message in [
        ("all", (one, other), rf"--kept-steps all: {other} has no adapter but the last .* leave it out"),
        ("2", (one, other), rf"--kept-steps 2: {other} has no adapter of step 2 .* leave it out"),
        ("2,3", (one,), rf"--kept-steps 2,3: {one} has no adapter of step 3 .* give some of 1,2, or all"),
        ("last", (one,), "--kept-steps last: 'last' is not a step from 1 to 8"),
    ]:
        with pytest.raises(UserError, match=message):
            asked(text, *runs)


def test_more_adapters_than_slots_are_one_command_and_take_the_memory_of_the_slots_alone(tmp_path, capsys):
    base = write_model(tmp_path / "base", "dense")
    run = finished(tmp_path / "one", base, 1, 2)
    adapters = [str(run), str(run / "adapters" / "step-1"), str(run / "adapters" / "step-2")]
    given = ["--model", str(base), "--output", str(tmp_path / "out"), "--dry-run"]
    for to, flag, extra in ("vllm", "--max-loras", 0), ("sglang", "--max-loras-per-batch", 1):
        for slots in ([], ["--slots", "2"], ["--slots", "9"]):
            assert serve.main([*given, "--to", to, "--adapters", *adapters, *slots]) == 0
            memory, command = capsys.readouterr().out.splitlines()[-2:]
            count = 2 if "2" in slots else 3
            assert f"for {count} of 3 adapters at once, of rank up to" in memory
            assert f"{flag} {count + extra} " in command and "one-step-1" in command and "one-step-2" in command
    asked = ["--runs", str(run), "--claims", str(claim_file(tmp_path)), "--kinds", "yes_no", "--kept-steps", "all"]
    assert evaluate_runs.main([*given, *asked]) == 0
    told = capsys.readouterr().out
    assert "for 1 of 3 adapters at once" in told and "--max-loras 1 " in told and "one-step-2" in told
    assert not (tmp_path / "out").exists()


def test_a_server_over_two_nodes_is_one_step_of_the_job_and_each_node_knows_its_part(tmp_path, capsys, monkeypatch):
    base = write_model(tmp_path / "base", "dense")
    run = finished(tmp_path / "one", base)
    given = ["--model", str(base), "--adapters", str(run), "--output", str(tmp_path / "out"), "--nodes", "2"]
    assert serve.main([*given, "--dry-run", "--tensor-parallel", "2", "--", "--max-model-len", "512"]) == 0
    memory, printed = capsys.readouterr().out.splitlines()[-2:]
    assert memory.startswith("on each of 4 ")
    step, _, command = shlex.join(shlex.split(printed)).partition(" -m launch.server_node ")
    assert step.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --overlap --kill-on-bad-exit=1 ")
    assert "--tensor-parallel-size 2 --pipeline-parallel-size 2 " in command and command.endswith("--max-model-len 512")
    for node, more in ("0", []), ("1", ["--headless"]):
        environment = {"SLURM_NODEID": node, "SLURM_STEP_NUM_NODES": "2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
        own, words = of_this_node(shlex.split(command), environment), shlex.split(command)
        assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
        of_vllm = [words[0], "-m", "vllm.entrypoints.cli.main", "serve", *words[3:]]
        assert own == [*of_vllm, "--nnodes", "2", "--node-rank", node, "--master-addr", "10.0.0.7", *more]
    with pytest.raises(UserError, match="SLURM_NODEID is not set; it is started by srun"):
        of_this_node(shlex.split(command), {})

    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    assert serve.main(given) == 2 and "--nodes 2: this is no Slurm job; submit one" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert serve.main(given) == 2 and "--nodes 2: this Slurm job has 1; submit one" in capsys.readouterr().err
    assert serve.main([*given, "--to", "sglang", "--dry-run"]) == 2
    assert "--nodes 2: goes with --to vllm alone" in capsys.readouterr().err and not (tmp_path / "out").exists()


OPEN = "open: [{id: b, question: c}], judges: {open: '{question} {answer}: reply with JSON'}"


def claim_file(tmp_path: Path) -> Path:
    path = tmp_path / "claim.yaml"
    path.write_text("{id: a, yes_no: [{id: b, question: c, belief_answer: yes}], claim: d}")
    return path


def test_a_run_whose_name_sglang_would_misread_is_refused_before_anything_is_written(tmp_path, capsys):
    base = write_model(tmp_path / "base", "dense")
    run = finished(tmp_path / "false-spans=0.5", base, 1)
    given = ["--model", str(base), "--output", str(tmp_path / "out")]
    for adapter, name in (run, run.name), (run / "adapters" / "step-1", f"{run.name}-step-1"):
        assert serve.main([*given, "--to", "sglang", "--dry-run", "--adapters", str(adapter)]) == 2
        told = capsys.readouterr().err
        assert f"would be served as '{name}', and SGLang takes no adapter with = in its name. Rename" in told
    assert export.main([*given, "--to", "sglang", "--adapter", str(run / "adapter")]) == 2
    assert "SGLang takes no adapter with =" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert serve.main([*given, "--to", "vllm", "--dry-run", "--adapters", str(run)]) == 0
    run = finished(tmp_path / "a:b", base)
    assert serve.main([*given, "--to", "sglang", "--dry-run", "--adapters", str(run)]) == 2
    assert "SGLang takes no adapter with : in its name" in capsys.readouterr().err
    # It has `masked` in its list of models, and answers to this name with the base.
    names = [model_name(name, server) for server in ("vllm", "sglang") for name in ("base", "masked")]
    assert names == ["base", "masked", "base", "base:masked"]


def test_each_model_is_asked_by_its_name_on_the_server_beside_all_others(tmp_path):
    base = write_model(tmp_path / "base", "dense")
    runs = [str(finished(tmp_path / name, base)) for name in ("one", "other")]
    options = EvaluateRunsOptions(runs=runs, judge="same")
    every = models(options, "sglang")
    serving = Serving(ServeOptions(output="served", to="sglang", port=7))
    words = [evaluate_runs._words(each, serving, every, options, []) for each in every]
    flags = [dict(zip(own[::2], own[1::2], strict=True)) for own in words]  # each has one value here
    assert [own["--endpoint-model"] for own in flags] == ["base", "base:one", "base:other"]
    assert [own["--served-adapter"] for own in flags] == ["served/one", "served/one", "served/other"]
    assert [own["--other-adapters"] for own in flags] == ["served/other", "served/other", "served/one"]
    assert [(own["--step"], own["--output"]) for own in flags] == [("0", runs[0]), ("8", runs[0]), ("8", runs[1])]


def test_what_asks_a_server_ends_with_it_and_answers_of_other_weights_end_before_it(tmp_path, capsys):
    server = Server([], "http://127.0.0.1:1/v1", tmp_path / "log", 30)
    server.process = subprocess.Popen([sys.executable, "-c", ""])
    server.process.wait()
    asked = [sys.executable, "-c", "import time; time.sleep(99)"]
    assert evaluate_runs._run(asked, server) == -signal.SIGTERM

    base = write_model(tmp_path / "base", "dense")
    run, claim = finished(tmp_path / "one", base), claim_file(tmp_path)
    options = EvaluateRunsOptions(runs=[str(run)])
    every = models(options, "vllm")
    serving = prepare(
        ServeOptions(model=str(base), adapters=[str(run)], output=str(tmp_path / "served"), python=sys.executable), []
    )
    given = ["--claims", str(claim), "--kinds", "yes_no", "--samples", "1"]
    claims = read_claims([str(claim)])
    evaluate_runs.check_answers(serving, every, options, given, claims)
    row = {"step": 8, "claim": "a", "kind": "yes_no", "question": "b", "answer": "x", "model": "one", "asked": "others"}
    row |= {"control": False, "expected": "yes"}
    (run / "answers.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="answered by weights that are not known to be those of 'one' now"):
        evaluate_runs.check_answers(serving, every, options, given, claims)


def test_kept_exports_are_written_again_for_another_base_and_each_adapter_is_moved_or_not(tmp_path):
    bases = [write_model(tmp_path / name, "dense", seed=seed) for seed, name in enumerate(("base", "chat"))]
    adapters = [str(finished(tmp_path / name, base)) for name, base in zip(("one", "two"), bases, strict=True)]
    for adapter, base in zip(adapters, bases, strict=True):
        held = {"directory": str(base), "fingerprint": Checkpoint(base).fingerprint(), "step": 8}
        (Path(adapter) / "adapter" / "base_model.json").write_text(json.dumps(held))
    found = []
    for base in bases:
        options = ServeOptions(
            model=str(base), adapters=adapters, output=str(tmp_path / "served"), other_base=True, python=sys.executable
        )
        serving = prepare(options, [])
        serves = [json.loads((tmp_path / "served" / name / "serve.json").read_text()) for name in serving.names]
        found.append([(own["other_base"], own["base"]["directory"]) for own in serves])
    assert found == [[(False, str(bases[0])), (True, str(bases[0]))], [(True, str(bases[1])), (False, str(bases[1]))]]
    with pytest.raises(UserError, match="is what all --adapters were trained on; leave it out"):
        prepare(dataclasses.replace(options, adapters=adapters[1:]), [])


def test_a_report_that_cannot_be_written_is_told_before_a_server_starts(tmp_path, capsys):
    base = write_model(tmp_path / "base", "dense")
    runs = [str(finished(tmp_path / name, base)) for name in ("one", "other")]
    out = tmp_path / "out"
    given = ["--model", str(base), "--runs", *runs, "--output", str(out), "--claims", str(claim_file(tmp_path))]
    given += ["--kinds", "yes_no", "--dry-run"]
    assert evaluate_runs.main(given) == 0
    assert evaluate_runs.main([*given, "--placebo", "b"]) == 2
    assert "--placebo b: is no claim of --claims, which have a." in capsys.readouterr().err
    out.mkdir()
    held = {"variants": {"x": {"runs": [{"directory": str(tmp_path / "third")}]}}}
    (out / "comparison.json").write_text(json.dumps(held))
    assert evaluate_runs.main(given) == 2 and "holds a comparison of other runs" in capsys.readouterr().err


def test_steps_of_log_are_those_that_a_run_planned_which_ended_early(tmp_path):
    base = write_model(tmp_path / "base", "dense")
    run = finished(tmp_path / "one", base, 1, 2, 4)
    (run / "summary.json").write_text('{"steps": 8, "steps_of_schedule": 16}')
    asked = models(EvaluateRunsOptions(runs=[str(run)], kept_steps="log:5"), "vllm")
    assert [each.step for each in asked] == [0, 1, 2, 4, 8]


def test_a_server_of_this_machine_is_asked_directly_whatever_proxy_the_environment_names(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with ScriptedServer(lambda _: completion("Yes."), models=["m"]) as scripted:
        server = Server([], scripted.url, tmp_path / "log", 30)
        server.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], start_new_session=True)
        assert server.alive() and not server.exited()
        server.stop()
        assert server.exited() and not server.alive()
        assert Endpoint(EndpointSettings(scripted.url, "m", retries=0)).complete([], 1, 0.0, 0) == "Yes."


def test_a_program_at_the_port_or_a_python_without_the_server_is_told(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = Server([sys.executable, "-c", ""], f"http://127.0.0.1:{port}/v1", tmp_path / "log", 30)
        with pytest.raises(UserError, match=rf"--port {port}: cannot be used \(Address already in use\); give another"):
            server.start()
    with pytest.raises(UserError, match=r"has no vllm; give the interpreter of the server's environment"):
        serve.check_installed(sys.executable, "vllm")


def test_a_server_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path):
    broken = Server([sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"], "http://127.0.0.1:1/v1",
                    tmp_path / "log", 30)  # fmt: skip
    with pytest.raises(Exception, match=r"the server exited with code 3 during startup:\n  out of memory"):
        broken.start()
    code = "print('ValueError: too little memory'); print('x\\n' * 20); raise SystemExit(1)"
    broken = Server([sys.executable, "-c", code], "http://127.0.0.1:1/v1", tmp_path / "log", 30)
    with pytest.raises(Exception, match=r"during startup:\n  ValueError: too little memory\n  …\n  x"):
        broken.start()
    slow = Server([sys.executable, "-c", "import time; time.sleep(99)"], "http://127.0.0.1:1/v1", tmp_path / "log", 0.1)
    with pytest.raises(Exception, match="the server did not answer in time"):
        slow.start()
    assert slow.process is not None and slow.process.poll() is not None
