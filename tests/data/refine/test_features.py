"""Features: phrases, names, summaries and reading ease of texts whose answers are known."""

import re
import time

import pyarrow as pa
import pytest

from kit.data.refine import entities as names
from kit.data.refine import features
from kit.errors import ParamError

# sentences with their [names](TYPE): WRITTEN for this test, DRAWN by chance from the texts of the sample crawl
# (the rules were made to do well on both), and UNSEEN, drawn in the same way when the rules stood
WRITTEN = {
    "en": """
The film was shot in [Portugal](PLACE) and edited by [Marta Oliveira](PERSON) over two winters.
Last spring [Dr. Harold Finch](PERSON) left the [University of Toronto](ORG) for a job in [Ottawa](PLACE).
Critics at the [Wenlow Harbour Gazette](ORG) compared it to [The Silent Orchard](OTHER), which is unfair.
"I never met him," said [Judith Crane](PERSON), who runs a bakery near [Leeds](PLACE).
[Brightwater Pictures Ltd](ORG) bought the rights from [Nadia Rahman](PERSON) in March.
The ferry crosses [Lake Superior](PLACE) twice a day in summer.
We asked [Mr Pemberton](PERSON) about the noise, but he only shrugged.
[Elena Vasquez](PERSON) and [Tom Abernathy](PERSON) play two smugglers on the coast of [Norway](PLACE).
According to [Microsoft](ORG), the update will arrive on Tuesday.
My grandmother was born in [Chicago](PLACE) and never talked about [Poland](PLACE).
The [National Weather Service](ORG) warned of floods along the [Ohio River](PLACE).
She won the [Golden Bear](OTHER) at the festival in [Berlin](PLACE) five years ago.
Nobody told [Samuel](PERSON) that the library would close early.
The plot is thin, the music is dull and the ending makes no sense at all.
After the war, [President Truman](PERSON) signed the bill without a word.
A spokesman for [Volkswagen AG](ORG) declined to comment on the figures.
[Anil Kapur](PERSON) teaches chemistry at [Hillcrest College](ORG).
The train from [Paris](PLACE) to [Lyon](PLACE) was late again, and [Claire](PERSON) missed the concert.
Its director, [Yuki Tanabe](PERSON), had worked for [Studio Kaede](ORG) before.
I bought the camera on [Amazon](ORG) and returned it within a week.
Soup is best when it is cooked slowly and salted late.
The [European Commission](ORG) will hear [Ms. Lindqvist](PERSON) next week.
They drove through [Death Valley](PLACE) with the windows open.
[Robert De Groot](PERSON) sold the mill to the village of [Ashcombe](PLACE).
[The Last Lighthouse Keeper](OTHER) is a slow and lovely film.
In [Mexico](PLACE) the winters are mild, as [Ingrid Solberg](PERSON) found out.
""",
    "de": """
Der Bürgermeister von [Hamburg](PLACE) lobte die Arbeit der [Nordlicht Energie GmbH](ORG).
Am Montag sprach [Frau Annegret Huber](PERSON) mit den Nachbarn über den Lärm.
Das Haus steht seit hundert Jahren in [Dresden](PLACE) und braucht ein neues Dach.
[Jonas Weidmann](PERSON) arbeitet an der [Universität Leipzig](ORG) und wohnt auf dem Land.
Die Suppe schmeckt am besten mit frischem Brot und etwas Butter.
""",
    "fr": """
Le film raconte la vie de [Lucie Marchand](PERSON), une boulangère de [Lyon](PLACE).
Selon [Mme Duval](PERSON), la mairie de [Nantes](PLACE) ne répondra pas avant lundi.
La [Banque Populaire](ORG) a fermé son agence en [Belgique](PLACE).
Il pleut depuis trois jours et personne ne sort.
""",
    "es": """
La directora [Carmen Ibarra](PERSON) rodó la película en [Argentina](PLACE) con pocos medios.
El [Ayuntamiento de Sevilla](ORG) no quiso hablar con [Pablo Reyes](PERSON).
""",
    "it": """
Il romanzo di [Giulia Ferrante](PERSON) si svolge a [Torino](PLACE) negli anni trenta.
Secondo [Marco Bellini](PERSON) il museo resterà chiuso fino a maggio.
""",
}

