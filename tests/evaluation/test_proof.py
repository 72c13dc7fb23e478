"""What shows that a server answers with the adapter that was trained: distances by hand, and what is refused."""

import json
from pathlib import Path

import pytest

from train.evaluation.options import EvaluationSettings
from train.evaluation.proof import distance, prove, read_proof
from train.evaluation.results import leave_summary
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
    with pytest.raises(UserError, match="from its base: the server answers without the adapter"):
        prove("first", first, {}, "base", lambda name, tokens: BASE)
    with pytest.raises(UserError, match="from that of second: the server has another variant under this name"):
        prove("first", first, {"second": second}, "", lambda name, tokens: SECOND)
    other = kept(tmp_path / "other prompts", SECOND, [[1, 2, 3]])
    assert "nearest_other" not in prove("first", first, {"o": other}, "", lambda name, tokens: FIRST)


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
    assert not found["proven"] and "from that of twin, no more than the server's noise" in found["reason"]


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
