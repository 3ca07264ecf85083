"""Reward model and policy on a tiny random model: what is learned, said, reloaded, refused and reproduced."""

import functools
import math
import random
import tempfile

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support import TEXT, make_lake, no_network, outputs, pair, review, sft_params, tiny_model

from kit import params
from kit.errors import ModelError
from kit.train.align import reward
from kit.train.align.reward import reward_and_policy
from kit.train.align.trust import LIMITS, calibration, hacking, repetition, wilson
from kit.train.encode.encode import perplexity, prepare
from kit.train.loop.meter import steps_table
from kit.train.models import load
from kit.train.plan.setup import resolve_setup
from kit.train.tune.sft import finetune

WORDS = ["plot", "cast", "scene", "music", "light", "story", "actor", "joke", "song", "end"]
ROWS = [review(i, f" {TEXT[i % 3]}", prompt=f"Film {i % 4} is") for i in range(8)]


def planted(n=64):
    """Pairs whose better text holds the word 'superb'; one in four is held out."""
    draw, pairs = random.Random(0), []
    for i in range(n):
        worse, better = draw.choices(WORDS, k=6), draw.choices(WORDS, k=6)
        better[draw.randrange(6)] = "superb"
        texts = (" " + " ".join(words) for words in (better, worse))
        pairs.append(pair(i, *texts, f"Film {i % 5} is", "train" if i % 4 else "heldout"))
    return pairs


def small(lake, **values):
    given = {"reward_steps": 3, "reward_batch_size": 4, "reward_learning_rate": 5e-3, "policy_steps": 2}
    given |= {"policy_tokens": 12, "reward_tokens": 48, "max_tokens": 64, "eval_rows": 3}
    given |= {"lora_r": 4, "threads": 1, "base_model": tiny_model(), "dtype": "float32", "lake": lake.uri}
    return params.RewardAndPolicy(**given | values)


@functools.cache
def tuned_lake():
    lake = make_lake(tempfile.mkdtemp(prefix="kit-reward-test-"), train=ROWS, pairs=planted())
    finetune(sft_params(lake, sft_learning_rate=1e-2), lake)
    return lake


class Planted(reward.Judge):
    """A reward without training: the share of tokens whose output weights point one way."""

    def __init__(self, model):
        super().__init__(model, load.load_tokenizer(tiny_model()))
        self.good = (model.lm_head.weight[:, 0] > 0).tolist()

    def rewards(self, texts):
        return [sum(self.good[t] for t in ids) / len(ids) for ids in texts]


def policy(folder, **values):
    """A trainer of a policy on the tiny model against a planted reward."""
    p = small(tuned_lake(), **values)
    asked = [Dataset.from_list([{"prompt": f"Film {i} is"} for i in range(4)])] * 2
    model = load.load_model(tiny_model(), dtype="float32")
    torch.manual_seed(0)  # random tied weights give all tokens nearly the same probability
    model.lm_head.weight = torch.nn.Parameter(torch.randn(512, 64) * 0.15)
    setup = resolve_setup(p, p.fits()[1])
    return reward.build_policy(p, setup, model, Planted(model), asked, folder)


def test_a_planted_preference_is_learned_and_the_saved_model_gives_the_same_rewards(monkeypatch):
    attempts, lake = no_network(monkeypatch), tuned_lake()
    m = reward_and_policy(p := small(lake, reward_steps=30, reward_batch_size=8), lake)
    learned = m.metrics["reward_model"]
    assert attempts == []
    assert learned["accuracy"] > 0.9
    assert learned["losses"][0] == pytest.approx(0.6931, abs=1e-3), "all rewards are 0 at first"
    tokenizer = load.load_tokenizer(tiny_model())
    base = reward.untrained(load.load_model(tiny_model(), dtype="float32"), tokenizer.pad_token_id)
    judge = reward.Judge(PeftModel.from_pretrained(base, lake.local_folder(m, "reward")), tokenizer)
    found = lake.table(lake.need("sample", "50_build_datasets"), "preferences").to_pylist()
    unseen = reward.prepare_pairs(found, judge.tokenizer, p.reward_tokens, "heldout")
    assert reward.reward_scores(judge, unseen)["brier"] == pytest.approx(learned["brier"], abs=1e-6)
    assert (m.counts.records_in, m.counts.records_out, m.counts.dropped) == (48, 48, {})


