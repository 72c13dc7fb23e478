"""What shows that a server answers with the adapter that was trained: distances by hand, and what is refused."""

import json
from pathlib import Path

import pytest

from train.evaluation.options import EvaluationSettings
from train.evaluation.proof import distance, proof_line, prove, prove_base, read_proof
from train.evaluation.results import keep_proof, leave_summary
from train.evaluation.store import Records
from train.runtime.errors import UserError

BASE, FIRST, SECOND = [[-1.0, -2.0]], [[-1.5, -1.0]], [[-1.0, -1.0]]


def kept(directory: Path, adapter: list[list[float]], tokens: list[list[int]] | None = None) -> Path:
    directory.mkdir()
    proof = {"tokens": tokens or [[5, 6, 7]], "base": BASE, "adapter": adapter}
    (directory / "proof.json").write_text(json.dumps(proof))
    return directory


def test_the_distance_is_the_mean_over_tokens():
    assert distance(BASE, FIRST) == (0.5 + 1.0) / 2
    assert distance([[-1.0], [-2.0, -3.0]], [[-1.0], [-2.0, -6.0]]) == 1.0


def test_a_server_is_proven_and_one_with_the_base_or_another_variant_behind_the_name_is_refused(tmp_path):
    first, second = kept(tmp_path / "first", FIRST), kept(tmp_path / "second", SECOND)
    served = {"base": BASE, "first": [[-1.5, -1.01]], "second": SECOND}
    found = prove("first", first, {"second": second}, "base", lambda name, tokens: served[name])
    assert found["proven"] and found["to_adapter"] == pytest.approx(0.005) and found["noise"] == 0
    assert found["to_base"] == pytest.approx((0.5 + 0.99) / 2) and found["base_to_base"] == 0
    assert found["nearest_other"] == "second" and found["to_nearest_other"] == pytest.approx((0.5 + 0.01) / 2)
    for base_name, said in (
        ("", "from its base"),
        ("base", "from the server's own base, from which the adapter is 0.75"),
    ):
        with pytest.raises(UserError, match=rf"{said}.*: the server answers without the adapter"):
            prove("first", first, {}, base_name, lambda name, tokens: BASE)
    with pytest.raises(UserError, match="from that of second: the server has another variant under this name"):
        prove("first", first, {"second": second}, "", lambda name, tokens: SECOND)


def test_a_variant_with_other_prompts_is_told_by_these(tmp_path):
    first, other = kept(tmp_path / "first", FIRST), kept(tmp_path / "other", SECOND, [[1, 2, 3]])
    asked = []

    def right(name: str, tokens: list[list[int]]) -> list[list[float]]:
        asked.append(tokens)
        return FIRST if tokens == [[5, 6, 7]] else [[-1.0, -3.0]]

    third = kept(tmp_path / "third", BASE, [[1, 2, 3]])  # as its base: nothing to tell it by
    found = prove("first", first, {"other": other, "third": third}, "", right)
    assert found["proven"] and "nearest_other" not in found
    assert len(asked) == 3  # the others' prompts once
    with pytest.raises(
        UserError, match="on the prompts of other 0 from that: the server has another variant under this"
    ):
        prove(
            "first", first, {"other": other}, "", lambda _, tokens: SECOND if tokens != [[5, 6, 7]] else [[-1.5, -1.5]]
        )
    # A weak variant that the answers are as far from as from its base is not what answers.
    weak = kept(tmp_path / "weak", [[-1.0, -1.88]], [[1, 2, 3]])
    served = {"base": BASE, "first": [[-1.5, -1.2]]}
    answers = lambda name, tokens: served[name] if tokens == [[5, 6, 7]] else BASE  # noqa: E731
    assert prove("first", first, {"weak": weak}, "base", answers)["proven"]


def test_an_adapter_is_told_by_what_it_changes_of_a_base_in_another_precision(tmp_path):
    small, quantized = kept(tmp_path / "small", [[-1.0, -1.9]]), [[-1.0, -2.2]]
    with pytest.raises(UserError, match=r"0 from the server's own base, from which the adapter is 0.05 away"):
        prove("small", small, {}, "base", lambda name, tokens: quantized)
    served = {"base": quantized, "small": [[-1.0, -2.1]]}
    found = prove("small", small, {}, "base", lambda name, tokens: served[name])
    assert not found["proven"] and found["to_served_base"] == pytest.approx(0.05)
    assert found["reason"].endswith("the noise of the server, whose base is 0.1 from the one that was trained on")


def test_an_adapter_of_which_only_a_part_is_applied_is_not_proven(tmp_path):
    first = kept(tmp_path / "first", FIRST)
    with pytest.raises(UserError, match=r"and 0.125 from the server's own base, from which the adapter is 0.75 away"):
        prove("first", first, {}, "base", lambda name, _: BASE if name == "base" else [[-1.25, -2.0]])
    found = prove("first", first, {}, "base", lambda name, _: BASE if name == "base" else [[-1.3, -1.45]])
    assert found["proven"] and found["to_adapter"] == pytest.approx(0.325)
    found = prove("first", first, {}, "base", lambda name, _: BASE if name == "base" else [[-1.9, -1.4]])
    assert not found["proven"] and "which is only 0.75 from its base: the server does not apply all of it" in str(found)


