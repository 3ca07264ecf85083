"""A large cc-index table to measure on: the true schema and layout, invented hosts, sizes as in a real crawl.

`python tests/data/select/big_index.py FOLDER 5000000` writes one; tests make a small one of the same kind.
"""

import sys
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

CRAWL = "CC-MAIN-2026-05"
MACROS = """
CREATE MACRO pick(h, xs) AS xs[(h % len(xs) + 1)::INT];
CREATE MACRO syllable(h) AS substr('bcdfghjklmnprstvz', (h % 17 + 1)::INT, 1) || substr('aeiou', ((h >> 8) % 5 + 1)::INT, 1);
CREATE MACRO word(h) AS syllable(h) || syllable(h >> 16) || syllable(h >> 32);
CREATE MACRO reversed(name) AS array_to_string(list_reverse(string_split(name, '.')), ',');
"""
# one row in `rows` fetches of a few heavy and very many light domains, sorted as Common Crawl sorts
ROWS = """
WITH fetched AS (
  SELECT i, hash(i) AS h, hash(i, 1) AS g, floor({domains} * pow((hash(i, 2) % 1000003) / 1000003, 3))::INT AS d FROM range({rows}) t(i)),
named AS (
  SELECT *, pick(hash(d, 3), ['com', 'com', 'com', 'org', 'net', 'de', 'fr', 'ru', 'jp', 'io', 'co.uk', 'com.br']) AS suffix,
    word(hash(d, 4)) || word(hash(d, 5)) || d AS name, pick(h, ['www.', 'www.', 'www.', '', '', 'blog.', 'shop.', 'm.']) AS sub,
    '/' || word(hash(g % 40, d)) || '/' || word(g) || '-' || word(hash(g, 1)) || '-' || word(hash(g, 2)) || pick(g, ['', '.html', '/', '-' || i]) AS path,
    CASE WHEN h % 9 = 0 THEN 'page=' || g % 500 END AS query, (g % 72000)::INT AS file
  FROM fetched),
placed AS (SELECT *, name || '.' || suffix AS domain, sub || name || '.' || suffix AS host FROM named)
SELECT reversed(domain) || CASE WHEN sub IN ('', 'www.') THEN '' ELSE ',' || sub[:-2] END || ')' || path || coalesce('?' || query, '') AS url_surtkey,
  'https://' || host || path || coalesce('?' || query, '') AS url, host AS url_host_name,
  split_part(reversed(host), ',', 1) AS url_host_tld, split_part(reversed(host), ',', 2) AS url_host_2nd_last_part,
  nullif(split_part(reversed(host), ',', 3), '') AS url_host_3rd_last_part, nullif(split_part(reversed(host), ',', 4), '') AS url_host_4th_last_part,
  NULL::VARCHAR AS url_host_5th_last_part, suffix AS url_host_registry_suffix, domain AS url_host_registered_domain,
  suffix AS url_host_private_suffix, domain AS url_host_private_domain, replace(reversed(host), ',', '.') AS url_host_name_reversed,
  'https' AS url_protocol, NULL::INT AS url_port, path AS url_path, query AS url_query,
  (TIMESTAMP '2026-01-12 00:00:00' + to_milliseconds((g % 1200000000)::BIGINT))::TIMESTAMP_MS AS fetch_time, 200::SMALLINT AS fetch_status,
  NULL::VARCHAR AS fetch_redirect, substr(translate(to_base64(unhex(md5(i::VARCHAR) || md5(domain || i))), '+/0189=', 'ABCDEFG'), 1, 32).upper() AS content_digest,
  'text/html' AS content_mime_type, pick(hash(h, 1), ['text/html', 'text/html', 'text/html', 'application/xhtml+xml']) AS content_mime_detected,
  'UTF-8' AS content_charset, pick(hash(d, 6) % 13 + h % 2, ['eng', 'eng', 'eng', 'eng', 'eng,deu', 'rus', 'deu', 'zho', 'jpn', 'fra', 'spa', NULL, 'zho,eng']) AS content_languages,
  CASE WHEN h % 97 = 0 THEN 'length' END AS content_truncated,
  format('crawl-data/{crawl}/segments/17682{{:08d}}.{{:d}}/warc/{crawl}-20260112000000-20260112030000-{{:05d}}.warc.gz', file // 800 * 7919, file // 800, file % 800) AS warc_filename,
  (hash(g, 9) % 1000000000)::INT AS warc_record_offset, (2000 + pow(hash(g, 10) % 1000 / 100, 5))::INT AS warc_record_length,
  format('17682{{:08d}}.{{:d}}', file // 800 * 7919, file // 800) AS warc_segment
FROM placed ORDER BY url_surtkey
"""


def make(folder: Path, rows: int, files: int = 4, group: int = 100_000, page: int = 20_000) -> Path:
    """Write `rows` rows of subset `warc` in `files` files below `folder`; returns the folder above `crawl=…`."""
    table = folder / "cc-index" / "table" / "cc-main" / "warc"
    part = table / f"crawl={CRAWL}" / "subset=warc"
    part.mkdir(parents=True)
    con = duckdb.connect()
    con.execute(f"SET preserve_insertion_order = true; SET threads = 2; {MACROS}")
    data = con.sql(ROWS.format(rows=rows, domains=max(rows // 25, 10), crawl=CRAWL)).to_arrow_table()
    for n in range(files):
        piece = data.slice(n * rows // files, (n + 1) * rows // files - n * rows // files)
        # pages, dictionary and codec as Spark writes them
        pq.write_table(piece, part / f"part-{n:05d}-made.c000.gz.parquet", compression="gzip", compression_level=6, row_group_size=group,
                       max_rows_per_page=page, write_page_index=True)  # fmt: skip
    return table


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), int(sys.argv[2])))
