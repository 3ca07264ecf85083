"""An endpoint that answers, stalls, lies, floods and fails; and the server that plays it."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kit.train import endpoint
from kit.train.endpoint import Endpoint, letter
from kit.train.models import ModelError

KEY = "sk-not-for-any-log-4711"


class Server:
    """/v1/chat/completions on a free port; `answer(messages, n)` returns (status, body bytes, headers)."""

    def __init__(self, answer):
        self.seen = seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append({"path": self.path, "key": self.headers["Authorization"], **asked})
                status, body, *headers = answer(asked["messages"], len(seen))
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("FEEDBACK_KEY", KEY)
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.01)
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def said(text):
    return 200, json.dumps(
        {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    ).encode()


def stall(messages, n):
    time.sleep(1)
    return said("late")


@pytest.mark.parametrize("answer, error, attempts", [
    (lambda m, n: (500, b"boom"), "HTTP 500", endpoint.ATTEMPTS),
    (stall, "timeout", endpoint.ATTEMPTS),
    (lambda m, n: (200, b"<html>"), "reply is not JSON", 1),
    (lambda m, n: (200, b"[1]"), "reply without choices", 1),
    (lambda m, n: (200, b" " * (endpoint.REPLY_BYTES + 9)), "reply larger than 1 MB", 1),
    (lambda m, n: (302, b"", ("Location", "http://127.0.0.1:9/")), "HTTP 302", 1),
])  # fmt: skip
def test_what_an_endpoint_can_do_wrong_is_named_and_bounded(serve, answer, error, attempts):
    server = serve(answer)
    asked = Endpoint(server.url, "big", "FEEDBACK_KEY", 0.2)
    assert asked.chat("answer", [{"role": "user", "content": "?"}], 5, 0.0) == ("", error)
    assert [c.error for c in asked.calls] == [error] * attempts


@pytest.mark.parametrize("values, words", [
    ({"url": "file:///etc/passwd"}, "no URL"), ({"url": "http://h:port/v1"}, "no URL"),
    ({"url": "https://me:secret@h/v1"}, "more than a place"), ({"model": ""}, "endpoint_model"),
    ({"url": "http://far.example/v1"}, "unencrypted"), ({"key_from": "sk-pasted"}, "not a key"),
])  # fmt: skip
def test_an_endpoint_that_cannot_be_right_is_refused(monkeypatch, values, words):
    monkeypatch.setenv("FEEDBACK_KEY", KEY)
    good = {"url": "https://far.example/v1", "model": "m", "key_from": "FEEDBACK_KEY", "timeout_s": 1.0}
    with pytest.raises(ModelError, match=words) as error:
        Endpoint(**{**good, **values})
    assert "secret" not in str(error.value) and "pasted" not in str(error.value)


@pytest.mark.parametrize("reply, named", [("B", "B"), ("(A).", "A"), ("A better one is B.", "B"), ("The answer is **A**", "A"),
    ("Text A or Text B", ""), ("Both", ""), ("", "")])  # fmt: skip
def test_a_letter_is_read_only_where_one_is_named(reply, named):
    assert letter(reply) == named
