"""The cost model against real modules, real optimisers, and the collectives of real processes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, BlipConfig, BlipForImageTextRetrieval

from fastmat.benchmarks.rows import append_rows
from fastmat.benchmarks.scaling.cluster import H200
from fastmat.benchmarks.scaling.command import known_rows, show
from fastmat.benchmarks.scaling.memory import memory_of, saved_bytes
from fastmat.benchmarks.scaling.observe import Observed, observe
from fastmat.benchmarks.scaling.predict import GPUS, Setup, efficiency, predict, setups
from fastmat.benchmarks.scaling.process import bytes_of
from fastmat.benchmarks.scaling.shapes import ALBEF, BLIP, CLIP_B16, MODELS, Tower
from fastmat.benchmarks.scaling.small import SMALL, build
from fastmat.benchmarks.scaling.strategies import STRATEGIES
from fastmat.benchmarks.scaling.traffic import Exchange, exchanges, sent
from fastmat.benchmarks.scaling.work import METHODS, Texts, step_flops
from fastmat.cli.main import main

TEXTS = Texts()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    """open_clip's own ViT-B-16, without memory."""
    with torch.device("meta"):
        return open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))


@pytest.fixture(scope="module")
def shallow() -> nn.Module:
    """The same with two layers a tower."""
    config = open_clip.get_model_config("ViT-B-16")
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    with torch.device("meta"):
        return open_clip.model.CLIP(**config)


def blip(layers: int) -> nn.Module:
    """transformers' BLIP for retrieval; eager attention, whose products are counted."""
    config = BlipConfig()
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = layers
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return BlipForImageTextRetrieval(config)


def test_parameters_are_those_of_the_real_models(clip: nn.Module) -> None:
    assert CLIP_B16.parameters == count(clip) == 149_620_737
    assert CLIP_B16.image.parameters == count(clip.visual)
    assert SMALL.parameters == count(build(SMALL))
    temperature = 1  # ours is trained, transformers keeps it in the configuration
    assert BLIP.parameters - temperature == count(blip(12))
    with torch.device("meta"):
        text = BertModel(BertConfig(num_hidden_layers=6), add_pooling_layer=False)
        cross = BertConfig(num_hidden_layers=6, add_cross_attention=True, is_decoder=True)
        fusion = BertModel(cross, add_pooling_layer=False).encoder
    projection = 768 * 256 + 256
    assert ALBEF.text.parameters - projection == count(text)
    assert ALBEF.fusion is not None
    assert ALBEF.fusion.parameters == count(fusion)
    assert ALBEF.image.parameters == BLIP.image.parameters


