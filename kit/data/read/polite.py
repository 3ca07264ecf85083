"""Polite HTTP for the whole kit: importing this makes `fsspec.open("https://…")` go through `PoliteHTTP`.

One rate for the process (`kit.data.read.rate` shares out a job's), time-outs on everything, back-off that honours
`Retry-After`. Common Crawl answers 403 and 503 when it is asked too fast, and calls one retry a second polite
(https://status.commoncrawl.org).

Bounded are: connecting, the silence between two packets, an answer's whole head, and its body by a least speed.
Not bounded: the name resolver (it has time-outs of its own) and a TLS handshake that drips.
"""

from __future__ import annotations

import functools
import os
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urljoin, urlsplit

import fsspec
import requests
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from urllib3.exceptions import InvalidHeader

from kit import __version__
from kit.errors import FetchError, Missing

READ_AHEAD_BYTES, PIECE_BYTES = 1 << 20, 1 << 18
INFO_S, MAX_REDIRECTS, GIVE_UP_AFTER = 60.0, 5, 3
# a pause doubles from one second to one minute; a server that asks for more than five minutes is asked again after five
PAUSE_S, MAX_PAUSE_S, MAX_RETRY_AFTER_S = 1.0, 60.0, 300.0
CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)", re.IGNORECASE)
# 403 is among them: it is how Common Crawl says "too fast"; 501 and 505 are not, a server will not learn a method or
# version while we wait
TRANSIENT = re.compile(
    r"fetch: (HTTP (403|408|425|429|5(?!01|05)\d\d)|timeout|connection reset|no connection|TLS error"
    r"|short body|wrong Content-Range|no credentials)|archive file unreadable"
)
KINDS = {
    "Timeout": "timeout",
    "Credential": "no credentials",
    "Incomplete|Payload": "short body",
    "SSL|Certificate": "TLS error",
    "NewConnection|NameResolution|Endpoint|Connector|Refused|Proxy": "no connection",
    "Connection|Protocol|BrokenPipe|Disconnected|HTTPClient|Streaming": "connection reset",
}
"""Reasons by the class names in a chain of errors, first match; requests, urllib3, botocore and aiohttp alike."""
clock, sleep = time.monotonic, time.sleep


@dataclass(frozen=True)
class Policy:
    """How this process asks; `configure` changes it."""

    requests_per_s: float = 10.0
    retries: int = 6
    timeout_s: float = 30.0
    """For connecting, for silence and for an answer's head; a body has this and what its least speed gives it."""
    min_bytes_per_s: float = 32 << 10
    contact: str = ""
    """Where to write to whoever asks: an e-mail address or a URL."""


class Gate:
    """When the next request may start: one rate for the process, and for each host a pause of its own."""

    def __init__(self) -> None:
        self.lock, self.next = threading.Lock(), 0.0
        self.paused: dict[str, float] = {}
        self.given_up: Counter[str] = Counter()
        """Reads in a row that a host let fail in all their tries: from `GIVE_UP_AFTER` on each gets one try."""

    def wait(self, host: str, limited: bool = True) -> None:
        """Sleep until a request to `host` may start; `limited`: it counts for the rate."""
        while True:
            with self.lock:
                now = clock()
                start = max(self.paused.get(host, 0.0), self.next if limited else 0.0)
                # the next slot is taken before the lock is let go: two threads cannot have the same one
                if start <= now:
                    self.next = now + 1 / policy.requests_per_s if limited else self.next
                    return
            # outside the lock, so that others may ask other hosts meanwhile
            sleep(start - now)

    def hold(self, seconds: float) -> None:
        """Let the next request that counts for the rate wait: processes that begin together must not ask together."""
        with self.lock:
            self.next = max(self.next, clock() + seconds)

    def pause(self, host: str, tried: int, wait_s: float) -> None:
        """Let nobody ask `host` for a while: longer with every try, at least what it asked for itself."""
        # jitter: tasks that were refused together must not come back together
        delay = min(MAX_PAUSE_S, PAUSE_S * 2**tried) * random.uniform(0.5, 1)
        delay = max(delay, min(wait_s, MAX_RETRY_AFTER_S))
        with self.lock:
            self.paused[host] = max(self.paused.get(host, 0.0), clock() + delay)


policy, gate = Policy(), Gate()


def configure(**changes: Any) -> None:
    """Change fields of this process's `Policy`: `configure(requests_per_s=2)`; raises `TypeError` for others."""
    global policy
    policy = replace(policy, **changes)


def user_agent() -> str:
    """What a server's log says of who asked, with the contact where there is one (RFC 9110, section 10.1.5)."""
    contact = f"; contact {policy.contact}" if policy.contact else ""
    return f"crawl-to-model-kit/{__version__} (polite range reader{contact})"


