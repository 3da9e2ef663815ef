from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.support.models import ModelShape, write_model
from tests.support.ranks import Ranks

from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.model_folder import find_model, read_config
from lockstep_runtime.weights import slice_reader
from lockstep_runtime.weights.checkpoint import Checkpoint
from lockstep_runtime.weights.safetensors_file import read_header
from lockstep_runtime.weights.sharding import RankInfo, TensorSlice, replicated, split_slice

A = torch.arange(60, dtype=torch.float32).view(12, 5)
B = torch.arange(100, 160, dtype=torch.float32).view(12, 5)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file({"a": A, "b": B.bfloat16(), "n": torch.arange(7.0)}, tmp_path / "model.safetensors")
    return tmp_path


def take(directory: Path, *slices: TensorSlice, start: int = 0, stop: int | None = None) -> tuple[torch.Tensor, int]:
    checkpoint = Checkpoint(directory)
    stop = sum(tensor_slice.rows for tensor_slice in slices) if stop is None else stop
    out = torch.full((stop - start, *slices[0].local_shape[1:]), float("nan"))
    checkpoint.read(slices, start, stop, out)
    checkpoint.close()
    return out, checkpoint.bytes_read


@pytest.fixture
def to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gap is so small that it is read over."""
    monkeypatch.setattr(slice_reader, "MOST_GAP_BYTES", 0)


@pytest.mark.usefixtures("to_the_byte")
def test_rows_columns_and_stacks_are_read_to_the_byte(directory: Path) -> None:
    rows, count = take(directory, split_slice("a", 12, 5, shard=RankInfo(1, 3)))
    assert rows.equal(A[4:8])
    assert count == rows.nbytes
    columns, count = take(directory, split_slice("a", 12, 5, shard=RankInfo(1, 2), dim=1))
    assert columns.equal(A[:, 2:])
    assert count == columns.nbytes
    stacked, count = take(directory, replicated("a", 12, 5), replicated("b", 12, 5), start=10, stop=15)
    assert stacked.equal(torch.cat((A, B))[10:15])
    assert count == 2 * 5 * 4 + 3 * 5 * 2  # b is bfloat16 in the file


@pytest.mark.usefixtures("to_the_byte")
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_along_any_dimension_is_what_slicing_gives(tmp_path: Path, dim: int, dtype: torch.dtype) -> None:
    shape = (4, 6, 8, 2)
    experts = torch.arange(4 * 6 * 8 * 2, dtype=torch.float32).view(shape).to(dtype)
    save_file({"experts": experts}, tmp_path / "model.safetensors")
    for rank in range(2):
        tensor_slice = split_slice("experts", *shape, shard=RankInfo(rank, 2), dim=dim)
        found, count = take(tmp_path, tensor_slice)
        wanted = experts.float().narrow(dim, tensor_slice.start, tensor_slice.stop - tensor_slice.start)
        assert found.equal(wanted)
        assert count == wanted.numel() * dtype.itemsize
        if tensor_slice.rows > 1:
            assert take(tmp_path, tensor_slice, start=1, stop=tensor_slice.rows)[0].equal(wanted[1:])


def test_conversion_goes_by_bounded_pieces(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_reader, "CHUNK_BYTES", 30)  # three rows
    assert take(directory, replicated("b", 12, 5))[0].equal(B)
    assert take(directory, split_slice("b", 12, 5, shard=RankInfo(0, 2), dim=1))[0].equal(B[:, :2])


def test_stored_rows_outlive_the_file_name(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    rows = checkpoint.rows(split_slice("b", 12, 5, shard=RankInfo(1, 2)))
    checkpoint.close()
    (directory / "model.safetensors").unlink()
    assert rows.read([5, 0, 5]).float().equal(B[[11, 6, 11]])
    with pytest.raises(IndexError):
        rows.read([6])


def test_missing_tensor_and_wrong_shape_are_named(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"the tensor q is missing from"):
        take(directory, replicated("q", 2))
    with pytest.raises(
        ModelError, match=r"tensor a in model.safetensors has shape \[12, 5\]; config.json implies \[5, 12\]"
    ):
        take(directory, replicated("a", 5, 12))


def test_truncated_files_are_named(directory: Path) -> None:
    file = directory / "model.safetensors"
    content = file.read_bytes()
    for size, words in ((len(content) - 1, "would end at byte"), (40, "its header alone"), (3, "no safetensors file")):
        file.write_bytes(content[:size])
        with pytest.raises(ModelError, match=words) as caught:
            Checkpoint(directory)
        assert "model.safetensors" in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_named(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelError, match="is truncated: it ends at byte"):
        checkpoint.read((replicated("a", 12, 5), replicated("b", 12, 5)), 0, 24, torch.empty(24, 5))


def header(entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (struct.pack("<Q", 2**40) + b"{}", "1099511627776 bytes as its header"),
        (struct.pack("<Q", 4) + b"\xff\xfe\x00\x01", "no readable"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "no readable"),
        (header([1]), "not a JSON object"),
        (header({"x": 3}), "the header's entry of x is malformed"),
        (header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}), "entry of x is malformed"),
        (header({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}), "can't take up bytes"),
        (header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "can't take up bytes 0 to 4"),
        (header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "can't take up bytes"),
        (b"", "is empty"),
    ],
)
def test_garbage_headers_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_header(file)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_header_or_a_model_error(content: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            read_header(Path(file.name))
        except ModelError:
            return


def test_an_index_may_only_name_files_beside_it(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="not in the model's own directory"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))
    with pytest.raises(ModelError, match=r"part\.safetensors is missing"):
        Checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        Checkpoint(tmp_path)


def test_where_models_come_from(tmp_path: Path) -> None:
    assert find_model(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match=r"the model directory can't be found: .*absent does not exist"):
        find_model(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"config.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="should hold a JSON object"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match="holds no safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.usefixtures("to_the_byte")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_read_their_slices_and_no_more(tmp_path: Path, tied: bool, dtype: str) -> None:
    path = write_model(tmp_path, ModelShape(tied=tied, dtype=dtype, vocabulary=128), shards=2)
    stored = sum(entry.stat().st_size for entry in path.glob("*.safetensors"))
    with Ranks(path, 2) as ranks:
        for report in ranks.reports:
            assert report.read_bytes == report.weight_bytes
            assert report.weight_bytes < stored * 0.55


# --- tensors that nobody needs, quantised ones, and files that are not what they should be


def stored(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file(tensors, folder / name)


ODD_TYPES = {
    "int64": torch.arange(10),
    "bool": torch.ones(3, dtype=torch.bool),
    "uint8": torch.zeros(5, dtype=torch.uint8),
    "int32": torch.zeros(2, 2, dtype=torch.int32),
    "f8": torch.zeros(4, 4).to(torch.float8_e4m3fn),
    "complex": torch.zeros(2, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", ODD_TYPES)
def test_tensors_that_nobody_needs_may_be_of_any_type(tmp_path: Path, name: str) -> None:
    a = torch.arange(6.0).view(2, 3)
    stored(tmp_path, {"a": a, "other": ODD_TYPES[name]})
    checkpoint, tensor_slice = Checkpoint(tmp_path), replicated("a", 2, 3)
    out = torch.empty(2, 3)
    checkpoint.read((tensor_slice,), 0, 2, out)
    assert torch.equal(out, a)
    with pytest.raises(ModelError, match=r"the tensor other in model.safetensors has the type \w+; Lockstep reads"):
        checkpoint.find(replicated("other", *ODD_TYPES[name].shape))


def test_double_precision_is_read(tmp_path: Path) -> None:
    stored(tmp_path, {"a": torch.arange(6.0, dtype=torch.float64)})
    out = torch.empty(6)
    Checkpoint(tmp_path).read((replicated("a", 6),), 0, 6, out)
    assert out.tolist() == list(range(6))


@pytest.mark.parametrize("sibling", ["qweight", "weight_packed", "SCB"])
def test_a_quantised_tensor_in_a_weights_place_is_named(tmp_path: Path, sibling: str) -> None:
    stored(tmp_path, {f"layer.q_proj.{sibling}": torch.zeros(2, dtype=torch.int32)})
    with pytest.raises(ModelError, match=rf"holds layer.q_proj.{sibling}: it is quantised"):
        Checkpoint(tmp_path).find(replicated("layer.q_proj.weight", 2))


def indexed(folder: Path, **places: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_a_stale_index_is_named(tmp_path: Path) -> None:
    stored(tmp_path, {"a": torch.zeros(2)}, "one.safetensors")
    indexed(tmp_path, a="one.safetensors", b="two.safetensors")
    with pytest.raises(ModelError, match=r"two.safetensors is missing, though model.safetensors.index.json names it"):
        Checkpoint(tmp_path)
    indexed(tmp_path, a="one.safetensors", b="one.safetensors")
    with pytest.raises(ModelError, match=r"b is missing .* places it in one.safetensors, which does not hold it"):
        Checkpoint(tmp_path).find(replicated("b", 2))


def test_one_whole_file_goes_before_an_index_that_was_left_behind(tmp_path: Path) -> None:
    stored(tmp_path, {"a": torch.zeros(2)})
    indexed(tmp_path, a="gone.safetensors")
    assert Checkpoint(tmp_path).find(replicated("a", 2)).file.name == "model.safetensors"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 6564160\n"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model.safetensors": ""}, r"model.safetensors is empty: its download or copy was cut short"),
        ({"model.safetensors": POINTER}, r"model.safetensors is a Git LFS pointer"),
        ({"part-1.safetensors": POINTER}, r"part-1.safetensors is a Git LFS pointer"),
        ({"pytorch_model.bin": "x"}, r"but pytorch_model.bin: pickled weights are not read"),
        ({"qwen3-q4.gguf": "x"}, r"but qwen3-q4.gguf: llama.cpp's format"),
        ({"adapter_model.safetensors": "x"}, r"but adapter_model.safetensors: it is an adapter \(LoRA\)"),
        ({}, r"holds no safetensors file$"),
        ({"model.safetensors.index.json": ""}, r"index.json is empty"),
        ({"model.safetensors.index.json": "{}"}, r"it has no weight_map"),
    ],
)
def test_what_is_there_instead_of_weights_is_named(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=words):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "m"])
def test_a_link_to_nowhere_is_named_with_what_it_names(tmp_path: Path, name: str) -> None:
    folder = tmp_path if name == "m" else tmp_path / "m"
    folder.mkdir(exist_ok=True)
    (folder / name).symlink_to("/mnt/gone/x")
    look = Checkpoint if name == "model.safetensors" else read_config
    with pytest.raises(ModelError, match=rf"{name} is a link to /mnt/gone/x, which does not exist here"):
        look(find_model(str(tmp_path / "m")))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "config.json is empty"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        (b'{"a": "caf\xe9"}', r"is not UTF-8: line 1 has the byte 0xE9 \(Latin-1, perhaps\)"),
        (b"{,}", "not valid JSON: .*line 1 column 2"),
        (b"[" * 100_000, "nested too deep"),
        (POINTER.encode(), "Git LFS pointer"),
        (b'{"architectures": ["Qwen3ForCausalLM"], "quantization_config": {"quant_method": "awq"}}', "quantised"),
        (b'{"architectures": "Qwen3ForCausalLM"}', "architecture none"),
    ],
)
def test_what_is_wrong_with_config_json_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_config(tmp_path)


def test_a_file_in_the_models_place_is_named(tmp_path: Path) -> None:
    file = tmp_path / "qwen.gguf"
    file.touch()
    with pytest.raises(ModelError, match="is a file: give the folder"):
        find_model(str(file))