def flops_of(call: Callable[[], object]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("trained", [True, False])
def test_flops_of_the_real_image_tower_and_of_both_backwards(shallow: nn.Module, trained: bool) -> None:
    visual = shallow.visual.requires_grad_(trained)
    images = torch.empty(1, 3, 224, 224, device="meta", requires_grad=not trained)
    with sdpa_kernel(SDPBackend.MATH):
        features = visual(images)
    own = replace(CLIP_B16.image, layers=2).flops
    assert flops_of(lambda: visual(images)) == own.forward
    inputs = None if trained else [images]
    backward = flops_of(lambda: features.sum().backward(inputs=inputs))
    assert backward == (own.full_backward if trained else own.input_backward)


def test_flops_of_the_text_towers_and_of_fusion(shallow: nn.Module) -> None:
    ids = torch.zeros(1, 77, dtype=torch.long, device="meta")
    own = replace(CLIP_B16.text, layers=2).flops
    assert flops_of(lambda: shallow.encode_text(ids)) == own.forward
    with sdpa_kernel(SDPBackend.MATH):
        features = shallow.encode_text(ids)
    assert flops_of(lambda: features.sum().backward()) == own.full_backward

    text_encoder = blip(2).text_encoder
    ids, tokens = ids[:, :35], torch.empty(1, 577, 768, device="meta")
    projection = 2 * 768 * 256  # not the encoder's
    assert flops_of(lambda: text_encoder(ids)) == replace(BLIP.text, layers=2).flops.forward - projection
    assert BLIP.fusion is not None
    fused = flops_of(lambda: text_encoder(ids, encoder_hidden_states=tokens))
    assert fused == replace(BLIP.fusion, layers=2).flops.forward


def test_flops_agree_with_what_others_counted() -> None:
    """performance.md, GFLOP: ViT-B/16 at 384 px, 6-layer text, fusion with and without shared keys and values."""
    assert ALBEF.image.flops.forward / 1e9 == pytest.approx(111.0, rel=1e-3)
    assert ALBEF.text.flops.forward / 1e9 == pytest.approx(2.56, rel=2e-3)
    fusion = ALBEF.fusion
    assert fusion is not None
    assert fusion.context_flops / 1e9 == pytest.approx(8.2, rel=5e-3)
    assert 9 * fusion.flops.forward / 1e9 == pytest.approx(103, rel=5e-3)
    shared = step_flops(ALBEF, "finetune", TEXTS, batch=1, gpus=1)
    without = step_flops(replace(ALBEF, fusion=None), "finetune", TEXTS, batch=1, gpus=1)
    assert (shared.total - without.total) / 1e9 == pytest.approx(54, rel=0.03)
    fare = step_flops(CLIP_B16, "fare", TEXTS, batch=1, gpus=1).total / CLIP_B16.image.flops.forward
    assert 24 < fare < 25, "a teacher, ten steps of 2f, 3f; attention's two gradients are the rest"


def test_a_step_is_its_passes() -> None:
    image, text = CLIP_B16.image.flops, replace(CLIP_B16.text, tokens=36).flops
    tried = replace(CLIP_B16.text, tokens=16).flops.forward
    found = step_flops(CLIP_B16, "mat", TEXTS, batch=4, gpus=3)
    assert found.inner == pytest.approx(
        4 * (image.forward + 2 * (image.forward + image.input_backward) + 20 * tried), rel=1e-12
    )
    assert found.forward == pytest.approx(4 * (image.forward + text.forward), rel=1e-12)
    assert found.backward == pytest.approx(4 * (image.full_backward + text.full_backward), rel=1e-12)
    assert found.contrast == 8 * 2 * 4 * 12 * 512
    saving = step_flops(CLIP_B16, "mat", TEXTS, batch=4, gpus=3, checkpointing=True, cached=True)
    assert saving.total - found.total == pytest.approx(2 * found.forward, rel=1e-9)


def saved_by(tower: nn.Module, images: torch.Tensor) -> int:
    """Bytes of the tensors that a real forward keeps for its backward, parameters apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # an address must not be used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tower(images)
    return sum(kept.values())


@pytest.mark.parametrize("trained", [True, False])
def test_activations_of_a_block_are_what_autograd_keeps(trained: bool) -> None:
    rows, found = 3, {}
    for layers in (1, 2):
        shape = replace(SMALL, image=replace(SMALL.image, layers=layers))
        tower = build(shape).visual.requires_grad_(trained)
        found[layers] = saved_by(tower, torch.rand(rows, 3, 32, 32).requires_grad_(not trained))
    one = replace(SMALL.image, layers=1)
    assert found[2] - found[1] == rows * saved_bytes(one, trained=trained, width=4)
    whole = rows * saved_bytes(SMALL.image, trained=trained, width=4)
    checkpointed = rows * saved_bytes(SMALL.image, trained=trained, width=4, checkpointing=True)
    inputs = 4 * rows * SMALL.image.tokens * 192 * 4
    assert checkpointed == whole / 4 + inputs, "the inputs of four blocks and the inside of one"


def test_the_state_is_that_of_a_real_optimiser() -> None:
    model = build(SMALL)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    moments = sum(
        bytes_of(value) for state in optimizer.state.values() for key, value in state.items() if key != "step"
    )
    told = memory_of(SMALL, "mat", STRATEGIES["ddp"], TEXTS, batch=1, gpus=1)
    assert told.optimiser == moments
    assert told.gradients == sum(bytes_of(parameter.grad) for parameter in model.parameters())


@pytest.mark.parametrize(("stage", "share"), [("zero1", (8, 1, 1)), ("zero2", (8, 8, 1)), ("zero3-pass", (8, 8, 8))])
def test_each_stage_divides_more(stage: str, share: tuple[int, int, int]) -> None:
    whole = memory_of(CLIP_B16, "mat", STRATEGIES[stage], TEXTS, batch=8, gpus=1)
    parted = memory_of(CLIP_B16, "mat", STRATEGIES[stage], TEXTS, batch=8, gpus=8)
    assert parted.optimiser == whole.optimiser / share[0]
    assert parted.gradients == whole.gradients / share[1]
    master = CLIP_B16.parameters * 4
    fixed = whole.weights - 2 * master  # bf16 copies, and a block made whole
    assert parted.weights == pytest.approx(fixed + master / 8 + master / share[2] if stage != "zero3-pass" else
                                           whole.weights - 2 * master + 2 * master / 8)  # fmt: skip
    assert (parted.inner, parted.outer) == (whole.inner, whole.outer)


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_a_ring_sends_what_is_claimed(world: int) -> None:
    """Every process's numbers added chunk by chunk around a ring, then handed around; what is sent is counted."""
    generator = torch.Generator().manual_seed(world)
    own = torch.randint(0, 100, (world, world, 5), generator=generator)  # process, chunk, numbers
    total, counted = own.sum(0), {"reduce_scatter": 0, "all_gather": 0}
    for phase in counted:
        for turn in range(world - 1):
            sends = [((rank - turn + (phase == "all_gather")) % world, rank) for rank in range(world)]
            moving = [own[rank, chunk].clone() for chunk, rank in sends]
            for (chunk, rank), numbers in zip(sends, moving, strict=True):
                after = (rank + 1) % world
                own[after, chunk] = own[after, chunk] + numbers if phase == "reduce_scatter" else numbers
                counted[phase] += numbers.numel() * 8
        if phase == "reduce_scatter":
            for rank in range(world):
                assert torch.equal(own[rank, (rank + 1) % world], total[(rank + 1) % world])
    assert (own == total).all()
    size = world * 5 * 8
    for kind, seen in {**counted, "all_reduce": sum(counted.values())}.items():
        claimed = sent(Exchange(what="", kind=kind, size=size, calls=1), world)  # type: ignore[arg-type]
        assert claimed * world == pytest.approx(seen)


def test_pgd_adds_2n_gathers_where_every_pass_gathers() -> None:
    def gathered(method: str, strategy: str) -> int:
        found = exchanges(CLIP_B16, method, STRATEGIES[strategy], TEXTS, batch=1, gpus=8)
        return sum(one.size for one in found if one.what in ("attack", "weights"))

    image, text = 4 * CLIP_B16.image.parameters, 4 * CLIP_B16.text.parameters
    assert gathered("finetune", "zero3-pass") == 2 * (image + text)
    assert gathered("tecoa_itr", "zero3-pass") == 2 * (image + text) + 20 * image + text
    assert gathered("mat", "zero3-pass") == 2 * (image + text) + (4 + 1) * image + 3 * text
    assert gathered("mat", "zero3") == 2 * 4 * CLIP_B16.parameters
    assert gathered("mat", "zero1") == 0


def test_a_prediction_by_hand() -> None:
    """CLIP, MAT, DDP on two nodes: compute, AdamW's traffic, buckets behind the backward, features waited for."""
    found = predict(Setup(model="clip-vit-b16", method="mat", strategy="ddp", gpus=16, batch=128))
    rate = 989.5e12 * 0.45
    assert found.compute == pytest.approx(found.flops.total / rate)
    size = 149_620_737 * 4
    assert found.update == pytest.approx(8 * size / (4.8e12 * 0.8))
    bus, level, part = 0.8 * 400e9, 5e-6 * 4, 15 / 16
    rows = 2 * 128 * 16
    gradients = 2 * part * size / bus + 24 * level
    features = part * rows * (512 * 4 + 8) / bus + 2 * level, part * rows * 512 * 4 / bus + level
    mask = part * 4 * 77 * 77 / bus + level
    assert gradients < found.flops.backward / rate
    assert found.exchange == pytest.approx(gradients + sum(features) + mask)
    assert found.exposed == pytest.approx(gradients / 24 + sum(features) + mask)
    assert found.step == pytest.approx(found.compute + found.update + found.exposed)


def test_every_line_of_the_table_is_sound() -> None:
    lines = list(setups())
    asked = {(m, s, n) for m in MODELS for s in STRATEGIES for n in (1, 8, 64, 512)}
    assert asked == {(one.model, one.strategy, one.gpus) for one in lines if one.method == "mat"}
    assert {one.method for one in lines} == set(METHODS)
    for setup in lines:
        found = predict(setup)
        assert found.step <= found.serial
        assert found.memory.peak < H200.memory
        assert found.pairs_that_fit(setup) > setup.batch
        assert (found.sent == 0) == (setup.gpus == 1)
        assert 0.5 < efficiency(setup, serial=True) <= efficiency(setup) <= 1.02  # a sharded AdamW is quicker
        if setup.gpus == GPUS[0] and setup.strategy == "ddp" and not setup.checkpointing and not setup.micro_batch:
            assert efficiency(setup) == 1


def test_more_memory_is_saved_than_time_is_lost() -> None:
    plain = Setup(model="albef", method="mat", strategy="ddp", gpus=1, batch=32)
    for saving in (replace(plain, checkpointing=True), replace(plain, micro_batch=8)):
        assert predict(saving).memory.outer < predict(plain).memory.outer / 3
        assert predict(plain).step < predict(saving).step < 1.2 * predict(plain).step
    assert predict(replace(plain, micro_batch=32)) == predict(plain)


def test_the_command_writes_predictions_a_page_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling", "--only", "predicted", "--out", str(tmp_path)]) == 0
    assert "zero3-pass" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "predicted.jsonl").read_text().splitlines()]
    assert len(lines) == len(list(setups()))
    assert lines[0]["pairs_per_s_per_gpu"] == pytest.approx(128 / lines[0]["step"])
    text = (tmp_path / "README.md").read_text()
    assert "scaling.svg" in text
    assert "Real processes" not in text
    assert (tmp_path / "scaling.svg").stat().st_size > 5000


