"""Image files of every mode and ending: the same pixels in every decoder, or a line that says why not."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from prune_lab.datasets import cifar, describe, parse_config
from prune_lab.datasets.image_crops import read_rgb
from prune_lab.datasets.image_reading import IMAGE_SUFFIXES, reason
from prune_lab.foundations.errors import UserError
from tests.helpers.data import evaluate, image_bytes, make, node, small_cifar, tar_bytes, write_tree

GREY = np.arange(0, 256, dtype=np.uint16).reshape(16, 16)
"""every value of 8 bits"""
TREE = {"train": {"cat": 2, "dog": 3}, "test": {"cat": 1, "dog": 2}}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def red(content: bytes) -> np.ndarray:
    image = read_rgb(io.BytesIO(content))
    assert image.mode == "RGB"
    return np.asarray(image)[..., 0]


@pytest.mark.parametrize("factor", [256, 257])
@pytest.mark.parametrize(
    ("kind", "type_"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2"), ("JPEG2000", "<u2")]
)
def test_grey_of_16_bits_becomes_the_8_bits_it_was_made_from(kind, type_, factor):
    content = saved(Image.fromarray((GREY * factor).astype(type_)), kind)
    assert np.array_equal(red(content), GREY)


def small_tiff(bits: int, photometric: int, pixels: bytes) -> bytes:
    """Return a grey TIFF of one row of two pixels, of kinds that Pillow does not write."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1),
            (279, len(pixels))]  # fmt: skip
    entries = b"".join(
        tag.to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in tags
    )
    header = b"II*\0" + (12).to_bytes(4, "little") + pixels.ljust(4, b"\0")
    return header + len(tags).to_bytes(2, "little") + entries + bytes(4)


def test_tiff_of_12_bits_is_scaled_by_its_own_range():
    assert red(small_tiff(12, 1, bytes([0xFF, 0xF8, 0x00]))).tolist() == [[255, 128]]


def test_tiff_whose_zero_is_white_looks_alike_in_8_and_16_bits():
    assert red(small_tiff(8, 0, bytes([0, 10]))).tolist() == [[255, 245]]
    assert red(small_tiff(16, 0, np.array([0, 10 * 257], "<u2").tobytes())).tolist() == [[255, 245]]
    assert red(small_tiff(16, 1, np.array([0, 10 * 257], "<u2").tobytes())).tolist() == [[0, 10]]


@pytest.mark.parametrize(
    "error", [RuntimeError("no codec"), TypeError("'x'"), zlib.error("-3"), KeyError("a"), EOFError()]
)
def test_whatever_a_reader_raises_becomes_one_line_with_the_file(tmp_path, monkeypatch, error):
    root = write_tree(tmp_path / "images", {"train": {"a": 2, "b": 1}, "test": {"a": 1, "b": 1}}, size=16)
    dataset = make("imagefolder", root=str(root), image_size=16, workers=0)

    def convert(image, mode):
        raise error

    monkeypatch.setattr(Image.Image, "convert", convert)
    message = rf"images.*test/./000.png is not a readable image: {reason(error)}$"
    with pytest.raises(UserError, match=message):
        evaluate(dataset)
    with pytest.raises(UserError, match="train/a/000.png is not a readable image: "):
        cifar.read(parse_config(node("cifar10", **small_cifar(tmp_path, root, image_size=16))))
    with pytest.raises(UserError, match="train/a/000.png is not a readable image: "):
        make("imagefolder", root=str(root), image_size=8, workers=0, cached_side=12, cache_dir=str(tmp_path / "cache"))


def test_reasons_without_a_sentence_name_the_type():
    assert reason(KeyError("a")) == "KeyError 'a'" and reason(EOFError()) == "EOFError"
    assert reason(ValueError("two\nlines")) == "two lines" and reason(OSError()) == "OSError"


@pytest.mark.parametrize(("type_", "kind", "mode"), [("<i4", "TIFF", "I"), ("<f4", "TIFF", "F"), ("<f4", "PPM", "F")])
def test_numbers_without_a_range_are_refused_by_name(tmp_path, type_, kind, mode):
    root = write_tree(tmp_path / "images", {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}, size=16)
    (root / "test" / "b" / "000.png").write_bytes(saved(Image.fromarray(GREY.astype(type_)), kind))
    message = rf"test/b/000.png is not a readable image: its pixels \(mode {mode}\) have no stated range; save it"
    with pytest.raises(UserError, match=message):
        make("imagefolder", root=str(root), image_size=16, workers=0)  # before anything is trained
    with pytest.raises(UserError, match=message):
        cifar.read(parse_config(node("cifar10", **small_cifar(tmp_path, root, image_size=16))))
    with pytest.raises(UserError, match=message):
        make("imagefolder", root=str(root), image_size=8, workers=0, cached_side=12, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 9, (9, 9, 9)),
        ("LA", (9, 0), (9, 9, 9)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
        ("P", 0, (0, 0, 0)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ],
)
def test_modes_of_8_bits_and_less_keep_their_look(mode, colour, rgb):
    content = saved(Image.new(mode, (2, 2), colour), "TIFF" if mode == "CMYK" else "PNG")
    assert read_rgb(io.BytesIO(content)).getpixel((0, 0)) == rgb


