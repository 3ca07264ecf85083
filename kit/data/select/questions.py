"""The questions that are asked of a crawl's index, as SQL in words that DuckDB and Athena both know.

Every function writes one SELECT over `ccindex`; `kit.data.select.index` runs it in DuckDB, `kit.launch.athena` submits it.
Values are written into the text, not passed as parameters: only so do engines skip row groups by lists of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from kit.data.read.record import PAGE_RECORDS, host_name
from kit.errors import ParamError
from kit.params import ExploreIndex

SELECTED = [
    "warc_filename", "warc_record_offset", "warc_record_length", "wrapping", "record_type", "url", "fetch_time",
    "fetch_status", "content_mime_detected", "content_digest", "content_truncated", "url_host_name",
    "url_host_registered_domain", "content_charset", "content_languages",
]  # fmt: skip
"""Columns of a selection."""
NOT_IN_TABLE = {"wrapping": "'member'", "record_type": "'response'"}
"""What a scan of archives tells and the cc-index table does not: there, every row is a gzip member of its own."""
PLAIN = [
    "content_languages", "url_host_tld", "url_host_registered_domain", "url_host_name", "content_mime_detected",
    "fetch_status", "subset",
]  # fmt: skip
COUNTABLE = dict(zip(PLAIN, PLAIN)) | {
    "language": "content_languages",
    "fetch_hour": "substr(CAST(fetch_time AS varchar), 1, 13)",
    "fetch_day": "CAST(date_trunc('day', fetch_time) AS date)",
}
"""What `count_query` counts by; `language` is the first of a page's languages."""


def text(value: str) -> str:
    """A string of SQL."""
    return "'" + value.replace("'", "''") + "'"


def _among(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(map(text, values))})"


def _not(condition: str) -> str:
    """True also where `condition` is NULL."""
    return f"NOT coalesce({condition}, false)"


def count_query(crawl: str, by: str, limit: int = 20) -> str:
    """Pages and compressed MB by one of `COUNTABLE`, largest first; raises `ParamError` for anything else."""
    if by not in COUNTABLE:
        raise ParamError(f"cannot count by '{by}', only by {', '.join(COUNTABLE)}")
    shown = "split_part(value, ',', 1)" if by == "language" else "CAST(value AS varchar)"
    # the column as it is inside, what is made of it outside: DuckDB counts a dictionary's numbers, not its strings
    return f"""SELECT coalesce({shown}, '(none)') AS {by}, CAST(sum(n) AS bigint) AS pages,
  round(CAST(sum(bytes) AS double) / 1e6, 2) AS mb
FROM (
  SELECT {COUNTABLE[by]} AS value, count(*) AS n, sum(warc_record_length) AS bytes
  FROM ccindex WHERE crawl = {text(crawl)} GROUP BY 1) AS counted
GROUP BY 1 ORDER BY pages DESC, 1 LIMIT {int(limit)}"""


def site_filter(site: str) -> str:
    """SQL for the pages of a registered domain (`imdb.com`), a host (`www.imdb.com`) or below a URL.

    The index is sorted by reversed host name, so the conditions on `url_host_tld` and on the registered domain are
    what lets an engine skip row groups; the URL alone skips none. Raises `ParamError` where there is no host.
    """
    scheme, rest = site.split("://", 1) if "://" in site else ("", site)
    host = host_name(f"//{rest}").rstrip(".")
    if not host:
        raise ParamError(f"'{site}' is no site: give a domain, a host or the beginning of a URL")
    labels = host.split(".")
    # which part of a host is its registered domain only the public suffix list knows: all of them are asked for
    above = [".".join(labels[i:]) for i in range(max(1, len(labels) - 1))]
    condition = f"url_host_tld = {text(labels[-1])} AND {_among('url_host_registered_domain', above)}"
    condition += f" AND (url_host_registered_domain = {text(host)} OR url_host_name = {text(host)})"
    if rest.partition("/")[2].strip("/") or "?" in rest:
        urls = [text(f"{s}://{rest}") for s in ([scheme.lower()] if scheme else ["https", "http"])]
        condition += f" AND ({' OR '.join(f'starts_with(url, {u})' for u in urls)})"
    return condition


