from __future__ import annotations

import math

import pytest
import torch

from fla_dist.config import ModelConfig
from fla_dist.models import LanguageModel
from fla_dist.models.initialization import Uninitialized
from fla_dist.models.language_model import sample
from tests.models.tiny import MIXERS, PATTERNS, tiny_config
from tests.packing import STARTS, PackedTokens, doc_ids_of, packed_tokens, positions_of

SAMBA_1B3 = ModelConfig(
    layer_pattern=("mamba", "sliding_window_attention"),
    num_hidden_layers=18,
    hidden_size=2304,
    intermediate_size=6144,
    vocab_size=32000,
    mixers={"sliding_window_attention": {"num_heads": 18, "num_kv_heads": 18}},
)


def build(pattern: str, **options) -> LanguageModel:
    model = LanguageModel(tiny_config(pattern), **options)
    model.initialize(seed=0)
    return model.double()


def test_samba_has_the_parameters_of_its_paper() -> None:
    with torch.device("meta"):
        model = LanguageModel(SAMBA_1B3)
    assert sum(p.numel() for p in model.parameters()) == 1_330_207_488


def test_flops_are_near_six_times_the_weights_and_grow_with_attention() -> None:
    with torch.device("meta"):
        model = LanguageModel(SAMBA_1B3)
        transformer = LanguageModel(tiny_config("attention"))
    six_n = 6 * 1_330_207_488
    assert six_n < model.flops_per_token(2048) < 1.15 * six_n
    assert model.flops_per_token(32768) < 1.02 * model.flops_per_token(8192)  # the window's limit
    scores = transformer.flops_per_token(4096) - transformer.flops_per_token(2048)
    assert scores == pytest.approx(
        3 * 2 * 4 * 1024 * 16
    )  # layers, (q k and weights v), keys, width


@pytest.mark.parametrize("pattern", PATTERNS)
def test_first_loss_is_that_of_guessing(pattern: str) -> None:
    batch = packed_tokens([[0], [0, 9]], 37)
    loss = build(pattern)(batch) / (batch.labels != -100).sum()
    assert loss.item() == pytest.approx(math.log(37), rel=0.02)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_documents_do_not_see_each_other(pattern: str) -> None:
    """A packed sequence has the loss and gradients of its documents alone."""
    starts = STARTS["many documents"]
    batch = packed_tokens([starts], 37)
    model = build(pattern)
    model(batch).backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ends = [*starts[1:], batch.tokens.shape[1]]
    for start, end in zip(starts, ends, strict=True):
        positions = positions_of([0], end - start)[None]
        tokens, labels = batch.tokens[:, start:end], batch.labels[:, start:end]
        model(PackedTokens(tokens, labels, positions, doc_ids_of(positions))).backward()
    for got, parameter in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_future_has_no_influence(pattern: str) -> None:
    model = build(pattern).eval()
    tokens = packed_tokens([[0]], 37).tokens
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 37
    positions = torch.arange(tokens.shape[1])[None]
    for length in (1, 10, 20):
        outcomes = []
        for x in (tokens, changed):
            labels = x.roll(-1, dims=1).clone()
            labels[:, :] = -100
            labels[:, length - 1] = 5
            outcomes.append(model(PackedTokens(x, labels, positions, doc_ids_of(positions))))
        assert torch.equal(*outcomes)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(pattern: str, mode: str) -> None:
    batch = packed_tokens([[0, 20], [0]], 37)
    outcomes = []
    for activation_checkpointing in ("none", mode):
        model = build(pattern, activation_checkpointing=activation_checkpointing)
        loss = model(batch)
        loss.backward()
        outcomes.append([loss, *(p.grad for p in model.parameters())])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generation_equals_the_parallel_form(pattern: str) -> None:
    model = build(pattern)
    prompt = packed_tokens([[0], [0]], 37).tokens[:, :11]
    got = model.generate(prompt, 20, temperature=0)
    tokens = prompt
    for _ in range(20):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits = model.next_logits(tokens, positions, [{} for _ in model.blocks])
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(got, tokens)


def test_generation_memory_does_not_grow() -> None:
    model = build("samba")
    caches = [{} for _ in model.blocks]
    sizes = []
    for position in range(40):
        token, positions = torch.zeros(1, 1).long(), torch.full((1, 1), position)
        model.next_logits(token, positions, caches)
        sizes.append(sum(x.numel() for cache in caches for x in cache.values()))
    assert len(set(sizes)) == 1