SEEN = Observed(
    time="2026-01-01T00:00:00+00:00", strategy="ddp", processes=2, carried={"all_reduce": 11_057_668},
    expected={"all_reduce": 11_057_668}, crossed=22_200_000, crossing=22_115_336, seconds=0.5, cores=2,
    machine="A CPU", versions={"torch": "2.15.0", "deepspeed": "0.19.8"}, commit=None, command="fastmat bench scaling",
)  # fmt: skip


def test_the_page_shows_where_a_prediction_is_wrong(tmp_path: Path) -> None:
    wrong = replace(SEEN, strategy="zero1", carried={"all_reduce": 12_000_000}, crossed=None)
    append_rows(tmp_path / "rows.jsonl", [replace(SEEN, seconds=9.0), SEEN, wrong])
    assert known_rows(tmp_path / "rows.jsonl")[1] == SEEN
    show(tmp_path, 0)
    text = (tmp_path / "README.md").read_text()
    assert "| ddp | 2 | 11.058 | 0 | 0 | 22.2 | 22.1 | 500 | - | 1.00 or more |" in text
    assert "| zero1 | 2 | 12.000 (not 11.058) | 0 | 0 | - | 22.1 |" in text
    assert "9000" not in text, "the newest row counts"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "processes"),
    [("ddp", 1), ("ddp", 2), ("ddp", 4), ("zero1", 2), ("zero2", 4), ("zero3", 2), ("zero3-pass", 2)],
)
def test_real_processes_move_what_is_predicted(strategy: str, processes: int) -> None:
    seen = observe(strategy, processes, command="")
    if processes > 1:
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            assert seen.carried.get(kind, 0) == pytest.approx(seen.expected.get(kind, 0), rel=1e-3, abs=64)
    if seen.crossed is not None:
        assert seen.crossing <= seen.crossed <= 1.05 * seen.crossing + 100_000


def test_towers_without_context_have_no_cross_attention() -> None:
    plain = Tower(layers=2, width=64, heads=1, hidden=256, tokens=8)
    assert plain.cross_parameters == plain.context_flops == 0
    assert plain.flops.forward == 2 * (8 * (8 * 64 * 64 + 4 * 64 * 256) + 4 * 8 * 8 * 64)