def find_query(crawl: str, site: str, limit: int = 0) -> str:
    """The pages of a site with what the index knows of each, those that were there (200) first; `limit` 0 = all."""
    return f"""SELECT url, fetch_time, fetch_status, content_mime_detected, content_languages, warc_record_length, warc_filename, warc_record_offset
FROM ccindex WHERE crawl = {text(crawl)} AND {site_filter(site)}
ORDER BY fetch_status, url, fetch_time{f" LIMIT {int(limit)}" if limit else ""}"""


def sites_query(crawl: str, language: str, limit: int = 20) -> str:
    """The sites with most pages whose first language is `language` (`(none)`: none known)."""
    return f"""SELECT url_host_registered_domain AS site, count(*) AS pages, round(avg(warc_record_length)) AS mean_bytes
FROM ccindex WHERE crawl = {text(crawl)} AND coalesce(split_part(content_languages, ',', 1), '(none)') = {text(language)}
GROUP BY 1 ORDER BY pages DESC, 1 LIMIT {int(limit)}"""


def archives_query(crawl: str, site: str) -> str:
    """Which archive files hold pages of a site, and how many."""
    return f"""SELECT warc_filename, count(*) AS pages, CAST(sum(warc_record_length) AS bigint) AS bytes
FROM ccindex WHERE crawl = {text(crawl)} AND {site_filter(site)}
GROUP BY 1 ORDER BY 1"""


def _population(p: ExploreIndex) -> str:
    """The rows that are judged at all: with `domains`, those of other domains are not even read."""
    where = f"crawl = {text(p.crawl)}"
    if p.domains:
        where += f" AND {_among('url_host_tld', sorted({d.rpartition('.')[2] for d in p.domains}))}"
        where += f" AND {_among('url_host_registered_domain', p.domains)}"
    return where


def _reason(p: ExploreIndex) -> str:
    """SQL for why a row is left out, the first reason that fits; NULL if it is selected."""
    status = "CAST(fetch_status AS varchar)"
    wrong = _not(_among(status, p.statuses))
    spoken = [f"contains(split(content_languages, ','), {text(language)})" for language in p.languages]
    cases = (
        (p.archive_paths, _not(_among("record_type", PAGE_RECORDS)), "'record type ' || record_type"),
        (p.statuses, f"{wrong} AND fetch_status BETWEEN 300 AND 399", "'redirect'"),
        (p.statuses, wrong, f"'status ' || coalesce({status}, 'none')"),
        (True, "subset = 'robotstxt'", "'robots.txt'"),
        (p.mimes, _not(_among("content_mime_detected", p.mimes)), "'MIME type'"),
        (p.languages, _not(" OR ".join(spoken)), "'index language'"),
        (not p.keep_truncated, "content_truncated IS NOT NULL", "'truncated'"),
        (p.min_record_kb, f"warc_record_length < {int(p.min_record_kb * 1e3)}", "'record too short'"),
        (True, f"warc_record_length > {int(p.max_record_mb * 1e6)}", "'record too long'"),
    )
    lines = [f"    WHEN {when} THEN {then}" for asked, when, then in cases if asked]
    return "\n".join(["CASE", *lines, "  END"])


def reasons_query(p: ExploreIndex) -> str:
    """How many rows are left out for which reason; NULL are those selected."""
    return f"""SELECT reason, count(*) AS records FROM (
  SELECT {_reason(p)} AS reason
  FROM ccindex WHERE {_population(p)}) AS judged
GROUP BY 1 ORDER BY 1"""


def select_query(p: ExploreIndex) -> str:
    """The selected rows, in the order in which archives are read."""
    stand_ins = {} if p.archive_paths else NOT_IN_TABLE
    return f"""SELECT {", ".join(f"{stand_ins[c]} AS {c}" if c in stand_ins else c for c in SELECTED)}
FROM ccindex WHERE {_population(p)} AND {_reason(p)} IS NULL
ORDER BY warc_filename, warc_record_offset{f" LIMIT {p.max_pages}" if p.max_pages else ""}"""