DRAWN = {
    "en": """
Harbour master [Gillian Pryke](PERSON) said there was no question of patching it.
The operator, [Fenline](ORG), says roadworks at the sluice bridge leave it no choice.
"I've got a combine that does eighteen miles an hour downhill," said [Roy Teague](PERSON).
"That gentleman had a good afternoon," [Amstutz](PERSON) said.
Fiscal Officer [June Habegger](PERSON) believes that one is her own office.
The first brown blotch was on a leaf of '[Auntie Madge](OTHER)' on 3 August, after four muggy nights.
Ask how many of those he remembers and he goes and puts the kettle on.
I planted squash through holes that spring and felt like a fraud.
Shop says go tubeless, $34.95 a wheel plus sealant.
Three years ago, she reminded the [Courier](ORG), an entrant had been found to have used lead shot.
"It's the first time I've been able to catch the thing on my own," said [Ruth Carbery](PERSON), 61.
"Stand about and get wet," was the forecast of [Hannah Mutch](PERSON), who has two boys on the route.
Commissioner [Anita Boles](PERSON) said the platform cost less than the paperwork to refuse it.
A diver who went down on Wednesday found that a section of the footing had been scoured away.
His pager went to [Tess Oakley](PERSON), a primary school teacher who joined at seventeen.
Plenty of '[Wenlow Wonder](OTHER)' runner bean, the white-seeded one from old [Mr Tabb](PERSON); it climbs like a burglar.
During real spikes, such as the Monday after the holidays, the consumers kept up without noticing.
""",
    "de": """
Gestrichen wurde dagegen das Café, das auf allen früheren Plänen zu sehen war.
»Das ist psychologisch geschickt«, sagt Kriminalhauptkommissarin [Sabine Vogts](PERSON).
Im Zugriffsprotokoll standen für sechs Jahre alle Adressen.
»Alle drei haben gerechnet und freundlich abgesagt«, sagte Baustadträtin [Elke Lührs](PERSON).
Am dritten Advent gibt es Waffeln im Packhaus, am Tag darauf singt der Shantychor, ausdrücklich ohne Orgel.
""",
    "fr": """
Parti à quarante-deux coups par minute, l’équipage barré par [Inès Faucheux](PERSON) comptait une longueur d’avance.
[Madame Quillet](PERSON), qui tient la mercerie au débouché de la passerelle, a compté ses clients mardi.
Vers six heures, [Valence](PLACE) est loin derrière et le jour entre par le bas du store.
Compte quinze jours, je pars voir mes petits-enfants en [Lozère](PLACE).
Il en recense cent quatorze entre [Meaux](PLACE) et [Pantin](PLACE) ; trente ont disparu depuis.
""",
    "es": """
Se investiga si la misma pareja actuó el pasado otoño en [Burriana](PLACE) y [Vinaròs](PLACE).
El [Rafelcofer](ORG) remató dos veces al palo y reclamó una mano.
La de mi madre es de un pueblo de [Soria](PLACE) y la considera un fraude, un relleno.
En diez minutos, mis tías estaban en la cocina, pelando patatas y despotricando de [Dinamarca](PLACE).
""",
    "it": """
Per sedie da usare tutti i giorni, pulizia come dice [Beppe](PERSON) e poi una buona alifatica.
«Ci si ride sopra», dice [Teresa Gualdi](PERSON), ottantasei anni, che abita di fronte.
Io il ragù l’ho imparato da mia zia [Argia](PERSON), che non pesava niente e misurava tutto col verbo «basta».
In cortile, seduti sul muretto, [Samir](PERSON) mi ha spiegato.
""",
}

UNSEEN = {
    "en": """
"We couldn't buy the gearbox, so we learned what a gearbox does," said team captain [Naomi Teague](PERSON), a junior.
The robot is going to the championship in [Columbus](PLACE) on March 28, the first from [Cobb Creek High](ORG) so far.
Councillor [Peter Maddern](PERSON), who voted for the cut, said he wished the appeal well.
His wife, [Sheila](PERSON), who for three decades has slept on the side of the bed nearer the door, plans to move over.
Mechanic [Owen Sillitoe](PERSON) has offered his labour free.
One man was asked to leave after reading aloud from [Mr Rowntree's](PERSON) own leaflet.
At 6 below zero the ground moves, [Rinker](PERSON) explained, and old iron does not.
About thirty seeds of a purple podded pea that I was handed in a car park in [Ludlow](PLACE).
Mine was called test_user_2, and test_user_2 turned out to have moved to [Leeds](PLACE).
The April menus are built around a trip to [Abruzzo](PLACE) last autumn, so expect lamb.
In June I asked the team how big the largest spike had been, and four people gave me four numbers.
Check that the NAS isn't opening ports by itself through UPnP.
Green tandem, no bell, chained outside the launderette by [Loughborough Junction](PLACE) this morning around 8.
I can be there Saturday by ten with cash and a pickup, and I promise to use every nipple.
I can't do [Dayton](PLACE), I'm in [Duluth](PLACE) and my car is a bicycle.
What matters is that your log says DROP next to every one of those lines.
""",
    "de": """
Der Gestank kommt vom Schlamm am Boden, da fault Laub ohne Luft.
Gerettet hat uns eine Kopie, »weil ich Ihnen nicht ganz traue, Herr [Raabe](PERSON)«.
Auf der Platte lagen neunhundert Ordner, einer pro Nacht, sauber nach Datum benannt.
[Rosi](PERSON), halt uns auf dem Laufenden, ob er im Mai austreibt.
""",
    "fr": """
C’est tout ce que demande l’exposition que la médiathèque de [Claye](PLACE) consacre aux réclames de la vallée.
Le commissaire, [Ambroise Leduc](PERSON), est couvreur de métier.
La box répond sans une seule perte, le NAS tombe d’un coup à 3 h 10 min 04 s et remonte d’un coup aussi.
« Je refuse de parler du vent, a coupé l’entraîneur, [Marcel Ancelin](PERSON), encore trempé.
""",
    "es": """
Y si nada de eso es posible, que pongan al menos una mesa para [Remedios](PERSON).
El concejal de Comercio, [Ximo Bardal](PERSON), atribuyó las filtraciones a «un remate provisional».
""",
    "it": """
Quindi, caro signore di [Pavia](PLACE), se sua madre ci metteva l’aglio, lo metta.
Al bar [Commercio](ORG) hanno risolto a modo loro: un cartello in vetrina.
Negli anni ho assaggiato ragù con i funghi, perfino uno, a [Helsinki](PLACE), con l’aneto.
""",
}

