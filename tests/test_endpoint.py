"""How an endpoint fails, against a server that fails in that way."""

import threading
import time
from typing import Any

import httpx
import openai
import pytest

from tests.support.servers import Response, ScriptedServer, body, completion, free_port
from train.endpoint import Endpoint, EndpointSettings, EndpointStopped, NoAnswer, retry_after
from train.evaluation.served_log_p import prompt_log_p
from train.runtime.errors import MayPass, UserError

CHAT = [{"role": "user", "content": "Why?"}]
KEY = "sk-secret-0123456789"


def endpoint(url: str, **changes) -> Endpoint:
    return Endpoint(EndpointSettings(**({"url": url, "model": "m", "retries": 2, "pause": 0.001} | changes)))


def in_turn(*responses: Response):
    """Answers with each response once, then with the last one."""
    left = list(responses)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def ask(url: str, **changes) -> str:
    return endpoint(url, **changes).complete(CHAT, max_tokens=9, temperature=0.5, seed=3)


def test_a_request_says_who_is_asked_what_and_how():
    with ScriptedServer(lambda request: completion("Because.")) as server:
        assert ask(server.url, top_p=0.8, body={"chat_template_kwargs": {"enable_thinking": False}}) == "Because."
    assert server.asked == [{
        "model": "m", "messages": CHAT, "max_tokens": 9, "temperature": 0.5, "top_p": 0.8, "seed": 3,
        "chat_template_kwargs": {"enable_thinking": False},
    }]  # fmt: skip


def test_several_chats_are_answered_in_their_order_each_with_its_seed():
    with ScriptedServer(lambda request: completion(f"{request['messages'][0]['content']}{request['seed']}")) as server:
        chats = [[{"role": "user", "content": name}] for name in "abcdef"]
        assert endpoint(server.url).answers(chats, 9, 0.0, 10) == ["a10", "b11", "c12", "d13", "e14", "f15"]


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (body({"error": {"message": "overloaded"}}, 500), "HTTP 500: overloaded"),
        (body({"detail": "busy"}, 503), "HTTP 503: busy"),
        (body({"message": "slow down"}, 429, Retry_After="0.01"), "HTTP 429: slow down"),
        ((502, {"Content-Type": "text/html"}, b"<html>Bad gateway</html>"), "HTTP 502: <html>Bad gateway</html>"),
        (
            (200, {"Content-Type": "text/html"}, b"<html>hello</html>"),
            "its response is not a chat completion: <html>hello",
        ),
        (
            (200, {"Content-Type": "application/json"}, b'{"choices": ['),
            "its response is not a chat completion: Expecting",
        ),
        ((200, {"Content-Type": "application/json"}, b""), "its response is not a chat completion: "),
        (body([1, 2]), "its response is not a chat completion: "),
        (body({}), "its response is not a chat completion: no choices"),
        (body({"choices": []}), "its response is not a chat completion: no choices"),
        (
            body({"choices": [{"index": 0}]}),
            "its response is not a chat completion: a choice without a message",
        ),
        (
            body({"choices": [{"message": {"content": [1]}}]}),
            "its response is not a chat completion: a choice without a",
        ),
        (
            body({"error": {"message": "no capacity"}}),
            "its response is not a chat completion: {'message': 'no capacity'}",
        ),
    ],
)
def test_what_may_pass_is_tried_again_and_then_named(response, said):
    with ScriptedServer(in_turn(response, response, completion("At last."))) as server:
        assert ask(server.url) == "At last." and len(server.asked) == 3
    with ScriptedServer(in_turn(response)) as server, pytest.raises(NoAnswer) as caught:
        ask(server.url)
    assert str(caught.value).startswith(said) and str(caught.value).endswith(", after 3 attempts")
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), (None, 0.0)],
)
def test_a_server_may_say_in_how_many_seconds_to_come_back(said, seconds):
    headers = {"retry-after": said} if said else {}
    response = httpx.Response(429, headers=headers, request=httpx.Request("POST", "http://x"))
    assert retry_after(openai.RateLimitError("slow down", response=response, body=None)) == seconds


def test_a_request_that_is_wrong_in_itself_is_not_tried_again():
    with ScriptedServer(in_turn(body({"error": {"message": "context of 9 tokens"}}, 400))) as server:
        with pytest.raises(NoAnswer, match=r"^HTTP 400: context of 9 tokens$"):
            ask(server.url)
        assert len(server.asked) == 1


def test_a_slow_server_is_left_after_the_timeout_and_each_retry_is_shown(capsys):
    release = threading.Event()

    def chat(request):
        release.wait(30)
        return completion("Late.")

    with ScriptedServer(chat) as server:
        with pytest.raises(NoAnswer, match=r"^no answer within 0.2 s, after 2 attempts$"):
            ask(server.url, timeout=0.2, retries=1)
        release.set()
        shown = f"--endpoint {server.url}: no answer within 0.2 s; attempt 2 of 2 in 0 s\n"
        assert shown in capsys.readouterr().err


