"""A URL on a list of the user's, and words in it that speak against its page."""

from pathlib import Path

import pytest

from kit.data.refine.urls import blocklist, measure_url
from kit.errors import ParamError


def test_a_blocked_url_is_told_by_page_host_or_domain(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# ours\nspam.example\nwww.shop.bad.example # a host\nhttps://fine.example/only/this/\n")
    blocked = blocklist(str(path))
    for url in (
        "http://spam.example/",
        "https://a.spam.example/x",
        "http://www.shop.bad.example",
        "http://fine.example/only/this",
    ):
        assert blocked(url), url
    for url in (
        "http://nospam.example/",
        "https://bad.example/",
        "http://fine.example/only",
        "http://[x",
        "",
    ):
        assert not blocked(url), url
    assert measure_url("http://a.example/casino/poker-Casino.html", blocked) == {
        "blocked_url": 0,
        "banned_url_words": 0,
        "soft_url_words": 2,
    }
    assert measure_url("http://essex.example/adults/")["banned_url_words"] == 0
    with pytest.raises(ParamError, match="blocked_urls"):
        blocklist(str(tmp_path / "none"))
