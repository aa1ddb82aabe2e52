# SPDX-License-Identifier: Apache-2.0
"""The ImageFolder layout in folders, tar files and shards: same content, same order, and clear errors."""

import io
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sola_vision.data import CorruptImage, ImageFolder, open_classification, read_image

DATA = Path(os.environ.get("SOLA_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 2 * shade % 256, 255 - shade)).save(stream, "PNG")
    return stream.getvalue()


FILES = {
    "train/cat/1.png": png(1),
    "train/cat/2.PNG": png(2),
    "train/cat/deep/er/3.png": png(3),
    "train/dog/1.png": png(4),
    "train/m\N{LATIN SMALL LETTER O WITH DIAERESIS}we/b\N{CJK UNIFIED IDEOGRAPH-732B}.png": png(5),
    "train/cat/notes.txt": b"no image",
    "train/readme.png": png(6),
    "train/.hidden/1.png": png(7),
    "train/cat/.1.png": png(8),
    "train/cat/._1.png": b"what macOS leaves",
    "val/cat/9.png": png(9),
    "val/dog/9.png": png(10),
}


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, files: dict[str, bytes], prefix: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def content(data: ImageFolder) -> list[tuple[str, int, bytes]]:
    return [(name, label, image.tobytes()) for name, (image, label) in zip(data.samples, data, strict=True)]


def to_numbers(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy())


def test_image_folder_lists_images_by_class_and_name(tmp_path):
    data = ImageFolder(write_tree(tmp_path, FILES), "train")
    assert data.classes == ["cat", "dog", "m\N{LATIN SMALL LETTER O WITH DIAERESIS}we"]
    assert data.samples[:4] == ["cat/1.png", "cat/2.PNG", "cat/deep/er/3.png", "dog/1.png"]
    assert data.targets == [0, 0, 0, 1, 2]
    assert len(data) == 5
    image, label = data[2]
    assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", (3, 6, 252), 0)
    assert data.location(3) == f"{tmp_path}/train/dog/1.png"


def test_image_folder_logs_how_many_files_it_ignored(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        ImageFolder(write_tree(tmp_path, FILES), "train")
    assert "ignored 2 files that are not images" in caplog.text
    assert "3 hidden" in caplog.text


def test_image_folder_logs_one_ignored_file_in_the_singular_and_no_zeros(tmp_path, caplog):
    write_tree(tmp_path, {"train/cat/1.png": png(1), "train/cat/notes.txt": b"", "train/.hidden/2.png": png(2)})
    with caplog.at_level(logging.INFO):
        ImageFolder(tmp_path, "train")
        (tmp_path / "train/cat/notes.txt").unlink()
        ImageFolder(tmp_path, "train")
    one, other = caplog.messages
    first = "1 file that is not an image in a class folder (the first: cat/notes.txt)"
    assert one == f"{tmp_path}/train: ignored {first}, 1 hidden file"
    assert other == f"{tmp_path}/train: ignored 1 hidden file"


@pytest.mark.parametrize("kind", ["tar", "tar below a top folder", "tar with ./", "shards", "shards one level up"])
def test_image_folder_of_a_tar_equals_the_folder(tmp_path, kind):
    folder = write_tree(tmp_path / "folder", FILES)
    if kind.startswith("shards"):
        root = tmp_path / "shards"
        root.mkdir()
        for split in ("train", "val"):
            above = "" if kind == "shards" else f"{split}/"
            files = [(above + n.removeprefix(f"{split}/"), c) for n, c in FILES.items() if n.startswith(split)]
            for shard in range(2):
                write_tar(root / f"{split}-{shard:03d}.tar", dict(files[shard::2]))
    else:
        prefix = {"tar": "", "tar with ./": "./"}.get(kind, "images v1/")
        root = write_tar(tmp_path / "data.tar", FILES, prefix)
    for split in ("train", "val"):
        one, other = ImageFolder(folder, split), ImageFolder(root, split)
        assert content(one) == content(other)
        assert one.classes == other.classes
        assert one.targets == other.targets
        archive, member = other.location(0).split(":")
        with tarfile.open(archive) as tar:
            names = [name.removeprefix("./") for name in tar.getnames()]
        assert member in names


def test_image_folder_tar_reads_long_names_and_the_later_of_two_members(tmp_path):
    long = "train/cat/" + "x" * 150 + "/" + "y" * 120 + ".png"
    path = write_tar(tmp_path / "a.tar", {long: png(1), "train/cat/1.png": png(2)})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("train/cat/1.png")
        info.size = len(png(99))
        tar.addfile(info, io.BytesIO(png(99)))
    data = ImageFolder(path, "train")
    assert [image.getpixel((0, 0))[0] for image, _ in data] == [99, 1]


def test_image_folder_tar_ignores_links_and_paths_that_leave_it(tmp_path, caplog):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("train/cat/1.png", "train/cat/../../../etc/2.png", "/train/cat/3.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png(1))
            tar.addfile(info, io.BytesIO(png(1)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"train/cat/link{kind!r}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    data = ImageFolder(path, "train")
    assert data.samples == ["cat/1.png"]
    assert "5 links or unsafe paths" in caplog.text


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_image_folder_tar_is_read_the_same_by_workers(tmp_path, method):
    files = {f"train/{'ab'[i % 2]}/{i:03d}.png": png(i) for i in range(24)}
    data = ImageFolder(write_tar(tmp_path / "a.tar", files), "train", to_numbers)
    alone = [(image.tolist(), label) for image, label in data]  # the parent's handle is open before the workers start
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method)
    assert [(image.tolist(), int(label)) for image, label in loader] == alone


def test_image_folder_tar_that_changed_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"train/a/1.png": png(1)})
    data = ImageFolder(path, "train")
    os.utime(path, ns=(1, 1))
    with pytest.raises(OSError, match="changed since it was indexed"):
        data[0]


def test_image_folder_pickles(tmp_path):
    data = ImageFolder(write_tar(tmp_path / "a.tar", FILES), "train")
    data[0]
    assert content(pickle.loads(pickle.dumps(data))) == content(data)


def test_image_folder_follows_links_and_survives_loops(tmp_path):
    write_tree(tmp_path, {"elsewhere/1.png": png(1), "root/train/cat/2.png": png(2)})
    (tmp_path / "root/train/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/train/cat/linked.png").symlink_to(tmp_path / "elsewhere/1.png")
    (tmp_path / "root/train/cat/loop").symlink_to(tmp_path / "root/train")
    (tmp_path / "root/train/cat/broken.png").symlink_to(tmp_path / "nowhere.png")
    for itself in ("itself", "itself.png"):
        (tmp_path / "root/train/cat" / itself).symlink_to(tmp_path / "root/train/cat" / itself)
    data = ImageFolder(tmp_path / "root", "train")
    assert data.samples == ["cat/2.png", "cat/linked.png", "dog/1.png"]


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_image_folder_val_has_three_names(tmp_path, name):
    data = ImageFolder(write_tree(tmp_path, {"train/a/1.png": png(1), f"{name}/a/2.png": png(2)}), "val")
    assert data.location(0) == f"{tmp_path}/{name}/a/2.png"


def test_image_folder_val_is_preferred_to_test(tmp_path):
    data = ImageFolder(write_tree(tmp_path, {"test/a/1.png": png(1), "val/a/2.png": png(2)}), "val")
    assert data.samples == ["a/2.png"]
    assert ImageFolder(tmp_path, "test").samples == ["a/1.png"]


def test_image_folder_val_takes_its_labels_from_the_training_classes(tmp_path):
    write_tree(tmp_path, {"train/a/1.png": png(1), "train/b/1.png": png(1), "val/b/1.png": png(1)})
    (tmp_path / "val" / "a").mkdir()
    train = ImageFolder(tmp_path, "train")
    val = ImageFolder(tmp_path, "val", classes=train.classes)
    assert val.classes == ["a", "b"]
    assert val.targets == [1]


def test_image_folder_knows_a_class_in_either_unicode_form(tmp_path):
    composed = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    apart = unicodedata.normalize("NFD", composed)
    write_tree(tmp_path, {f"train/{apart}/1.png": png(1), f"val/{composed}/1.png": png(2)})
    train = ImageFolder(tmp_path, "train")
    val = ImageFolder(tmp_path, "val", classes=train.classes)
    assert val.targets == train.targets == [0]
    assert train[0][0].size == (6, 4)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are always Unicode there")
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_image_folder_refuses_classes_that_would_read_the_same(tmp_path, packed):
    names = [os.fsdecode(b"caf\xe8"), os.fsdecode(b"caf\xe9")]  # Latin 1
    files = {f"train/{name}/1.png": png(1) for name in names}
    root = tmp_path / "a.tar" if packed else tmp_path
    if packed:
        write_tar(root, files)
    else:
        write_tree(root, files)
    with pytest.raises(
        ValueError, match=r"train: .* b'caf\\xe8' and b'caf\\xe9' cannot be told apart .*rename"
    ) as caught:
        ImageFolder(root, "train")
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_image_folder_names_a_corrupt_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"train/a/1.png": b"text"})
    with pytest.raises(CorruptImage) as caught:
        ImageFolder(path, "train")[0]
    assert str(caught.value).startswith(f"{path}:train/a/1.png: ")


def no_folder(root: Path) -> None:
    pass


def no_split(root: Path) -> None:
    write_tree(root, {"cat/1.png": png(1), "dog/1.png": png(1)})


def no_classes(root: Path) -> None:
    write_tree(root, {"train/1.png": png(1)})


def empty_class(root: Path) -> None:
    write_tree(root, {"train/cat/1.png": png(1), "train/dog/notes.txt": b""})


def two_empty_classes(root: Path) -> None:
    write_tree(root, {"train/cat/1.png": png(1), "train/dog/notes.txt": b"", "train/emu/notes.txt": b""})


def other_class(root: Path) -> None:
    write_tree(root, {"train/cat/1.png": png(1), "train/wolf/1.png": png(1)})


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (no_folder, ["no such folder", "holds train/ and val/"]),
        (no_split, ["no train/", "found: cat, dog", "ROOT/train/CLASS/*.jpg"]),
        (no_classes, ["train: no class folders", "CLASS/"]),
        (empty_class, ["train/dog: class without images", "add images"]),
        (two_empty_classes, ["train/dog: class without images (and 1 other class); add"]),
        (other_class, ["train/wolf: class 'wolf'", "2 known classes (cat, dog)", "rename"]),
    ],
)
def test_image_folder_errors_are_one_line_with_path_rule_and_fix(tmp_path, make, words, packed):
    root = tmp_path / "data"
    make(root)
    if packed and root.exists():
        path = tmp_path / "data.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(root, ".")
        root = path
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        ImageFolder(root, "train", classes=["cat", "dog"] if make is other_class else None)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(root))
    for word in words:
        assert word in text