def as_16_bits(content: bytes) -> bytes:
    """Return a grey image as PNG of 16 bits."""
    return saved(Image.fromarray(np.asarray(Image.open(io.BytesIO(content))).astype(np.uint16) * 257), "PNG")


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_cifar_of_16_bits_equals_its_copy_of_8(tmp_path, form):
    files = {f"{split}/{name}/{i}.png": image_bytes(40 * i + 50, mode="L")
             for split, classes in TREE.items() for name, count in classes.items() for i in range(count)}  # fmt: skip
    found = []
    for bits, change in (("8", lambda content: content), ("16", as_16_bits)):
        changed = {name: change(content) for name, content in files.items()}
        root = tmp_path / bits
        if form == "tar":
            root.write_bytes(tar_bytes(changed, "w"))
        else:
            for name, content in changed.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
        found.append(cifar.read(parse_config(node("cifar10", **small_cifar(tmp_path, root)))))
    assert found[0].train_images[:, 0, 0, 0].tolist() == [50, 90, 50, 90, 130]
    assert found[0].content_hash == found[1].content_hash


@pytest.mark.parametrize("cached_side", [None, 20])
def test_streamed_images_of_16_bits_equal_their_copies_of_8(tmp_path, cached_side):
    batches = []
    for bits in (8, 16):
        root = write_tree(tmp_path / str(bits), TREE)
        for i, path in enumerate(sorted(root.rglob("*.png"))):
            content = image_bytes(20 * i + 50, mode="L")
            path.write_bytes(content if bits == 8 else as_16_bits(content))
        options = {"image_size": 16, "workers": 0, "cached_side": cached_side, "cache_dir": str(tmp_path / "cache")}
        ((images, _),) = evaluate(make("imagefolder", root=str(root), mean=[0] * 3, std=[1] * 3, **options))
        batches.append((images * 255).round())
    assert sorted(batches[0][:, 0, 0, 0].tolist()) == [50, 70, 90]
    assert batches[0].equal(batches[1])


def test_every_ending_that_pillow_reads_counts(tmp_path):
    names = ("tif", "tiff", "gif", "ppm", "pgm", "jfif", "webp", "bmp", "JPEG", "png", "jp2", "tga", "qoi")
    assert {f".{name.lower()}" for name in names} <= IMAGE_SUFFIXES
    assert not IMAGE_SUFFIXES & {".txt", ".eps", ".h5", ".mpg", ".csv", ".json"}
    kinds = {"tif": "TIFF", "gif": "GIF", "ppm": "PPM", "jfif": "JPEG", "webp": "WEBP", "jp2": "JPEG2000"}
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i, (name, kind) in enumerate(kinds.items()):
            (tmp_path / split / "a" / f"{i}.{name}").write_bytes(image_bytes(9, kind=kind))
    dataset = make("imagefolder", root=str(tmp_path), image_size=24, workers=0)
    assert (dataset.info.num_train, dataset.info.num_test) == (6, 6)
    assert sum(len(labels) for _, labels in evaluate(dataset)) == 6
    assert dataset.info.lines() == ["6 training and 6 test images of 1 classes"]


def test_hidden_names_and_other_files_are_left_out_and_counted(tmp_path):
    root = write_tree(tmp_path / "images", TREE | {"train": {**TREE["train"], ".ipynb_checkpoints": 2}})
    (root / "train" / ".DS_Store").touch()
    (root / "train" / "cat" / "._000.png").touch()
    (root / "train" / "cat" / ".hidden.png").write_bytes(image_bytes(1))
    (root / "train" / "cat" / "boxes.txt").touch()
    (root / "test" / "dog" / "raw.HEIC").touch()
    (root / "test" / "README").touch()
    line = "left out, because they are hidden or no images, of train: 1 .txt, 4 hidden; of test: 1 .heic"
    dataset = make("imagefolder", root=str(root), image_size=24, workers=0)
    assert (dataset.info.num_classes, dataset.info.num_train, dataset.info.num_test) == (2, 5, 3)
    assert dataset.info.note == f"{line}, 1 without an ending"
    assert describe(parse_config(node("imagefolder", root=str(root)))).note == dataset.info.note
    for _ in range(2):  # decoded, and from the cache
        small = make("cifar10", **small_cifar(tmp_path, root, image_size=32))
        assert small.info.num_classes == 2 and small.info.lines() == [
            "5 training and 3 test images of 2 classes",
            "left out, because they are hidden or no images, of train: 1 .txt, 4 hidden; of test: 1 .heic",
        ]


def test_classes_without_test_images_are_named(tmp_path):
    root = write_tree(tmp_path / "images", {"train": dict.fromkeys("abcdefg", 1), "test": {"b": 1}})
    options = {"root": str(root), "image_size": 24, "workers": 0}
    with pytest.raises(UserError, match=r"check_counts=false \(no image of a, c, d, e, f and 1 more\)"):
        make("imagefolder", **options)
    dataset = make("imagefolder", **options, check_counts=False, validation=0.3)
    assert dataset.info.lines() == [
        "5 training, 2 validation and 1 test images of 7 classes", "no test images of a, c, d, e, f and 1 more"
    ]
    assert dataset.info.figures() == {
        "data/num_train": 5, "data/num_val": 2, "data/num_test": 1, "data/num_classes": 7
    }
    with pytest.raises(UserError, match=r"7 classes in train and 1 in test \(test lacks a, c, d, e, f and 1 more"):
        cifar.read(parse_config(node("cifar10", **small_cifar(tmp_path, root))))


def test_what_other_systems_put_into_a_tar_is_no_image(tmp_path):
    names = ("./train/cat/1.png", "./train/dog/2.png", "./test/cat/3.png", "./test/dog/4.png", "./train/cat/._1.png",
             "./train/.cache/5.png")  # fmt: skip
    (tmp_path / "images.tar").write_bytes(tar_bytes({name: image_bytes(5) for name in names}, "w"))
    sizes = {"num_train": 2, "num_test": 2}
    arrays = cifar.read(parse_config(node("cifar10", **small_cifar(tmp_path, tmp_path / "images.tar", **sizes))))
    assert arrays.num_classes == 2
    assert arrays.note == "left out, because they are hidden or no images, of train: 2 hidden"
