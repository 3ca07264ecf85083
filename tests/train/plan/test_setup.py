"""What a training is resolved to at its door: each thing that a stage fits by its own fields, and asked once."""

import os
import sys
from dataclasses import replace

import pytest
import torch
from support import make_lake, sft_params, tiny_model

import kit
from kit.errors import ModelError
from kit.estimate import table
from kit.params import AlignDpo, ContinuePretraining, Distill, FinetuneSft, RewardAndPolicy
from kit.train.align import preference
from kit.train.plan import fit as plan
from kit.train.plan import scaling
from kit.train.plan.machine import GPUS, Machine
from kit.train.plan.setup import resolve_setup
from kit.train.tune.sft import finetune

GPU = GPUS["h100"]


def compiles(p):
    return {fit.name: resolve_setup(p, fit, GPU).recipe["compile"] for fit in p.fits()}


def test_what_is_compiled_hangs_on_the_steps_of_what_is_trained():
    """The first field that ends with _steps was read: 200 from scratch compiled the ten continued ones, too."""
    assert compiles(ContinuePretraining(continue_steps=10)) == {"scratch": True, "model": False}
    assert compiles(ContinuePretraining(pretrain_steps=10, continue_steps=500)) == {
        "scratch": False,
        "model": True,
    }
    assert compiles(RewardAndPolicy(reward_steps=500, policy_steps=4)) == {"reward": True, "policy": False}
    assert compiles(RewardAndPolicy(reward_steps=4, policy_steps=500)) == {"reward": False, "policy": True}
    assert compiles(Distill(distill_steps=100)) == {"student": True}
    # steps between checkpoints are none that the optimizer takes
    assert compiles(FinetuneSft(sft_steps=99, checkpoint_steps=500)) == {"sft": False}


def policy_plan(machine=GPU, **values):
    p = RewardAndPolicy(base_model=tiny_model(), **values)
    reward, policy = (resolve_setup(p, fit, machine) for fit in p.fits())
    return plan.plan_training(reward), plan.plan_training(policy)


def test_the_policys_memory_and_time_are_planned_from_its_own_fields():
    reward, policy = policy_plan()
    # beside the policy lies the reward model: its weights, what was trained of it, and the state of its optimizer
    held = sum(policy.parts[name] for name in ("weights", "trained", "optimizer"))
    assert policy.parts["reward model"] == held > 0 and "reward model" not in reward.parts
    more = policy_plan(policy_prompts=64, policy_generations=16)
    assert more[0] == reward, "the reward model does not change with the policy's batch"
    assert more[1].parts["activations"] > 10 * policy.parts["activations"]
    assert policy_plan(policy_steps=40)[1].seconds == pytest.approx(10 * policy.seconds)
    assert policy_plan(policy_tokens=48)[1].seconds > policy.seconds, "answers are written token by token"
    assert policy_plan(reward_tokens=256)[1].memory_mb > policy.memory_mb


def test_a_policy_that_does_not_fit_names_its_own_parameters():
    given = {"policy_prompts": 512, "reward_tokens": 512, "max_tokens": 64, "policy_generations": 8}
    p = RewardAndPolicy(base_model=tiny_model(), dtype="float32", **given)
    machine = Machine("a machine", 2048.0, 1e12, 100.0, gpu=False)
    reward, policy = (resolve_setup(p, fit, machine) for fit in p.fits())
    assert plan.require_fit(reward, rows_tokens=[512])
    with pytest.raises(ModelError, match=r"a machine has 2\.0 GB free: .*policy_prompts=1 .*needs"):
        plan.require_fit(policy, rows_tokens=[512])
    both, wrong = plan.foresee(p, machine)
    assert "policy_prompts=1" in wrong
    assert both.seconds == plan.plan_training(reward).seconds + plan.plan_training(policy).seconds


