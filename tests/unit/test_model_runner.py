from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.models import ModelShape, write_model
from tests.support.ranks import Ranks, piece

from lockstep_runtime.chaos.injector import FaultyGroup
from lockstep_runtime.config import EngineLimits, ServeConfig
from lockstep_runtime.layers.cache import BLOCK_SIZE, CacheMemory, CacheSize, KVCache
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.protocol.chaos import Inject, Injection
from lockstep_runtime.protocol.progress_record import Progress, new_memory
from lockstep_runtime.protocol.step import SamplingParams
from lockstep_runtime.recovery.self_test import probe
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.worker.likeliest import NonFiniteError
from lockstep_runtime.worker.model_runner import ModelRunner
from lockstep_runtime.worker.scrub import name_of

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", ModelShape())


def config(model: Path, limits: EngineLimits | None = None) -> ServeConfig:
    return ServeConfig(model=str(model), served_name="test", backend="cpu", limits=limits or EngineLimits())


def test_progress_ends_at_the_total(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = ModelRunner(config(model), 0).load(lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (report.weight_bytes, report.weight_bytes)


def test_one_that_has_loaded_reads_nothing_again(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    runner = ModelRunner(config(model), 0)
    first, tensors = runner.load(lambda done, total: None), runner.weights()
    again = runner.load(lambda done, total: seen.append((done, total)))
    assert (again.weight_bytes, again.read_bytes) == (first.weight_bytes, 0)
    assert seen == [(first.weight_bytes, first.weight_bytes)]
    assert runner.weights() == tensors
    assert again.scrub is not first.scrub  # whose round begins anew


def test_the_cache_is_what_was_asked_for_or_what_can_be_used(model: Path) -> None:
    block = 2 * 2 * 2 * 16 * 4 * BLOCK_SIZE  # keys and values, layers, kv heads, width, bytes
    report = ModelRunner(config(model, EngineLimits(kv_cache_bytes=block * 10 + 5)), 0).load(lambda done, total: None)
    assert report.cache.blocks == 10
    report = ModelRunner(config(model, EngineLimits(max_model_len=100, max_sequences=3)), 0).load(
        lambda done, total: None
    )
    assert report.cache.blocks == 3 * 4 + 1
    with pytest.raises(ModelError, match="no room for a KV cache"):
        ModelRunner(config(model, EngineLimits(kv_cache_bytes=10)), 0).load(lambda done, total: None)
    runner = ModelRunner(config(model), 0)
    runner.load(lambda done, total: None)
    assert runner.allocate(CacheSize(blocks=7)).nbytes == 7 * block
    assert runner.allocate(CacheSize(blocks=5)).nbytes == 5 * block


def write(cache: KVCache) -> None:
    with torch.inference_mode():
        cache.paged[1].values[3] = 7.0


def test_a_cache_is_laid_out_anew_only_for_another_size(model: Path) -> None:
    runner = ModelRunner(config(model), 0)
    runner.load(lambda done, total: None)
    cache = runner.allocate(CacheSize(blocks=4))
    write(cache)
    assert runner.allocate(CacheSize(blocks=4)) is cache
    other = runner.allocate(CacheSize(blocks=5))
    assert other.name != cache.name
    assert not other.paged[1].values[3].any()


def test_the_next_process_of_a_rank_finds_what_stood_in_its_cache(model: Path) -> None:
    descriptor = os.memfd_create("test")
    before, after = (ModelRunner(config(model), 0, CacheMemory(descriptor)) for _ in range(2))
    offered = before.load(lambda done, total: None).cache.blocks
    cache = before.allocate(CacheSize(blocks=offered - 2))  # another rank had less room
    write(cache)
    assert after.load(lambda done, total: None).cache.blocks == offered - 2
    found = after.allocate(CacheSize(blocks=offered - 2))
    assert found.name == cache.name
    assert torch.equal(found.paged[1].values, cache.paged[1].values)
    assert not found.paged[1].keys[3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 40])
def test_a_cache_is_spoiled_by_what_is_no_number_in_a_context(model: Path, bad: float, position: int) -> None:
    held = piece(1, 40, [7], [2, 0])  # 41 tokens in two blocks
    with Ranks(model, 2, blocks=4) as ranks:
        ranks.step(piece(1, 0, list(range(41)), [2, 0], GREEDY))
        runner = ranks.runners[1]
        cache = runner.allocate(CacheSize(blocks=4))
        slot = (2, 0)[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        beyond = 41 % BLOCK_SIZE
        with torch.inference_mode():
            cache.paged[1].values[beyond, 0, 3] = bad  # of a step that failed: it is computed again
        assert not runner.is_spoiled([held])
        assert not runner.is_spoiled([])
        assert not runner.is_spoiled([piece(2, 200, [7], [2, 4, 5, 6, 7, 8, 9])])  # of a larger cache, that is no more
        with torch.inference_mode():
            cache.paged[1].values[slot, 0, 3] = bad
        assert runner.is_spoiled([held])
        assert runner.allocate(CacheSize(blocks=4)) is cache
        before = cache.name
        anew = runner.allocate(CacheSize(blocks=4), anew=True)
        assert anew is cache  # in place: nowhere is there room for two
        assert anew.name != before
        assert not anew.paged[1].values[: 3 * BLOCK_SIZE].any()
        assert anew.paged[1].values[3 * BLOCK_SIZE :].any()  # the probe's
        assert not runner.is_spoiled([held])


def test_a_cache_of_another_model_is_not_taken_over(model: Path, tmp_path: Path) -> None:
    descriptor = os.memfd_create("test")
    other = write_model(tmp_path / "other", ModelShape(layers=3))
    names = []
    for path in (model, other):
        runner = ModelRunner(config(path), 0, CacheMemory(descriptor))
        runner.load(lambda done, total: None)
        names.append(runner.allocate(CacheSize(blocks=4)).name)
    assert len(set(names)) == 2


def test_a_slice_without_room_is_refused_before_any_collective(model: Path) -> None:
    with Ranks(model, 2) as ranks:
        with pytest.raises(ValueError, match=r"sequence 3: 1 blocks for 40 tokens"):
            ranks.step(piece(3, 0, list(range(40)), [0], GREEDY))
        with pytest.raises(ValueError, match="sequence 4"):
            ranks.step(piece(4, 0, [], [0], GREEDY))
        assert len(ranks.step(piece(3, 0, [1, 2], [0], GREEDY)).sampled) == 1


@pytest.mark.parametrize("silent", [{}, {"dtype": None}, {"dtype": "auto"}, {"torch_dtype": None}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_own_type_is_taken_where_config_json_is_silent(
    tmp_path: Path, dtype: str, silent: dict[str, str | None]
) -> None:
    named = write_model(tmp_path / "named", ModelShape(dtype=dtype))
    mute = write_model(tmp_path / "mute", ModelShape(dtype=dtype))
    config = {key: value for key, value in json.loads((mute / "config.json").read_text()).items() if key != "dtype"}
    (mute / "config.json").write_text(json.dumps(config | silent))
    fingerprints = []
    for model in (named, mute):
        with Ranks(model, 2) as ranks:
            fingerprints.append(ranks.step(piece(0, 0, [1, 2, 3], [0], GREEDY)).fingerprint)
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("token", [131, 132, 151_936, -1])  # 131 rows: two ranks pad them to 132
def test_a_token_without_a_row_is_refused_before_any_collective(model: Path, size: int, token: int) -> None:
    with Ranks(model, size) as ranks:
        with pytest.raises(ValueError, match=rf"token {token} has no row in an embedding of 131"):
            ranks.step(piece(0, 0, [1, token, 2], [0], GREEDY))
        assert len(ranks.step(piece(0, 0, [1, 130], [0], GREEDY)).sampled) == 1


def test_drawing_all_logits_or_only_the_best_agree(model: Path) -> None:
    with Ranks(model, 4) as ranks:
        plain = ranks.step(*(piece(n, 0, [n, 7, n + 1], [n], GREEDY) for n in range(9)))
        mixed = ranks.step(
            *(piece(n, 0, [n, 7, n + 1], [n], SamplingParams(temperature=0, logprobs=0)) for n in range(9))
        )
    assert plain.fingerprint == mixed.fingerprint
    assert [drawn.token for drawn in plain.sampled] == [drawn.token for drawn in mixed.sampled]


def test_a_step_may_draw_for_some_or_for_none(model: Path) -> None:
    with Ranks(model, 2) as ranks:
        output = ranks.step(piece(1, 0, [1, 2], [0]), piece(2, 0, [3], [1], GREEDY), piece(3, 0, [4], [2]))
        assert [drawn.sequence_id for drawn in output.sampled] == [2]
        assert ranks.step(piece(1, 2, [5], [0])).sampled == []


@pytest.mark.parametrize("place", ["embed_tokens", "layers.0.mlp", "layers.1.self_attn"])
def test_a_state_of_any_token_that_one_rank_alters_shows_in_its_fingerprint(model: Path, place: str) -> None:
    """It is the prompt's first token's, of which the last one sees only what all ranks sum alike."""
    fault = Inject(rank=1, kind=Injection.ACTIVATION, place=place)
    with Ranks(model, 2) as ranks:
        honest = ranks.groups[1]
        ranks.groups[1] = FaultyGroup(honest, Progress(new_memory("test")), [fault], lambda fault: None)
        with pytest.raises(AssertionError, match="fingerprint"):
            ranks.step(piece(1, 0, [1, 2, 3], [0], GREEDY))
        ranks.groups[1] = honest
        ranks.step(piece(1, 0, [1, 2, 3], [0], GREEDY))


def test_a_nan_shows_at_once_where_no_token_is_drawn(model: Path) -> None:
    fault = Inject(rank=1, kind=Injection.NAN, place="layers.0.mlp")
    with Ranks(model, 2) as ranks:
        ranks.groups[1] = FaultyGroup(ranks.groups[1], Progress(new_memory("test")), [fault], lambda fault: None)
        with pytest.raises(NonFiniteError, match="the hidden states of 1 of 1 sequences hold NaN"):
            ranks.step(piece(1, 0, [1, 2, 3], [0]))


@pytest.mark.parametrize("logprobs", [-1, 3])
def test_a_nan_in_the_weights_shows_as_non_finite(model: Path, logprobs: int) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file)
    with Ranks(model, 2) as ranks, pytest.raises(NonFiniteError, match="1 of 1 sequences"):
        ranks.step(piece(1, 0, [1, 2, 3], [0], SamplingParams(temperature=0, logprobs=logprobs)))


def test_the_probe_sees_every_weight_of_a_layer(model: Path) -> None:
    with Ranks(model, 2, blocks=4) as ranks:
        right = prove(ranks)
        assert prove(ranks) == right
        plain = [weight for weight in ranks.runners[1].weights() if isinstance(weight, PlainWeight)]
        layers = [weight for weight in plain if "layers." in name_of(weight)]
        assert len(layers) > 10
        for weight in layers:
            right_data = weight.data
            with torch.inference_mode():
                weight.data = right_data * 1.5
                ranks.runners[1].model.loaded()
                assert prove(ranks) != right, name_of(weight)
                weight.data = right_data
                ranks.runners[1].model.loaded()
        assert prove(ranks) == right


def prove(ranks: Ranks) -> int:
    """The fingerprint of the probe, after a request's step."""
    ranks.step(piece(1, 0, [5, 6, 7], [0], GREEDY))
    for runner in ranks.runners:
        runner.allocate(CacheSize(blocks=4))
    return ranks.step(*probe(3)).fingerprint


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path, ModelShape())
    settings = path / "config.json"
    settings.write_text(settings.read_text().replace('"float32"', '"float8_e4m3fn"'))
    with pytest.raises(ModelError, match="the model's type is float8_e4m3fn"):
        ModelRunner(config(path), 0).load(lambda done, total: None)
