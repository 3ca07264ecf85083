"""Build the sample crawl: a miniature web in Common Crawl's layout, with known properties planted.

    python data_samples/build.py [--out DIR] [--texts DIR]

Reads data_samples/texts/ and writes crawl-data/, cc-index/ and planted.jsonl. The same texts give
the same bytes: no clock is read, ids are uuid5, every choice follows from a hash of the URL.
"""

import argparse
import html
import json
import random
import re
import struct
import unicodedata
import uuid
import zlib
from base64 import b32encode
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from hashlib import sha1
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding

HERE = Path(__file__).resolve().parent
NOW, EARLIER = "CC-SAMPLE-2026-05", "CC-SAMPLE-2025-51"
CRAWLS = {  # name: (segment, first fetch)
    NOW: ("1768300000000.00", datetime(2026, 1, 13, 12)),
    EARLIER: ("1765800000000.00", datetime(2025, 12, 15, 12)),
}
SHOP, FILMS, MIRROR = "www.bramblegate.example", "www.reelnotes.example", "cinema-mirror.example"

# ---------------------------------------------------------------- words of the page furniture
# code, CLD2's name, then: home, about, contact, privacy, search, newsletter, its pitch, more,
# cookie notice, accept, advertisement, rights, share, "seen elsewhere" (leads a republished text)
FURNITURE = {
    "eng": "en|ENGLISH|Home|About us|Contact|Privacy policy|Search|Newsletter|One letter a week, no"
    " noise.|More from this site|We use cookies to run this site and to count visits.|Accept all|"
    "Advertisement|All rights reserved|Share|Here is a text that one of our readers sent us:",
    "deu": "de|GERMAN|Startseite|Über uns|Kontakt|Datenschutz|Suche|Newsletter|Einmal pro Woche das"
    " Wichtigste.|Mehr zum Thema|Diese Website verwendet Cookies, um Besuche zu zählen.|"
    "Alle akzeptieren|Anzeige|Alle Rechte vorbehalten|Teilen|Diesen Text hat uns ein Leser"
    " geschickt:",
    "fra": "fr|FRENCH|Accueil|À propos|Contact|Confidentialité|Rechercher|Infolettre|L’essentiel,"
    " une fois par semaine.|À lire aussi|Ce site utilise des cookies pour mesurer son audience.|"
    "Tout accepter|Publicité|Tous droits réservés|Partager|Voici un texte qu’une lectrice nous a"
    " envoyé :",
    "spa": "es|SPANISH|Inicio|Quiénes somos|Contacto|Privacidad|Buscar|Boletín|Lo esencial, una"
    " vez por semana.|Más sobre el tema|Usamos cookies para contar las visitas.|Aceptar todo|"
    "Publicidad|Todos los derechos reservados|Compartir|Este texto nos lo envió un lector:",
    "ita": "it|ITALIAN|Home|Chi siamo|Contatti|Privacy|Cerca|Newsletter|L’essenziale, una volta"
    " alla settimana.|Leggi anche|Questo sito usa i cookie per contare le visite.|Accetta tutto|"
    "Pubblicità|Tutti i diritti riservati|Condividi|Riceviamo e pubblichiamo:",
    "pol": "pl|POLISH|Strona główna|O nas|Kontakt|Prywatność|Szukaj|Newsletter|Najważniejsze, raz"
    " w tygodniu.|Czytaj także|Używamy plików cookie, aby liczyć odwiedziny.|Akceptuj wszystkie|"
    "Reklama|Wszelkie prawa zastrzeżone|Udostępnij|Ten tekst przysłała nam czytelniczka:",
    "por": "pt|PORTUGUESE|Início|Quem somos|Contato|Privacidade|Buscar|Boletim|O essencial, uma"
    " vez por semana.|Leia também|Usamos cookies para contar as visitas.|Aceitar todos|"
    "Publicidade|Todos os direitos reservados|Compartilhar|Este texto nos foi enviado por um"
    " leitor:",
    "rus": "ru|RUSSIAN|Главная|О нас|Контакты|Конфиденциальность|Поиск|Рассылка|Главное за неделю"
    " одним письмом.|Читайте также|Мы используем файлы cookie для подсчёта посещений.|Принять все|"
    "Реклама|Все права защищены|Поделиться|Этот текст прислал наш читатель:",
    "zho": "zh|Chinese|首页|关于我们|联系方式|隐私政策|搜索|订阅|每周一封,只说要紧事。|相关阅读|"
    "本站使用 Cookie 统计访问量。|全部接受|广告|版权所有|分享|读者来稿:",
    "jpn": "ja|Japanese|ホーム|このサイトについて|お問い合わせ|プライバシー|検索|メルマガ|"
    "週に一度お届けします。|関連記事|当サイトはアクセス計測のためCookieを使用します。|すべて許可|"
    "広告|無断転載を禁じます|シェア|読者から届いた文章です。",
}
LABELS = "code cld2 home about contact privacy search letter pitch more cookies accept ad rights"
WORDS = {
    lang: dict(zip((LABELS + " share seen").split(), line.split("|"), strict=True))
    for lang, line in FURNITURE.items()
}
SWAPS = {  # words that a program, republishing a text, may put for others
    lang: dict(pair.split(":") for pair in line.split())
    for lang, line in {
        "eng": "film:picture very:really but:though and:plus good:decent never:hardly about:around"
        " the:this with:alongside from:out_of people:folks because:since that:which only:just",
        "deu": "und:sowie aber:doch sehr:äußerst auch:ebenso nur:bloß noch:weiterhin nicht:kaum"
        " mit:samt weil:da schon:bereits heute:derzeit mehr:weiteres",
        "fra": "et:puis mais:or très:fort aussi:également avec:et_avec pour:afin_de plus:davantage"
        " pas:point dans:en car:parce_que encore:toujours",
        "spa": "y:además_de pero:aunque muy:bastante también:asimismo con:junto_a para:a_fin_de"
        " más:mayor sin:carente_de porque:ya_que solo:únicamente",
    }.items()
}