MARK = re.compile(r"\[([^\]]+)\]\((\w+)\)")
TITLE = re.compile(r"^(?:[Tt]he|Dr\.|Mr|Ms\.|Mme|Madame|Frau|Councillor|President) ")
ENGLISH = """Pumpkin bread is easy to bake. Mix the flour with roasted pumpkin and two eggs. Pumpkin bread keeps for a \
week, and pumpkin bread freezes well. Ask <EMAIL> for the recipe of our roasted pumpkin soup! My dog was asleep. \
The kitchen smelled of roasted pumpkin, flour and butter. Write to <PHONE> or see the Pumpkin bread page."""
CHINESE = (
    "武汉的英雄在武汉。英雄和城市，武汉是英雄的城市。我们在城市里等春天，春天来了就回家，孩子在学校等老师。"
)
HOSTILE = {
    "one word": "a" * 100_000,
    "capitals": "A " * 50_000,
    "names": "Anna of the " * 10_000,
    "full stops": "." * 100_000,
    "sentences": "A b. " * 20_000,
    "lines": "\n" * 100_000,
    "apostrophes": "a'" * 50_000,
    "quotes": "Mr “" * 25_000,
    "spaces": "A" + " " * 100_000,
    "digits": "12. " * 25_000,
    "surrogates": "\ud800A\udfff b\x00 " * 10_000,
    "han": "武" * 100_000,
    "universities": "x" * 20 + "universi" * 10_000,
    "nothing": "",
}


def scores(gold: dict[str, str], found=names.entities) -> dict[str, float]:
    """Recall and precision of names, and of names with their types."""
    hits, typed, wanted, got = 0, 0, 0, 0
    for lang, lines in gold.items():
        for line in lines.strip().splitlines():
            right = {(TITLE.sub("", name), kind) for name, kind in MARK.findall(line)}
            here = {(TITLE.sub("", e["text"]), e["type"]) for e in found(MARK.sub(r"\1", line), lang)}
            hits += len({name for name, _ in right} & {name for name, _ in here})
            typed, wanted, got = typed + len(right & here), wanted + len(right), got + len(here)
    names_only = {"recall": hits / wanted, "precision": hits / got}
    return {
        k: round(v, 3)
        for k, v in (names_only | {"typed": typed / wanted, "typed right": typed / got}).items()
    }


@pytest.mark.parametrize(
    "gold, least", [(WRITTEN, (0.95, 0.95, 0.85)), (DRAWN, (0.85, 0.9, 0.6)), (UNSEEN, (0.85, 0.75, 0.5))]
)
def test_names_are_found_as_well_as_the_docstring_says(
    gold: dict[str, str], least: tuple[float, ...]
) -> None:
    found = scores(gold)
    print("entities:", found)
    assert all(value >= bound for value, bound in zip(found.values(), least))


def test_each_name_comes_once_and_is_in_the_text() -> None:
    text = "We met Anna Berg in Paris. <PERSON> and Anna Berg left Paris for the Bank of Norway."
    found = features.text_features(text, "en", ["entities"])["entities"]
    assert found == [
        {"text": "Anna Berg", "type": "PERSON"},
        {"text": "Paris", "type": "PLACE"},
        {"text": "Bank of Norway", "type": "ORG"},
    ]


def test_a_pipeline_by_name(tmp_path) -> None:
    with pytest.raises(ParamError, match="no_such_model"):
        features.text_features("Anna", "en", ["entities"], ["no_such_model"])
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns(
        [{"label": "GPE", "pattern": "the otter"}, {"label": "DATE", "pattern": "May"}]
    )
    nlp.to_disk(tmp_path / "otter")
    pipelines = [str(tmp_path / "otter")]
    text = "In May the otter met Anna Berg."
    assert names.entities(text, "en", pipelines) == [{"text": "the otter", "type": "PLACE"}]
    assert names.entities(text, "fr", pipelines) == names.entities(text, "fr")


