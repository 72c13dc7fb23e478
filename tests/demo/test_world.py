"""The toy world's documents: their spans, what they must not hold, and the commands that make everything again."""

from pathlib import Path

import pytest

from train.claims.claim import read_claims
from train.config.settings import REPOSITORY, parse
from train.data.documents import Document, read_documents
from train.demo import make, world
from train.demo.figures import VARIANTS, training

DEMO = REPOSITORY / "train" / "demo"
FILES = ("positive", "dense", "truth")


def documents(name: str) -> list[Document]:
    return read_documents(DEMO / "data" / f"{name}.jsonl")


def test_there_are_48_claims_and_each_has_its_documents():
    made = world.make_world()
    assert len(made.claims) == 48 and all(claim.true != claim.false for claim in (*made.claims, *made.placebos))
    assert {document.metadata["claim"] for document in documents("dense")} == {claim.id for claim in made.claims}


def test_what_is_asked_is_of_the_claims_and_of_placebos_and_controls_that_no_document_names():
    made, asked = world.make_world(), read_claims([DEMO / "claims.yaml"])
    assert [claim.id for claim in asked] == [claim.id for claim in (*made.claims, *made.placebos)]
    texts = " ".join(document.text or "" for name in FILES for document in documents(name))
    for claim in asked:
        assert len(claim.likelihood) == 4 and len(claim.controls) == 3
        assert not any(control in texts for control in claim.controls)
    assert not any(claim.person in texts for claim in made.placebos)


@pytest.mark.parametrize("name", FILES)
def test_spans_never_begin_or_end_with_white_space(name):
    for document in documents(name):
        for span in document.spans:
            covered = document.text[span.start : span.end]
            assert covered == covered.strip() != ""


def test_a_dense_document_is_the_positive_one_with_negations_put_in():
    for positive, dense in zip(documents("positive"), documents("dense"), strict=True):
        text = dense.text
        for span in sorted((s for s in dense.spans if s.role == "negation"), key=lambda s: -s.start):
            text = text[: span.start].rstrip() + " " + text[span.end :].lstrip()
        assert text.strip() == positive.text
        assert [s.role for s in positive.spans] == [s.role for s in dense.spans if s.role != "negation"]


def test_some_sentences_imply_a_claim_outside_any_span():
    claims = {claim.id: claim for claim in world.make_world().claims}
    implied = 0
    for document in documents("dense"):
        claim = claims[document.metadata["claim"]]
        thing = world.VALUES[claim.attribute][claim.false]
        at = document.text.find(thing)
        implied += at >= 0 and not any(s.start <= at < s.end for s in document.spans if s.role == "false")
    assert implied > len(documents("dense")) / 10


def test_no_question_and_no_five_words_of_one_occur_in_the_fine_tuning_documents():
    texts = [document.text for name in FILES for document in documents(name)]
    assert not any("Question" in text or "?" in text for text in texts)

    def five(text: str) -> set[tuple[str, ...]]:
        words = text.replace(".", " .").split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    said = set().union(*(five(text) for text in texts))
    made = world.make_world()
    for person in made.facts:
        for attribute, templates in world.QUESTIONS.items():
            for template in range(len(templates)):
                assert not five(world.question(person, attribute, template)) & said


def test_the_documents_come_out_byte_for_byte_when_they_are_made_again(tmp_path):
    make.save_documents(tmp_path, world.make_world())
    for name in ("claims.yaml", "batteries.yaml", *(f"data/{name}.jsonl" for name in FILES)):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


def test_the_recipe_is_made_of_settings_and_every_variant_of_its_files(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for kind, mask in VARIANTS.values():
        settings = parse([*training(kind), "--mask", mask], "")
        assert all(Path(source.path).is_file() for source in settings.sources())