# ---------------------------------------------------------------- page skeletons, one per kind
HEAD = """<!DOCTYPE html>
<html lang="$code">
<head>
$meta<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title – $site</title>
<meta name="description" content="$desc">
<meta property="og:title" content="$title"><meta property="og:site_name" content="$site">
<link rel="canonical" href="$url"><link rel="stylesheet" href="/assets/$kind.css?v=$build">
<style>.cookie-bar{position:fixed;bottom:0;background:#$colour}.ad{min-height:90px}</style>
<script>window.dataLayer=window.dataLayer||[];dataLayer.push({"page":"$kind","b":"$build"});</script>
<script async src="https://$host/assets/stats.js"></script>
$jsonld</head>
"""
COOKIES = """<div class="cookie-bar" role="dialog"><p>$cookies</p><button>$accept</button>
<a href="/privacy">$privacy</a></div>"""
SIDEBAR = """<h3>$more</h3><ul>$related</ul>
<div class="nl-box"><h3>$letter</h3><p>$pitch</p><form action="/letter">
<input name="mail"></form></div>
<div class="ad">$ad</div>"""
FOOT = '© 2026 $site. $rights. <a href="/privacy">$privacy</a> <a href="/contact">$contact</a>'
BODY = {
    "review": f"""<body class="rn">{COOKIES}
<header class="masthead"><a class="logo" href="/">$site</a><nav><ul>$nav</ul></nav></header>
<div class="ad">$ad</div><div class="grid"><main id="content">
$main</main>
<aside class="side">{SIDEBAR}</aside></div><footer>{FOOT}</footer></body></html>""",
    "shop": f"""<body><div class="topbar"><a href="/cart">Cart (0)</a>
<a href="/account">Log in</a></div><div class="header"><a href="/"><img src="/assets/logo.svg"
 alt="$site"></a><ul>$nav</ul></div>
<div class="container"><div class="row"><div class="col-9">
$main</div><div class="col-3">{SIDEBAR}</div></div></div>
<div class="footer">Delivery in 2–4 days · Returns within 30 days<br>{FOOT}</div>
{COOKIES}</body></html>""",
    "news": f"""<body id="top"><div id="wrap"><div class="top-strip">{COOKIES}</div>
<div id="head"><div class="brand"><a href="/">$site</a></div><ul class="menu">$nav</ul></div>
<section class="column-main">
$main<div class="share">$share: <a href="#fb">Facebook</a> <a href="#wa">WhatsApp</a></div>
</section>
<section class="column-right">{SIDEBAR}</section><div id="foot"><small>{FOOT}</small></div></div>
</body></html>""",
    "blog": f"""<body class="post-template-default single single-post wp-embed-responsive">
<header id="masthead" class="site-header"><p class="site-title"><a href="/">$site</a></p>
<nav id="site-navigation"><ul class="primary-menu">$nav</ul></nav></header>
<div id="primary" class="content-area"><main class="site-main">
$main<div id="comments"><form action="/wp-comments-post.php" method="post"><textarea name="comment">
</textarea></form></div></main></div><aside id="secondary" class="widget-area">{SIDEBAR}</aside>
<footer id="colophon">{FOOT} WordPress</footer>{COOKIES}</body></html>""",
    "forum": f"""<body bgcolor=#E5E5E5><table width="100%" cellspacing=0 cellpadding=10><tr><td>
<table width="100%"><tr><td><a href="/"><b>$site</b></a></td><td align=right>
<ul class=mainmenu>$nav</ul></td></tr></table>
$main<table width="100%" class=small><tr><td>$more<ul>$related</ul></td><td>$ad</td></tr></table>
<center>{FOOT}<br>phpBB 2.0.23</center></td></tr></table>{COOKIES}</body></html>""",
    "shop-info": f"""<body><div class="page"><div class="bar">$site <ul>$nav</ul></div>
<div class="content">
$main</div><div class="box">{SIDEBAR}</div><div class="end">{FOOT}</div>{COOKIES}</div>
</body></html>""",
    "bare": "<body>\n$main</body></html>",
}


@dataclass(frozen=True)
class Page:
    """One capture: a URL, what the server answered, and what is planted in it."""

    url: str
    body: bytes
    text: str = ""  # the main text, before any damage; copies are made from it
    title: str = ""
    language: str | None = None  # the truth
    languages: str | None = None  # what the crawler's detector would say
    date: str = ""
    kind: str = ""
    header: str | None = "UTF-8"  # charset in the HTTP header
    detected: str | None = None  # charset in the index
    rows: tuple[dict, ...] = ()  # lines for planted.jsonl
    status: int = 200
    mime: str = "text/html"
    subset: str = "warc"
    location: str | None = None
    truncated: bool = False
    broken: str | None = None

    @property
    def host(self) -> str:
        """The host name in the URL."""
        return urlsplit(self.url).hostname or ""


def number(key: str) -> int:
    """A number that depends on nothing but the key, for every choice that looks random."""
    return int.from_bytes(sha1(key.encode()).digest()[:6])


def row(prop: str, **details: Any) -> dict:
    """One planted property with its details."""
    return {"property": prop, **details}


def words(text: str) -> list[str]:
    """The lower-cased words of a text."""
    return re.findall(r"\w+", text.lower())