def test_the_policy_starts_at_the_tuned_model_goes_on_top_of_it_and_its_answers_are_kept():
    lake = tuned_lake()
    p = small(lake, policy_steps=4, policy_iterations=2, policy_learning_rate=3e-2, policy_clip=0.01)
    m = reward_and_policy(p, lake)
    steps = lake.table(m, "model_steps").to_pylist()
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["kl"] > 1e-3
    assert steps[0]["clip_ratio/region_mean"] == 0 < steps[1]["clip_ratio/region_mean"]
    assert steps[1]["reward"] is None, "no new answers, no new rewards"
    assert {"reward", "reward_std", "completions/mean_length", "repetition"} <= set(steps[0])
    tuned = lake.local_folder(lake.need("sample", "60_finetune_sft"), "model")
    model = load.load_model(tiny_model(), dtype="float32", adapters=[tuned, lake.local_folder(m, "model")])
    tokenizer = load.load_tokenizer(tiny_model())
    held = prepare(lake.table(lake.need("sample", "50_build_datasets"), "heldout").to_pylist(), tokenizer, 64)
    after = m.metrics["after"]["perplexity"]
    assert perplexity(model, tokenizer, held.rows)[0] == pytest.approx(after, rel=1e-3)
    answers = lake.table(m, "answers").to_pylist()
    assert [a["when"] for a in answers] == ["before"] * 2 + ["after"] * 2
    assert sum(a["reward"] for a in answers[:2]) / 2 == pytest.approx(m.metrics["before"]["reward"])


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_a_planted_reward_rises(tmp_path, objective):
    given = {
        "policy_generations": 8,
        "policy_steps": 12,
        "policy_learning_rate": 2e-2,
        "policy_kl_beta": 0.01,
    }
    trainer = policy(tmp_path, policy_objective=objective, **given)
    ran = reward.run_training(trainer, "policy")
    steps = steps_table(trainer).to_pydict()
    assert sum(steps["reward"][-3:]) > sum(steps["reward"][:3]) + 0.3
    assert steps["kl"][0] == pytest.approx(0, abs=1e-6)
    assert ran["what_ran"]["trainer"] == {"grpo": "GRPOTrainer", "rloo": "RLOOTrainer"}[objective]


def test_rewards_that_are_all_equal_are_reported(monkeypatch, capsys):
    monkeypatch.setattr(reward.Judge, "rewards", lambda self, texts: [1.0] * len(texts))
    m = reward_and_policy(small(tuned_lake()), tuned_lake())
    assert "all rewards equal in 2 of 2 steps" in capsys.readouterr().out
    assert m.metrics["reward_model"]["accuracy"] == 0, "an undecided model is not right"


def test_another_reference_is_refused(monkeypatch):
    build = reward.build_policy

    def moved(*args):
        trainer = build(*args)
        for weight in (w for name, w in trainer.model.named_parameters() if "lora_B" in name):
            torch.nn.init.normal_(weight, std=0.1)
        return trainer

    monkeypatch.setattr(reward, "build_policy", moved)
    with pytest.raises(ModelError, match="the first KL is"):
        reward_and_policy(small(tuned_lake()), tuned_lake())


