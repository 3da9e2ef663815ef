"""Any slice of any tensor, in any window, from the checkpoint and from the weight cache: what torch's narrow gives."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lockstep_runtime.layers.placement import place
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.weights import slice_reader
from lockstep_runtime.weights.cache import Identity
from lockstep_runtime.weights.checkpoint import Checkpoint
from lockstep_runtime.weights.load import attach_weights, fill_cache, load_weights
from lockstep_runtime.weights.sharding import RankInfo, TensorSlice, head_slice, replicated, split_slice
from lockstep_runtime.worker.scrub import name_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDENTITY = Identity(model="m", revision=None, dtype="auto", size=1, rank=0)
dtypes = st.sampled_from(DTYPES)


@dataclass(frozen=True)
class Case:
    """A stack of slices, and what it is."""

    tensors: dict[str, Tensor]
    slices: tuple[TensorSlice, ...]

    def expected(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([cut(self.tensors[one.tensor], one) for one in self.slices]).to(dtype)


def cut(tensor: Tensor, one: TensorSlice) -> Tensor:
    whole = tensor if one.index is None else tensor[one.index]
    return whole.narrow(one.dim, one.start, one.stop - one.start)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """1 to 3 slices of one shape behind the rows, each of a tensor of its own or of the first one's."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    dtype, stacked = draw(dtypes), len(shape) > 1 and draw(st.booleans())
    dim = draw(st.integers(0, len(shape) - 1 - stacked))
    length = shape[dim + stacked]
    start = draw(st.integers(0, length))
    stop = draw(st.integers(start, length))
    tensors: dict[str, Tensor] = {}
    slices = []
    for number in range(draw(st.integers(1, 3))):
        name = "t0" if draw(st.booleans()) else f"t{number}"
        if name not in tensors:
            numbers = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
            tensors[name] = (numbers.sin() * 3.0 ** len(tensors)).to(dtype)
        if dim == 0:  # the rows of a stack may be other ones each time
            start = draw(st.integers(0, length))
            stop = draw(st.integers(start, length))
        index = draw(st.integers(0, shape[0] - 1)) if stacked else None
        slices.append(TensorSlice(tensor=name, shape=shape, dim=dim, start=start, stop=stop, index=index))
    return Case(tensors, tuple(slices))