def test_the_base_is_told_from_the_adapters_without_which_it_is_asked(tmp_path):
    first, second = kept(tmp_path / "first", FIRST), kept(tmp_path / "second", SECOND)
    adapters = {"first": first, "second": second}
    found = prove_base("base", adapters, lambda name, tokens: [[-1.0, -2.1]])
    assert found["proven"] and found["to_base"] == pytest.approx(0.05) and found["nearest_other"] == "second"
    assert "the server answers with the base: 0.05 nats per token from it, 0.55 from second" in proof_line(found)
    with pytest.raises(UserError, match=r"0.75 nats per token from the base, and 0 from the adapter of first"):
        prove_base("base", adapters, lambda name, tokens: FIRST)
    found = prove_base("base", adapters, lambda name, tokens: [[-1.0, -3.0]])
    assert not found["proven"] and "the server's base is 0.5 nats per token from the one" in found["reason"]
    # Steps at which an adapter has hardly changed anything say nothing, however many there are.
    early = {f"step-{k}": kept(tmp_path / f"step-{k}", [[-1.0, -2.0 + k / 1000]]) for k in range(1, 9)}
    other_precision = [[-1.02, -1.99]]
    assert not prove_base("base", early, lambda name, tokens: other_precision)["proven"]
    assert prove_base("base", early | adapters, lambda name, tokens: other_precision)["proven"]
    (first / "serve.json").write_text('{"other_base": true}')
    found = prove_base("base", adapters, lambda name, tokens: BASE)
    assert not found["proven"] and found["other_base"]
    assert "no log-probabilities" in prove_base("base", {"second": second}, lambda name, tokens: None)["reason"]
    assert "has a proof.json" in prove_base("base", {"none": tmp_path}, lambda name, tokens: BASE)["reason"]


def test_a_step_is_unproven_if_some_of_its_answers_are(tmp_path):
    for step, answered, proven, expected in [
        (1, False, True, True), (1, True, False, False), (1, True, True, False), (2, True, True, False),
        (3, False, False, False), (3, False, True, True), (3, True, True, True),
    ]:  # fmt: skip
        keep_proof(tmp_path, step, {"proven": proven, "reason": "x"}, answered)
        assert json.loads((tmp_path / "evaluation.json").read_text())["proof"][str(step)]["proven"] == expected


def test_what_is_left_out_on_purpose_is_unproven_and_no_error(tmp_path):
    first = kept(tmp_path / "first", FIRST)
    (first / "serve.json").write_text('{"not_served": ["experts"]}')
    found = prove("first", first, {}, "base", lambda name, _: BASE if name == "base" else [[-1.1, -1.9]])
    assert not found["proven"] and "nearer to the base than to the adapter, without experts" in found["reason"]
    with pytest.raises(UserError, match="the server answers without the adapter"):
        prove("first", first, {}, "base", lambda name, _: BASE)


def test_without_the_servers_base_near_variants_are_not_told_apart(tmp_path):
    first, twin = kept(tmp_path / "first", FIRST), kept(tmp_path / "twin", [[-1.5, -1.02]])
    found = prove("first", first, {"twin": twin}, "", lambda name, _: [[-1.5, -1.03]])
    assert not found["proven"] and "0.01 nats per token from that of" in found["reason"]


def test_what_cannot_be_told_is_unproven_with_the_reason(tmp_path):
    first = kept(tmp_path / "first", FIRST)
    found = prove("first", first, {}, "base", lambda name, tokens: None)
    assert found == {"proven": False, "reason": "the server gives no log-probabilities of prompts"}
    (tmp_path / "foreign").mkdir()
    found = prove("first", tmp_path / "foreign", {}, "base", lambda name, tokens: FIRST)
    assert not found["proven"] and "has no proof.json" in found["reason"]
    noisy = iter([[[-1.5, -1.0]], [[-3.5, -1.0]]])  # 1 nat from itself, where adapter and base are 0.75 apart
    found = prove("first", first, {}, "", lambda name, tokens: next(noisy))
    assert not found["proven"] and "no more than the noise of the server" in found["reason"]


def test_what_the_server_leaves_out_and_another_base_are_kept_with_the_proof(tmp_path):
    first = kept(tmp_path / "first", FIRST)
    (first / "serve.json").write_text(json.dumps({"not_served": ["kv_b_proj"], "other_base": False}))
    found = prove("first", first, {}, "", lambda name, tokens: FIRST)
    assert found["proven"] and found["not_served"] == ["kv_b_proj"]
    (first / "serve.json").write_text(json.dumps({"not_served": [], "other_base": True}))
    found = prove("first", first, {}, "", lambda name, tokens: FIRST)
    assert not found["proven"] and found["other_base"] and "another base" in found["reason"]


def test_variants_no_further_apart_than_the_noise_are_unproven(tmp_path):
    first, twin = kept(tmp_path / "first", FIRST), kept(tmp_path / "twin", [[-1.5, -1.01]])
    answers = iter([[[-1.5, -1.02]], [[-1.5, -0.98]]])  # 0.02 a token from itself; the adapters are 0.005 apart
    found = prove("first", first, {"twin": twin}, "", lambda name, tokens: next(answers))
    assert not found["proven"] and "from that of twin, within the server's noise" in found["reason"]


def test_a_damaged_proof_is_refused(tmp_path):
    first = kept(tmp_path / "first", [[-1.0]])
    with pytest.raises(UserError, match=r"proof\.json: is damaged: it must have log p of every token but the first"):
        read_proof(first)


def test_that_a_directory_has_measurements_on_another_base_is_not_forgotten_by_the_next_evaluation(tmp_path):
    records = Records(tmp_path)
    try:
        for other_base in (False, True, False):
            leave_summary(EvaluationSettings(output=str(tmp_path), other_base=other_base), [], records, None)
            found = json.loads((tmp_path / "evaluation.json").read_text())["other_base"]
            assert found == (other_base or (tmp_path / "seen").exists())
            if other_base:
                (tmp_path / "seen").touch()
    finally:
        records.close()