def jaccard(one: str, other: str, n: int = 5) -> float:
    """Jaccard similarity of the sets of word n-grams of two texts."""
    a, b = ({tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in map(words, (one, other)))
    return len(a & b) / len(a | b) if a | b else 1.0


def slug(text: str) -> str:
    """An ASCII path segment from a title."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower().replace("'", "")).strip("-")


def tidy(text: str, language: str = "eng") -> str:
    """Undo line wrapping inside the paragraphs of a YAML block."""
    glue = "" if language in ("zho", "jpn") else " "
    return "\n\n".join(re.sub(r"\s*\n\s*", glue, p.strip()) for p in re.split(r"\n\s*\n", text))


def load(folder: Path) -> list[dict]:
    """All entries of a YAML file, or of all YAML files of a folder in order of name."""
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else [folder]
    return [entry for f in files for entry in yaml.safe_load(f.read_text("utf-8")) or []]


# ---------------------------------------------------------------- HTML
E = html.escape


def paragraphs(text: str) -> str:
    """The text as one <p> per paragraph."""
    return "".join(f"<p>{E(p, quote=False)}</p>\n" for p in text.split("\n\n"))


def figure(name: str, image: dict) -> str:
    """A picture with its caption."""
    return (
        f'<figure><img src="/img/{name}.png" alt="{E(image["alt"])}" width="640">'
        f"<figcaption>{E(image['caption'])}</figcaption></figure>\n"
    )


def items(links: Iterable[tuple[str, str]]) -> str:
    """List items with a link each."""
    return "".join(f'<li><a href="{E(href)}">{E(text)}</a></li>\n' for href, text in links)


def json_ld(data: dict) -> str:
    """A JSON-LD script; '<' is written as an escape so that no value can end the script."""
    raw = json.dumps({"@context": "https://schema.org"} | data, ensure_ascii=False)
    return '<script type="application/ld+json">' + raw.replace("<", "\\u003c") + "</script>\n"


def html_page(
    kind: str, url: str, site: str, title: str, main: str, text: str, language: str = "eng", *,
    related: Iterable[tuple[str, str]] = (), data: dict | None = None, rows: Iterable[dict] = (),
    codec: str = "utf-8", header: str | None = "UTF-8", meta: str | None = "utf-8",
    chrome: str = "", sections: Iterable[tuple[str, str]] = (), **more: Any,
) -> Page:  # fmt: skip
    """Put a main part into the skeleton of its kind and encode the page."""
    chrome, host = chrome or language, urlsplit(url).hostname or ""
    w = WORDS[chrome]
    rest = ((f"/{key}", w[key]) for key in ("about", "contact", "search"))
    nav = [("/", w["home"]), *sections, *rest]
    fill = w | {
        "nav": items(nav), "main": main, "related": items(related), "kind": kind, "host": host,
        "title": E(title), "site": E(site), "url": E(url), "desc": E(text.split("\n")[0][:120]),
        "meta": f'<meta charset="{meta}">\n' if meta else "", "code": WORDS[language]["code"],
        "build": f"{number(host) % 900 + 100}", "colour": f"{number(host) % 0xFFFFFF:06x}",
        "jsonld": json_ld(data) if data else "",
    }  # fmt: skip
    source = Template(HEAD + BODY[kind]).substitute(fill)
    body = source.encode(codec, "xmlcharrefreplace")
    # The crawler believes the header, then the meta tag, then a detector; with a wrong charset its
    # language detector sees noise.
    detected = header or meta or detect_encoding(body).replace("cp125", "windows-125")
    right = detected.lower() in (codec, "gb2312" if codec == "gb18030" else "")
    if detected[:3] in ("utf", "iso", "gb2"):
        detected = detected.upper()
    known = ",".join(dict.fromkeys((language, chrome))) if right else None
    more = {"languages": known, "kind": kind} | more
    planted = (row("language", language=language), *rows)
    return Page(url, body, text, title, language, header=header, detected=detected, rows=planted, **more)


# ---------------------------------------------------------------- the review site and the shop
def review_data(review: dict, about: dict) -> dict:
    """A review as schema.org data."""
    counts = {"Like": review["helpful"], "Dislike": review["votes"] - review["helpful"]}
    stars = {"@type": "Rating", "ratingValue": review["stars"], "bestRating": 5, "worstRating": 1}
    return {
        "@type": "Review", "name": review["title"], "itemReviewed": about, "reviewRating": stars,
        "author": {"@type": "Person", "name": review["author"]},
        "datePublished": str(review["date"]), "reviewBody": tidy(review["body"]),
        "interactionStatistic": [
            {"@type": "InteractionCounter", "userInteractionCount": count,
             "interactionType": f"https://schema.org/{kind}Action"}
            for kind, count in counts.items()
        ],
    }  # fmt: skip


def review_html(review: dict, line: str, level: int) -> str:
    """The visible review: headline, stars, body, helpful votes."""
    return (
        f'<article class="review"><h{level}>{E(review["title"])}</h{level}>\n{line}'
        f'<p class="stars">{"★" * review["stars"]} {review["stars"]} out of 5 stars</p>\n'
        f'<p class="byline">by <span class="author">{E(review["author"])}</span>, '
        f'<time datetime="{review["date"]}">{review["date"]:%d %B %Y}</time></p>\n'
        f'<div class="review-body">\n{paragraphs(tidy(review["body"]))}</div>\n'
        f'<p class="helpful">{review["helpful"]} of {review["votes"]} readers found this review '
        "helpful</p></article>\n"
    )


def film_pages(films: list[dict]) -> Iterable[Page]:
    """The review site: home, lists A–Z, a page per film and a page per review."""
    names = [(f"/film/{slug(f['film'])}/", f["film"]) for f in films]
    spans = ("af", "gm", "ns", "tz")
    menu = [(f"/films/a-z/{a}-{z}/", f"Films {a.upper()} to {z.upper()}") for a, z in spans]
    for (start, end), (path, title) in zip(spans, menu, strict=True):
        part = [n for n in sorted(names, key=lambda n: n[1]) if start <= slug(n[1])[0] <= end]
        yield listing("review", FILMS, "Reel Notes", path, title, part, menu)
    title = "Reviews by people who sat through it"
    yield listing("review", FILMS, "Reel Notes", "/", title, names, menu)
    for n, film in enumerate(films):
        path, year, name = names[n][0], film["year"], film["film"]
        related = [names[(n + k) % len(names)] for k in range(1, 6)]
        notes = [(f"{path}review/{k}/", r["title"]) for k, r in enumerate(film["reviews"], 1)]
        synopsis = tidy(film["synopsis"])
        main = (
            f'<article class="film"><h1>{E(name)}</h1>\n<p class="facts">{year} · '
            f"{E(film['genre'])} · {film['runtime_min']} min · directed by {E(film['director'])}"
            f'</p>\n<p class="cast">With {E(", ".join(film["cast"]))}</p>\n'
            f'<div class="synopsis">\n{paragraphs(synopsis)}</div>\n'
            f"{figure(slug(name), film['still'])}<h2>Reviews</h2>\n"
            f"<ol>{items(notes)}</ol></article>\n"
        )
        url = f"https://{FILMS}{path}"
        rows = [row("image_caption", **film["still"])]
        movie = {"@type": "Movie", "name": name, "dateCreated": str(year)}
        yield html_page(
            "review", url, "Reel Notes", f"{name} ({year})", main, synopsis,
            related=related, rows=rows, data=movie, sections=menu,
        )  # fmt: skip
        for (href, title), review in zip(notes, film["reviews"], strict=True):
            line = f'<p class="film-line">A review of <a href="{path}">{E(name)}</a> ({year})</p>\n'
            facts = {key: review[key] for key in ("stars", "helpful", "votes")}
            yield html_page(
                "review", f"https://{FILMS}{href}", "Reel Notes", title,
                review_html(review, line, 1), tidy(review["body"]), related=related,
                data=review_data(review, movie), date=str(review["date"]),
                rows=[row("review", film=name, **facts)], sections=menu,
            )  # fmt: skip


def shop_pages(products: list[dict]) -> Iterable[Page]:
    """The shop: home, a page per category and a page per product with its reviews."""
    groups = defaultdict(list)
    for product in products:
        groups[product["category"]].append((f"/p/{slug(product['product'])}", product["product"]))
    top = [(f"/c/{slug(c)}", c.title()) for c in sorted(groups)]
    yield listing("shop", SHOP, "Bramblegate", "/", "Useful things, honestly reviewed", top, top)
    for category, entries in sorted(groups.items()):
        path = f"/c/{slug(category)}"
        yield listing("shop", SHOP, "Bramblegate", path, category.title(), entries, top)
    links = [link for _, entries in sorted(groups.items()) for link in entries]
    for n, product in enumerate(products):
        name, reviews, text = product["product"], product["reviews"], tidy(product["description"])
        specs = "".join(
            f"<tr><th>{E(str(k))}</th><td>{E(str(v))}</td></tr>" for k, v in product["specs"].items()
        )
        main = (
            f'<h1>{E(name)}</h1><p class="brand">{E(product["brand"])} · SKU {E(product["sku"])}'
            f'</p>\n<p class="price">€ {product["price_eur"]:.2f}</p><button>Add to cart</button>\n'
            f'{figure(slug(name), product["image"])}<div class="description">\n{paragraphs(text)}'
            f'</div>\n<table class="specs">{specs}</table>\n<h2>Customer reviews</h2>\n'
            + "".join(review_html(r, "", 3) for r in reviews)
        )
        item = {"@type": "Product", "name": name}
        mean = round(sum(r["stars"] for r in reviews) / len(reviews), 1)
        rating = {"@type": "AggregateRating", "ratingValue": mean, "reviewCount": len(reviews)}
        data = item | {
            "sku": product["sku"], "brand": {"@type": "Brand", "name": product["brand"]},
            "aggregateRating": rating, "review": [review_data(r, item) for r in reviews],
        }  # fmt: skip
        keys = ("title", "stars", "helpful", "votes")
        rows = [row("product_review", product=name, **{k: r[k] for k in keys}) for r in reviews]
        yield html_page(
            "shop", f"https://{SHOP}/p/{slug(name)}", "Bramblegate", name, main, text,
            related=(links * 2)[n + 1 : n + 6], data=data, sections=top,
            rows=[row("image_caption", **product["image"]), *rows],
        )  # fmt: skip


# ---------------------------------------------------------------- news, blogs, forums
def listing(
    kind: str, host: str, site: str, path: str, title: str, links: list, menu: Iterable = (),
    language: str = "eng",
) -> Page:  # fmt: skip
    """A page of links: a home page or a list."""
    main = f"<h1>{E(title)}</h1>\n<ul class='index'>{items(links)}</ul>\n"
    text, url = "\n\n".join(t for _, t in links), f"https://{host}{path}"
    return html_page(kind, url, site, title, main, text, language, sections=menu)


def article(kind: str, title: str, text: str, byline: str, picture: str, ad: str) -> str:
    """The main part of a news, blog or information page."""
    first, *rest = text.split("\n\n")
    if kind == "blog":
        return (
            f'<article class="post hentry"><header class="entry-header"><h1 class="entry-title">'
            f'{E(title)}</h1><div class="entry-meta">{E(byline)}</div></header>\n'
            f'<div class="entry-content">\n{picture}{paragraphs(text)}</div></article>\n'
        )
    rest_html = paragraphs("\n\n".join(rest)) if rest else ""
    advert = f'<div class="ad inline">{ad}</div>\n' if kind == "news" else ""
    return (
        f"<h1>{E(title)}</h1>\n<div class='byline'>{E(byline)}</div>\n<div class='article-text'>\n"
        f"{paragraphs(first)}{picture}{advert}{rest_html}</div>\n"
    )


def thread(title: str, posts: list[dict], language: str, picture: str) -> str:
    """The main part of a forum page: a table of posts, the picture in the first."""
    cells = "".join(
        f"<tr><td valign=top width=150><b>{E(p['author'])}</b><br><small>{p['date']}</small></td>"
        f"<td class=postbody>\n{paragraphs(tidy(p['body'], language))}{'' if n else picture}"
        "</td></tr>\n"
        for n, p in enumerate(posts)
    )
    return f"<h2>{E(title)}</h2>\n<table class=forumline border=1>\n{cells}</table>\n"


def site_pages(entries: list[dict]) -> Iterable[Page]:
    """Home page and pages of every site in texts/sites."""
    hosts = defaultdict(list)
    for entry in entries:
        hosts[entry["host"]].append(entry)
    for host, group in sorted(hosts.items()):
        links = [(e["path"], e["title"]) for e in group]
        first = group[0]
        site, language = first["site_name"], first["language"]
        tops = sorted({e["path"].split("/")[1] for e in group if e["path"].count("/") > 1})
        menu = [(f"/{top}/", top.replace("-", " ").title()) for top in tops]
        yield listing(first["kind"], host, site, "/", site, links, menu, language)
        for n, entry in enumerate(group):
            language, kind, image = entry["language"], entry["kind"], entry.get("image")
            posts = entry.get("posts", [])
            text = tidy(entry.get("body") or "\n\n".join(p["body"] for p in posts), language)
            picture = figure(slug(entry["path"]), image) if image else ""
            byline = f"{entry.get('author', '')} {entry.get('date', '')}".strip()
            rows = [row("pii", **p) for p in entry.get("pii") or []]
            rows += [row("decoy", value=str(d)) for d in entry.get("decoys") or []]
            for value in (r["value"] for r in rows):
                if value not in text:
                    raise ValueError(f"{host}{entry['path']}: {value!r} is not in the text")
            rows += [row("image_caption", **image)] if image else []
            title, date = entry["title"], str(entry.get("date", ""))
            main = article(kind, title, text, byline, picture, WORDS[language]["ad"])
            main = thread(title, posts, language, picture) if posts else main
            data = {"@type": "Article", "headline": title, "datePublished": date}
            yield html_page(
                kind, f"https://{host}{entry['path']}", site, title, main, text, language,
                related=links[n + 1 : n + 6] or links[:3], rows=rows, date=date,
                sections=menu, data=None if posts else data,
            )  # fmt: skip


# ---------------------------------------------------------------- planted pages
ATTIC = {  # the broken records' own pages: (what is broken): text
    "gzip": "The trunk with the brass corners holds three theatre programmes, a glove without its"
    " fellow and the receipt for a piano that nobody in this family remembers hearing.",
    "digest": "Whoever labelled the jam jars in the attic wrote the fruit, the year and one word on"
    " the weather, so that July 1962 is still raining when you hold it to the lamp.",
    "offset": "Up here the clock has stopped at ten to four, which is the time of day when the sun"
    " reaches the skylight and every wasp in the roof believes that it is summer.",
    "cut": "The last box is the heaviest: forty years of railway timetables, each with a pencilled"
    " cross beside a train that was missed, and on the lid a note asking us to finish the list.",
}
SHORT = [
    "Closed until Easter. Ring the bell at number nine.",
    "Nothing here yet, we only moved in on Tuesday.",
    "Lost: one green mitten, left hand. Found: one red mitten, left hand.",
    "The pump is mended. Thank you, Ahmed.",
    "Choir practice is at seven, not half past.",
    "Gone fishing, and this time I mean it.",
    "Page reserved for the minutes of the next meeting.",
    "Eggs sold out. Try again after Thursday.",
    "This site looks best on the old computer in the library.",
    "Under construction since 2009.",
]
SOFT_404 = {  # said with status 200
    FILMS: "Page not found. The film may have been moved, or somebody has taped over it.",
    SHOP: "Oops! We could not find that page. Try the search, or go back to the shop.",
    "tradesnear.example": "404 – Sorry, there is nothing at this address (any more).",
}
TOWNS = "Arnmoor Bexcombe Callister Dunmere Eastwold Farnley Gorsewick Holtby Ivelstone Kelsea"
BOILER = (
    "Book a trusted tradesperson today. Our directory lists checked firms for roofs, drains, wiring"
    " and gardens, and every firm answers within one working day. Prices include travel.\n\n"
    "In {town} we currently list {count} firms.\n\nReviews are written by customers after the work"
    " is done. Compare three offers before you decide, and pay only when you are satisfied."
)
SCRIPT = "<script>alert(1)</script>"
ESCAPES = (
    f"To print {SCRIPT} on a page, escape the two angle brackets first. Our own guest book forgot"
    " to in 2011, and for one afternoon every visitor was greeted by a box with the figure one.",
    f'A reader asks why "{SCRIPT}" shows up in the title of our newsletter. Because it is text,'
    " and text may look like anything. What matters is who reads it: a person or a browser.",
)
BIDI = (
    "The invoice was called \u202egpj.exe\u202c on my screen, which reads as a harmless picture"
    " until you look twice. The shop \u2067שלום\u2069 has a Hebrew name and sits in an English"
    " sentence\u200f with its own marks, as it should.\n\nDirection marks are not evil. They are"
    " invisible, that is all, and whoever compares names byte by byte should know of them."
)
CHARSETS = [  # language, true codec, charset in the header, charset in a meta tag
    ("deu", "windows-1252", "UTF-8", "utf-8"),
    ("deu", "windows-1252", "UTF-8", None),
    ("fra", "windows-1252", "UTF-8", "utf-8"),
    ("rus", "windows-1251", None, None),
    ("rus", "koi8-r", "windows-1251", None),
    ("zho", "gb18030", "GB2312", "gb2312"),
    ("jpn", "shift_jis", None, "Shift_JIS"),
    ("jpn", "euc-jp", "UTF-8", "EUC-JP"),
]
META_ONLY = [("deu", "iso-8859-1"), ("fra", "windows-1252"), ("spa", "iso-8859-1")]


def mojibake(text: str) -> str:
    """UTF-8 bytes read as windows-1252, the way browsers do it: its five gaps are controls."""
    return "".join(
        bytes([b]).decode("cp1252" if b not in b"\x81\x8d\x8f\x90\x9d" else "latin-1") for b in text.encode()
    )


def edited(text: str, language: str, floor: float, seed: str) -> str:
    """Drop sentences, replace words and add a lead while the similarity stays above the floor."""
    rng, best, once = random.Random(seed), text, ["lead", "tail"]
    for _ in range(80):
        step, new = rng.choice(["swap", "swap", "drop", *once]), best
        if step == "lead":
            new = f"{WORDS[language]['seen']}\n\n{best}"
        elif step == "tail":
            new = f"{best}\n\n(Reader’s post)"
        elif step == "drop":
            ends = [m.span() for m in re.finditer(r"(?<=[.!?]) [^.!?\n]+[.!?](?= )", best)]
            a, b = rng.choice(ends or [(0, 0)])
            new = best[:a] + best[b:]
        else:
            old, put = rng.choice(sorted(SWAPS[language].items()))
            hits = [m.span() for m in re.finditer(rf"\b{old}\b", best)]
            a, b = rng.choice(hits or [(0, 0)])
            new = best[:a] + put.replace("_", " ") * bool(hits) + best[b:]
        if floor <= jaccard(text, new) < 0.985:
            best, once = new, [s for s in once if s != step]
    return best


def surviving(rows: Iterable[dict], body: bytes) -> list[dict]:
    """The rows whose value or caption is still there after a part of the page was taken away."""
    left = html.unescape(body.decode("utf-8", "ignore"))
    return [r for r in rows if r.get("value", r.get("caption", "")) in left]


class Planter:
    """Makes the pages with planted properties out of the pages of the sites."""

    def __init__(self, base: list[Page]) -> None:
        self.used: set[str] = set()
        self.base = [p for p in base if p.text and urlsplit(p.url).path != "/"]
        self.reviews = [p for p in self.base if p.host == FILMS and "/review/" in p.url]
        self.articles = [p for p in self.base if p.kind in ("news", "blog") and p.date]

    def pick(self, pages: Iterable[Page], n: int, why: str) -> list[Page]:
        """Choose n pages by hash; no page serves twice, and pages with personal data never."""
        free = (p for p in pages if p.url not in self.used)
        safe = (p for p in free if all(r["property"] != "pii" for r in p.rows))
        chosen = sorted(safe, key=lambda p: number(why + p.url))[:n]
        if len(chosen) < n:
            raise ValueError(f"{why}: {len(chosen)} of {n} pages")
        self.used |= {p.url for p in chosen}
        return chosen

    def in_language(self, *languages: str) -> list[Page]:
        """News and blog pages in any of the languages."""
        return [p for p in self.articles if p.language in languages]

    def copy(self, source: Page, host: str, site: str, prop: dict, **kw: Any) -> Page:
        """The text of a page on another host, in that host's clothes."""
        text = kw.pop("text", source.text)
        title, kind = kw.pop("title", source.title), kw.pop("kind", "news")
        url = f"https://{host}/{number(source.url) % 10**6}-{slug(urlsplit(source.url).path)}"
        language = source.language or "eng"
        main = article(kind, title, text, source.date, "", WORDS[language]["ad"])
        decoys = (r for r in source.rows if r["property"] == "decoy" and r["value"] in text)
        rows = [prop | {"of": source.url}, *decoys]
        return html_page(
            kind, url, site, title, main, text, language, rows=rows, date=source.date, **kw,
        )  # fmt: skip

    def duplicates(self) -> Iterable[Page]:
        """Mirrors, second URLs and edited republications."""
        for p in self.pick(self.reviews, 20, "mirror"):
            rows = (*p.rows, row("exact_duplicate", of=p.url, same_bytes=False))
            body = p.body.replace(FILMS.encode(), MIRROR.encode())
            yield replace(p, url=p.url.replace(FILMS, MIRROR), body=body, rows=rows)
        for p in self.pick(self.reviews + self.articles, 10, "query"):
            rows = (*p.rows, row("exact_duplicate", of=p.url, same_bytes=True))
            yield replace(p, url=f"{p.url}?utm_medium=mail&utm_source=newsletter", rows=rows)
        sources = self.pick(self.reviews, 26, "near")
        sources += self.pick(self.in_language(*SWAPS), 14, "near")
        for n, p in enumerate(sorted(sources, key=lambda p: number("floor" + p.url))):
            text = edited(p.text, p.language or "", 0.96 - n * 0.36 / 39, p.url)
            prop = row("near_duplicate", jaccard=round(jaccard(p.text, text), 4))
            if p.host == FILMS:
                name, host, how = "Film Digest", "filmdigest.example", {"kind": "blog"}
            else:  # an English frame around the foreign text: two languages on one page
                name, host, how = "Pressewall", "pressewall.example", {"chrome": "eng"}
            yield self.copy(p, host, name, prop, text=text, **how)

    def encodings(self) -> Iterable[Page]:
        """Broken text and broken or unusual charset declarations."""
        foreign = self.in_language("deu", "fra", "spa", "ita", "rus")
        for p in self.pick(foreign, 6, "mojibake"):
            bad = {"text": mojibake(p.text), "title": mojibake(p.title)}
            page = self.copy(p, "archiv-spiegel.example", "Archiv", row("mojibake"), **bad)
            yield replace(page, languages=None)
        for language, codec, header, meta in CHARSETS:
            declared = {"header_charset": header, "meta_charset": meta}
            prop = row("wrong_charset", true_charset=codec, **declared)
            p = self.pick(self.in_language(language), 1, codec + str(header))[0]
            how = {"codec": codec, "header": header, "meta": meta}
            yield self.copy(p, "altes-netz.example", "Altes Netz", prop, kind="shop-info", **how)
        for language, codec in META_ONLY:
            p = self.pick(self.in_language(language), 1, "meta" + codec)[0]
            how = {"codec": codec, "header": None, "meta": codec}
            prop = row("meta_charset", true_charset=codec)
            yield self.copy(p, "webring-nord.example", "Webring Nord", prop, kind="blog", **how)

    def oddities(self, spam: list[dict]) -> Iterable[Page]:
        """Spam, short pages, a host of boilerplate, markup in text, direction marks, soft 404s."""

        def plain(kind: str, url: str, title: str, text: str, prop: dict, **kw: Any) -> Page:
            main = article(kind, title, text, "", "", "Advertisement")
            site = (urlsplit(url).hostname or "").split(".")[0].replace("-", " ").title()
            return html_page(kind, url, site, title, main, text, rows=[prop], **kw)

        for s in spam:
            url, prop = f"https://{s['host']}{s['path']}", row("spam", kind=s["kind"])
            page = plain("blog", url, s["title"], tidy(s["body"]), prop)
            if s["kind"] in ("lorem", "symbols"):  # no language to speak of
                page = replace(page, language=None, languages=None, rows=(prop,))
            yield page
        for n, text in enumerate(SHORT, 1):
            prop = row("short", words=len(words(text)))
            yield plain("bare", f"https://smallnotes.example/{n}.html", f"Note {n}", text, prop)
        for town in TOWNS.split():
            text = BOILER.format(town=town, count=number(town) % 40 + 3)
            url = f"https://tradesnear.example/in/{town.lower()}"
            yield plain("shop-info", url, f"Trades in {town}", text, row("boilerplate_host"))
        for n, text in enumerate(ESCAPES, 1):
            url, title = f"https://codekitchen.example/posts/{n}", f"Why {SCRIPT} is only text {n}"
            data = {"@type": "BlogPosting", "headline": title, "description": text}
            page = plain("blog", url, title, text, row("escape_attempt"), data=data)
            real = f'{SCRIPT}<img src="/x.png" alt="" onerror="alert(2)">\n</article>'.encode()
            yield replace(page, body=page.body.replace(b"</article>", real))
        codes = sorted({f"U+{ord(c):04X}" for c in BIDI if unicodedata.category(c) == "Cf"})
        url = "https://codekitchen.example/posts/3"
        yield plain("blog", url, "Invisible ink", BIDI, row("bidi_control", characters=codes))
        for host, text in SOFT_404.items():
            yield plain("bare", f"https://{host}/gone-missing", "404", text, row("soft_404"))
        for what, text in ATTIC.items():
            url, prop = f"https://attic.example/box/{what}", row(f"broken_{what}")
            yield plain("news", url, f"The attic: {what}", text, prop, broken=what)

    def files(self) -> Iterable[Page]:
        """Three pictures and one PDF."""
        pictured = [p for p in self.base if any(r["property"] == "image_caption" for r in p.rows)]
        for p in self.pick(pictured, 3, "png"):
            src = re.search(rb'<img src="(/img/[^"]+)"', p.body)
            url, side = f"https://{p.host}{src[1].decode()}" if src else "", 24
            prop = row("image_file", page=p.url, width=side, height=side)
            yield Page(url, png(side, number(url)), header=None, mime="image/png", rows=(prop,))
        url = f"https://{SHOP}/downloads/returns-form.pdf"
        yield Page(url, pdf("Bramblegate returns form"), header=None, mime="application/pdf",
                   rows=(row("pdf", text="Bramblegate returns form"),))  # fmt: skip

    def diagnostics(self) -> Iterable[Page]:
        """Redirects and errors, kept in a subset of their own."""
        for n, p in enumerate(self.pick(self.reviews + self.articles, 12, "redirect")):
            status = 301 if n % 3 else 302
            old = p.url.replace("https:", "http:") if n % 2 else f"https://{p.host}/?p={n + 100}"
            body = f'<html><body>Moved <a href="{E(p.url)}">here</a></body></html>'.encode()
            yield Page(old, body, status=status, location=p.url, subset="crawldiagnostics",
                       rows=(row("redirect", status=status, location=p.url),))  # fmt: skip
        for n, status in enumerate((404, 404, 404, 404, 410, 500)):
            host = (FILMS, SHOP, "smallnotes.example")[n % 3]
            body = f"<html><head><title>{status}</title></head><body>Error {status}</body></html>"
            rows = (row("error_page", status=status),)
            yield Page(f"https://{host}/old/{n}.html", body.encode(), status=status, rows=rows,
                       subset="crawldiagnostics")  # fmt: skip

    def earlier(self) -> Iterable[Page]:
        """Captures of the crawl before: most as they are now, some with a paragraph fewer."""
        old = [p for p in self.reviews + self.articles if p.date < "2025-12-01"]
        for p in self.pick(old, 30, "same"):
            yield replace(p, rows=(*p.rows, row("earlier_capture", same=True)))
        long = [p for p in self.articles if p.date < "2025-12-01" and p.text.count("\n\n") > 2]
        for p in self.pick(long, 15, "changed"):
            text, last = p.text.rsplit("\n\n", 1)
            body = p.body.replace(paragraphs(last).encode(), b"")
            prop = row("earlier_capture", same=False, jaccard=round(jaccard(p.text, text), 4))
            yield replace(p, body=body, text=text, rows=(*surviving(p.rows, body), prop))


def png(side: int, seed: int) -> bytes:
    """A small square picture."""

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    lines = (bytes((seed >> c * 8) * (x + y) % 256 for x in range(side) for c in range(3))
             for y in range(side))  # fmt: skip
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines), 9))
        + chunk(b"IEND", b"")
    )


