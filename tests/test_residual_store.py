"""The residual store: complete records of one run or none, and never a file that is not its own."""

import json
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from blockskip_hooks.residuals.store import ResidualStore, fingerprint
from blockskip_hooks.utils import files


RUN = {"weights": {"transformer": "abc"}, "spans": [1, 2], "dtype": "torch.float32", "guidance_scale": 3.5}
OTHER = {**RUN, "spans": [2, 1], "guidance_scale": 1.0}


def make_record(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(4, 8, 8, generator=generator),
        "trailing": torch.randn(16, 6, generator=generator).to(torch.bfloat16),
        "leading": torch.randn(21, 6, generator=generator).to(torch.float16),
        "scalar": torch.tensor(float(seed)),
        "empty": torch.zeros(0, 6),
    }


def same(left, right):
    return left.keys() == right.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in ((left[name], right[name]) for name in left)
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def shards(folder):
    return sorted(folder.glob("records-*.safetensors"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "records"


@pytest.fixture
def store(folder):
    store = ResidualStore(folder, RUN)
    store.write({f"instance-{i}": make_record(i) for i in range(3)})
    store.write({"class-0": make_record(10)})
    return store


# Reading back


def test_records_come_back_with_their_dtypes_and_shapes(store):
    assert len(store) == 4
    for sample_id, seed in (("class-0", 10), ("instance-0", 0), ("instance-2", 2)):
        assert same(store.read(sample_id), make_record(seed))


def test_tensors_that_are_views_come_back_whole(folder):
    base = torch.arange(24.0).reshape(4, 6)
    record = {"column": base[:, 1], "turned": base.T, "row": base[2]}
    store = ResidualStore(folder, RUN)
    store.write({"a": record})
    assert same(store.read("a"), {name: tensor.contiguous() for name, tensor in record.items()})


def test_records_are_found_by_their_id_only(store):
    assert "instance-1" in store and "instance-3" not in store and "instance-1/latents" not in store
    with pytest.raises(KeyError, match="instance-3"):
        store.read("instance-3")


def test_an_id_that_begins_like_another_is_another(folder):
    store = ResidualStore(folder, RUN)
    store.write({"instance-1": make_record(1), "instance-10": make_record(10)})
    assert same(store.read("instance-1"), make_record(1)) and same(store.read("instance-10"), make_record(10))


def test_counts_of_what_was_written_and_what_is_there(store, folder):
    assert store.bytes_written == store.num_bytes == sum(path.stat().st_size for path in shards(folder))
    assert ResidualStore(folder, RUN).bytes_written == 0


# Opening again


def test_a_store_opened_again_has_all_records(store, folder):
    again = ResidualStore(folder, dict(reversed(RUN.items())))
    assert len(again) == 4 and same(again.read("instance-2"), make_record(2))


def test_two_stores_on_one_folder_see_each_others_shards_when_opened_again(folder):
    one, two = ResidualStore(folder, RUN), ResidualStore(folder, RUN)
    one.write({"a": make_record(1)})
    two.write({"b": make_record(2)})
    assert "b" not in one and "a" not in two
    again = ResidualStore(folder, RUN)
    assert same(again.read("a"), make_record(1)) and same(again.read("b"), make_record(2))


@pytest.mark.parametrize("left", [0, 4, 50, 300, -1], ids=lambda left: f"{left} bytes")
def test_a_shard_cut_short_is_absent(store, folder, left):
    (whole,) = (path for path in shards(folder) if b"class-0" in path.read_bytes())
    whole.write_bytes(whole.read_bytes()[:left])
    again = ResidualStore(folder, RUN)
    assert "class-0" not in again and len(again) == 3 and same(again.read("instance-0"), make_record(0))
    again.write({"class-0": make_record(10)})
    assert same(ResidualStore(folder, RUN).read("class-0"), make_record(10))


def test_a_shard_of_another_fingerprint_is_absent(store, folder):
    save_file({"instance-9/latents": torch.ones(2)}, folder / "records-other.safetensors", {"fingerprint": "x"})
    save_file({"instance-8/latents": torch.ones(2)}, folder / "records-plain.safetensors")
    again = ResidualStore(folder, RUN)
    assert len(again) == 4 and "instance-9" not in again and "instance-8" not in again


def test_the_manifest_says_what_the_records_depend_on(store, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {"schema": 1, "fingerprint": fingerprint(RUN), "description": RUN}


# Another run, other files


def test_records_of_another_run_are_refused_and_kept(store, folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="guidance_scale, spans") as error:
        ResidualStore(folder, OTHER)
    message = str(error.value)
    assert f"--residual_dir {folder}" in message and "--overwrite_residuals" in message and "\n" not in message
    assert "weights" not in message and "dtype" not in message
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert len(ResidualStore(folder, RUN)) == 4


def test_overwriting_drops_records_and_nothing_else(store, folder):
    mine = {"notes.txt": "kept", "holiday.safetensors": "kept", "records.csv": "kept", "records-of-mine.txt": "kept"}
    for name, text in mine.items():
        (folder / name).write_text(text)
    (folder / "records-folder").mkdir()
    replaced = ResidualStore(folder, OTHER, overwrite=True)
    assert len(replaced) == 0 and names(folder) == sorted([*mine, "records-folder", "manifest.json"])
    assert {name: (folder / name).read_text() for name in mine} == mine
    assert json.loads((folder / "manifest.json").read_text())["fingerprint"] == fingerprint(OTHER)


def test_overwriting_keeps_a_users_file_that_is_named_like_a_shard(store, folder):
    save_file({"mine": torch.ones(3)}, folder / "records-2024-backup.safetensors")
    ResidualStore(folder, OTHER, overwrite=True)
    assert (folder / "records-2024-backup.safetensors").is_file()


def test_overwriting_keeps_the_runs_own_records(store, folder):
    assert len(ResidualStore(folder, RUN, overwrite=True)) == 4


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["photo.jpg", "records-0.safetensors", ".hidden", "model/config.json"])
def test_a_folder_with_other_things_is_refused_and_untouched(folder, name, overwrite):
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text("kept")
    with pytest.raises(
        ValueError, match="is neither empty nor a residual store; give another --residual_dir"
    ) as error:
        ResidualStore(folder, RUN, overwrite=overwrite)
    assert "\n" not in str(error.value)
    assert [p for p in folder.rglob("*") if p.is_file()] == [path] and path.read_text() == "kept"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "text", ["", "not json", "[]", "null", '{"name": "web app", "icons": []}'], ids=lambda text: text[:8] or "empty"
)
def test_a_manifest_of_something_else_is_refused_and_untouched(folder, text, overwrite):
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="--residual_dir") as error:
        ResidualStore(folder, RUN, overwrite=overwrite)
    assert "\n" not in str(error.value)
    assert names(folder) == ["manifest.json"] and (folder / "manifest.json").read_text() == text


