"""Digests of models: every tensor counts, and a file that has not changed is read once."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockskip_hooks.embedded import embedded_model
from blockskip_hooks.utils import digests
from blockskip_hooks.utils.digests import file_digest, folder_digest


@pytest.mark.slow
def test_altering_any_tensor_of_a_model_changes_its_digest(tmp_path):
    folder = shutil.copytree(embedded_model() / "transformer", tmp_path / "transformer")
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    save_file(tensors, path)
    first = folder_digest(folder)
    assert len(tensors) == 376
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1).clone()
        flat[len(flat) // 2] += 1
        save_file({**tensors, name: flat.reshape(tensor.shape)}, path)
        assert folder_digest(folder) != first, name
    save_file(tensors, path)
    assert folder_digest(folder) == first


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "metadata"])
def test_what_the_header_says_counts(tmp_path, change):
    tensor, path = torch.zeros(4, 6, dtype=torch.float16), tmp_path / "a.safetensors"
    save_file({"weight": tensor}, path, {"note": "1"})
    before = file_digest(path)
    name = "height" if change == "name" else "weight"
    tensor = tensor.view(torch.bfloat16) if change == "dtype" else tensor
    tensor = tensor.reshape(6, 4) if change == "shape" else tensor
    save_file({name: tensor}, path, {"note": "2" if change == "metadata" else "1"})
    assert file_digest(path) != before


def test_a_large_tensor_is_read_in_part(tmp_path, monkeypatch):
    """From its first byte to its last, and of every tensor, however many there are."""
    monkeypatch.setattr(digests, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(digests, "_BLOCK_BYTES", 100)
    path, tensors = tmp_path / "a.safetensors", {str(n): torch.zeros(80_000, dtype=torch.uint8) for n in range(5)}

    def digest(number, place):
        changed = tensors[str(number)].clone()
        changed[place] = 1
        save_file({**tensors, str(number): changed}, path)
        return file_digest(path)

    save_file(tensors, path)
    plain = file_digest(path)
    seen = {place: digest(3, place) != plain for place in range(0, 80_000, 50)}
    assert seen[0] and seen[79_950] and 10 <= sum(seen.values()) <= 20
    assert all(plain != digest(number, -1) for number in range(5))


@pytest.mark.parametrize("content", [b"", b"weights", b"\xff" * 100, b"\x02" + bytes(7) + b"[]", b"\x04" + bytes(9)])
def test_a_damaged_file_has_a_digest_of_all_its_bytes(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    before = file_digest(path)
    path.write_bytes(content + b"x")
    assert file_digest(path) != before


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    status = path.stat()
    before = file_digest(path)
    path.write_text('{"a": 2}')
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digest(path) == before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert file_digest(path) != before


def test_folder_digests_see_weights_and_config_and_nothing_else(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert folder_digest(tmp_path) == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    second = folder_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert len({first, second, folder_digest(tmp_path)}) == 3