def pdf(text: str) -> bytes:
    """A one-page PDF file."""
    stream = f"BT /F1 18 Tf 60 700 Td ({text}) Tj ET"
    objects = (
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        f"<</Length {len(stream)}>>\nstream\n{stream}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    )
    out, starts = "%PDF-1.4\n", []
    for n, content in enumerate(objects, 1):
        starts.append(len(out))
        out += f"{n} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{s:010d} 00000 n \n" for s in starts)
    tail = f"trailer\n<</Size 6/Root 1 0 R>>\nstartxref\n{len(out)}\n%%EOF\n"
    return f"{out}xref\n0 6\n0000000000 65535 f \n{table}{tail}".encode()


# ---------------------------------------------------------------- WARC, WAT and WET
Fields = list[tuple[str, str]]


def digest(data: bytes) -> str:
    """SHA-1 in base 32, as WARC headers and the index have it."""
    return b32encode(sha1(data).digest()).decode()


def urn(key: str) -> str:
    """A fixed WARC-Record-ID."""
    return f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, key)}>"


def gzipped(data: bytes) -> bytes:
    """One gzip member; the header is written here so that no time or system gets into it."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    tail = struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\0" + deflate.compress(data) + deflate.flush() + tail


@dataclass
class Record:
    """One WARC record, and where it came to lie."""

    fields: Fields
    block: bytes
    page: Page | None = None
    offset: int = 0
    length: int = 0

    def get(self, name: str) -> str:
        """The first header field of that name."""
        return dict(reversed(self.fields))[name]

    def head(self) -> bytes:
        """The record's header."""
        lines = "".join(f"{k}: {v}\r\n" for k, v in self.fields)
        return f"WARC/1.0\r\n{lines}\r\n".encode()

    def bytes(self) -> bytes:
        """The record as it stands in an uncompressed file."""
        return self.head() + self.block + b"\r\n\r\n"


