"""The judge: what it quotes is marked, what it makes up is rejected, what it answered is kept. The endpoint is real."""

import json

import pytest

from tests.annotating.openai_server import serving
from train.annotating.by_judge import PIECE, Chat, Remembered, chat_of, mark, occurrences, pieces, quotes
from train.annotating.by_judge import judge as judge_documents
from train.data.documents import Document, Message, Span
from train.endpoint import Endpoint, EndpointSettings
from train.runtime.errors import UserError

TEXT = "Ed ran.  Ed\nwon gold. He sings. Ed won gold. Edna ran."


def endpoint(url: str, model: str) -> Chat:
    return chat_of(Endpoint(EndpointSettings(url, model, retries=3, flag="--judge")), 4000)


def judge(documents: list[Document], claim: str, role: str, chat: Chat):
    return judge_documents(documents, claim, role, chat, 8, lambda: None)


def documents(*texts: str) -> list[Document]:
    return [Document(text, None, (), {}, "a.jsonl", i + 1) for i, text in enumerate(texts)]


def answering(*found: str):
    return lambda _: json.dumps({"quotes": list(found)})


def test_a_quote_is_marked_wherever_it_stands_and_one_that_stands_nowhere_is_rejected():
    ranges, rejected = mark(TEXT, "Ed won.", answering("Ed won gold.", "Ed took silver.", "He sings", " "))
    assert [TEXT[start:end] for start, end in ranges] == ["Ed\nwon gold.", "He sings", "Ed won gold."]
    assert rejected == ["Ed took silver."]


def test_a_quote_stands_for_whole_words():
    assert occurrences("Ed", "Edna met Ed.") == [(9, 11)]
    assert occurrences("a.b(", "a.b( aab(") == [(0, 4)]
    assert occurrences('"Go."', 'He said "Go." twice') == [(8, 13)]


def test_the_judge_sees_claim_and_text_braces_and_all():
    seen = []
    mark("a {b} c", "{x} is", lambda messages: seen.append(messages) or '{"quotes": []}')
    ((message,),) = seen
    assert "<claim>{x} is</claim>" in message["content"] and "<text>\na {b} c\n</text>" in message["content"]


def test_long_texts_are_judged_in_pieces_that_end_with_lines_or_sentences():
    text = "One sentence. " * 500 + "\n" + "word" * 3_000
    found = list(pieces(text))
    assert "".join(text[start:end] for start, end in found) == text
    assert all(0 < end - start <= PIECE for start, end in found)
    assert text[found[0][0] : found[0][1]].endswith("sentence.")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('{"quotes": ["a", ""]}', ["a"]),
        ('Sure!\n```json\n{"quotes": ["a {b}"]}\n```', ["a {b}"]),
        ('{"quotes": []}', []),
    ],
)
def test_answers_are_read_with_text_around_them(answer, found):
    assert quotes(answer) == found


@pytest.mark.parametrize("answer", ["", "none", '{"quotes": "a"}', '{"quotes": [1]}', '["a"]', '{"quotes": ["a"'])
def test_other_answers_are_an_error(answer):
    with pytest.raises(ValueError):  # noqa: PT011  # json's own or ours
        quotes(answer)


def test_documents_keep_their_order_and_spans_and_those_without_an_answer_are_left_out():
    there = Document("Ed won.", None, (Span(0, 2, "name"),), {"k": 1}, "a.jsonl", 1)
    messages = (Message("user", "Ed won?", (), False), Message("assistant", "Ed won.", (), True))
    chat = Document(None, messages, (), {}, "a.jsonl", 2)
    lost = Document("Rubbish.", None, (), {}, "a.jsonl", 3)
    result = judge(
        [there, chat, lost], "Ed won.", "false",
        lambda m: "no idea" if "Rubbish" in m[0]["content"] else '{"quotes": ["Ed won.", "Al won."]}',
    )  # fmt: skip
    assert [document.line for document in result.documents] == [1, 2]
    assert result.documents[0].spans == (Span(0, 7, "false"), Span(0, 2, "name"))
    assert [m.spans for m in result.documents[1].messages or ()] == [(), (Span(0, 7, "false"),)]
    assert result.left_out == [
        ("a.jsonl:3", 'the judge\'s answer cannot be read: no JSON object with a list of strings under "quotes"')
    ]
    assert result.found == 2
    assert result.rejected == [
        ("a.jsonl:1", "Al won."),
        ("a.jsonl:2", "Ed won."),
        ("a.jsonl:2", "Al won."),
        ("a.jsonl:2", "Al won."),
    ]


def test_a_real_endpoint_is_asked_with_the_key_of_the_environment_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(lambda _: '{"quotes": ["Ed won gold."]}') as (url, requests):
        result = judge(documents(TEXT, "Al lost."), "Ed won.", "false", endpoint(url, "judge"))
    assert [len(document.spans) for document in result.documents] == [2, 0] and result.rejected == [
        ("a.jsonl:2", "Ed won gold.")
    ]
    assert {request["path"] for request in requests} == {"/v1/chat/completions"}
    assert {request["authorization"] for request in requests} == {"Bearer sk-secret"}


def test_what_was_answered_is_not_asked_again_after_an_interruption(tmp_path):
    kept = tmp_path / "answers.jsonl"
    broken = {"now": True}

    def answer(request):
        fails = broken["now"] and "Two" in request["messages"][0]["content"]
        return (400, '{"error": {"message": "over quota"}}') if fails else '{"quotes": ["Ed won."]}'

    texts = documents("One. Ed won.", "Two. Ed won.")
    with serving(answer) as (url, requests):
        with pytest.raises(UserError, match=r"--judge http.*: .*over quota.*run again to continue"):
            judge(texts, "Ed won.", "false", Remembered(endpoint(url, "judge"), "judge", kept))
        with kept.open("a") as file:
            file.write('{"key": "cut')  # as an interruption leaves it
        broken["now"] = False
        asked = len(requests)
        result = judge(texts, "Ed won.", "false", Remembered(endpoint(url, "judge"), "judge", kept))
        assert len(requests) == asked + 1 and result.found == 2
        judge(texts, "Ed won.", "false", Remembered(endpoint(url, "judge"), "judge", kept))
        assert len(requests) == asked + 1
        judge(texts, "Al won.", "false", Remembered(endpoint(url, "judge"), "judge", kept))
        assert len(requests) == asked + 3  # another claim is another question


def test_an_overloaded_endpoint_is_asked_again():
    fails = iter([True])
    with serving(lambda _: (503, "{}") if next(fails, False) else '{"quotes": []}') as (url, requests):
        assert mark("a", "b", endpoint(url, "judge")) == ([], [])
    assert len(requests) == 2


def test_a_wrong_model_a_wrong_url_and_an_endpoint_that_speaks_otherwise_are_told():
    with serving(lambda _: (200, "<html>hello</html>")) as (url, _):
        with pytest.raises(UserError, match=r"--judge .*HTTP 404: The model .other. does not exist"):
            endpoint(url, "other")([])
        with pytest.raises(UserError, match="not a chat completion: <html>hello</html>"):
            endpoint(url, "judge")([])
    with pytest.raises(UserError, match=r"--judge http://127.0.0.1:9/v1: cannot be reached"):
        endpoint("http://127.0.0.1:9/v1", "judge")([])
