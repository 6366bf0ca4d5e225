"""The search for launch settings, and the table it writes."""

from dataclasses import replace

import pytest

from fla_dist.benchmark import tune
from fla_dist.benchmark.ops import Shape
from fla_dist.kernels.common.launch import Launch, read_tuned, write_tuned
from fla_dist.kernels.gla import settings as gla
from fla_dist.kernels.simple_gla import settings as simple_gla


@pytest.mark.parametrize("name", tune.FAMILIES)
def test_candidates_are_fields_of_the_settings(name):
    family = tune.FAMILIES[name]
    start = family.module.settings(90, 128, 128, 2)
    for field, values in family.candidates.items():
        assert all(type(value) is type(getattr(start, field)) for value in values)


def test_the_search_settles_one_field_after_the_other():
    start = gla.settings(90, 128, 128, 2)
    wanted = {"output": Launch(64, 4, 2), "prepare": Launch(16, 1, 3)}
    tried = []

    def milliseconds(settings):
        tried.append(settings)
        if settings.key_gradient.block == 32:
            return float("inf")
        return 5.0 - sum(getattr(settings, field) == value for field, value in wanted.items())

    best, least = tune.search(start, tune.FAMILIES["gla"].candidates, milliseconds)
    assert (best, least) == (replace(start, **wanted), 3.0)
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize("module", [gla, simple_gla])
def test_a_table_is_read_as_it_was_written(module, tmp_path):
    tuned = module.TUNED | {(90, 64, 128): module.settings(80, 64, 128, 2)}
    write_tuned(tmp_path / "tuned.json", tuned)
    assert read_tuned(tmp_path / "tuned.json", module.Settings) == tuned


@pytest.mark.parametrize("module", [gla, simple_gla])
def test_the_checked_in_table_serves(module):
    assert module.TUNED
    for (capability, key_size, value_size), settings in module.TUNED.items():
        assert module.settings(capability, key_size, value_size, 2) == settings


def test_a_size_without_checked_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(tune, "make_inputs", lambda *_: pytest.fail("nothing to measure"))
    with pytest.raises(ValueError, match="K=24, V=128"):
        tune.tune("gla", Shape(1, 64, 1, 24, 128))