def may_retry(reason: str) -> bool:
    """Whether a rerun should ask again for a record that failed for `reason`.

    Not for what another try does not change: nothing there, a range past the end of the file, a server that
    ignores ranges, a request refused for good (400, 401, other 4xx), damage in the bytes themselves.
    """
    return TRANSIENT.fullmatch(reason) is not None


def host_of(url: str) -> str:
    """Host and port."""
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def persist(host: str, attempt: Callable[[], Any]) -> Any:
    """`attempt` until it works, fails for good, or has used up its tries; raises the last `FetchError`."""
    for tried in range(1 if gate.given_up[host] >= GIVE_UP_AFTER else policy.retries + 1):
        try:
            result = attempt()
        except FetchError as error:
            if not (may_retry(error.reason) if error.again is None else error.again):
                raise
            # the pause is the host's, not this call's: whoever else asks it waits as well
            gate.pause(host, tried, error.wait_s)
            last = error
        else:
            gate.given_up[host] = 0
            return result
    gate.given_up[host] += 1
    raise last


def named(error: Exception, uri: str) -> FetchError:
    """Any client's error as a `FetchError` with one of the short names."""
    if isinstance(error, FetchError):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return Missing("fetch: HTTP 404", uri)
    answer = getattr(error.__cause__ or error, "response", None)
    if isinstance(answer, dict):  # botocore; S3 refuses with 403 for good, its "too fast" is 503
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return FetchError(f"fetch: HTTP {status}", uri, again=status >= 429)
    # a client's error wraps a library's, which wraps a socket's: the innermost often names the cause
    chain = [error]
    for link in chain:
        inside = [*link.args, getattr(link, "reason", None), link.__cause__]
        chain += [e for e in inside if isinstance(e, Exception) and e not in chain]
    names = " ".join(type(e).__name__ for e in chain)
    for pattern, reason in KINDS.items():
        if re.search(pattern, names):
            return FetchError(f"fetch: {reason}", uri, again=False if reason == "no credentials" else None)
    if isinstance(error, OSError) and "://" not in uri:
        return FetchError("archive file unreadable", uri, again=False)
    return FetchError(f"fetch: {type(error).__name__}", uri)


def _start_afresh() -> None:
    """A forked child must not share its parent's sockets, nor a lock that another thread held."""
    global gate
    gate = Gate()
    _session.cache_clear()


os.register_at_fork(after_in_child=_start_afresh)


class _InTime:
    """A connection whose answer's head is there in time: a socket's own time-out starts anew with every byte."""

    def getresponse(self) -> Any:
        end = time.monotonic() + policy.timeout_s
        watch = threading.Timer(policy.timeout_s, _hang_up, [self.sock])
        watch.daemon = True
        watch.start()
        try:
            return super().getresponse()
        finally:
            watch.cancel()
            if time.monotonic() >= end:  # a head cut off by hanging up would pass for a whole one
                raise TimeoutError


def _hang_up(sock: socket.socket) -> None:
    with suppress(Exception):  # closed meanwhile; the plain method, for TLS's own is not for another thread
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _Adapter(HTTPAdapter):
    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        if not issubclass(pool.ConnectionCls, _InTime):
            pool.ConnectionCls = type("InTime", (_InTime, pool.ConnectionCls), {})
        return pool


@functools.cache
def _session() -> requests.Session:
    session = requests.Session()
    # identity: ranges are of the bytes as stored, and a server that compressed them would answer others
    session.headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
    for scheme in PoliteHTTP.protocol:
        session.mount(f"{scheme}://", _Adapter(pool_maxsize=32))
    return session


def _ask(url: str, wanted: str) -> requests.Response:
    """The answer to one GET for a range, its body unread, redirects followed; raises `FetchError`."""
    for _ in range(MAX_REDIRECTS + 1):
        gate.wait(host_of(url))
        try:
            headers = {"Range": wanted, "User-Agent": user_agent()}
            asked = _session().prepare_request(requests.Request("GET", url, headers))
            settings = _session().merge_environment_settings(url, {}, True, None, None)
            # by the adapter: the session would read the whole body of a redirect
            answer = _session().get_adapter(url).send(asked, timeout=policy.timeout_s, **settings)
        except Exception as error:
            raise named(error, url) from None
        if not answer.is_redirect:
            return answer
        answer.close()
        url = urljoin(url, answer.headers["location"])
        if urlsplit(url).scheme not in PoliteHTTP.protocol:
            raise FetchError("fetch: redirect refused", url)
    raise FetchError("fetch: too many redirects", url)


def _refusal(answer: requests.Response, url: str) -> FetchError:
    """The error for a status that brings no part of a file, with the seconds that its `Retry-After` asks for."""
    status, wait_s = answer.status_code, 0.0
    if 200 <= status < 300:
        return FetchError("fetch: range ignored", url)
    with suppress(InvalidHeader, ValueError, OverflowError):
        wait_s = Retry().parse_retry_after(answer.headers.get("Retry-After", ""))
    return (Missing if status in (404, 410) else FetchError)(f"fetch: HTTP {status}", url, wait_s=wait_s)


