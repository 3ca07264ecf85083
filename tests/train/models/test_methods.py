"""Every method tunes the shipped model on the sample's reviews; none needs more than parameters."""

import pytest

from kit.errors import ModelError
from kit.params import METHODS as NAMES
from kit.params import FinetuneSft
from kit.train.encode.encode import prepare
from kit.train.models import load
from kit.train.models.methods import METHODS, adapter_config, base_quantization
from kit.train.plan.setup import resolve_setup
from kit.train.tune.sft import fit_rows


def test_the_table_has_every_method_that_a_recipe_may_name():
    assert tuple(METHODS) == NAMES
    for name, method in METHODS.items():
        p = FinetuneSft(method=name)
        config = adapter_config(p)
        assert (config is None) == (name == "full")
        assert method.merges == (config is None or not config.is_prompt_learning)
        assert resolve_setup(p).learning_rate == method.learning_rate > 0
        assert resolve_setup(p.model_copy(update={"sft_learning_rate": 1e-5})).learning_rate == 1e-5
    assert base_quantization(FinetuneSft(method="qlora")) == "nf4_double"
    assert base_quantization(FinetuneSft(method="qlora", quantization="nf4")) == "nf4"
    with pytest.raises(ModelError, match="method=qlora"):
        base_quantization(FinetuneSft(method="full", quantization="int8"))


@pytest.fixture(scope="module")
def reviews(data_lake):
    """The tokenizer, and rows of the sample: (tokenizer, train, held out)."""
    data = data_lake.need("sample", "50_build_datasets")
    tokenizer = load.load_tokenizer("smollm2")
    train = prepare(data_lake.table(data, "train").to_pylist(), tokenizer, 64)
    return tokenizer, train, prepare(data_lake.table(data, "heldout").to_pylist()[:8], tokenizer, 64)


@pytest.mark.slow  # the shipped model, seven times: in make test, test_sft trains a tiny one by every method
@pytest.mark.parametrize("method", NAMES)
def test_the_held_out_loss_on_the_samples_reviews_falls_below_the_bases(reviews, method, tmp_path):
    tokenizer, train, heldout = reviews
    p = FinetuneSft(method=method, max_tokens=64, sft_steps=6, sft_batch_size=2)
    m = fit_rows(p, tokenizer, train, heldout, tmp_path).metrics
    print(f"{method}: {m['heldout_before']:.3f} → {m['heldout_after']:.3f}")
    assert m["heldout_after"] < m["heldout_before"]
