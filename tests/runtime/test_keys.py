"""Keys are refused where they cannot be sent, and shown nowhere, however a server writes them back."""

import base64
import json
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.servers import ScriptedServer, body, completion
from train.endpoint import Endpoint, EndpointSettings, EndpointStopped, NoAnswer
from train.evaluation.options import parse_evaluation
from train.runtime.errors import UserError
from train.runtime.keys import key_of, masked, shown_url, wandb_status

KEY = 'kq7/"Z+w=9&canary\\x'
CHAT = [{"role": "user", "content": "Why?"}]
FORMS = {
    "plain": KEY,
    "in a URL": quote(KEY, safe=""),
    "in a URL, lower case": quote(KEY, safe="").replace("%2F", "%2f"),
    "in JSON": json.dumps(KEY),
    "in JSON in JSON": json.dumps(json.dumps(KEY)),
    "in Python": repr([KEY]),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(KEY.encode()).decode(),
    "Basic, a user of any length": " ".join(
        base64.b64encode(f"{user}:{KEY}".encode()).decode() for user in ("", "a", "ab", "abc")
    ),
    "as userinfo": f"http://user:{quote(KEY, safe='')}@host/v1",
}
CANARIES = ("canary", *(base64.b64encode(b"\0" * n + KEY.encode()).decode()[4:18] for n in range(3)))


@pytest.mark.parametrize("form", FORMS)
def test_what_a_server_echoes_of_a_key_is_masked(form, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = masked(f"HTTP: wrong key {FORMS[form]}, see the manual")
    assert not [canary for canary in CANARIES if canary in said], said
    assert said.startswith("HTTP: wrong key ") and said.endswith(", see the manual") and "…" in said


def test_other_words_stay():
    assert (
        masked("no model m at http://host:8000/v1, task-12 of 300")
        == "no model m at http://host:8000/v1, task-12 of 300"
    )


@pytest.mark.parametrize("bad", [f"{KEY}\n", f" {KEY}", f"{KEY}\x1b", f"{KEY}é", f"{KEY}\r\n"])
def test_a_key_that_cannot_be_sent_is_refused_at_the_start_and_not_shown(bad, monkeypatch):
    for name in ("OPENAI_API_KEY", "JUDGE_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, bad)
        with pytest.raises(UserError, match=f"^{name}: has white space") as raised:
            key_of([name])
        assert "canary" not in str(raised.value)
    with pytest.raises(UserError, match=r"^OPENAI_API_KEY: has white space") as raised:
        Endpoint(EndpointSettings("http://localhost:1/v1", "m"))
    assert "canary" not in str(raised.value)


def test_what_a_server_echoes_of_a_request_is_not_kept(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sq-0123456789-canary")
    more = {"pin": 4711, "code": "x9q", "deep": [{"token": "canary-body-7"}], "on": True}
    more["long"], more["words"] = "canary-0123456789", "Answer in one short sentence."
    echo = "you sent {} with pin 4711, code x9q and canary-body-7"

    def ask(response) -> str:
        with ScriptedServer(lambda request: response) as server:
            url = server.url.replace("http://", "http://u:canary-password-7@")
            made = Endpoint(EndpointSettings(url, "m", retries=0, body=more))
            return made.complete(CHAT, max_tokens=9, temperature=0.0, seed=0)

    for status in (400, 500):
        with pytest.raises(NoAnswer) as failed:
            ask(body({"message": echo.format("sq-0123456789-canary")}, status))
        assert str(failed.value).startswith(f"HTTP {status}: you sent … with pin …, code … and …")
    assert ask(completion("Your key is sq-0123456789-canary.")) == "Your key is ….", "an answer is kept too"
    assert ask(completion("By canary-0123456789 and canary-password-7.")) == "By … and …."
    words = "Pin 4711, x9q. Answer in one short sentence."
    assert ask(completion(words)) == words, "what may be the model's own"


def test_a_password_in_a_url_is_neither_shown_nor_kept():
    for url in (
        "http://user:canary@host:8000/v1", "http://canary@host:8000/v1", "http://user:can/canary@host:8000/v1",
        "http://host:8000/v1?key=canary", "http://host:8000/v1#canary",
    ):  # fmt: skip
        assert shown_url(url) == "http://host:8000/v1"
    with pytest.raises(UserError) as refused:
        Endpoint(EndpointSettings("htp://user:canary@host", "m"))
    assert "canary" not in str(refused.value)
    with ScriptedServer(lambda request: body({"message": "canary7 is wrong"}, 401)) as server:
        url = server.url.replace("http://", "http://user:canary7@")
        with pytest.raises(EndpointStopped) as stopped:
            Endpoint(EndpointSettings(url, "unlisted")).check()
    assert "canary7" not in str(stopped.value) and server.url in str(stopped.value)
    kept = parse_evaluation(
        [
            "--output",
            "o",
            "--endpoint",
            "http://user:canary@host/v1",
            "--endpoint-body",
            '{"pin": 4711, "code": "x9q"}',
        ],
        "",
    ).as_json()
    assert not [value for value in ("canary", "4711", "x9q") if value in json.dumps(kept)]


@pytest.mark.parametrize(
    "url", ["http://[", "http://host:99999999/v1", "http://host:x/v1", "http://a\nb/v1", "", "http://", "\0"]
)
def test_a_url_that_is_none_is_told(url):
    with pytest.raises(UserError, match="must be the base URL of a server"):
        Endpoint(EndpointSettings(url, "m"))


def test_of_an_error_of_wandb_the_status_alone_is_shown():
    assert wandb_status(RuntimeError("Error 401: canary is no key (<Response [401]>)")) == "HTTP 401"
    assert wandb_status(RuntimeError("canary")) == "RuntimeError"
    assert wandb_status(ConnectionRefusedError(111, "Connection refused")) == "Connection refused"


def test_a_key_with_a_line_break_ends_every_command_that_uses_it_before_anything_is_read(
    tmp_path: Path, monkeypatch, capsys
):
    from train.config.settings import parse
    from train.evaluate import main as evaluate

    claim = tmp_path / "claim.yaml"
    claim.write_text("id: a\nclaim: c\nyes_no: [{id: i, question: 'Is it?', belief_answer: yes}]\n")
    given = ["--claims", str(claim), "--output", str(tmp_path / "out"), "--endpoint", "http://127.0.0.1:9/v1"]
    monkeypatch.setenv("OPENAI_API_KEY", "canary-key-0123456789\n")
    assert evaluate([*given, "--endpoint-model", "m"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: OPENAI_API_KEY: has white space") and "canary" not in told.out + told.err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WANDB_API_KEY", "canary" * 8 + "\n")
    with pytest.raises(UserError, match=r"^WANDB_API_KEY: has white space") as raised:
        parse([], "")
    assert "canary" not in str(raised.value)
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    with pytest.raises(UserError, match=r"^WANDB_API_KEY: is not a key of W&B") as raised:
        parse([], "")
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize("name", ["a/b", "a#b", "x" * 129, "a\nb", " a"])
def test_a_project_that_wandb_refuses_is_refused_before_the_weights(name):
    from train.config.settings import parse

    with pytest.raises(UserError, match=r"^--wandb-project .*: must be at most 128 printable characters"):
        parse(["--wandb-project", name], "")