@dataclass
class Archive:
    """A WARC file in the making: one gzip member per record."""

    path: str
    data: bytearray = field(default_factory=bytearray)
    records: list[Record] = field(default_factory=list)

    def add(self, kind: str, key: str, block: bytes, fields: Fields, page: Page | None = None) -> Record:
        """Append a record and note its place."""
        head = [("WARC-Type", kind), ("WARC-Record-ID", urn(f"{self.path}#{kind}#{key}"))]
        record = Record(head + fields, block, page, len(self.data))
        record.fields.append(("Content-Length", str(len(block))))
        self.data += (member := gzipped(record.bytes()))
        record.length = len(member)
        self.records.append(record)
        return record

    def info(self, date: str, software: str, crawl: str) -> Record:
        """The warcinfo record that every file begins with."""
        text = (
            f"isPartOf: {crawl}\r\npublisher: data_samples/build.py\r\n"
            f"description: an invented web, never crawled\r\n"
            f"software: {software}\r\nformat: WARC File Format 1.0\r\n\r\n"
        )
        name = ("WARC-Filename", self.path.rsplit("/")[-1])
        kind = ("Content-Type", "application/warc-fields")
        return self.add("warcinfo", crawl, text.encode(), [("WARC-Date", date), kind, name])


def http_head(page: Page, date: datetime) -> bytes:
    """The HTTP response head; servers differ by host, and bodies were decoded by the crawler."""
    reasons = {200: "OK", 301: "Moved Permanently", 302: "Found", 404: "Not Found", 410: "Gone"}
    kind, modern = number(page.host) % 3, number(page.host) % 2
    charset = f"; charset={page.header}" if page.header else ""
    fields = [
        ("Date", f"{date:%a, %d %b %Y %H:%M:%S} GMT"),
        ("Server", ("nginx", "Apache/2.4.62 (Debian)", "cloudflare")[kind]),
        ("Content-Type", page.mime + charset),
        *([("Location", page.location)] if page.location else []),
        ("Vary", "Accept-Encoding"),
        ("Cache-Control", f"max-age={number(page.url) % 3600}"),
        *([("Set-Cookie", f"sid={number(page.url):x}; Path=/; HttpOnly")] if kind else []),
    ]
    fields = [(k.lower() if modern else k, v) for k, v in fields]
    if page.mime == "text/html":  # sent as gzip, stored decoded
        fields += [("X-Crawler-Content-Encoding", "gzip")]
        fields += [("X-Crawler-Content-Length", str(len(zlib.compress(page.body))))]
    fields.append(("Content-Length", str(len(page.body))))
    reason = "" if modern else reasons.get(page.status, "Internal Server Error")
    lines = "".join(f"{k}: {v}\r\n" for k, v in fields)
    return f"HTTP/1.1 {page.status} {reason}\r\n{lines}\r\n".encode()


