"""Side by side: three models, one seed, one page that hostile text cannot break."""

import pytest
from support import (
    no_network,
    review,
    tiny_model,
)

from kit import params
from kit.errors import ModelError
from kit.measure.compare import compare
from kit.measure.compare.compare import compare_generations, comparison_page, complete
from kit.params import CompareGenerations

EVIL = "<script>alert(1)</script> \u202etxt\x07"


@pytest.fixture(scope="module")
def lake(aligned_lake):
    return aligned_lake


def settings(lake, **values):
    small = {"max_new_tokens": 6, "eval_rows": 3, "max_tokens": 48, "threads": 1}
    base = {
        "lake": lake.uri,
        "base_model": tiny_model(),
        "dtype": "float32",
        "prompts": ["The film is", EVIL],
    }
    return CompareGenerations(**{**base, **small, **values})


def test_three_models_side_by_side(lake, monkeypatch):
    attempts = no_network(monkeypatch)
    manifest = compare_generations(settings(lake), lake)
    assert attempts == []
    rows = lake.table(manifest, "completions").to_pylist()
    assert [r["prompt"] for r in rows] == ["The film is", EVIL]
    assert set(rows[0]) == {"prompt", "base", "tuned", "aligned"}
    scores = {s["model"]: s for s in lake.table(manifest, "perplexity").to_pylist()}
    made = lake.need("sample", "60_finetune_sft").metrics
    assert scores["base"]["perplexity"] == pytest.approx(made["perplexity_before"], rel=1e-4)
    assert scores["tuned"]["perplexity"] == pytest.approx(made["perplexity_after"], rel=1e-3)
    assert scores["aligned"]["perplexity"] != scores["tuned"]["perplexity"]
    assert len({s["tokens"] for s in scores.values()}) == 1
    assert compare_generations(settings(lake), lake).content_sha256 == manifest.content_sha256


def test_the_page_escapes_every_text_and_needs_no_network(lake):
    p = settings(lake, run="sample")
    rows = [{"prompt": EVIL, "base": EVIL, "tuned": EVIL, "aligned": ""}]
    scores = [{"model": m, "perplexity": 10.0, "tokens": 5} for m in compare.STEPS]
    page = comparison_page(rows, scores, p)
    assert "<script" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page
    assert page.count("class='trio'") == 1
    assert "(nothing)" in page


def test_blank_prompts_are_counted_and_only_blanks_are_an_error(lake):
    manifest = compare_generations(settings(lake, prompts=["The film is", "  "]), lake)
    assert manifest.counts.dropped == {"empty": 1}
    with pytest.raises(ModelError, match="holds no prompt"):
        compare_generations(settings(lake, prompts=[" "]), lake)


def test_a_prompt_completes_alike_alone_and_in_a_padded_batch(lake):
    p = settings(lake, temperature=0.0, prompts=["The film is", "I walked out after an hour; the plot"])
    manifest = compare_generations(p, lake)
    rows = lake.table(manifest, "completions").to_pylist()
    for row in rows:
        assert complete(row["prompt"], "aligned", p, lake) == row["aligned"]


def test_live_completion_names_the_models_it_knows(lake):
    assert isinstance(complete("The film is", "base", settings(lake), lake), str)
    assert complete("  ", "base", settings(lake), lake) == ""
    with pytest.raises(ModelError, match="choose one of base, tuned, aligned"):
        complete("The film is", "best", settings(lake), lake)


def test_no_heldout_row_is_an_error(tmp_path, lake):
    import pyarrow as pa

    from kit.lake.manifest import Counts

    with lake.stage(params.BuildDatasets(lake=lake.uri, run="bare")) as out:
        for name in ("train", "heldout"):
            out.table(name, pa.Table.from_pylist([review(0, "")]))
        out.commit(Counts(records_in=1, records_out=1))
    for stage in ("60_finetune_sft", "70_align_dpo"):
        source = lake.need("sample", stage)
        cls = params.STAGES[stage]
        with lake.stage(cls(lake=lake.uri, run="bare")) as out:
            out.folder("model", lake.local_folder(source, "model"))
            out.commit(Counts(records_in=1, records_out=1))
    with pytest.raises(ModelError, match="no usable heldout row"):
        compare_generations(settings(lake, run="bare"), lake)