def test_image_folder_refuses_other_files(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a\.zip: neither a folder nor"):
        ImageFolder(tmp_path / "a.zip", "train")


@pytest.mark.parametrize(
    "damage",
    [
        *("compressed", "text", "cut in a member", "cut in a header", "cut between members", "cut at the end"),
        *("damaged header", "header of zeros", "two in one"),
    ],
)
def test_image_folder_refuses_a_broken_tar(tmp_path, damage):
    path = write_tar(tmp_path / "a.tar", {f"train/a/{i}.png": png(i) for i in range(5)})
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    broken = {
        "compressed": b"\x1f\x8b\x08\0" + bytes(600),
        "text": b"no tar at all\n" * 100,
        "cut in a member": whole[: last.offset_data + 10],
        "cut in a header": whole[: last.offset + 100],
        "cut between members": whole[: last.offset],
        "cut at the end": whole[: last.offset_data + 512 * -(-last.size // 512)],
        "header of zeros": whole[: last.offset] + bytes(512) + whole[last.offset + 512 :],
        "two in one": whole + whole,
        "damaged header": whole[: last.offset] + b"X" * 512 + whole[last.offset + 512 :],
    }
    path.write_bytes(broken[damage])
    with pytest.raises(ValueError, match=r"a\.tar: not a complete, uncompressed tar archive \(.*copy") as caught:
        ImageFolder(path, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
@pytest.mark.parametrize("options", [[], ["-b", "1"], ["-b", "2000"], ["--format=ustar"], ["--format=pax"]])
def test_image_folder_takes_what_tar_writes(tmp_path, options):
    files = {f"train/{name}/{i}.png": png(i) for i in range(3) for name in "ab"}
    write_tree(tmp_path / "tree", files)
    subprocess.run(["tar", *options, "-cf", tmp_path / "a.tar", "-C", tmp_path / "tree", "train"], check=True)
    assert len(ImageFolder(tmp_path / "a.tar", "train")) == len(files)


def test_image_folder_indexes_a_large_tar_quickly(tmp_path):
    header = tarfile.TarInfo("train/a/x.png")
    with open(tmp_path / "a.tar", "wb") as stream:
        for i in range(20_000):
            header.name = f"train/{i % 10}/{i:05d}.png"
            stream.write(header.tobuf())
        stream.write(bytes(1024))
    start = time.process_time()
    assert len(ImageFolder(tmp_path / "a.tar", "train")) == 20_000
    assert time.process_time() - start < 5  # about 0.6 s; generous, because the machine may be busy


def test_open_classification_takes_the_word_digits_or_a_folder(tmp_path):
    pytest.importorskip("sklearn")
    assert open_classification("digits", "val").classes == list("0123456789")
    assert open_classification(str(write_tree(tmp_path, FILES)), "val").classes == ["cat", "dog"]


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"REAL DATA ABSENT: {DATA / name}; set SOLA_DATA to the folder that holds {name}")
    return DATA / name


def test_real_caltech16_opens_and_its_greyscale_files_decode():
    train = ImageFolder(real("caltech16"), "train")
    val = ImageFolder(real("caltech16"), "val", classes=train.classes)
    assert (len(train), len(val), len(train.classes)) == (512, 128, 16)
    grey = []
    for index in range(len(train)):
        with Image.open(f"{DATA}/caltech16/train/{train.samples[index]}") as image:
            if image.mode == "L":
                grey.append(index)
    assert grey
    for index in (*grey[:3], 0, 511):
        image, label = train[index]
        assert image.mode == "RGB"
        assert train.samples[index].startswith(train.classes[label])


def test_real_cifar10_tar_opens_and_decodes_as_the_archive_holds_it():
    path = real("cifar10.tar")
    data = ImageFolder(path, "val")
    assert len(data) == 5000
    assert np.bincount(data.targets).tolist() == [500] * 10
    with tarfile.open(path) as tar:
        for index in (0, 1234, 4999):
            stream = tar.extractfile(f"val/{data.samples[index]}")
            assert stream is not None
            assert data[index][0].tobytes() == read_image(io.BytesIO(stream.read())).tobytes()