def test_texts_that_are_too_long_for_the_machine_are_shortened_by_the_parameter_that_sets_them():
    """71 reads reward_tokens of a text: to lower max_tokens, as was said before, changes nothing."""
    p = RewardAndPolicy(
        base_model=tiny_model(), dtype="float32", method="qlora", optimizer="adamw_8bit", reward_tokens=4096,
        policy_prompts=1, activation_checkpointing=True,
    )  # fmt: skip
    shorter = p.model_copy(update={"reward_tokens": 1024})
    enough = plan.plan_training(resolve_setup(shorter, shorter.fits()[1], GPU)).memory_mb
    machine = replace(GPU, memory_mb=enough)
    changes, made = plan.nearest_fit(resolve_setup(p, p.fits()[1], machine))
    assert changes == {"reward_tokens": 1024} and made.memory_mb == enough


def test_only_a_reference_adds_its_forward_pass():
    """Texts a row were taken for it: ORPO and the reward model have two and no reference."""

    def seconds(**values):
        return plan.plan_training(
            resolve_setup(AlignDpo(base_model=tiny_model(), **values), machine=GPU)
        ).seconds

    assert seconds(preference_loss="orpo") < seconds(preference_loss="dpo") == seconds(preference_loss="kto")
    for loss, objective in preference.OBJECTIVES.items():
        assert AlignDpo(preference_loss=loss).fits()[0].reference == (objective.first_loss is not None)
    reward, _ = RewardAndPolicy().fits()
    usual = resolve_setup(RewardAndPolicy(base_model=tiny_model()), reward, GPU)
    compared = replace(usual, fit=replace(reward, reference=True))
    assert plan.plan_training(usual).seconds < plan.plan_training(compared).seconds


def test_a_stage_without_a_method_trains_all_weights_in_float32():
    for p in (ContinuePretraining(dtype="bfloat16"), Distill(dtype="bfloat16")):
        setup = resolve_setup(p, p.fits()[0])
        assert setup.full and setup.mixed and setup.quantization == "none"
        assert setup.weights == torch.float32 and setup.recipe["weights"] == "float32"
        assert setup.recipe["autocast"] and not setup.recipe["packing"]


def test_each_model_has_an_adapter_configuration_of_its_own():
    setup = resolve_setup(FinetuneSft())
    setup.new_adapter().target_modules = {"changed"}
    assert setup.new_adapter().target_modules == "all-linear"


def entries(doing) -> list[str]:
    """Modules of the kit that `doing` enters with the parameters of 60 in hand, one for each time it comes from another.

    A call counts where an argument is a `FinetuneSft` and the caller stands in another module; the class's own methods
    do not.
    """
    base, entered = os.path.dirname(kit.__file__), []

    def module(frame):
        path = frame.f_code.co_filename
        return os.path.relpath(path, base) if path.startswith(base) else None

    def watch(frame, event, arg):
        here = module(frame) if event == "call" else None
        if here is None or here.startswith("params"):
            return
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(isinstance(frame.f_locals.get(name), FinetuneSft) for name in names):
            caller = frame.f_back
            while caller and module(caller) is None:  # a context manager's frame, say
                caller = caller.f_back
            if not caller or module(caller) != here:
                entered.append(here)

    sys.setprofile(watch)
    try:
        doing()
    finally:
        sys.setprofile(None)
    return entered


def test_the_parameters_of_60_come_back_to_few_modules(tmp_path):
    """An estimate, one for several GPUs, and a run with a batch to be found: 21 returns when each asked anew, in 7 modules."""
    lake = make_lake(tmp_path)
    p = sft_params(lake, sft_batch_size=0, sft_steps=1)

    def whole_trip():
        planned, _ = plan.foresee(p, GPU)
        table.estimate_stage(p, 10, None, (planned.seconds, planned.memory_mb, "a plan"))
        scaling.work_of(resolve_setup(p, machine=GPU))
        finetune(p, lake)

    entered = entries(whole_trip)
    assert "train/plan/setup.py" in entered and "train/tune/sft.py" in entered
    assert len(entered) - len(set(entered)) <= 10, entered