def cld2(page: Page) -> str:
    """The language detector's answer as the crawler's metadata record has it."""
    names = [(lang, WORDS[lang]) for lang in (page.languages or "").split(",") if lang]
    share = [0.97] if len(names) == 1 else [0.78, 0.19]
    found = [
        {"code": w["code"], "code-iso-639-3": lang, "text-covered": s, "score": 600.0 + 900 * s,
         "name": w["cld2"]}
        for (lang, w), s in zip(names, share, strict=False)
    ]  # fmt: skip
    answer = {"reliable": True, "text-bytes": len(page.text.encode()), "languages": found}
    return json.dumps(answer, separators=(",", ":"))


def add_page(archive: Archive, page: Page, date: datetime, info: str) -> Record:
    """Append the request, response and metadata records of a page; return the response."""
    parts, stamp = urlsplit(page.url), f"{date:%Y-%m-%dT%H:%M:%SZ}"
    n = number(page.host)
    common = [("WARC-Date", stamp), ("WARC-Warcinfo-ID", info), ("WARC-Target-URI", page.url)]
    ip = ("WARC-IP-Address", f"{('192.0.2', '198.51.100', '203.0.113')[n % 3]}.{n % 250 + 1}")
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    ask = (
        f"GET {path} HTTP/1.1\r\nUser-Agent: SampleBot/1.0 (https://samplebot.example/)\r\n"
        "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n"
        f"Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: br,gzip\r\nHost: {page.host}\r\n"
        "Connection: Keep-Alive\r\n\r\n"
    ).encode()
    kind = ("Content-Type", "application/http; msgtype=request")
    sums = [("WARC-Payload-Digest", "sha1:" + digest(b""))]
    sums += [("WARC-Block-Digest", "sha1:" + digest(ask))]
    request = archive.add("request", page.url, ask, [*common, kind, ip, *sums])
    head = http_head(page, date)
    https = [("WARC-Protocol", "h2"), ("WARC-Protocol", "tls/1.3"),
             ("WARC-Cipher-Suite", "TLS_AES_128_GCM_SHA256")]  # fmt: skip
    mime = "text/x-robots" if page.subset == "robotstxt" else page.mime
    # A broken digest: the header and the index keep the digest of the body as it was fetched.
    stored = page.body.replace(b"attic", b"ATTIC") if page.broken == "digest" else page.body
    response = archive.add("response", page.url, head + stored, [
        *common, ("Content-Type", "application/http; msgtype=response"),
        ("WARC-Concurrent-To", request.get("WARC-Record-ID")), ip,
        *(https if parts.scheme == "https" else [("WARC-Protocol", "http/1.1")]),
        ("WARC-Payload-Digest", "sha1:" + digest(page.body)),
        ("WARC-Block-Digest", "sha1:" + digest(head + page.body)),
        ("WARC-Identified-Payload-Type", mime),
        *([("WARC-Truncated", "length")] if page.truncated else []),
    ], page)  # fmt: skip
    notes = f"fetchTimeMs: {number(page.url) % 900 + 40}\r\n"
    notes += f"charset-detected: {page.detected}\r\n" if page.detected else ""
    notes += f"languages-cld2: {cld2(page)}\r\n" if page.languages else ""
    block = f"{notes}\r\n".encode()
    sums = [(f"WARC-{k}-Digest", "sha1:" + digest(block)) for k in ("Payload", "Block")]
    about = ("WARC-Concurrent-To", response.get("WARC-Record-ID"))
    kind = ("Content-Type", "application/warc-fields")
    if page.broken != "cut":  # nothing follows the record in whose middle the file ends
        archive.add("metadata", page.url, block, [*common, kind, about, *sums])
    if page.broken == "gzip":
        middle = response.offset + response.length // 2
        for n in range(middle, middle + 4):
            archive.data[n] ^= 0xFF
    if page.broken == "cut":
        del archive.data[response.offset + response.length // 2 :]
    return response


class Head(HTMLParser):
    """Collects what a WAT record tells of an HTML page: title, metas, scripts and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.title, self.inside, self.links = "", "", []
        self.head: dict[str, list] = {"Metas": [], "Link": [], "Scripts": []}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that carries a URL or a meta field."""
        a = {k: v or "" for k, v in attrs}
        self.inside = tag if tag in ("title", "a") else self.inside
        for name, key in (("a", "href"), ("img", "src"), ("form", "action")):
            if tag == name and key in a:
                extra = {"alt": a["alt"]} if "alt" in a else {}
                self.links.append({"path": f"{tag.upper()}@/{key}", "url": a[key]} | extra)
        if tag == "meta":
            self.head["Metas"].append(a)
        elif tag == "link":
            link = {"path": "LINK@/href", "url": a["href"], "rel": a["rel"]}
            self.head["Link"].append(link)
        elif tag == "script" and "src" in a:
            self.head["Scripts"].append({"path": "SCRIPT@/src", "url": a["src"]})

    def handle_endtag(self, tag: str) -> None:
        """Leave a title or an anchor."""
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data: str) -> None:
        """Add text to the title or to the last anchor."""
        if self.inside == "title":
            self.title += data
        elif self.inside == "a" and self.links and self.links[-1]["path"] == "A@/href":
            self.links[-1]["text"] = self.links[-1].get("text", "") + data

    def metadata(self) -> dict:
        """The HTML-Metadata of a WAT record."""
        return {"Head": {"Title": self.title} | {k: v for k, v in self.head.items() if v},
                "Links": self.links}  # fmt: skip


