"""Momentum encoders follow as the formula says; queues keep the newest features, wrap, and survive a checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastmat.defences.momentum import NOBODY, FeatureQueue, Momentum
from fastmat.errors import UserError
from fastmat.models.tiny_fusion import tiny_albef
from fastmat.types import AttackContext


def keys(count: int, seed: int) -> AttackContext:
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(2, count, 16, generator=generator), dim=-1)
    group = torch.arange(count) + 100 * seed
    return AttackContext(image_features=rows[0], image_group=group, text_features=rows[1], text_group=group)


def test_follows_and_leaves_the_model_alone():
    model = tiny_albef()
    memory = Momentum(model, queue=8, ema_decay=0.9)
    before = {name: p.detach().clone() for name, p in memory.model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    memory.follow(model)
    for name, copied in memory.model.named_parameters():
        assert not copied.requires_grad
        torch.testing.assert_close(copied, 0.9 * before[name] + 0.1 * now[name])
        assert torch.equal(now[name], model.get_parameter(name))


def test_the_queue_against_a_list():
    """5 at a time into 12: the newest 12, wherever they lie; at first nobody's unit rows."""
    queue = FeatureQueue(size=12, width=16, seed=0)
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(12))
    assert set(queue.group.tolist()) == {NOBODY}
    added: list[tuple[int, torch.Tensor]] = []
    for step in range(7):
        new = keys(5, step + 1)
        queue.add(new.image_features, new.image_group)
        added += zip(new.image_group.tolist(), new.image_features, strict=True)
        assert queue.start == len(added) % 12
        held = dict(zip(queue.group.tolist(), queue.features, strict=True))
        for group, row in added[-12:]:
            assert torch.equal(held[group], row)
    assert NOBODY not in queue.group


def test_goes_on_from_a_checkpoint_exactly(tmp_path):
    model = tiny_albef()
    memory = Momentum(model, queue=12, seed=1)
    with torch.no_grad():
        model.itm_head.weight.add_(1)
    for step in range(3):
        memory.follow(model)
        memory.add(keys(4, step))
    memory.add(keys(4, 9))
    save_file({k: v.contiguous() for k, v in memory.state_dict().items()}, tmp_path / "memory.safetensors")
    other = Momentum(tiny_albef(seed=1), queue=12, seed=2)
    other.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    assert other.steps == 4 and other.images.start == other.texts.start == 4
    for one in (memory, other):
        one.follow(model)
        one.add(keys(4, 5))
    mine, its = memory.state_dict(), other.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)


def test_no_queue():
    memory = Momentum(tiny_albef(), queue=0)
    memory.check(7, 9)
    memory.add(keys(4, 0))
    assert memory.steps == 1 and not len(memory.images.group)


def test_refusals():
    model = tiny_albef()
    with pytest.raises(UserError, match="queue must not be negative, got -1"):
        Momentum(model, queue=-1)
    with pytest.raises(UserError, match="ema_decay must be in"):
        Momentum(model, queue=4, ema_decay=1.5)
    memory = Momentum(model, queue=10)
    with pytest.raises(UserError, match=r"multiple of the global batch of 4 images, got 10; take 8"):
        memory.check(4, 4)
    memory.check(5, 10)
    with pytest.raises(UserError, match=r"captions of a global batch, which are 11, got 10; take 15"):
        memory.check(5, 11)
    with pytest.raises(UserError, match="at least one batch"):
        memory.add(keys(11, 0))
    queues = {"image_queue": torch.zeros(16, 7), "idx_queue": torch.zeros(1, 7), "queue_ptr": torch.zeros(1)}
    with pytest.raises(UserError, match="holds 7 features"):
        memory.load_official({}, queues)
    with pytest.raises(UserError, match=r"another model: itm_head\.weight"):
        memory.load_official({"itm_head.weight": torch.zeros(3)}, {})