@given(cases(), dtypes, st.data())
def test_any_window_of_any_slice_is_read_right(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    expected = case.expected(dtype)
    start = data.draw(st.integers(0, len(expected)), label="start")
    stop = data.draw(st.integers(start, len(expected)), label="stop")
    chunk, gap = data.draw(st.sampled_from([1, 30, 1 << 20])), data.draw(st.sampled_from([0, 8, 1 << 14]))
    told = [0]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(slice_reader, "CHUNK_BYTES", chunk)
        patch.setattr(slice_reader, "MOST_GAP_BYTES", gap)
        save_file(case.tensors, Path(folder, "model.safetensors"))
        found = torch.full((stop - start, *expected.shape[1:]), float("nan"), dtype=dtype)
        reader = Checkpoint(Path(folder), told.append)
        reader.read(case.slices, start, stop, found)
        reader.close()
    assert found.equal(expected[start:stop])
    needed = found.numel() * case.tensors["t0"].dtype.itemsize
    assert told == sorted(told)
    assert told[-1] == needed
    assert reader.bytes_read >= needed
    if gap == 0:
        assert reader.bytes_read == needed


@given(cases(), dtypes)
def test_any_slice_is_loaded_right_with_and_without_the_weight_cache(case: Case, dtype: torch.dtype) -> None:
    placement = place(torch.device("cpu"), dtype, None)
    plain, filled, attached = (PlainWeight(*case.slices, placement=placement) for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        model, path = Path(folder), Path(folder, "cache")
        save_file(case.tensors, model / "model.safetensors")
        load_weights(model, [plain], lambda done, total: None)
        cache, _ = fill_cache(path, IDENTITY, {}, model, [filled], lambda done, total: None, 0)
        cache.verify()
        attach_weights(cache, [attached], lambda done, total: None)
        expected = case.expected(dtype)
        assert plain.data.equal(expected)
        assert attached.data.equal(expected)


def test_the_parts_of_a_packed_projection_are_split_part_by_part(tmp_path: Path) -> None:
    """q | k | v in one tensor: a contiguous cut would give a rank another's heads."""
    q, k, v, hidden = 8, 4, 4, 3
    packed = torch.arange((q + k + v) * hidden, dtype=torch.float32).view(-1, hidden)
    save_file({"qkv": packed, "conv": packed[:, None].clone()}, tmp_path / "model.safetensors")
    rows = torch.cat((packed[4:8], packed[10:12], packed[14:16]))
    parts, shard = ((0, 8), (8, 12), (12, 16)), RankInfo(1, 2)
    heads = tuple(head_slice("qkv", q + k + v, hidden, count=2, shard=shard, part=part) for part in parts)
    channels = tuple(split_slice("conv", q + k + v, 1, hidden, shard=shard, part=part) for part in parts)
    reader = Checkpoint(tmp_path)
    for slices, expected in ((heads, rows), (channels, rows[:, None])):
        found = torch.empty_like(expected)
        reader.read(slices, 0, len(rows), found)
        assert found.equal(expected)
    reader.close()


def test_experts_are_read_one_by_one_or_as_they_are_stacked(tmp_path: Path) -> None:
    experts, inner, hidden, shard = 4, 6, 5, RankInfo(1, 2)
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=torch.Generator().manual_seed(1))
    save_file({"gate_up": gate_up}, tmp_path / "model.safetensors")
    one_by_one = tuple(
        split_slice("gate_up", *gate_up.shape, shard=shard, part=part, index=expert)
        for expert in range(experts)
        for part in ((0, inner), (inner, 2 * inner))
    )
    stacked = split_slice("gate_up", *gate_up.shape, shard=shard, dim=1, part=(inner, 2 * inner))
    reader = Checkpoint(tmp_path)
    found = torch.empty(experts * inner, hidden)
    reader.read(one_by_one, 0, experts * inner, found)
    expected = torch.cat((gate_up[:, inner // 2 : inner], gate_up[:, inner + inner // 2 :]), dim=1)
    assert found.view(experts, inner, hidden).equal(expected)
    ups = torch.empty(experts, inner // 2, hidden)
    reader.read((stacked,), 0, experts, ups)
    assert ups.equal(expected[:, inner // 2 :])
    reader.close()


@pytest.mark.parametrize("stacked", [False, True])
def test_single_experts_may_be_stacked_in_the_checkpoint(tmp_path: Path, stacked: bool) -> None:
    """The weight cache holds the same under the same names."""
    experts, inner, hidden, shard = 3, 4, 5, RankInfo(1, 2)
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=torch.Generator().manual_seed(1))
    single = {f"{n}.{name}": gate_up[n].chunk(2)[at].clone() for n in range(experts) for at, name in enumerate("gu")}
    save_file({"gate_up": gate_up} if stacked else single, tmp_path / "model.safetensors")
    slices = [
        split_slice(
            f"{n}.{name}", inner, hidden, shard=shard,
            otherwise=split_slice("gate_up", *gate_up.shape, shard=shard, part=part, index=n),
        )
        for n in range(experts)
        for name, part in (("g", (0, inner)), ("u", (inner, 2 * inner)))
    ]  # fmt: skip
    weights = [PlainWeight(*slices, placement=place(torch.device("cpu"), torch.float32, None)) for _ in range(2)]
    load_weights(tmp_path, weights[:1], lambda done, total: None)
    cache, _ = fill_cache(tmp_path / "cache", IDENTITY, {}, tmp_path, weights[1:], lambda done, total: None, 0)
    attach_weights(cache, weights[1:], lambda done, total: None)
    expected = gate_up.view(2 * experts, inner, hidden)[:, inner // 2 :].reshape(-1, hidden)
    assert all(weight.data.equal(expected) for weight in weights)
    assert list(cache.contents.checksums) == ["+".join(f"{one.tensor}[2:4]" for one in slices)]


def test_one_that_is_missing_in_either_form_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 6)}, tmp_path / "model.safetensors")
    reader = Checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"the tensor 0\.g is missing"):
        reader.find(replace(replicated("0.g", 4, 6), otherwise=replicated("gate_up", 4, 6)))
    reader.close()


def test_what_can_not_be_filled_or_looked_up_is_said(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 6)}, tmp_path / "model.safetensors")
    reader = Checkpoint(tmp_path)
    with pytest.raises(ValueError, match="contiguous"):
        reader.read((replicated("a", 4, 6),), 0, 4, torch.empty(6, 4).T)
    with pytest.raises(ValueError, match="no range of a matrix's rows"):
        reader.rows(split_slice("a", 4, 6, shard=RankInfo(0, 2), dim=1))
    reader.close()


@pytest.mark.parametrize(("columns", "whole"), [(4096, True), (4098, False)])
def test_a_gap_is_read_over_where_a_call_would_cost_more(tmp_path: Path, columns: int, whole: bool) -> None:
    numbers = torch.randn(5, 2 * columns, generator=torch.Generator().manual_seed(1))
    save_file({"a": numbers}, tmp_path / "model.safetensors")
    reader, found = Checkpoint(tmp_path), torch.empty(5, columns)
    reader.read((split_slice("a", 5, 2 * columns, shard=RankInfo(1, 2), dim=1),), 0, 5, found)
    reader.close()
    assert found.equal(numbers[:, columns:])
    assert reader.bytes_read == (found.nbytes + 4 * columns * 4 if whole else found.nbytes)


def test_nothing_writes_to_the_target_any_more_when_a_read_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slice_reader, "CHUNK_BYTES", 4096)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1 << 20)}, file)
    reader = Checkpoint(tmp_path)
    os.truncate(file, file.stat().st_size // 2)
    found = torch.zeros(1 << 20)
    with pytest.raises(ModelError, match="is truncated"):
        reader.read((replicated("a", 1 << 20),), 0, 1 << 20, found)
    before = found.clone()
    reader.close()
    assert found.equal(before)


def test_the_experts_of_a_layer_in_one_weight_have_a_short_name(tmp_path: Path) -> None:
    tensors = {f"experts.{number}.down_proj.weight": torch.full((3, 4), float(number)) for number in range(50)}
    save_file(tensors, tmp_path / "model.safetensors")
    stacks = [[replicated(name, 3, 4) for name in order] for order in (tensors, reversed(tensors))]
    weights = [PlainWeight(*stack, placement=place(torch.device("cpu"), torch.float32, None)) for stack in stacks]
    cache, _ = fill_cache(tmp_path / "cache", IDENTITY, {}, tmp_path, weights, lambda done, total: None, 0)
    attach_weights(cache, weights, lambda done, total: None)
    assert [float(weight.data[0, 0]) for weight in weights] == [0, 49]
    assert all(len(name) < 200 for name in cache.contents.checksums)
    assert name_of(weights[0]) == "experts.0.down_proj.weight and 49 more"