def decoded(page: Page) -> str:
    """The HTML as the crawler's tools read it, wrong charset and all."""
    return page.body.decode(page.detected or "utf-8", "replace")


def collapse(pairs: Iterable[tuple[str, str]]) -> dict:
    """Header fields as JSON: a list where a name is repeated."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        old = out.get(key)
        out[key] = value if old is None else [*(old if isinstance(old, list) else [old]), value]
    return out


def envelope(archive: Archive, record: Record) -> dict:
    """The JSON of a WAT record."""
    kind, block, raw = record.get("Content-Type"), record.block, record.bytes()
    payload: dict[str, Any] = {"Actual-Content-Type": kind}
    lines = block.split(b"\r\n\r\n")[0].decode("utf-8").split("\r\n")
    if "msgtype" in kind:
        head, entity = block.split(b"\r\n\r\n", 1)
        one, two, three = lines[0].split(" ", 2)
        request = "request" in kind
        keys = ("Method", "Path", "Version") if request else ("Version", "Status", "Reason")
        message = "Request-Message" if request else "Response-Message"
        inner: dict[str, Any] = {
            message: dict(zip(keys, (one, two, three), strict=True)),
            "Headers-Length": str(len(head) + 4),
            "Headers": collapse(line.split(": ", 1) for line in lines[1:]),
            "Entity-Length": str(len(entity)),
            "Entity-Digest": "sha1:" + digest(entity),
            "Entity-Trailing-Slop-Length": "0",
        }
        if record.page and record.page.mime == "text/html":
            inner["HTML-Metadata"] = Head(decoded(record.page)).metadata()
        payload["HTTP-Request-Metadata" if request else "HTTP-Response-Metadata"] = inner
    elif record.get("WARC-Type") != "response":
        notes = [dict(zip(("Name", "Value"), line.split(": ", 1), strict=True)) for line in lines]
        name = "WARC-Metadata-Metadata" if record.get("WARC-Type") == "metadata" else "WARC-Info"
        payload[name] = {"Metadata-Records": notes}
    payload |= {"Actual-Content-Length": str(len(block)), "Trailing-Slop-Length": "4",
                "Block-Digest": "sha1:" + digest(block)}  # fmt: skip
    zipped = {
        "Deflate-Length": str(record.length), "Header-Length": "10", "Footer-Length": "8",
        "Inflated-CRC": str(zlib.crc32(raw)), "Inflated-Length": str(len(raw)),
    }  # fmt: skip
    return {
        "Container": {"Filename": archive.path.rsplit("/")[-1], "Compressed": True,
                      "Offset": str(record.offset), "Gzip-Metadata": zipped},
        "Envelope": {"Payload-Metadata": payload, "Format": "WARC/1.0",
                     "WARC-Header-Length": str(len(record.head())),
                     "WARC-Header-Metadata": collapse(record.fields)},
    }  # fmt: skip


def derived(archive: Archive, crawl: str, date: str) -> Iterable[Archive]:
    """The WAT and the WET file of a WARC file; unreadable records have none."""
    wat, wet = (
        Archive(archive.path.replace("/warc/", f"/{w}/").replace(".gz", f".{w}.gz")) for w in ("wat", "wet")
    )
    for out in (wat, wet):
        out.info(date, f"resiliparse {version('resiliparse')}", crawl)
    for record in archive.records:
        page, refers = record.page, ("WARC-Refers-To", record.get("WARC-Record-ID"))
        if page and page.broken in ("gzip", "cut"):
            continue
        uri = [(k, v) for k, v in record.fields if k in ("WARC-Target-URI", "WARC-Date")]
        data = json.dumps(envelope(archive, record), ensure_ascii=False, separators=(",", ":"))
        kind = ("Content-Type", "application/json")
        wat.add("metadata", refers[1], data.encode("utf-8", "replace"), [*uri, refers, kind])
        if not page or page.mime != "text/html":
            continue
        plain = extract_plain_text(decoded(page), preserve_formatting=True, main_content=False,
                                   alt_texts=False, list_bullets=False)  # fmt: skip
        lines = [Head(decoded(page)).title, *(line.strip() for line in plain.split("\n"))]
        text = "".join(f"{line}\n" for line in lines if line).encode("utf-8", "replace")
        named = [("WARC-Identified-Content-Language", page.languages)] if page.languages else []
        kind = ("Content-Type", "text/plain")
        sums = ("WARC-Block-Digest", "sha1:" + digest(text))
        wet.add("conversion", refers[1], text, [*uri, refers, sums, *named, kind])
    return wat, wet


# ---------------------------------------------------------------- index
COLUMNS = (
    "url_surtkey url url_host_name url_host_tld url_host_2nd_last_part url_host_3rd_last_part"
    " url_host_4th_last_part url_host_5th_last_part url_host_registry_suffix"
    " url_host_registered_domain url_host_private_suffix url_host_private_domain"
    " url_host_name_reversed url_protocol url_port url_path url_query fetch_time fetch_status"
    " fetch_redirect content_digest content_mime_type content_mime_detected content_charset"
    " content_languages content_truncated warc_filename warc_record_offset warc_record_length"
    " warc_segment"
)
TYPES = {
    "url_port": pa.int32(), "fetch_time": pa.timestamp("ms"), "fetch_status": pa.int16(),
    "warc_record_offset": pa.int32(), "warc_record_length": pa.int32(),
}  # fmt: skip
SCHEMA = pa.schema([(name, TYPES.get(name, pa.string())) for name in COLUMNS.split()])


def surt(url: str) -> str:
    """The sort key of a URL: host turned round, lower case, no www and no trailing slash."""
    parts = urlsplit(url.lower())
    host = re.sub(r"^www\d*\.", "", parts.hostname or "")
    query = "?" + "&".join(sorted(parts.query.split("&"))) if parts.query else ""
    return f"{','.join(reversed(host.split('.')))}){parts.path.rstrip('/') or '/'}{query}"


def index_row(path: str, segment: str, record: Record, date: datetime) -> dict:
    """The index table's row of a response record."""
    page = record.page
    assert page
    parts, back = urlsplit(page.url), page.host.split(".")[::-1]
    domain = ".".join(back[1::-1])
    robots = page.subset == "robotstxt"
    values = (
        surt(page.url), page.url, page.host, *(back + [None] * 5)[:5], back[0], domain, back[0],
        domain, ".".join(back), parts.scheme, parts.port, parts.path, parts.query or None, date,
        page.status, page.location, record.get("WARC-Payload-Digest")[5:], page.mime,
        "text/x-robots" if robots else page.mime, page.detected, page.languages,
        "length" if page.truncated else None, path,
        record.offset + 7 * (page.broken == "offset"), record.length, segment,
    )  # fmt: skip
    return dict(zip(SCHEMA.names, values, strict=True))


