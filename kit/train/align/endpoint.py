"""Questions to an OpenAI-compatible endpoint, by the package openai: its retries, timeouts and errors."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kit.errors import ModelError
from kit.train.align.chat import Call, Turn

RETRIES, WORKERS, JUDGED = 3, 4, 3
"""Further attempts of a request; requests under way at once; how often a judge is asked for a letter."""
PLACE = re.compile(r"(?i)(https?)://([a-z\d.-]+|\[[\da-f:.]+\])(:\d{1,5})?(/[\w./~-]*)?", re.ASCII)
LETTER = re.compile(r"(?i)^\W*([AB])\W*$|(?:text|answer|one)(?: is)?:? ?\W{0,2}([AB])\b|\(([AB])\)")
ONLY = "Answer with one letter, A or B."


class Endpoint:
    """A model behind a URL and its log of requests; `ModelError` for settings that cannot be right."""

    gives_odds = False
    length = staticmethod(lambda text: len(text.encode()) // 4)  # about so many bytes make a token

    def __init__(self, url: str, model: str, key_from: str, timeout_s: float) -> None:
        try:
            import openai
        except ImportError:
            raise ModelError("an endpoint needs the package openai: pip install '.[serve]'") from None
        place, self.key = PLACE.fullmatch(url), os.environ.get(key_from or "-", "").strip()
        if not place:
            raise ModelError("parameter 'endpoint' is no plain URL such as https://host/v1 (no key in it)")
        if not model or re.search(r"\W", key_from):
            raise ModelError("'endpoint_model' names a model, 'endpoint_key_from' an environment variable")
        near = place[2].lower() in ("localhost", "127.0.0.1", "[::1]")
        if self.key and (re.search(r"[^!-~]", self.key) or (place[1].lower() == "http" and not near)):
            raise ModelError(f"the key in {key_from} is not ASCII, or would travel unencrypted: use https")
        self.openai, self.model, self.key_from, self.calls = openai, model, key_from, []
        self.what_ran = {"endpoint": url.split("/")[2], "model": model}
        # the key is for one host: no redirect is followed; no proxy of the environment leads to this machine
        hooks = {"request": [self._headers]}
        web = openai.DefaultHttpxClient(follow_redirects=False, trust_env=not near, event_hooks=hooks)
        settings = {"base_url": url, "api_key": self.key or "none", "timeout": timeout_s, "http_client": web}
        self.client = openai.OpenAI(**settings, max_retries=RETRIES)

    def _headers(self, request: Any) -> None:
        for name in ("Authorization", "OpenAI-Organization", "OpenAI-Project"):
            request.headers.pop(name, None)  # openai takes what it finds in the environment
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"

    def ask(self, role: str, chats: Sequence[list[Turn]], tokens: int, temperature: float, bar: Any) -> list:
        """(reply, error) for each chat, in order."""
        return self._each(lambda chat: self.chat(role, chat, tokens, temperature), chats, bar)

    def judge(self, chats: Sequence[list[Turn]], bar: Any) -> list[tuple[float | None, str]]:
        """(∞ for A, -∞ for B, None for neither; error) for each chat."""
        return self._each(self._judge, chats, bar)

    def _each(self, work: Callable, chats: Sequence[list[Turn]], bar: Any) -> list:
        with ThreadPoolExecutor(WORKERS) as pool:
            return [(answer, bar.update())[0] for answer in pool.map(work, chats)]

    def _judge(self, chat: list[Turn]) -> tuple[float | None, str]:
        chat = [{"role": "user", "content": f"{chat[-1]['content']} {ONLY}"}]
        for _ in range(JUDGED):
            reply, error = self.chat("judge", chat, 16, 0.0)
            named = {"".join(letter).upper() for letter in LETTER.findall(reply)}
            if error or len(named) == 1:
                break
            chat = [*chat, {"role": "assistant", "content": reply or "?"}, {"role": "user", "content": ONLY}]
        return {"A": math.inf, "B": -math.inf}[named.pop()] if len(named) == 1 else None, error

    def chat(self, role: str, turns: list[Turn], tokens: int, temperature: float) -> tuple[str, str]:
        """(reply, "") or ("", error in a few words); `ModelError` where no later request can do better."""
        call = Call(role, self.model, json.dumps(turns, ensure_ascii=False))
        self.calls.append(call)
        started, create = time.perf_counter(), self.client.chat.completions.with_raw_response.create
        try:
            raw = create(model=self.model, messages=turns, max_tokens=tokens, temperature=temperature)
            call.attempts, reply = raw.retries_taken + 1, raw.parse()
            text = (reply.choices[0].message.content or "").encode("utf-8", "replace").decode().strip()
            call.reply = text.replace(self.key, "***") if self.key else text  # a server may say it back
            used = [getattr(reply.usage, f"{k}_tokens", None) for k in ("prompt", "completion")]
            call.prompt_tokens, call.reply_tokens = (n if isinstance(n, int) else None for n in used)
        except self.openai.APIError as error:
            status, late = getattr(error, "status_code", 0), isinstance(error, self.openai.APITimeoutError)
            call.error = f"HTTP {status}" if status else "timeout" if late else "no connection"
            call.attempts = int(error.request.headers.get("x-stainless-retry-count", 0)) + 1
            if status in (401, 403, 404):
                key = f"{'the' if self.key else 'no'} key in {self.key_from or 'endpoint_key_from'}"
                raise ModelError(f"the endpoint refuses '{self.model}' with {key}: {call.error}") from None
        except (AttributeError, IndexError, TypeError, ValueError, RecursionError):
            call.error = "reply without choices"
        call.seconds = time.perf_counter() - started
        return call.reply, call.error
