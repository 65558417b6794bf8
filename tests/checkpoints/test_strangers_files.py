"""Pickles of strangers run nothing and take no more memory than they are worth, in every file where one is read."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.payloads import LARGE, REFUSED, RUN, archive, saved, tensor_pickle

from searchr1.checkpoints.metadata import read_metadata
from searchr1.checkpoints.pickles import Reader
from searchr1.checkpoints.torch_files import load_tensors, load_weights
from searchr1.errors import UserError

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def marker(tmp_path):
    """What a payload would create; it must not be there in the end."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


def sentence(caught: pytest.ExceptionInfo[UserError]) -> str:
    text = str(caught.value)
    assert len(text) < 600
    assert "\n" not in text
    return text


def write_metadata(folder: Path, data: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(data)


def as_weights(folder: Path, data: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "pytorch_model.bin").write_bytes(data)


PLACES = {
    "metadata": (write_metadata, read_metadata),
    "rank file": (
        lambda folder, data: (folder.mkdir(), (folder / "model.pt").write_bytes(archive(data))),
        lambda folder: load_tensors(folder / "model.pt"),
    ),
    "model": (
        lambda folder, data: as_weights(folder, archive(data)),
        lambda folder: load_weights(folder / "pytorch_model.bin"),
    ),
    "model of before PyTorch 1.6": (
        lambda folder, data: as_weights(
            folder, pickle.dumps(torch.serialization.MAGIC_NUMBER, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + data
        ),
        lambda folder: load_weights(folder / "pytorch_model.bin"),
    ),
    "its first part": (as_weights, lambda folder: load_weights(folder / "pytorch_model.bin")),
}
"""How a pickle gets into a file, and who reads it."""


@pytest.mark.parametrize("name", RUN)
def test_the_payloads_work(name, tmp_path):
    with contextlib.suppress(TypeError, pickle.UnpicklingError):  # after it has run
        pickle.loads(RUN[name](tmp_path / "ran"))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RUN)
def test_nothing_is_run(place, name, tmp_path, marker):
    write, read = PLACES[place]
    write(tmp_path / "x", RUN[name](marker))
    with pytest.raises(UserError) as caught:
        read(tmp_path / "x")
    sentence(caught)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [*REFUSED, *LARGE])
def test_what_has_no_place_or_no_measure_is_rejected(place, name, tmp_path):
    write, read = PLACES[place]
    write(tmp_path / "x", (REFUSED | LARGE)[name])
    with pytest.raises(UserError) as caught:
        read(tmp_path / "x")
    sentence(caught)


MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from support.payloads import LARGE, archive, tensor_pickle
from searchr1.checkpoints.metadata import read_metadata
from searchr1.checkpoints.torch_files import load_tensors, load_weights
from searchr1.errors import UserError
folder = Path({folder!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for name, data in LARGE.items():
    (folder / ".metadata").write_bytes(data)
    (folder / "model.pt").write_bytes(archive(data))
    for read, path in ((read_metadata, folder), (load_tensors, folder / "model.pt"), (load_weights, folder / "model.pt")):
        try:
            read(path)
        except UserError as error:
            assert "MemoryError" not in str(error) and "allocate" not in str(error), (name, error)
        else:
            raise SystemExit(name + " is read")
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
assert grown < 100, f"{{grown}} MiB"
print("bounded")
"""


def test_memory_stays_bounded(tmp_path):
    script = MEMORY.format(here=str(SUPPORT), folder=str(tmp_path))
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.strip() == "bounded", found.stderr[-2000:]


# Archives


FOUR = torch.arange(4.0).numpy().tobytes()


def read_archive(tmp_path: Path, data: bytes) -> dict[str, torch.Tensor]:
    (tmp_path / "x.pt").write_bytes(data)
    return load_tensors(tmp_path / "x.pt")


def test_an_archive_made_by_hand_is_read(tmp_path):
    found = read_archive(tmp_path, archive(tensor_pickle(4), {"data/0": FOUR}))
    assert found["w"].tolist() == [0, 1, 2, 3]


ZEROS = bytes(4 << 20)
HOSTILE = {
    "packed parts": (archive(tensor_pickle(1 << 20, 1 << 20), {"data/0": ZEROS}, zipfile.ZIP_DEFLATED), "is packed"),
    "more elements than stored": (archive(tensor_pickle(1 << 40, 1 << 40), {"data/0": FOUR}), "claims 1099511627776"),
    "fewer elements than stored": (archive(tensor_pickle(3, 3), {"data/0": FOUR}), "claims 3"),
    "no such part": (archive(tensor_pickle(4), {}), "claims 4 elements of what is not stored"),
    "a tensor beyond its part": (archive(tensor_pickle(4, 5), {"data/0": FOUR}), r"tensor \(5,\) of 4 stored"),
    "a tensor that begins beyond it": (archive(tensor_pickle(4, 4, 1, 1), {"data/0": FOUR}), r"of 4 stored"),
    "a tensor of one element a trillion times": (archive(tensor_pickle(4, 1 << 40, 0), {"data/0": FOUR}), "of 4 stored"),
    "a stride far away": (archive(tensor_pickle(4, 2, 1 << 40), {"data/0": FOUR}), "of 4 stored"),
    "a part named twice": (archive(tensor_pickle(4), {"data/0": FOUR, "DATA/0": FOUR}), "names that torch.save does not"),
    "TorchScript": (archive(tensor_pickle(4), {"data/0": FOUR, "constants.pkl": b"."}), "damaged"),
    "no pickle": (archive(b"", {}), "damaged"),
    "an archive cut short": (archive(tensor_pickle(4), {"data/0": FOUR})[:-40], "damaged"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", HOSTILE)
def test_archives_that_lie_are_rejected(name, tmp_path):
    data, message = HOSTILE[name]
    with pytest.raises(UserError, match=message) as caught:
        read_archive(tmp_path, data)
    sentence(caught)


def test_a_size_of_a_terabyte_in_the_archives_directory_is_rejected(tmp_path):
    data = bytearray(archive(tensor_pickle(4), {"data/0": FOUR}))
    place = data.rindex(b"archive/data/0") - 46
    assert data[place : place + 4] == b"PK\x01\x02"
    for at in (place + 20, place + 24):  # both sizes
        data[at : at + 4] = (0xFFFFFFF0).to_bytes(4, "little")
    with pytest.raises(UserError, match="longer than the file"):
        read_archive(tmp_path, bytes(data))


def test_packed_parts_are_not_unpacked_to_verify_them(tmp_path):
    from searchr1.checkpoints.structure import check_torch_file
    from searchr1.checkpoints.torch_files import check_checksums

    path = tmp_path / "x.pt"
    path.write_bytes(HOSTILE["packed parts"][0])
    [damage] = check_torch_file(path, lambda count: None)
    assert "is packed, which torch.save does not do" in damage.problem
    with pytest.raises(UserError, match=r"is packed, which torch\.save does not do"):
        check_checksums(path)


def test_a_pickle_too_long_is_rejected_before_it_is_read(tmp_path):
    with pytest.raises(UserError, match="in too many words"):
        read_archive(tmp_path, archive(b"N" * (33 << 20)))


def test_pointers_links_and_pipes(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name, read in (
        (".metadata", lambda path: read_metadata(path.parent)),
        ("x.pt", load_tensors),
        ("y.bin", load_weights),
    ):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(UserError, match="is a Git LFS pointer, not the file"):
            read(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UserError, match="is missing"):
        load_tensors(tmp_path / "pipe.pt")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/1").write_bytes(saved({"a": torch.ones(2)}))
    (tmp_path / "link.pt").symlink_to("blobs/1")  # as in the hub's cache
    assert load_tensors(tmp_path / "link.pt")["a"].tolist() == [1, 1]


# What is no attack


class Holder:
    """Has a tensor in it."""


@pytest.mark.parametrize(
    "value",
    [
        {
            "a": torch.arange(6.0).reshape(2, 3).T,
            "b": torch.zeros(0, 4),
            "c": torch.tensor(3),
            "d": torch.ones(2).bfloat16(),
        },
        {"parameter": torch.nn.Parameter(torch.ones(3)), "set": {1, 2}, "bytes": b"abc", "complex": 1j},
        {
            "size": torch.Size([2, 3]),
            "dtype": torch.float16,
            "device": torch.device("cpu"),
            "none": None,
            "range": [1, (2, 3)],
        },
        torch.nn.Linear(3, 2).state_dict(),
        {"unsigned": torch.tensor([1, 2], dtype=torch.uint16), "fp8": torch.ones(2).to(torch.float8_e4m3fn)},
    ],
)
def test_ordinary_files_are_read_as_torch_reads_them(value, tmp_path):
    (tmp_path / "x.pt").write_bytes(saved(value))
    found = load_tensors(tmp_path / "x.pt")
    expected = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, item in expected.items():
        same = torch.equal(found[name], item) if isinstance(item, torch.Tensor) else found[name] == item
        assert same, name


def test_models_of_before_pytorch_1_6_are_read_and_measured(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(10.0), "b": torch.ones(3).half()}, path, _use_new_zipfile_serialization=False)
    found = load_weights(path)
    assert found["a"].tolist() == list(range(10))
    assert found["b"].dtype == torch.float16
    data = path.read_bytes()
    place = data.index(b"cpu") + 3
    count = data.index(b"K\n", place)
    path.write_bytes(data[:count] + b"\x8a\x06" + (1 << 41).to_bytes(6, "little") + data[count + 2 :])
    with pytest.raises(UserError, match="claims more elements than are stored"):
        load_weights(path)
    path.write_bytes(data[:-8])
    with pytest.raises(UserError, match="damaged, cut short"):
        load_weights(path)


def test_the_numbers_of_a_large_checkpoint_are_no_attack():
    """A tenth of a million entries are read in seconds, and their tuples and sizes are within what is allowed."""
    entries = {f"layer.{n}": (torch.Size([n, 2]), [n, n + 1], ("a", ("b", n))) for n in range(20_000)}
    data = pickle.dumps(entries, 4)

    def find(module, name, reader):
        from searchr1.checkpoints.pickles import Call

        return Call(torch.Size) if (module, name) == ("torch", "Size") else None

    assert Reader(data, find).load() == entries