def test_a_path_that_is_a_file_is_refused_and_untouched(tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(ValueError, match="--residual_dir"):
        ResidualStore(path, RUN)
    assert path.read_text() == "kept"


# Leaving things


def test_writing_leaves_no_temporary_file(store, folder):
    assert names(folder) == sorted(["manifest.json", *(path.name for path in shards(folder))])
    assert len(shards(folder)) == 2


def test_a_write_that_fails_leaves_nothing(store, folder, monkeypatch):
    before = names(folder)

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="No room for .*records-.* 0.001 MB are needed and [0-9.]+ MB are free"):
        store.write({"instance-7": make_record()})
    assert names(folder) == before and "instance-7" not in store and len(store) == 4


def test_what_a_killed_write_left_goes_with_the_store(store, folder):
    (folder / "records-0123456789abcdef0123456789abcdef.tmp").write_bytes(b"half of it")
    again = ResidualStore(folder, RUN)
    assert len(again) == 4
    again.remove()
    assert not folder.exists()


def test_forgetting_a_record_deletes_its_shard(store, folder):
    (folder / "notes.txt").write_text("kept")
    assert store.read("instance-1")
    store.forget("instance-1")
    # A shard goes whole: all of it came out of one forward.
    assert len(store) == 1 and "class-0" in store and "instance-1" not in store
    assert len(shards(folder)) == 1 and (folder / "notes.txt").is_file()
    assert same(store.read("class-0"), make_record(10))
    with pytest.raises(KeyError):
        store.read("instance-1")


def test_dropping_all_leaves_an_empty_store_that_can_be_written(store, folder):
    (folder / "notes.txt").write_text("kept")
    store.drop()
    assert len(store) == 0 and store.num_bytes == 0 and names(folder) == ["manifest.json", "notes.txt"]
    store.write({"instance-0": make_record(3)})
    assert same(store.read("instance-0"), make_record(3))


def test_records_of_another_lora_are_gone_and_not_counted(store, folder):
    store.begin_stretch("a LoRA")
    assert len(store) == 0 and store.num_bytes == 0 and not shards(folder)
    store.write({"instance-0": make_record(1)})
    store.begin_stretch("a LoRA")
    assert len(store) == 1 and store.num_bytes == shards(folder)[0].stat().st_size


def test_dropping_twice_or_what_another_process_dropped_is_fine(folder):
    store = ResidualStore(folder, RUN)
    store.write({"a": make_record()})
    other = ResidualStore(folder, RUN)
    store.drop()
    other.forget("a")
    store.forget("never there")
    assert len(store) == len(other) == 0


def test_removing_takes_the_folder_only_if_it_is_then_empty(store, folder):
    (folder / "notes.txt").write_text("kept")
    store.remove()
    assert names(folder) == ["notes.txt"]
    (folder / "notes.txt").unlink()
    fresh = ResidualStore(folder, RUN)
    fresh.write({"a": make_record()})
    fresh.remove()
    fresh.remove()
    assert not folder.exists() and folder.parent.is_dir()


# Workers


class Records(Dataset):
    def __init__(self, store, ids):
        self.store, self.ids = store, ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, item):
        return self.store.read(self.ids[item])


IDS = [f"instance-{i}" for i in range(3)] + ["class-0"]
SEEDS = [0, 1, 2, 10]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize("read_before", [False, True])
def test_forked_loader_workers_read_the_same_records(store, read_before):
    if read_before:
        assert store.read("class-0") and store.read("instance-0")
    loader = DataLoader(
        Records(store, IDS),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context("fork"),
    )
    assert all(same(record, make_record(seed)) for record, seed in zip(loader, SEEDS, strict=True))


@pytest.mark.parametrize("read_before", [False, True])
def test_a_store_can_be_sent_to_a_spawned_worker(store, read_before):
    if read_before:
        assert store.read("class-0")
    arrived = pickle.loads(pickle.dumps(Records(store, IDS)))
    assert all(same(arrived[item], make_record(seed)) for item, seed in enumerate(SEEDS))
    assert same(store.read("class-0"), make_record(10))


# Fingerprints


def test_fingerprints_depend_on_values_and_not_on_order():
    assert fingerprint(RUN) == fingerprint(dict(reversed(RUN.items()))) != fingerprint(OTHER)
    assert len({fingerprint({**RUN, "spans": spans}) for spans in ([1, 2], [1, 3], None, [12])}) == 4