def test_sampling_keeps_to_the_nucleus() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(500, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits, 1.0, 0.8, generator).flatten()
    assert set(drawn.tolist()) == {1, 2}
    assert sample(logits, 1.0, 0.5, generator).unique().tolist() == [1]


def test_initialization_is_the_same_from_the_same_seed() -> None:
    models = [LanguageModel(tiny_config("all")) for _ in range(3)]
    before = torch.random.get_rng_state()
    for model, seed in zip(models, (3, 3, 4), strict=True):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
        model.initialize(seed)
    assert torch.equal(before, torch.random.get_rng_state())
    first, second, other = (
        torch.cat([p.flatten() for p in model.parameters()]) for model in models
    )
    assert torch.isfinite(first).all() and torch.equal(first, second)
    assert not torch.equal(first, other)


def test_initialization_needs_no_first_values() -> None:
    torch.manual_seed(0)
    with Uninitialized():
        bare = LanguageModel(tiny_config("all"))
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert drawn == torch.rand(())  # PyTorch drew nothing
    model = LanguageModel(tiny_config("all"))
    for x in (bare, model):
        x.initialize(3)
    for got, expected in zip(bare.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_initialization_of_samba() -> None:
    config = tiny_config("samba", hidden_size=128, intermediate_size=256)
    model = LanguageModel(config)
    model.initialize(0)
    mamba = model.blocks[0].mixer
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[1].mlp.output.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert mamba.output.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    dt = torch.nn.functional.softplus(mamba.time_step_bias)
    assert 1e-3 * 0.999 <= dt.min() and dt.max() <= 0.1 * 1.001
    torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 5.0).expand(256, 4))
    assert model.head.weight is model.embedding.weight


def test_parameters_that_stay_fp32_are_marked() -> None:
    model = LanguageModel(tiny_config("all"))
    kept = {name for name, p in model.named_parameters() if getattr(p, "_keep_fp32", False)}
    assert {"blocks.0.mixer.A_log", "blocks.0.mixer.D", "blocks.0.mixer.time_step_bias"} <= kept
    assert all(getattr(model.get_parameter(n), "_no_weight_decay", False) for n in kept)
    assert not any("weight" in name and "norm" not in name for name in kept)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("attention", {"num_heads": 3}, "num_heads: 3"),
        ("attention", {"num_kv_heads": 3}, "num_kv_heads: 3, expected a divisor of num_heads"),
        ("sliding_window_attention", {"window_size": 0}, "window_size: 0, expected at least 1"),
        ("gla", {"num_heads": 3}, "expand_k: gives a width of 8"),
        ("retention", {"num_heads": 3}, "num_heads: 3, expected so many that"),
        ("retention", {"expand_v": 0.3}, "expand_v: gives a width of 4.8"),
        ("linear_attention", {"num_heads": 3}, "num_heads: 3, expected a divisor of the width 16"),
        ("hgrn", {"expand": 0}, "expand: 0, expected at least 1"),
        ("hgrn2", {"expansion": 3}, "expansion: 3, expected a divisor of the width 16"),
        ("rwkv6", {"head_size": 3}, "head_size: 3, expected a divisor of the width 16"),
        ("rwkv6", {"decay_rank": 0}, "decay_rank: 0, expected at least 1"),
        ("gsa", {"num_heads": 3}, "num_heads: 3, expected a divisor of the width 16"),
        ("gsa", {"num_slots": 0}, "num_slots: 0, expected at least 1"),
        ("mamba", {"state_size": 0}, "state_size: 0, expected at least 1"),
        ("mamba", {"time_step_rank": 0}, "time_step_rank: 0"),
        ("mamba2", {"head_size": 7}, "head_size: 7, expected a divisor of the 32 channels"),
        ("mamba2", {"num_groups": 3}, "num_groups: 3, expected a divisor of the 4 heads"),
    ],
)
def test_mixers_name_what_cannot_be(name: str, change: dict, message: str) -> None:
    from fla_dist.models.mixers import MIXERS as TABLE

    config = TABLE[name].config_class(**{**MIXERS[name], **change})
    assert TABLE[name].problem(16, TABLE[name].config_class(**MIXERS[name])) is None
    assert message in TABLE[name].problem(16, config)
