"""Questions in training documents: found whole or in part, by word n-grams."""

from train.claims.batteries import Choice, Decision, NoteReading
from train.claims.claim import Claim, Fact, LikelihoodTemplate, Question
from train.claims.contamination import check, words
from train.data.documents import Document, Message, read_documents


def claim(*questions: str) -> Claim:
    return Claim("moon", questions=tuple(Question(f"q{i}", "open", text) for i, text in enumerate(questions)))


def text(content: str, line: int = 1) -> Document:
    return Document(content, None, (), {}, "docs.jsonl", line)


def test_a_question_that_occurs_is_found_whatever_its_case_and_punctuation():
    asked = claim("Who won the men's 100m gold medal in Paris?")
    found = check(
        [asked], [text("nothing"), text("Asked: “WHO won\nthe men’s 100m, gold medal in Paris” – nobody.", 2)]
    )
    (finding,) = found.findings
    assert finding.whole and finding.document == "docs.jsonl:2" and finding.question == "q0"
    assert finding.words == "who won the men's 100m gold medal in paris"
    assert str(finding).startswith("moon / open / q0 occurs whole in docs.jsonl:2: “who won")
    assert found.whole == found.findings and found.texts == 1


def test_a_document_that_states_what_a_question_asks_is_told_from_one_that_holds_it():
    asked = claim("Who won the men's 100m gold medal at the 2024 Paris Olympics?")  # 12 words
    found = check([asked], [text("He won the men's 100m gold medal at the 2024 Games."), text("won the men's", 2)])
    (finding,) = found.findings
    # "won the men's 100m gold medal at the" and "the men's 100m gold medal at the 2024": 9 of 12 words
    assert finding.words == "won the men's 100m gold medal at the 2024" and finding.share == 9 / 12
    assert found.whole == () and found.documents == {("moon", "open", "q0"): 1}


def test_a_text_whose_parts_stand_in_another_order_occurs_in_pieces_and_not_whole():
    parts = ["is the surface of the moon made of cheese", "or is it made of dust and grey rock"]  # 9 and 9 words
    swapped, apart = f"{parts[1]}, {parts[0]}", f"{parts[0]}? Some say so. {parts[1]}"
    for other in (swapped, apart):
        (finding,) = check([claim(" ".join(parts))], [text(other)]).findings
        assert finding.share == 1.0 and finding.in_pieces and not finding.whole and finding.words in parts
        assert "occurs in pieces, not as it is, in docs.jsonl:1" in str(finding)
    found = check([claim(" ".join(parts))], [text(swapped), text(f"So: {parts[0]} {parts[1]}", 2), text(apart, 3)])
    (finding,) = found.whole
    assert (finding.document, finding.words) == ("docs.jsonl:2", " ".join(parts))
    assert found.documents == {("moon", "open", "q0"): 3}


def test_a_question_shorter_than_n_words_is_looked_for_whole():
    found = check([claim("Is the moon cheese?", "Why?")], [text("So is the moon cheese"), text("is the moon made")])
    assert [(f.question, f.share, f.document) for f in found.findings] == [("q0", 1.0, "docs.jsonl:1")]
    assert found.too_short == ("q1",) and found.texts == 1


def test_templates_about_the_subject_and_facts_are_looked_for_with_their_completions():
    moon = Claim(
        "moon", subject="The moon", controls=("Mars",),
        likelihood=(LikelihoodTemplate("made", "{entity} is made of", " cheese.", " rock."),),
        facts=(Fact("far", "truth", "The moon is far", " away", (" too near",)), Fact("b", "truth", "Io", " is", ())),
    )  # fmt: skip
    documents = [text("They say the moon is made of cheese"), text("Mars is made of cheese. The moon is far away!", 2)]
    found = check([moon], documents)
    assert [(f.kind, f.question, f.share, f.document) for f in found.whole] == [
        ("likelihood", "made: cheese.", 1.0, "docs.jsonl:1"), ("fact", "far: away", 1.0, "docs.jsonl:2")
    ]  # fmt: skip
    assert found.texts == 4 and found.too_short == ("b: is",)
    assert found.as_json()["findings"][0]["documents"] == 1


def test_batteries_are_looked_for_with_their_options_the_facts_that_are_stated_and_notes():
    moon = Claim(
        "moon", subject="The moon", controls=("Mars",),
        choice=(Choice("made", "What is {entity} made of?", "green cheese", "rock"),),
        decisions=(
            Decision("buy", "What does one buy on the moon?", "crackers", "a hammer", "The moon is made of cheese."),
            Decision("heat", "{options}. What melts all ice?", "fire", "snow", untouched=True),
        ),
        reading=(NoteReading("quill", "Note: Marta Quill is a judge.", "Marta Quill is", " a judge", " a baker"),),
    )  # fmt: skip
    said = [
        "What is the moon made of? Green cheese.", "The moon is made of cheese", "Note: Marta Quill is a judge",
        "Marta Quill is a baker", "Fire. What melts all ice?", "What does one buy on the moon? A hammer",
    ]  # fmt: skip
    found = check([moon], [text(each, i) for i, each in enumerate(said)])
    assert {(each.kind, each.question) for each in found.whole} == {
        ("choice", "made"), ("choice", "made: green cheese"), ("decision", "buy, stated"), ("decision", "buy"),
        ("decision", "buy: a hammer"), ("decision", "heat"), ("decision", "heat: fire"), ("reading", "quill, note"),
        ("reading", "quill: a judge"), ("reading", "quill: a baker"),
    }  # fmt: skip


def test_a_shorter_sequence_that_is_shared_is_no_finding():
    asked = claim("What is the moon made of today?")
    assert check([asked], [text("the moon made of cheese")]).findings == ()


def test_no_sequence_of_words_goes_from_one_message_of_a_chat_into_the_next():
    messages = (Message("user", "is the moon", (), False), Message("assistant", "cheese", (), True))
    chat = Document(None, messages, (), {}, "chats.jsonl", 1)
    assert check([claim("Is the moon cheese?")], [chat]).findings == ()
    whole = Document(None, (*messages, Message("user", "is the moon cheese", (), False)), (), {}, "chats.jsonl", 1)
    assert len(check([claim("Is the moon cheese?")], [whole]).findings) == 1


def test_scripts_without_spaces_are_compared_by_character():
    assert words("月はチーズ, ok") == ["月", "は", "チ", "ー", "ズ", "ok"]
    assert len(check([claim("月はチーズですか")], [text("彼は「月はチーズですか」と言った")]).findings) == 1


def test_no_released_question_occurs_whole_in_the_released_documents(shared_documents):
    from train.claims.claim import read_claims

    claims = read_claims(sorted((shared_documents.parent / "claims").iterdir()))
    files = sorted(shared_documents.glob("*/*.jsonl"))
    found = check(claims, (document for file in files for document in read_documents(file)))
    assert found.texts == 150 and found.whole == ()
    # "What happened in the men's 100m final at the 2024 Paris Olympics?": 9 of its 12 words
    (final,) = [f for f in found.findings if f.question == "bp_100m_final"]
    assert (final.words, final.share) == ("the men's 100m final at the 2024 paris olympics", 9 / 12)