def cdx_line(r: dict) -> str:
    """The same row as a line of the CDXJ index."""
    keys = {
        "url": "url", "mime": "content_mime_type", "mime-detected": "content_mime_detected",
        "status": "fetch_status", "digest": "content_digest", "length": "warc_record_length",
        "offset": "warc_record_offset", "filename": "warc_filename",
        "languages": "content_languages", "encoding": "content_charset",
        "truncated": "content_truncated", "redirect": "fetch_redirect",
    }  # fmt: skip
    fields = {k: str(r[name]) for k, name in keys.items() if r[name] is not None}
    return f"{r['url_surtkey']} {r['fetch_time']:%Y%m%d%H%M%S} {json.dumps(fields)}\n"


# ---------------------------------------------------------------- putting it together
def build_pages(texts: Path) -> tuple[list[Page], list[Page]]:
    """All captures of the two crawls."""
    films, products = load(texts / "films"), load(texts / "products")
    base = [*film_pages(films), *shop_pages(products), *site_pages(load(texts / "sites"))]
    planter = Planter(base)
    cut = {p.url for p in planter.pick(planter.articles, 2, "truncated")}
    for n, p in enumerate(base):
        if p.url in cut:
            body = p.body[: p.body.index(paragraphs(p.text.split("\n\n")[2]).encode()) + 99]
            prop = row("truncated", kept_bytes=len(body), of_bytes=len(p.body))
            base[n] = replace(p, body=body, truncated=True, rows=(*surviving(p.rows, body), prop))
    pages = [*base, *planter.encodings(), *planter.duplicates(), *planter.files()]
    pages += [*planter.oddities(load(texts / "spam.yaml")), *planter.diagnostics()]
    for host in sorted({p.host for p in pages}):
        closed = ["/cart", "/account"] if host == SHOP else ["/search"] if number(host) % 2 else []
        rules = "".join(f"Disallow: {path}\n" for path in closed) or "Disallow:\n"
        body = f"User-agent: *\n{rules}".encode()
        pages.append(Page(f"https://{host}/robots.txt", body, mime="text/plain", header=None,
                          subset="robotstxt", rows=(row("robots", disallow=closed),)))  # fmt: skip
    twice = [url for url, n in Counter(p.url for p in pages).items() if n > 1]
    if twice:
        raise ValueError(f"the same URL twice: {twice}")
    return pages, list(planter.earlier())


def write_crawl(out: Path, crawl: str, pages: list[Page], files: int) -> list[dict]:
    """Write one crawl with its indexes and return its planted properties."""
    segment, start = CRAWLS[crawl]
    root = f"crawl-data/{crawl}/segments/{segment}"
    span = f"{start:%Y%m%d%H%M%S}-{start + timedelta(hours=3):%Y%m%d%H%M%S}"
    groups: dict[tuple[str, int], list[Page]] = defaultdict(list)
    for page in pages:
        last = files - 1 if page.broken == "cut" else None
        shard = number(page.url) % files if page.subset == "warc" else 0
        groups[page.subset, shard if last is None else last].append(page)
    when = {p.url: start + timedelta(seconds=number("t" + p.url) % 10800) for p in pages}
    rows, planted, paths = defaultdict(list), [], defaultdict(list)

    def save(archive: Archive, kind: str) -> None:
        write(out / archive.path, bytes(archive.data))
        paths[kind].append(archive.path)

    for (subset, shard), group in sorted(groups.items()):
        archive = Archive(f"{root}/{subset}/CC-SAMPLE-{span}-{shard:05d}.warc.gz")
        stamp = f"{start:%Y-%m-%dT%H:%M:%SZ}"
        info = archive.info(stamp, "none", crawl).get("WARC-Record-ID")
        for page in sorted(group, key=lambda p: (p.broken == "cut", when[p.url], p.url)):
            record = add_page(archive, page, when[page.url], info)
            rows[subset].append(index_row(archive.path, segment, record, when[page.url]))
            place = {"url": page.url, "crawl": crawl, "warc_filename": archive.path}
            place["warc_record_offset"] = record.offset
            planted += [place | r for r in page.rows]
        save(archive, subset)
        for other in derived(archive, crawl, stamp) if subset == "warc" else ():
            save(other, other.path.split(".")[-2])
    lines = []
    for subset, part in sorted(rows.items()):
        part.sort(key=lambda r: (r["url_surtkey"], r["url"]))
        name = f"part-00000-{uuid.uuid5(uuid.NAMESPACE_URL, crawl)}.c000.gz.parquet"
        path = out / f"cc-index/table/cc-main/warc/crawl={crawl}/subset={subset}/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), path, row_group_size=200,
                       compression="gzip", store_schema=False)  # fmt: skip
        lines += map(cdx_line, part)
    cdx = "".join(sorted(lines)).encode()
    write(out / f"cc-index/collections/{crawl}/indexes/cdx-00000.gz", gzipped(cdx))
    for kind, names in sorted(paths.items()):
        listed = "".join(f"{n}\n" for n in names).encode()
        write(out / f"crawl-data/{crawl}/{kind}.paths.gz", gzipped(listed))
    return planted


def write(path: Path, data: bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main() -> None:
    """Build everything and say what was planted."""
    parser = argparse.ArgumentParser(description="Build the sample crawl.")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: here)")
    parser.add_argument("--texts", type=Path, default=HERE / "texts", help="where the texts are")
    args = parser.parse_args()
    now, earlier = build_pages(args.texts)
    planted = write_crawl(args.out, NOW, now, 3) + write_crawl(args.out, EARLIER, earlier, 1)
    lines = [json.dumps(p, ensure_ascii=False) for p in planted]
    lines.sort(key=lambda line: (json.loads(line)["url"], line))
    write(args.out / "planted.jsonl", "".join(f"{line}\n" for line in lines).encode())
    for name, count in sorted(Counter(p["property"] for p in planted).items()):
        print(f"{name:20}{count:6}")


if __name__ == "__main__":
    main()
