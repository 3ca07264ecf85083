"""Lists of words that tell a text from the furniture around it; the model of `blocks` was trained with these."""

from __future__ import annotations

_FUNCTION_WORDS = """the of and to in a is that for it as was with be by on not he his but at are this have or had from an they
    which you were all her she there would their we him been has when who will no more if out so said what up its
    about than into them can only other new some could time these two may then do first any my now such like our
    der die das und ist nicht ein eine zu mit den von auf sich des im dem für es auch als er hat aus bei nach wird
    sind noch wie wir einen zum war haben nur oder aber vor zur bis durch man sein wurde kann wenn um ich sie dass
    le la les de et est un une que qui dans pour pas sur au par plus ce se ne il avec sont mais ou son nous vous
    el los las y en del con su para al lo como más pero di e che per non è della i sono da het een van dat op te
    zijn voor met niet aan o um os não na no do em uma w z się jest że и в на не что с по как это для из"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""The commonest words of English, German, French, Spanish, Italian, Dutch, Portuguese, Polish and Russian."""
_FURNITURE_WORDS = """cookie cookies privacy policy copyright © rights reserved login log sign signin signup subscribe newsletter
    share tweet facebook twitter pinterest linkedin instagram whatsapp youtube related read comment comments reply
    replies posted menu search terms conditions contact impressum datenschutz agb advertisement advertise previous
    next home follow email e-mail download cart click view more updated published author tags categories category
    filed skip back top anmelden teilen kommentar kommentare weiter weiterlesen mehr artikel like likes vote votes
    javascript browser enable account password register online quote edit report members joined location messages
    posts thread views shop wishlist quantity add checkout sale price free shipping sitemap faq careers support
    help press blog news latest popular recent archives photo image credit: via print pdf close accept settings
    partager suivez accueil connexion mentions légales leer compartir comentarios inicio testimonials reviews review faq faqs
    recommended similar trending discover watch bio author leave cancel stories"""
FURNITURE_WORDS = frozenset(_FURNITURE_WORDS.split())
"""Words of menus, notices, forms and teasers, which a main text seldom has."""
_FIRST_PERSON_WORDS = (
    "i my me i'm i've i’m i’ve mine myself you your ich mein meine mir je j'ai mon ma yo mi eu"
)
FIRST_PERSON_WORDS = frozenset(_FIRST_PERSON_WORDS.split())
"""Whoever says I writes a post, a comment or a review."""
CLASS_WORDS = {
    "nav": "nav|menu|crumb|toc$|pagina|pager|paging",
    "head": "header|masthead|topbar|banner|logo|brand",
    "foot": "footer|bottom|copyright|colophon",
    "side": "sidebar|side$|aside|widget|rail$|column",
    "related": "related|recommend|similar|more$|popular|trending|latest|also|teaser|promo|carousel|slider|swiper",
    "share": "share|sharing|social|facebook|twitter",
    "comment": "comment|disqus|respond|reply|replies",
    "cookie": "cookie|consent|gdpr|privacy",
    "ad": "advert|sponsor|adsense|ads$|ad$|dfp",
    "form": "form|search|filter|input|btn|button|cta|newsletter|subscri|sign|login|register",
    "popup": "modal|popup|overlay|dialog|hidden|hide|only$|screen|reader$|visually|collapse|skip|print",
    "meta": "meta|byline|date|time|tags$|tag$|categor|posted|info|credit",
    "image": "caption|figure|image|photo|gallery|media|thumb",
    "content": "content|article|entry|main|body|text|story|prose|markdown",
    "post": "post|message|thread|topic|answer|question",
    "review": "review|testimonial|rating|quote|feedback|star$",
    "author": "author|bio$|profile|avatar|user|member",
    "product": "product|price|cart|shop|item|card|grid|listing|list",
    "detail": "description|summary|detail|feature|spec|faq|accordion|tab",
    "title": "hero|title|headline|intro|lead|subtitle",
}
"""Parts of words in the class or id of an element, by what such an element is; regular expressions: `$` is a word's end."""
