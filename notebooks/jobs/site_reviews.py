"""Every review of one site: film, rating, text. Who wrote it is masked, in the text too. Change `SITE` to yours.

Reviews are read as schema.org JSON-LD, which shops and film sites write for search engines.
"""

import json
import re
from urllib.parse import urlsplit

from kit.data.extract.reviews import reviews_of
from kit.data.read.charset import decode

SITE = "www.reelnotes.example"
SCHEMA = {"film": "string", "rating": "double", "rating_max": "double", "review": "string", "url": "string"}
JSON_LD = re.compile(r"<script[^>]{0,200}ld\+json[^>]{0,200}>(.*?)</script", re.DOTALL | re.IGNORECASE)


def record(r):
    if r.type != "response" or r.status != 200 or urlsplit(r.url).hostname != SITE:
        return
    html, _ = decode(r.payload, r.charset)
    reviews = reviews_of(html)
    mask = masker(author_names(html)) if reviews else None
    for review in reviews:
        yield {
            "film": mask(review["item"]),
            "rating": review["rating"],
            "rating_max": review["rating_max"],
            "review": mask(f"{review['title']}\n\n{review['body']}".strip()),
            "url": mask(r.url),
        }


def author_names(html):
    """Names under `author` anywhere in the page's JSON-LD."""
    found, todo = set(), []
    for script in JSON_LD.findall(html):
        try:
            todo.append(json.loads(script))
        except (ValueError, RecursionError):
            continue  # then it has no reviews either
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            who = node.get("author")
            for one in who if isinstance(who, list) else [who]:
                name = one.get("name") if isinstance(one, dict) else one
                found |= {name.strip()} if isinstance(name, str) and name.strip() else set()
        todo += [
            x for x in (node.values() if isinstance(node, dict) else node) if isinstance(x, (dict, list))
        ]
    return found


def masker(names):
    """A function that replaces `names`, and the words of a name like `Ann Lee`, by `<PERSON>`."""
    words = {w for n in names if n.istitle() and " " in n for w in n.split() if len(w) > 2}
    whole = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    parts = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    patterns = [re.compile(rf"(?<!\w)(?:{p})(?!\w)", flags) for p, flags in ((whole, re.I), (parts, 0)) if p]

    def mask(text):
        for pattern in patterns:
            text = pattern.sub("<PERSON>", text)
        return text

    return mask