@pytest.mark.parametrize("method", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_the_same_bytes_twice(method):
    first, second = (reward_and_policy(small(tuned_lake(), method=method), tuned_lake()) for _ in range(2))
    assert outputs(first) == outputs(second)
    assert first.counts.dropped == {"not reached in reward_steps": 48 - 12}


def test_calibration_of_a_model_that_says_what_comes_true_and_of_one_that_boasts():
    draw = random.Random(1)
    said = [draw.uniform(0, 3) for _ in range(4000)]
    honest = [m if draw.random() < 1 / (1 + math.exp(-m)) else -m for m in said]
    true, boasted = calibration(honest), calibration([5 * m for m in honest])
    assert true["ece"] < 0.03 and boasted["ece"] > 0.1
    assert true["brier"] < 0.25
    assert [b["pairs"] for b in true["bins"]] == [1000] * 4
    assert calibration([0.0] * 8) | {"bins": []} == {"ece": 0.0, "brier": 0.25, "bins": []}


def test_wilson_and_repetition():
    # Newcombe 1998, table I
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert repetition([1, 2, 3, 1, 2, 3, 1]) == pytest.approx(2 / 5)


BEFORE = {"reward": 0.0, "length": 20.0, "repetition": 0.02, "cut": 0.5, "perplexity": 30.0}
AT_LIMIT = {"length": 24.0, "repetition": 0.07, "cut": 0.7, "perplexity": 33.0}


@pytest.mark.parametrize("what", LIMITS)
def test_hacking_is_a_rise_beyond_the_limit_beside_a_risen_reward(what):
    little, much = (BEFORE | {what: AT_LIMIT[what] * by} for by in (0.99, 1.01))
    assert hacking(BEFORE, much | {"reward": 1.0}) == [f"{what} {BEFORE[what]:.3g} → {much[what]:.3g}"]
    assert hacking(BEFORE, little | {"reward": 1.0}) == []
    assert hacking(BEFORE, much | {"reward": 0.0}) == [], "nothing was gained by it"
    assert hacking(BEFORE, much | {"reward": -1.0}) == []
    assert hacking(much, BEFORE | {"reward": 1.0}) == [], "shorter, plainer, likelier: no hacking"


def test_each_way_of_hacking_is_named():
    assert len(hacking(BEFORE, AT_LIMIT | {"reward": 1.0, "repetition": 0.3, "cut": 0.9})) == 2


REFUSED = {
    "lora, qlora or dora": {"method": "prompt"},
    "raise reward_tokens": {"policy_tokens": 47},
    "4 of 4 distinct prompts .* lower policy_prompts": {"policy_prompts": 9},
    "2 usable heldout pairs .* needs 4": {"reward_eval_pairs": 2},
    "needs .* GB and this machine has": {
        "reward_tokens": 100_000,
        "max_tokens": 100_000,
        "reward_batch_size": 500,
    },
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_done_is_said_before_anything_runs(said):
    with pytest.raises(ModelError, match=said):
        reward_and_policy(small(tuned_lake(), **REFUSED[said]), tuned_lake())


@pytest.mark.parametrize("said", ["3 usable train pairs", "0 of 0 distinct prompts"])
def test_too_few_pairs_and_rows_without_prompts_are_refused(tmp_path, said):
    unasked = {"train": [review(i, " fine", prompt="") for i in range(4)], "pairs": planted(32)}
    lake = make_lake(tmp_path, **({"pairs": planted(4)} if "pairs" in said else unasked))
    finetune(sft_params(lake, sft_steps=1), lake)
    with pytest.raises(ModelError, match=said):
        reward_and_policy(small(lake), lake)


@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix"])
def test_a_learned_prompt_below_is_refused_before_anything_is_trained(tmp_path, monkeypatch, method):
    lake = make_lake(tmp_path, train=ROWS, pairs=planted())
    finetune(sft_params(lake, sft_steps=1, method=method), lake)
    monkeypatch.setattr(reward, "train_reward", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(ModelError, match=f"method={method}: run 60 with method=lora"):
        reward_and_policy(small(lake), lake)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_reference_is_said(capsys, beta):
    m = reward_and_policy(small(tuned_lake(), policy_kl_beta=beta), tuned_lake())
    said = m.metrics["policy"]["what_ran"]["reference"]
    assert said == ("the tuned model, new adapter off" if beta else "none, policy_kl_beta is 0")
    assert f"reference: {said}" in capsys.readouterr().out


def test_a_text_that_several_pairs_share_is_read_once(monkeypatch):
    judge = Planted(load.load_model(tiny_model(), dtype="float32"))
    pairs = [pair(i, f" {better}", " dull", "Film is", "heldout") for i, better in enumerate(WORDS[:5])]
    read, rewards = [], judge.rewards
    monkeypatch.setattr(judge, "rewards", lambda texts: (read.extend(map(tuple, texts)), rewards(texts))[1])
    found = reward.reward_scores(judge, reward.prepare_pairs(pairs, judge.tokenizer, 32, "heldout"))
    assert (found["pairs"], found["texts"]) == (5, 6) == (5, len(read))
    assert len(set(read)) == 6