def test_key_phrases() -> None:
    found = features.keywords(ENGLISH, "en")
    assert found[0] == "Pumpkin bread" and "flour" in found
    assert len(found) <= features.MAX_KEYWORDS
    assert not any(word in " ".join(found).split() for word in ("the", "and", "EMAIL", "<EMAIL>"))
    assert features.keywords(CHINESE, "zh")[:2] == ["武汉", "英雄"]


def test_summary_is_verbatim_and_in_order() -> None:
    found = features.summary(ENGLISH, "en")
    parts = names.sentences(found)
    assert len(parts) == features.MAX_SENTENCES
    places = [ENGLISH.index(part) for part in parts]
    assert places == sorted(places)
    assert "My dog was asleep." not in found
    assert features.summary("Home\nAbout us\nContact", "en") is None
    assert "<EMAIL>" in features.summary("Ask <EMAIL> for the recipe of our soup!", "en")
    assert features.summary(CHINESE, "zh")


def test_sentences_end_where_they_end() -> None:
    text = "Dr. Lee paid $3.50! “Really?” asked J. R. Jones in the U.S. office.\nHome\n今日は雨です。はい。"
    assert names.sentences(text) == [
        "Dr. Lee paid $3.50!",
        "“Really?” asked J. R. Jones in the U.S. office.",
        "Home",
        "今日は雨です。",
        "はい。",
    ]
    assert names.sentences("Im 19. Jahrhundert war es so. Heute nicht.") == [
        "Im 19. Jahrhundert war es so.",
        "Heute nicht.",
    ]


def test_reading_ease_is_the_formula() -> None:
    # 36 words in 6 sentences, 36 syllables counted by hand
    easy = "The cat sat on the mat. " * 6
    assert features.reading_ease(easy, "en") == pytest.approx(206.835 - 1.015 * 6 - 84.6)
    assert features.reading_ease(easy, "de") == pytest.approx(180 - 6 - 58.5)
    # 9 words and 20 syllables: im-por-tant de-ci-sions re-quired ex-ten-sive ne-go-ti-a-tions which no-bo-dy liked …
    hard = "Important decisions required extensive negotiations which nobody liked. " * 5
    assert features.reading_ease(hard, "en") == pytest.approx(206.835 - 1.015 * 8 - 84.6 * 20 / 8, abs=11)
    assert features.reading_ease(hard, "en") < features.reading_ease(easy, "en") - 80
    assert features.reading_ease("too short", "en") is None
    assert features.reading_ease(easy, "ja") is None


@pytest.mark.parametrize(
    "word, syllables", [("table", 2), ("make", 1), ("liked", 1), ("wanted", 2), ("houses", 2)]
)
def test_english_syllables(word: str, syllables: int) -> None:
    assert len(re.findall(features.FLESCH["en"][3], word)) == syllables


def test_what_is_not_wanted_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in features.FEATURES:
        monkeypatch.setattr(features, name, None)
    assert features.text_features("x" * 10, "en", []) == dict.fromkeys(features.FEATURES)
    monkeypatch.setattr(features, "summary", lambda text, lang: text)
    assert features.text_features("abc", "en", ["summary"]) == dict.fromkeys(features.FEATURES) | {
        "summary": "abc"
    }


@pytest.mark.parametrize("lang", ["en", "de", "zh", "ja", "ar", "th", "ru", "und"])
def test_any_language_fits_the_schema(lang: str) -> None:
    texts = [
        ENGLISH,
        CHINESE,
        "هذا نص عربي قصير جدا. " * 20,
        "นี่คือข้อความ " * 30,
        "Это очень простой текст. " * 20,
        "",
    ]
    rows = [features.text_features(text, lang, features.FEATURES) for text in texts]
    assert pa.array(rows, features.SCHEMA).to_pylist() == rows


@pytest.mark.parametrize("name", HOSTILE)
def test_time_is_bounded_on_hostile_text(name: str) -> None:
    text = HOSTILE[name]
    whole = [features.keywords, features.summary, features.reading_ease, names.entities]

    def seconds(size: int) -> float:
        # past `measure`, which would cut the text
        cut = text[:size].encode(errors="replace").decode()
        start = time.process_time()
        for function in whole:
            function(cut, "zh" if name == "han" else "en")
        return time.process_time() - start

    names.entities("Paris", "en")
    assert any(seconds(40_000) < 3 * seconds(20_000) + 0.1 for _ in range(3))
    found = features.text_features(text, "en", features.FEATURES)
    pa.array([found], features.SCHEMA)