def _body(answer: requests.Response, length: int, url: str) -> bytes:
    """Exactly `length` bytes of a body, in the time its length allows."""
    data, deadline = bytearray(), time.monotonic() + policy.timeout_s + length / policy.min_bytes_per_s
    while len(data) < length:
        if time.monotonic() > deadline:
            raise FetchError("fetch: timeout", url)
        try:
            # read1 returns what one packet brought, so a dripping body comes back here
            piece = answer.raw.read1(min(length - len(data), PIECE_BYTES), decode_content=False)
        except Exception as error:
            raise named(error, url) from None
        if not piece:
            raise FetchError("fetch: short body", url)
        data += piece
    return bytes(data)


def _range(url: str, start: int, end: int) -> tuple[bytes, dict[str, Any]]:
    """Bytes `start` to `end` (not included), fewer where the file ends before, and what the answer tells of it."""
    with closing(_ask(url, f"bytes={start}-{end - 1}")) as answer:
        content_range = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
        size = int(content_range[3]) if content_range and content_range[3] != "*" else None
        data = b""
        # 206: a part, and it must be the part that was asked for. 416: nothing there, the file is shorter. All else,
        # 200 included, would bring bytes from another place, or a whole archive
        if answer.status_code == 206:
            first, stop = (
                (int(content_range[1]), int(content_range[2]) + 1)
                if content_range and content_range[1]
                else (-1, -1)
            )
            if first != start or not (stop == end or (start < stop < end and stop == size)):
                raise FetchError("fetch: wrong Content-Range", url)
            data = _body(answer, stop - start, url)
        elif answer.status_code != 416:
            raise _refusal(answer, url)
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        return data, {"name": url, "type": "file", "size": size, "ETag": tag}


class PoliteHTTP(AbstractFileSystem):
    """Files behind http(s)://, read-only and by exact ranges; there are no folders, so nothing can be listed.

    Raises `FetchError` (an `OSError`), and for what is not there `Missing` (a `FileNotFoundError`).
    """

    protocol = ("http", "https")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._infos: dict[str, tuple[float, dict[str, Any]]] = {}

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return path  # the address is the path

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, size in bytes and `ETag` (or time of the last change); asked for once a minute at most."""
        if path.endswith("/") or "*" in path:
            raise FetchError("nothing can be listed over HTTP; give each file's address instead", path)
        asked, info = self._infos.get(path, (-INFO_S, {}))
        if clock() - asked >= INFO_S:
            # not HEAD: signed addresses and many servers refuse it, and this tells as well whether ranges work
            info = persist(host_of(path), lambda: _range(path, 0, 1))[1]
            if info["size"] is None:
                raise FetchError("fetch: size unknown", path)
            self._infos[path] = clock(), info
        return info

    def exists(self, path: str, **_: Any) -> bool:
        """Whether a file is there; a refusal is an error, not a no."""
        try:
            return bool(self.info(path))
        except FileNotFoundError:
            return False

    def isdir(self, path: str) -> bool:
        """Whether the address looks like a folder's."""
        return path.endswith("/")

    def find(self, path: str, *_: Any, **__: Any) -> list[str]:
        """The file itself; raises `FetchError` for a folder."""
        return [self.info(path)["name"]]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """The bytes of a file from `start` to `end` (not included), fewer where the file ends before."""
        if end is None or end < 0 or (start or 0) < 0:
            # as Python counts from the end; only here the size has to be asked for
            start, end, _ = slice(start, end).indices(self.info(path)["size"])
        first, stop = start or 0, end
        return persist(host_of(path), lambda: _range(path, first, stop))[0] if first < stop else b""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> HTTPFile:
        """Parquet is read by exact ranges, anything else `block_size` bytes ahead (0: exactly)."""
        if mode != "rb":
            raise FetchError("HTTP is read-only", path)
        if block_size is None:
            block_size = 0 if urlsplit(path).path.endswith(".parquet") else READ_AHEAD_BYTES
        cache, size = "readahead" if block_size else "none", self.info(path)["size"]
        return HTTPFile(self, path, mode, block_size or 1 << 16, cache_type=cache, size=size)


class HTTPFile(AbstractBufferedFile):
    """A seekable file opened over HTTP, as long as it was when it was opened."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        # fewer bytes than the file had when it was opened: it has changed under the reader
        data = self.fs.cat_file(self.path, start, end)
        if len(data) < end - start:
            raise FetchError("fetch: short body", self.path)
        return data


for _protocol in PoliteHTTP.protocol:
    fsspec.register_implementation(_protocol, PoliteHTTP, clobber=True)
