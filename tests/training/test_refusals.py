"""What an engine cannot do is refused in one sentence, before anything is sharded."""

from types import SimpleNamespace

import pytest
import torch
from training.synthetic import settings

from fastmat.errors import UserError
from fastmat.training.engine import check_moments, make_engine
from fastmat.training.fsdp import check_environment
from fastmat.training.zero import configure


def accelerator(config: dict[str, object]) -> SimpleNamespace:
    plugin = SimpleNamespace(deepspeed_config=config)
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        ({"zero_optimization": {"stage": 0}}, {}, "must be 1, 2 or 3, got 0; stage 0 is plain DDP"),
        ({}, {}, "must be 1, 2 or 3, got 0"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            {},
            "offload_optimizer': offload",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "offload_param': offloading"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, {}, "quantised communication"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, {}, "'fp16': fp16 is not supported"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, {}, "'bf16': weights stay fp32"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}, {}, "'optimizer': fastmat makes"),
        ({"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 4}, {}, "train.micro_batch saves memory"),
        ({"zero_optimization": {"stage": 3}}, {"compile": True}, "train.compile does not work with ZeRO stage 3"),
    ],
)
def test_deepspeed_options(config, changes, said):
    with pytest.raises(UserError, match=said) as refused:
        configure(accelerator(config), settings(**changes))
    assert "\n" not in str(refused.value)


def test_what_accelerate_writes_by_itself_is_no_wish():
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}},
        "fp16": {"enabled": False},
        "gradient_accumulation_steps": "auto",
    }
    assert configure(accelerator(config), settings(clip_norm=None)) == 2
    assert config["gradient_clipping"] == 0.0 and config["train_batch_size"] == 2


@pytest.mark.parametrize(
    ("environment", "changes", "said"),
    [
        ({"FSDP_VERSION": "1"}, {}, "set fsdp_version to 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params to false"),
        ({"FSDP_VERSION": "2"}, {"compile": True}, "train.compile does not work with FSDP2"),
    ],
)
def test_fsdp_options(monkeypatch, environment, changes, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        check_environment(settings(**changes))


def test_deepspeed_is_not_silently_replaced(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed was asked for and use_cpu forbids it"):
        make_engine(SimpleNamespace(distributed_type="MULTI_CPU"), None, None, {}, settings())


def test_optimiser_state_of_other_parameters():
    with pytest.raises(UserError, match=r"of other parameters \(exp_avg/b\)"):
        check_moments({"exp_avg/b": torch.zeros(2)}, {})