@pytest.mark.parametrize("sent", [b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"])
def test_a_server_that_sends_its_answer_byte_by_byte_is_left_after_the_timeout_too(sent):
    closed = threading.Event()

    def trickle(handler):
        try:
            handler.wfile.write(sent)
            for _ in range(1000):
                handler.wfile.write(b"x")
                time.sleep(0.02)
        except ConnectionError:
            closed.set()

    with ScriptedServer(lambda request: completion("x")) as server:
        server.server.RequestHandlerClass.do_POST = trickle
        with pytest.raises(NoAnswer, match=r"^no answer within 0.3 s, after 1 attempt$"):
            ask(server.url, timeout=0.3, retries=0)
        assert closed.wait(10), "the request goes on"


def test_a_connection_that_breaks_ends_its_request_and_not_the_run():
    with ScriptedServer(lambda request: completion("x")) as server:
        server.server.RequestHandlerClass.do_POST = lambda self: self.connection.close()
        with pytest.raises(NoAnswer, match=r", after 3 attempts$"):
            ask(server.url)
    with pytest.raises(EndpointStopped, match="cannot be reached"):
        ask(server.url)  # nobody listens there any more


def test_an_answer_of_nothing_is_an_answer():
    with ScriptedServer(lambda request: completion(None)) as server:
        assert ask(server.url) == ""


def test_a_model_that_wants_max_completion_tokens_is_given_that():
    def chat(request):
        if "max_tokens" in request:
            said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return body({"error": {"message": said, "code": "unsupported_parameter"}}, 400)
        return completion("Yes.")

    with ScriptedServer(chat) as server:
        one = endpoint(server.url)
        assert [one.complete(CHAT, 9, 1.0, 0) for _ in range(2)] == ["Yes.", "Yes."]
        assert [set(request) & {"max_tokens", "max_completion_tokens"} for request in server.asked] == [
            {"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"},
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (body({"detail": "Not Found"}, 404), "missing"),
        (body({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, 429), "quota"),
    ],
)
def test_what_no_request_can_mend_ends_the_run_at_once(response, why):
    with ScriptedServer(in_turn(response)) as server:
        with pytest.raises(EndpointStopped) as caught:
            ask(server.url)
        assert caught.value.why == why and len(server.asked) == 1


# The check before anything is spent.


def refusal(one: Endpoint) -> str:
    with pytest.raises(UserError) as caught:
        one.check()
    return str(caught.value)


def test_a_server_that_lists_the_model_is_asked_nothing():
    with ScriptedServer(lambda request: completion("x"), models=["other", "m"]) as server:
        endpoint(server.url).check()
        assert server.asked == [] and server.listed == 1


def test_while_a_server_that_does_not_list_the_model_is_asked_for_it_that_is_said(capsys):
    with ScriptedServer(lambda request: completion("Yes."), models=["other"]) as server:
        endpoint(server.url, timeout=7).check()
    said = f"--endpoint {server.url}: does not list 'm'; requesting a few tokens from it, for 7 s at most\n"
    assert capsys.readouterr().err == said


def test_no_server_is_told_from_a_wrong_name_and_from_a_missing_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url = f"http://127.0.0.1:{free_port()}/v1"
    said = refusal(endpoint(url))
    assert said.startswith(f"--endpoint {url}: cannot be reached (") and said.endswith("or correct --endpoint.")

    unknown = in_turn(body({"error": {"message": "The model does not exist"}}, 404))
    with ScriptedServer(unknown, models=["qwen-base", "qwen-tuned"]) as server:
        assert refusal(endpoint(server.url, model="qwen-tune")) == (
            f"--endpoint-model 'qwen-tune': --endpoint {server.url} does not serve it (HTTP 404: The model does not "
            "exist). Did you mean qwen-tuned? It has: qwen-base, qwen-tuned."
        )
    with ScriptedServer(in_turn(body({"detail": "Server is pinned to 'x'"}, 400)), models=body({}, 500)) as server:
        assert refusal(endpoint(server.url, flag="--judge")) == (
            f"--judge-model 'm': --judge {server.url} does not serve it (HTTP 400: Server is pinned to 'x'). It lists "
            "no models; give the name that it was started with."
        )

    for status in (401, 403):
        denied = body({"error": {"message": f"Incorrect API key provided: {KEY}"}}, status)
        with ScriptedServer(in_turn(denied), models=denied) as server:
            assert refusal(endpoint(server.url)) == (
                f"--endpoint {server.url}: HTTP {status}: requires a key, and OPENAI_API_KEY is not set. Set it in the "
                "environment."
            )
            monkeypatch.setenv("OPENAI_API_KEY", KEY)
            assert refusal(endpoint(server.url)) == (
                f"--endpoint {server.url}: HTTP {status}: refuses the key in OPENAI_API_KEY. Set the right one there."
            )
            monkeypatch.delenv("OPENAI_API_KEY")


def test_a_server_without_a_list_is_asked_for_a_few_tokens_of_the_model():
    with ScriptedServer(lambda request: completion("x"), models=body({"detail": "Not Found"}, 404)) as server:
        endpoint(server.url).check()
        assert [request["max_tokens"] for request in server.asked] == [16]


def test_a_url_without_its_path_is_told():
    with ScriptedServer(lambda request: completion("x")) as server:
        url = server.url.removesuffix("/v1")
        assert refusal(endpoint(url)) == (
            f"--endpoint-model 'm': --endpoint {url} does not serve it (HTTP 404: Not Found). Correct the name, or the "
            "URL: a base URL mostly ends in /v1."
        )


def test_a_server_that_never_answers_the_check_may_still_be_starting():
    release = threading.Event()
    with ScriptedServer(lambda request: completion("x"), models=(200, {}, b"")) as server:
        server.server.RequestHandlerClass.do_GET = lambda self: release.wait(30)
        said = refusal(endpoint(server.url, timeout=0.1))
        assert "no answer within 0.1 s, after 3 attempts. Is it still starting, or busy? Else raise --endpoint-" in said
        release.set()


def test_the_key_is_sent_from_the_environment_and_never_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("JUDGE_API_KEY", "another-key")
    echo = in_turn(body({"error": {"message": f"cannot serve {KEY} nor sk-…6789 now"}}, 400))
    with ScriptedServer(echo) as server:
        with pytest.raises(NoAnswer) as caught:
            ask(server.url)
        assert KEY not in str(caught.value) and str(caught.value) == "HTTP 400: cannot serve … nor … now"
        with pytest.raises(NoAnswer):
            ask(server.url, key_variables=("JUDGE_API_KEY", "OPENAI_API_KEY"))
    assert [headers["authorization"] for headers in server.headers] == [f"Bearer {KEY}", "Bearer another-key"]
    url = f"http://me:pass@127.0.0.1:{free_port()}/v1"
    assert "pass" not in refusal(endpoint(url)) and KEY not in refusal(endpoint(url))


def texts(request: dict[str, Any], told: bool) -> Response:
    """A server that leaves a part out of what it says of a prompt, and may be told what to generate: log p of token t
    is -t, and of a prompt's -t - 100."""
    prompt = request["prompt"]
    token = request["allowed_token_ids"][0] if told and "allowed_token_ids" in request else 9
    log_p = [None, *(-t - 100.0 for t in prompt[1:]), -9.0] if request.get("echo") else [-float(token)]
    tokens = [f"token_id:{token}"] * len(log_p)
    choice = {
        "index": 0,
        "text": "",
        "finish_reason": "length",
        "logprobs": {"tokens": tokens, "token_logprobs": log_p},
    }
    return body({"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})


def test_the_tokens_of_prompts_are_generated_where_a_server_can_be_told_which_and_is_not_to_be_asked_for_its_prompt():
    prompts = [[1, 2, 3], [4, 5]]
    for told, by_generating, expected, requests in [
        (True, True, [[-2.0, -3.0], [-5.0]], 1 + 3),
        (False, True, [[-102.0, -103.0], [-105.0]], 1 + 2),  # it generates what it likes
        (True, False, [[-102.0, -103.0], [-105.0]], 2),
    ]:
        with ScriptedServer(lambda _: completion(""), texts=lambda request, told=told: texts(request, told)) as server:
            found = prompt_log_p(endpoint(server.url, concurrency=4), "m", prompts, by_generating)
        assert found == expected and len(server.asked) == requests
    for response, passing in ((body({"detail": "no"}, 400), False), (body({"detail": "busy"}, 503), True)):
        with ScriptedServer(lambda _: completion(""), texts=lambda _, response=response: response) as server:
            asked = endpoint(server.url)
            if not passing:
                assert prompt_log_p(asked, "m", prompts, by_generating=True) is None
                continue
            with pytest.raises(MayPass, match=r"HTTP 503: busy, after 3 attempts. Run the same command again."):
                prompt_log_p(asked, "m", prompts)
    with ScriptedServer(lambda _: completion("")) as server:
        assert prompt_log_p(endpoint(server.url), "m", prompts, by_generating=True) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "localhost:8000"}, "--endpoint 'localhost:8000': must be the base URL of a server, such as http://"),
        ({"url": "http://"}, "--endpoint 'http://': must be the base URL"),
        ({"model": ""}, "--endpoint-model: is missing; give the name under which the server knows the model."),
        ({"concurrency": 0}, "--endpoint concurrency 0: must be at least 1."),
        ({"timeout": float("nan")}, "--endpoint timeout nan: must be at least 0.001."),
    ],
)
def test_settings_that_cannot_be_are_told(changes, message):
    with pytest.raises(UserError) as caught:
        endpoint(**({"url": "http://x/v1"} | changes))
    assert str(caught.value).startswith(message)
