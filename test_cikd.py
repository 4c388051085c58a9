"""Tests of cikd.py: `python -m pytest`, offline, minutes on two CPU cores. The order is that of the file."""
import csv
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import cikd
import visualize_attention as va

TINY = dict(train_size=60, holdout=40, epochs=2, ali_epochs=1, teacher_epochs=1, device="cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may reach the network, on any machine."""
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of seconds in a folder of its own."""
    return cikd.Config(output_dir=str(tmp_path / "runs"), **TINY)


def fails(capsys, *argv) -> str:
    """Run the command line, demand one plain line on stderr and exit code 2, and return that line."""
    assert cikd.main([str(a) for a in argv]) == 2
    out = capsys.readouterr()
    assert re.fullmatch(r"cikd: error: [^\n]+\n", out.err) and "Traceback" not in out.out + out.err
    return out.err


def small_student(**kwargs):
    torch.manual_seed(0)
    return cikd.VisionTransformer(**dict(image_size=32, patch_size=4, num_classes=10, depth=3, width=64, heads=4) | kwargs)


# ---- 1. settings

BAD = [
    ("--dataset", "mnist", "--dataset: 'mnist'"), ("--method", "dino", "--method: 'dino'"),
    ("--student", "vit_huge", "--student"), ("--teacher", "vgg", "--teacher"), ("--crop", "five", "--crop"),
    ("--teacher-maps", "two", "--teacher-maps"), ("--relations", "kk", "--relations"), ("--device", "tpu", "--device"),
    ("--compile", "maybe", "--compile"), ("--seed", "-1", "--seed"), ("--seed", "1.5", "--seed"),
    ("--seeds", "0 0", "--seeds"), ("--seeds", "0 -3", "--seeds"), ("--seeds", "", "--seeds"),
    ("--train-size", "1", "--train-size"), ("--train-size", "5", "10 classes"), ("--train-size", "3001", "--train-size: 3000"),
    ("--holdout", "5", "10 classes"), ("--holdout", "2995", "--holdout"), ("--holdout", "1000 --train-size 2500", "--train-size: 3000"),
    ("--data-seed", "-1", "--data-seed"), ("--image-size", "8", "--image-size"), ("--image-size", "9999", "--image-size"),
    ("--image-size", "30", "without rest"), ("--patch-size", "0", "--patch-size"),
    ("--patch-size", "5", "without rest"), ("--patch-size", "32", "2 x 2"),
    ("--crop-scale", "0", "--crop-scale"), ("--crop-scale", "1.5", "--crop-scale"), ("--jitter", "-0.1", "--jitter"),
    ("--heads", "0", "--heads"), ("--heads", "5", "does not divide vit_micro's width"), ("--drop-path", "1", "--drop-path"),
    ("--teacher-epochs", "0", "--teacher-epochs"), ("--teacher-lr", "0", "--teacher-lr"),
    ("--teacher-lr", "inf", "--teacher-lr"), ("--ali-epochs", "0", "--ali-epochs"),
    ("--ali-epochs", "16", "an epoch for LM"), ("--epochs", "1 --method cikd", "an epoch for LM"),
    ("--tau", "0", "--tau"), ("--tau", "nan", "--tau"), ("--tau", "cold", "--tau"),
    ("--pairs", "", "--pairs"), ("--pairs", "0:4", "--pairs"), ("--pairs", "6:1", "--pairs"), ("--pairs", "first:1", "--pairs"),
    ("--pairs", "0:1;1:2", "--pairs"), ("--dkd-alpha", "-1", "--dkd-alpha"), ("--dkd-beta", "-1", "--dkd-beta"),
    ("--dkd-temperature", "0", "--dkd-temperature"), ("--ramp-epochs", "-1", "--ramp-epochs"),
    ("--label-smoothing", "1", "--label-smoothing"), ("--epochs", "0", "--epochs"), ("--epochs", "ten", "--epochs"),
    ("--batch-size", "0", "--batch-size"), ("--lr", "0", "--lr"), ("--lr", "-1", "--lr"), ("--min-lr", "-1", "--min-lr"),
    ("--warmup", "2", "--warmup"), ("--weight-decay", "-1", "--weight-decay"), ("--layer-decay", "0", "--layer-decay"),
    ("--run-name", "a/b", "--run-name"), ("--run-name", "..", "--run-name"), ("--run-name", "x --compare", "--run-name"),
    ("--pretrained-teacher", "", "above 64 only"), ("--pretrained-teacher", "--teacher-checkpoint t.pt", "contradicts"),
    ("--resume", "nowhere", "holds no whole run"), ("--teacher-checkpoint", "missing.pt", "missing.pt"),
    ("--epoch", "3", "--epoch"), ("--heads", "32", "channels"),
    ("--run-name", "teachers", "--run-name"), ("--pairs", "0:" + 5000 * "9", "--pairs"), ("--resume", "r --overwrite", "holds no whole run"),
    ("--compare", "--method kd", "contradicts"), ("--seeds", "1 2 --seed 3", "contradicts"), ("--colour", "blue", "--colour"), ("extra", "", "extra"),
]


@pytest.mark.parametrize("option,value,says", BAD, ids=[" ".join(b[:2]).strip()[:40] for b in BAD])
def test_bad_arguments(option, value, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cikd, "train_student", lambda *_: pytest.fail("training began"))
    (tmp_path / "t.pt").touch()
    assert says in fails(capsys, option, *value.split())
    assert [p.name for p in tmp_path.iterdir()] == ["t.pt"]  # nothing was written


@pytest.mark.parametrize("option", ["--teacher-checkpoint", "--resume", "--run-name", "--data-dir", "--output-dir"])
def test_an_empty_string_is_not_taken_for_not_given(option, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, option, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_cuda_is_refused(capsys):
    assert "torch finds no cuda" in fails(capsys, "--device", "cuda")


def test_help_shows_every_setting_and_default(capsys):
    with pytest.raises(SystemExit):
        cikd.main(["--help"])
    text = capsys.readouterr().out
    for f in fields(cikd.Config):
        said = re.search(rf"--{f.name.replace('_', '-')}\b(.*?)(\n  --|\n\n)", text[text.index("options:"):], re.S).group(1)
        assert f.metadata["help"] and (f.default is None or f.default is False or f"[{f.default}]" in said), f.name
    assert all(name in text for name in cikd.DATASETS)


def test_rows_fill_what_is_not_given():
    cfg = cikd.resolve(cikd.Config(dataset="cifar10"))
    assert (cfg.image_size, cfg.patch_size, cfg.student, cfg.teacher, cfg.heads) == (32, 4, "vit_tiny", "resnet18", 3)
    cfg = cikd.resolve(cikd.Config(dataset="cifar10", epochs=30))
    assert cfg.ali_epochs == 10                              # a third, as in the row
    assert cikd.resolve(cikd.Config(dataset="cifar10", epochs=30, ali_epochs=7)).ali_epochs == 7
    assert cikd.resolve(cfg) == cfg                          # a resolved one stays as it is


def test_pairs_count_blocks_from_0_and_stages_from_1():
    cfg = cikd.resolve(cikd.Config())
    assert cikd.parse_pairs(cfg) == [(0, 0), (5, 1)]         # the first and last block, layer1 and layer2
    assert cikd.parse_pairs(replace(cfg, pairs="2:3, last:1")) == [(2, 2), (5, 0)]


def test_run_names_tell_runs_apart():
    names = {cikd.resolve(cikd.Config(**kw)).run_name for kw in (
        {}, dict(seed=1), dict(method="kd"), dict(tau=0.1), dict(tau=0.3), dict(train_size=100), dict(dataset="dtd"))}
    assert len(names) == 7 and cikd.resolve(cikd.Config()).run_name == "shapes-cikd-seed0"
    assert len(cikd.default_name(cikd.Config(teacher_checkpoint="x" * 500))) < 130


# ---- 2. data

def test_shapes_are_deterministic_and_disjoint():
    images, labels = cikd.make_shapes(200, 0)
    again, _ = cikd.make_shapes(200, 0)
    other, _ = cikd.make_shapes(200, 1)
    assert images.dtype == torch.uint8 and images.shape == (200, 3, 32, 32) and torch.equal(images, again)
    assert labels.bincount().tolist() == [20] * 10
    digests = {hashlib.sha256(x.numpy().tobytes()).digest() for x in torch.cat([images, other])}
    assert len(digests) == 400                               # no image twice, none shared between the two seeds


def encode(array, path, mode=None, **kwargs):
    Image.fromarray(array, mode).save(path, **kwargs) if mode else Image.fromarray(array).save(path, **kwargs)


def make_folder(root: Path, classes=("cat", "dog"), train=8, test=4, size=40, test_name="test") -> Path:
    rng = np.random.default_rng(0)
    for split, n in (("train", train), (test_name, test)):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (size, size + 6, 3), dtype=np.uint8)
                pixels[..., k % 3] = 255
                encode(pixels, root / split / name / f"{i}.png")
    return root


def folder_config(root, **kwargs):
    return cikd.resolve(cikd.Config(**dict(dataset="folder", data_dir=str(root), image_size=32, patch_size=8,
                                           device="cpu", student="vit_micro") | kwargs))


def test_folder_reads_every_kind_of_image(tmp_path):
    root, side = make_folder(tmp_path), 32
    here = root / "train" / "cat"
    gray = np.tile(np.linspace(0, 255, side, dtype=np.uint8), (side, 1))
    rgb = np.stack([gray, gray[:, ::-1], gray.T], 2)
    encode(gray, here / "grey.png")
    Image.fromarray(rgb).quantize(16).save(here / "palette.png")
    Image.fromarray(rgb).convert("CMYK").save(here / "cmyk.jpg", quality=95)
    Image.fromarray(gray > 127).save(here / "bilevel.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(here / "deep.png")
    Image.fromarray(np.dstack([rgb, np.zeros_like(gray)])).save(here / "clear.png")
    Image.fromarray(np.dstack([gray, np.zeros_like(gray)]), "LA").save(here / "clear_grey.png")
    Image.new("P", (side, side), 0).save(here / "clear_palette.png", transparency=0)
    Image.fromarray(rgb[:1, :1]).save(here / "pixel.png")
    Image.fromarray(np.full((1, 4000, 3), 77, np.uint8)).save(here / "thread.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                         # the camera was turned: show it rotated by 90 degrees
    Image.fromarray(rgb).save(here / "turned.jpg", exif=exif, quality=95)
    data = cikd.load_dataset(folder_config(root))
    names = sorted(p.name for p in here.iterdir())
    images = dict(zip(names, data.train_images[data.train_labels == 0]))
    close = lambda name, want, by: (images[name].float() - torch.tensor(want.copy()).float().permute(2, 0, 1)).abs().mean() < by
    triple = np.stack([gray] * 3, 2)
    assert data.train_images.shape == (len(names) + 8, 3, side, side) and data.train_images.dtype == torch.uint8
    assert close("grey.png", triple, 0.1) and close("deep.png", triple, 0.6) and close("palette.png", rgb, 25)
    assert close("cmyk.jpg", rgb, 6) and close("bilevel.png", (triple > 127) * 255, 0.1)
    assert all((images[n] == 255).all() for n in ("clear.png", "clear_grey.png", "clear_palette.png"))    # over white
    assert close("turned.jpg", np.rot90(rgb, -1), 6)
    assert (images["thread.png"] == 77).all()
    assert (images["pixel.png"] == torch.tensor(rgb[0, 0])[:, None, None]).all()


@pytest.mark.parametrize("seed", range(4))
def test_images_are_resized_as_torchvision_does(seed):
    rng = np.random.default_rng(seed)
    side, longer, size = (int(rng.integers(low, high)) for low, high in ((30, 60), (1, 20), (20, 70)))
    wide = Image.fromarray(rng.integers(0, 256, (side, side + 2 * longer, 3), dtype=np.uint8))
    TF = torchvision.transforms.functional
    for image in (wide, TF.center_crop(wide, side)):
        ours, want = cikd.to_rgb(image, size), TF.pil_to_tensor(TF.resize(TF.center_crop(image, side), size, TF.InterpolationMode.BICUBIC))
        edge = 0 if image.width == image.height else size // 4               # beyond the crop, ours still sees the neighbours
        apart = (ours.int() - want.int())[:, edge:size - edge, edge:size - edge].abs().max()
        assert apart <= (1 if edge else 0)


def test_folder_takes_the_train_folders_numbers(tmp_path):
    root = make_folder(tmp_path, classes=("ant", "bee", "cat"), test_name="val")
    for path in (root / "val" / "ant").iterdir():
        path.unlink()
    (root / "val" / "ant").rmdir()
    data = cikd.load_dataset(folder_config(root))
    assert data.classes == ["ant", "bee", "cat"] and data.test_labels.unique().tolist() == [1, 2]


def test_hidden_folders_are_no_classes(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert cikd.load_dataset(folder_config(root)).classes == ["cat", "dog"]


def test_a_holdout_without_a_class_is_refused(tmp_path):
    root = make_folder(tmp_path)
    for path in list((root / "train" / "dog").iterdir())[1:]:
        path.unlink()
    with pytest.raises(cikd.CIKDError, match="--holdout"):
        cikd.load_dataset(folder_config(root, holdout=2))


FOLDER_FAULTS = {
    "no folder": (lambda r: None, "no such folder"),
    "no train": (lambda r: make_folder(r).joinpath("train").rename(r / "training"), "no such folder"),
    "no test": (lambda r: make_folder(r).joinpath("test").rename(r / "testing"), "no such folder"),
    "no class": (lambda r: [(r / s).mkdir(parents=True) for s in ("train", "test")], "find any class folder"),
    "one class": (lambda r: make_folder(r, classes=("cat",)), "two classes"),
    "empty class": (lambda r: (make_folder(r) / "train" / "eel").mkdir(), "eel"),
    "class only in test": (lambda r: (make_folder(r) / "train" / "dog").rename(r / "dog"), "dog: a class that"),
    "truncated": (lambda r: shorten(make_folder(r) / "train" / "cat" / "0.png"), "0.png: not a readable image"),
    "truncated JPEG": (lambda r: (make_folder(r) / "train" / "cat" / "a.jpg").write_bytes(jpeg(0)[: len(jpeg(0)) // 2]), "a.jpg: not a readable"),
    "zero bytes": (lambda r: (make_folder(r) / "train" / "cat" / "0.png").write_bytes(b""), "0.png: not a readable"),
    "text": (lambda r: (make_folder(r) / "train" / "cat" / "0.png").write_text("hello"), "0.png: not a readable"),
    "pipe": (lambda r: os.mkfifo(make_folder(r) / "train" / "cat" / "a.png"), "a.png: not a readable"),
    "link to itself": (lambda r: (make_folder(r) / "train" / "cat" / "more").symlink_to("."), "more: a link to a folder"),
    "link to above": (lambda r: (make_folder(r) / "train" / "cat" / "more").symlink_to(".."), "more: a link to a folder"),
    "hidden classes": (lambda r: (make_folder(r, classes=("cat",)) / "train" / "cat").rename(r / "train" / ".cat"), "train: "),
    "damaged EXIF": (lambda r: Image.new("RGB", (9, 9)).save(make_folder(r) / "train" / "cat" / "a.webp", exif=b"\0M\0*\0\0\0\x08"),
                     "a.webp: not a readable"),
    "bomb": (lambda r: (make_folder(r) / "train" / "cat" / "0.png").write_bytes(bomb()), "0.png: not a readable"),
}


def shorten(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 40,000 x 40,000 pixels."""
    import struct
    import zlib
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")
@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_folder_faults(fault, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cikd, "train_student", lambda *_: pytest.fail("training began"))
    make, says = FOLDER_FAULTS[fault]
    make(tmp_path / "data")
    assert says in fails(capsys, "--dataset", "folder", "--data-dir", tmp_path / "data", "--image-size", 32,
                         "--patch-size", 8, "--output-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# Each published data set as a miniature archive in its real on-disk format, put where the error message says.

def tar(path: Path, files: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def jpeg(i: int, size=(50, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (i * 40 % 256, 100, 50)).save(buffer, "JPEG")
    return buffer.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def mini_cifar(root, monkeypatch, cls, names, key):
    rng = np.random.default_rng(0)
    files = {}
    for name in names["train"] + names["test"]:
        files[name] = pickle.dumps({"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), key: [0, 1, 1, 0]})
    files[cls.meta["filename"]] = pickle.dumps({cls.meta["key"]: ["plane", "car"]})
    archive = root / cls.filename
    tar(archive, {f"{cls.base_folder}/{n}": c for n, c in files.items()})
    monkeypatch.setattr(cls, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(cls, "train_list", [[n, md5(files[n])] for n in names["train"]])
    monkeypatch.setattr(cls, "test_list", [[n, md5(files[n])] for n in names["test"]])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5(files[cls.meta["filename"]])})
    return (4 * len(names["train"]), 4), root / cls.base_folder / names["train"][0]


def mini_cifar10(root, monkeypatch):
    return mini_cifar(root, monkeypatch, torchvision.datasets.CIFAR10,
                      dict(train=[f"data_batch_{i}" for i in range(1, 6)], test=["test_batch"]), "labels")


def mini_cifar100(root, monkeypatch):
    return mini_cifar(root, monkeypatch, torchvision.datasets.CIFAR100, dict(train=["train"], test=["test"]), "fine_labels")


def mini_fashion_mnist(root, monkeypatch):
    cls, resources = torchvision.datasets.FashionMNIST, []
    for name, n in (("train", 12), ("t10k", 3)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for kind, header, body in (("images-idx3", [2051, n, 28, 28], pixels), ("labels-idx1", [2049, n], np.arange(n) % 2)):
            content = gzip.compress(np.array(header, ">i4").tobytes() + body.astype(np.uint8).tobytes())
            path = root / f"{name}-{kind}-ubyte.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            resources.append((path.name, md5(content)))
    monkeypatch.setattr(cls, "resources", resources)
    return (12, 3), root / "train-images-idx3-ubyte"


def mini_stl10(root, monkeypatch):
    cls, rng = torchvision.datasets.STL10, np.random.default_rng(0)
    files = {"class_names.txt": b"\n".join(b"class%d" % i for i in range(10)), "fold_indices.txt": b"0 1\n",
             "unlabeled_X.bin": rng.bytes(96 * 96 * 3)}
    for split, n in (("train", 12), ("test", 4)):
        files[f"{split}_X.bin"] = rng.bytes(n * 96 * 96 * 3)
        files[f"{split}_y.bin"] = bytes(1 + i % 2 for i in range(n))
    tar(root / cls.filename, {f"{cls.base_folder}/{n}": c for n, c in files.items()})
    monkeypatch.setattr(cls, "tgz_md5", md5((root / cls.filename).read_bytes()))
    for which in ("train_list", "test_list"):
        monkeypatch.setattr(cls, which, [[n, md5(files[n])] for n, _ in getattr(cls, which)])
    return (12, 4), root / cls.base_folder / "train_X.bin"


def mini_pets(root, monkeypatch):
    cls, names = torchvision.datasets.OxfordIIITPet, {"trainval": ["Abyssinian_1", "beagle_1", "beagle_2"],
                                                      "test": ["Abyssinian_2", "beagle_3"]}
    tar(root / "images.tar.gz", {f"images/{n}.jpg": jpeg(i) for i, n in enumerate(sum(names.values(), []))})
    tar(root / "annotations.tar.gz", {f"annotations/{split}.txt": "".join(
        f"{n} {1 + (n[0] == 'b')} 1 1\n" for n in some).encode() for split, some in names.items()})
    monkeypatch.setattr(cls, "_RESOURCES", tuple((u, md5((root / u.rsplit("/")[-1]).read_bytes())) for u, _ in cls._RESOURCES))
    return (3, 2), root / "images" / "beagle_1.jpg"


def mini_aircraft(root, monkeypatch):
    top = "fgvc-aircraft-2013b/data/"
    files = {top + f"images/{i:07}.jpg": jpeg(i) for i in range(5)} | {
        top + "variants.txt": b"707-320\nA340-300\n",
        top + "images_variant_trainval.txt": b"0000000 707-320\n0000001 A340-300\n0000002 707-320\n",
        top + "images_variant_test.txt": b"0000003 A340-300\n0000004 707-320\n"}
    tar(root / "fgvc-aircraft-2013b.tar.gz", files)
    return (3, 2), root / top / "images" / "0000001.jpg"


def mini_dtd(root, monkeypatch):
    kinds, files = ("banded", "woven"), {}
    for j, split in enumerate(("train", "val", "test")):
        files[f"dtd/labels/{split}1.txt"] = "".join(f"{k}/{k}_{j}.jpg\n" for k in kinds).encode()
        files |= {f"dtd/images/{k}/{k}_{j}.jpg": jpeg(j) for k in kinds}
    tar(root / "dtd-r1.0.1.tar.gz", files)
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", md5((root / "dtd-r1.0.1.tar.gz").read_bytes()))
    return (4, 2), root / "dtd" / "images" / "woven" / "woven_1.jpg"


def mini_imagenette(root, monkeypatch):
    cls, kinds = torchvision.datasets.Imagenette, ("n01440764", "n02102040")
    tar(root / "imagenette2-320.tgz", {f"imagenette2-320/{split}/{k}/{i}.JPEG": jpeg(i) for k in kinds
                                       for split, n in (("train", 3), ("val", 2)) for i in range(n)})
    url, _ = cls._ARCHIVES["320px"]
    monkeypatch.setattr(cls, "_ARCHIVES", cls._ARCHIVES | {"320px": (url, md5((root / "imagenette2-320.tgz").read_bytes()))})
    return (6, 4), root / "imagenette2-320" / "train" / "n02102040" / "1.JPEG"


MINI = dict(cifar10=mini_cifar10, cifar100=mini_cifar100, fashion_mnist=mini_fashion_mnist, stl10=mini_stl10, pets=mini_pets,
            aircraft=mini_aircraft, dtd=mini_dtd, imagenette=mini_imagenette)


def test_every_downloaded_set_has_a_miniature():
    assert set(MINI) == {name for name, row in cikd.DATASETS.items() if row.source}


@pytest.mark.parametrize("name", MINI)
def test_published_sets(name, tmp_path, monkeypatch):
    """Extracted from the archive lying where the message says, then read again; a half-extracted copy is refused."""
    row = cikd.DATASETS[name]
    counts, victim = MINI[name](tmp_path / row.folder, monkeypatch)
    monkeypatch.setitem(cikd.DATASETS, name, row._replace(counts=counts))
    cfg = cikd.resolve(cikd.Config(dataset=name, data_dir=str(tmp_path)))
    data = cikd.load_dataset(cfg)
    assert data.train_images.shape == (counts[0], 3, row.image_size, row.image_size)
    assert len(data.test_labels) == counts[1] and len(set(data.train_labels.tolist())) == 2
    assert all(isinstance(c, str) for c in data.classes)
    if name == "dtd":
        assert data.classes == ["banded", "woven"] and data.train_labels.tolist() == [0, 1, 0, 1]
    assert cikd.load_dataset(cfg).fingerprint == data.fingerprint
    for archive in (tmp_path / row.folder).glob("*.*gz"):
        archive.unlink()
    victim.unlink()
    with pytest.raises(cikd.CIKDError, match="incomplete|neither whole"):
        cikd.load_dataset(cfg)


def test_a_foreign_archive_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"<html>login first</html>")
    line = fails(capsys, "--dataset", "cifar10", "--data-dir", tmp_path, "--output-dir", tmp_path)
    assert "neither whole" in line and not (tmp_path / "cifar-10-batches-py").exists()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(b"<html>login first</html>"))
    assert "ReadError" in fails(capsys, "--dataset", "cifar10", "--data-dir", tmp_path, "--output-dir", tmp_path)


@pytest.mark.parametrize("name", MINI)
def test_without_network_the_message_says_what_to_get(name, tmp_path, capsys):
    line = fails(capsys, "--dataset", name, "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "runs")
    assert "http" in line and str(tmp_path / "data" / cikd.DATASETS[name].folder) in line and "--dataset shapes" in line
    assert not (tmp_path / "runs").exists()


def test_a_silent_server_does_not_hang(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()                                       # the real urlopen, against a server that never answers
    monkeypatch.setattr(cikd, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz")
        start = time.monotonic()
        assert "timed out" in fails(capsys, "--dataset", "cifar10", "--data-dir", tmp_path, "--output-dir", tmp_path)
        assert time.monotonic() - start < 20
    assert socket.getdefaulttimeout() is None


def test_subsets_are_balanced_seeded_and_disjoint():
    base = cikd.Config(train_size=207, holdout=103)
    data = cikd.load_dataset(cikd.resolve(base))
    assert len(data.train_labels) == 207 and len(data.test_labels) == 103
    for labels in (data.train_labels, data.test_labels):
        counts = labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
    rows = [{x.numpy().tobytes() for x in images} for images in (data.train_images, data.test_images)]
    assert len(rows[0]) == 207 and len(rows[1]) == 103 and not rows[0] & rows[1]
    everything = {x.numpy().tobytes() for x in cikd.make_shapes(3000, 0)[0]}
    assert rows[0] | rows[1] <= everything                   # the holdout comes from the training images
    assert cikd.load_dataset(cikd.resolve(base)).fingerprint == data.fingerprint
    assert cikd.load_dataset(cikd.resolve(replace(base, data_seed=1))).fingerprint != data.fingerprint
    assert cikd.load_dataset(cikd.resolve(replace(base, seed=1))).fingerprint == data.fingerprint


def test_balanced_order_of_unequal_classes():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    order = cikd.balanced_order(labels, 5)
    assert sorted(order.tolist()) == list(range(73))
    assert labels[order[:9]].bincount().tolist() == [3, 3, 3]
    assert labels[order[:29]].bincount().tolist() == [13, 3, 13]


def test_pad_crop_shifts_by_whole_pixels_and_flips():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    crops = cikd.draw_crops(64, 32, "pad", 1.0)
    out = cikd.to_float(images, crops)
    padded = F.pad(images.float() / 127.5 - 1, (4, 4, 4, 4))
    seen = set()
    for i in range(64):
        flip, dx, dy = crops[i, 0] < 0, round(float(crops[i, 1]) * 16), round(float(crops[i, 3]) * 16)
        want = padded[i, :, 4 + dy:36 + dy, 4 + dx:36 + dx]
        assert (out[i] - (want.flip(2) if flip else want)).abs().max() < 1e-4
        seen.add((bool(flip), dx, dy))
    assert len(seen) > 50 and {s[0] for s in seen} == {True, False} and max(abs(s[1]) for s in seen) == 4


def test_resized_crop_agrees_with_torchvision():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    for top, left, height, width in ((0, 0, 32, 32), (4, 8, 16, 20), (10, 2, 8, 30), (0, 20, 12, 12)):
        crop = torch.tensor([width / 32, (2 * left + width) / 32 - 1, height / 32, (2 * top + height) / 32 - 1])
        ours = cikd.to_float(images, crop.expand(6, 4))
        theirs = torchvision.transforms.functional.resized_crop(
            images.float() / 127.5 - 1, top, left, height, width, [32, 32], antialias=False)
        inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))       # at its edge ours still sees the neighbours
        assert (ours - theirs)[inner].abs().max() < 1e-4


def test_resized_crops_stay_inside_and_are_large_enough():
    torch.manual_seed(0)
    crops = cikd.draw_crops(5000, 32, "resized", 0.3)
    wide, x, high, y = crops.abs().unbind(1)
    assert (wide + x <= 1 + 1e-6).all() and (high + y <= 1 + 1e-6).all()
    assert 0.25 < (wide * high).min() < 0.33 and 0.6 < (wide * high).mean() < 0.7
    assert 0.45 < (crops[:, 0] < 0).float().mean() < 0.55


def test_color_jitter_is_per_image_and_can_be_off():
    torch.manual_seed(0)
    images = torch.rand(8, 3, 16, 16) * 1.6 - 0.8
    assert torch.allclose(cikd.color_jitter(images, 0.0), images, atol=1e-6)
    out = cikd.color_jitter(images[:1].expand(8, -1, -1, -1), 0.4)
    assert out.min() >= -1 and out.max() <= 1 and len({round(float(x.mean()), 4) for x in out}) == 8


# ---- 3. student

def timm_shapes(image=224, patch=16, classes=1000, depth=12, width=192):
    """Names and shapes of timm's vit_tiny_patch16_224, written down by hand."""
    yield from {"cls_token": (1, 1, width), "pos_embed": (1, (image // patch) ** 2 + 1, width),
                "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
                "norm.weight": (width,), "norm.bias": (width,), "head.weight": (classes, width), "head.bias": (classes,)}.items()
    for i in range(depth):
        for name, (out, into) in {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
                                  "mlp.fc2": (width, 4 * width)}.items():
            yield from ((f"blocks.{i}.{name}.weight", (out, into)), (f"blocks.{i}.{name}.bias", (out,)))
        for name in ("norm1", "norm2"):
            yield from ((f"blocks.{i}.{name}.weight", (width,)), (f"blocks.{i}.{name}.bias", (width,)))


def test_student_has_timms_names_and_shapes():
    student = cikd.VisionTransformer()
    assert {n: tuple(p.shape) for n, p in student.state_dict().items()} == dict(timm_shapes())
    assert sum(p.numel() for p in student.parameters()) == 5_717_416


@pytest.mark.parametrize("image,patch,heads", [(32, 4, 3), (224, 16, 12)])
def test_student_gives_timms_logits(image, patch, heads):
    timm = pytest.importorskip("timm")
    student = small_student(image_size=image, patch_size=patch, depth=12, width=192, heads=heads, num_classes=7).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=image, patch_size=patch, num_heads=heads, num_classes=7).eval()
    theirs.load_state_dict(student.state_dict(), strict=True)
    x = torch.randn(2, 3, image, image)
    with torch.no_grad():
        assert (student(x) - theirs(x)).abs().max() < 1e-5


def to_torchvision(state: dict) -> dict:
    """Our (timm's) parameter names as torchvision.models.VisionTransformer's."""
    rules = [("patch_embed.proj", "conv_proj"), ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"),
             (r"blocks\.(\d+)", r"encoder.layers.encoder_layer_\1"), (r"\.norm(\d)", r".ln_\1"),
             (r"attn\.qkv\.", "self_attention.in_proj_"), (r"attn\.proj", "self_attention.out_proj"),
             (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.3"), (r"^norm", "encoder.ln"), ("^head", "heads.head")]
    out = {}
    for name, value in state.items():
        for old, new in rules:
            name = re.sub(old, new, name)
        out[name] = value
    return out


@pytest.mark.parametrize("seed", range(3))
def test_student_gives_torchvisions_logits(seed):
    torch.manual_seed(seed)
    student = small_student(depth=2 + seed, heads=(1, 2, 8)[seed]).double().eval()
    for p in student.parameters():                           # away from zeros and ones, so that each one matters
        p.data.normal_(std=0.2)
    theirs = torchvision.models.VisionTransformer(32, 4, 2 + seed, (1, 2, 8)[seed], 64, 256, num_classes=10).double().eval()
    theirs.load_state_dict(to_torchvision(student.state_dict()), strict=True)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert (student(x) - theirs(x)).abs().max() < 1e-9


def test_fused_and_explicit_attention_agree():
    attention = cikd.Attention(64, 4).double()
    x = torch.randn(2, 17, 64, dtype=torch.float64)
    q, k, v = attention.project(x)
    maps = (q @ k.transpose(-2, -1) / math.sqrt(16)).softmax(-1)
    explicit = attention.proj((maps @ v).transpose(1, 2).reshape(2, 17, 64))
    assert (attention(q, k, v) - explicit).abs().max() < 1e-12
    assert (cikd.relation(q, k).exp() - maps).abs().max() < 1e-6             # relation() computes in float32


def test_sincos_positions_tell_places_apart():
    table = cikd.sincos_positions(8, 64)
    assert table.shape == (1, 65, 64) and (table[0, 0] == 0).all()
    near = torch.cdist(table[0, 1:], table[0, 1:]) + 9 * torch.eye(64)
    place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    step = torch.cdist(place, place).gather(1, near.argmin(1)[:, None])
    assert near.min() > 0.1 and (step == 1).all()            # the most similar position is always a direct neighbour


def test_drop_path_rises_and_is_off_in_evaluation():
    student = small_student(drop_path=0.2)
    assert [b.drop_path.p for b in student.blocks] == pytest.approx([0, 0.1, 0.2])
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(student.eval()(x), student(x)) and not torch.equal(student.train()(x), student(x))


def test_taps_stop_early_and_do_not_change_the_logits():
    student, calls = small_student().eval(), []
    for i, block in enumerate(student.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
    x = torch.randn(2, 3, 32, 32)
    logits, tapped = student.forward_taps(x, (0, 2))
    assert torch.equal(logits, student(x)) and list(tapped) == [0, 2] and tapped[2][0].shape == (2, 4, 65, 16)
    calls.clear()
    none, early = student.forward_taps(x, (0, 1), classify=False)
    assert none is None and calls == [0] and torch.equal(early[0][2], tapped[0][2])


# ---- 4. teacher

@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_teacher_gives_torchvisions_logits(name):
    ours, theirs = cikd.ResNetTeacher(name, 1000, 224).eval(), getattr(torchvision.models, name)().eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert (ours(x)[0] - theirs(x)).abs().max() < 1e-4


@pytest.mark.parametrize("name,size,shapes", [
    ("resnet20", 32, [(16, 32), (32, 16), (64, 8)]), ("resnet56", 32, [(16, 32), (32, 16), (64, 8)]),
    ("resnet18", 32, [(64, 32), (128, 16), (256, 8), (512, 4)]), ("resnet34", 224, [(64, 56), (128, 28), (256, 14), (512, 7)])])
def test_teacher_maps(name, size, shapes):
    teacher = cikd.ResNetTeacher(name, 10, size).eval()
    logits, maps = teacher(torch.randn(1, 3, size, size))
    assert logits.shape == (1, 10) and [(m.shape[1], m.shape[2]) for m in maps] == shapes
    convolutions = sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) for m in teacher.modules())
    assert convolutions + 1 == int(name[6:]) + (size > 64) * -1        # He 2016 counts 3x3 layers and fc; a 7x7 stem is one


def test_teacher_stops_where_it_is_told():
    teacher, calls = cikd.ResNetTeacher("resnet20", 10, 32).eval(), []
    teacher.layer3.register_forward_hook(lambda *_: calls.append(3))
    x = torch.randn(2, 3, 32, 32)
    logits, maps = teacher(x, stop=2)
    assert logits is None and len(maps) == 2 and not calls and torch.equal(maps[1], teacher(x)[1][1])


def test_teacher_is_untouched_by_student_training(tiny, monkeypatch):
    """Bit by bit, BatchNorm's running statistics included, through ALI and LM."""
    kept, freeze = [], cikd.freeze
    monkeypatch.setattr(cikd, "freeze", lambda teacher: kept.append(freeze(teacher)) or kept[-1])
    run = Path(cikd.train(tiny)["folder"])
    before = cikd.load(cikd.read_run(run)[0]["teacher_file"])
    after = kept[0].state_dict()
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    assert any("running_var" in n and not torch.equal(v, torch.ones_like(v)) for n, v in before.items())
    assert not kept[0].training and not any(p.requires_grad for p in kept[0].parameters())


# ---- 5. ALI

@pytest.mark.parametrize("shape,grid,heads", [((2, 16, 32, 32), 8, 4), ((2, 64, 32, 32), 8, 3), ((1, 32, 8, 8), 8, 5),
                                              ((2, 128, 7, 7), 14, 3), ((2, 10, 9, 9), 4, 4)])
def test_teacher_attention_rows_sum_to_one(shape, grid, heads):
    torch.manual_seed(0)
    features = torch.randn(shape).relu()
    maps = cikd.teacher_attention(features, grid, heads, 0.2)
    assert maps.shape == (shape[0], heads, grid ** 2, grid ** 2)
    assert torch.allclose(maps.sum(-1), torch.ones(1), atol=1e-5) and (maps >= 0).all()
    assert (maps.argmax(-1) == torch.arange(grid ** 2)).float().mean() > 0.95     # nothing looks more like a patch than itself
    assert not torch.equal(maps[:, 0], maps[:, 1])
    shared = cikd.teacher_attention(features, grid, heads, 0.2, shared=True)
    assert torch.equal(shared[:, 0], shared[:, 1]) and shared.shape == maps.shape


def test_teacher_attention_against_plain_loops():
    torch.manual_seed(1)
    features = torch.randn(1, 6, 4, 4)
    maps = cikd.teacher_attention(features, 4, 2, 0.3)
    for head, channels in enumerate((slice(0, 3), slice(3, 6))):
        vectors = features[0, channels].flatten(1).T.double()
        vectors = vectors - vectors.mean(0)
        for i in range(16):
            scores = torch.stack([F.cosine_similarity(vectors[i], vectors[j], dim=0) for j in range(16)]) / 0.3
            assert torch.allclose(maps[0, head, i].double(), scores.exp() / scores.exp().sum(), atol=1e-6)


def test_teacher_attention_extremes():
    constant = cikd.teacher_attention(torch.ones(1, 8, 8, 8), 8, 4)
    assert torch.allclose(constant, torch.full_like(constant, 1 / 64))       # nothing to tell apart: uniform, not NaN
    features = torch.randn(1, 64, 8, 8)
    reach = [float(cikd.teacher_attention(features, 8, 1, tau).max(-1).values.mean()) for tau in (0.05, 0.2, 1.0)]
    assert reach[0] > reach[1] > reach[2]


@pytest.mark.parametrize("seed", range(4))
def test_ali_loss_is_the_kl_of_torch_distributions(seed):
    torch.manual_seed(seed)
    B, H, N, d = [(2, 3, 16, 8), (1, 1, 4, 4), (3, 4, 9, 5), (2, 2, 25, 16)][seed]
    q, k, v = torch.randn(3, B, H, N + 1, d).unbind(0)
    target = torch.randn(B, H, N, N).mul(2).softmax(-1)
    want = 0
    for a, b in ((q, k), (v, v)):
        logits = a[:, :, 1:] @ b[:, :, 1:].transpose(2, 3) / d ** 0.5
        want = want + torch.distributions.kl_divergence(
            torch.distributions.Categorical(probs=target), torch.distributions.Categorical(logits=logits)).mean()
    assert float(cikd.ali_loss((q, k, v), target)) == pytest.approx(float(want), rel=1e-4)
    parts = [float(cikd.ali_loss((q, k, v), target, r)) for r in ("qk", "vv")]
    assert sum(parts) == pytest.approx(float(want), rel=1e-4)
    moved = torch.cat([torch.randn(B, H, 1, d), q[:, :, 1:]], 2)             # what CLS does is not asked
    assert float(cikd.ali_loss((moved, k, v), target)) == pytest.approx(float(want), rel=1e-4)


def test_ali_loss_is_zero_for_a_perfect_imitator():
    q, k, v = torch.randn(3, 2, 3, 17, 8).unbind(0)
    assert abs(float(cikd.ali_loss((q, k, v), cikd.relation(q[:, :, 1:], k[:, :, 1:]).exp(), "qk"))) < 1e-5


def models(method="cikd", **kwargs):
    cfg = cikd.resolve(cikd.Config(method=method, **kwargs))
    torch.manual_seed(0)
    return cfg, cikd.build_student(cfg, 10), cikd.freeze(cikd.ResNetTeacher(cfg.teacher, 10, cfg.image_size))


def gradients(stage, labels, seed=0, **kwargs):
    cfg, student, teacher = models(**kwargs)
    torch.manual_seed(seed)
    view = torch.rand(12, 3, 32, 32) * 2 - 1
    loss, terms = cikd.student_loss(stage, cfg, student.train(), teacher, view, labels, torch.tensor(0.5))
    loss.backward()
    return loss.detach(), terms, {n: p.grad for n, p in student.named_parameters()}


def test_ali_never_uses_the_labels():
    labels = torch.arange(12) % 10
    loss, _, grads = gradients(cikd.ALI, labels)
    for other in (labels.flip(0), torch.zeros_like(labels)):
        again, _, same = gradients(cikd.ALI, other)
        assert torch.equal(loss, again) and all(torch.equal(g, same[n]) for n, g in grads.items() if g is not None)
    assert sum(g is not None for g in grads.values()) > 60 and grads["head.weight"] is None
    _, _, changed = gradients(cikd.LM, labels.flip(0))
    assert not torch.equal(changed["head.weight"], gradients(cikd.LM, labels)[2]["head.weight"])     # LM does


def test_ali_stops_both_models_as_early_as_it_can():
    cfg, student, teacher = models(pairs="0:1,2:2")
    calls = []
    teacher.layer3.register_forward_hook(lambda *_: calls.append("layer3"))
    for i, block in enumerate(student.blocks):
        block.norm1.register_forward_hook(lambda *_, i=i: calls.append(i))
    cikd.student_loss(cikd.ALI, cfg, student, teacher, torch.rand(2, 3, 32, 32), torch.zeros(2).long(), torch.tensor(1.0))
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("stage", [cikd.ALI, cikd.LM, cikd.JOINT])
def test_teacher_and_student_see_the_same_crop(stage):
    cfg, student, teacher = models(jitter=0.3)
    seen = {}
    teacher.conv1.register_forward_pre_hook(lambda _, x: seen.update(teacher=x[0]))
    student.patch_embed.register_forward_pre_hook(lambda _, x: seen.update(student=x[0]))
    view = torch.rand(4, 3, 32, 32) * 2 - 1
    cikd.student_loss(stage, cfg, student, teacher, view, torch.zeros(4).long(), torch.tensor(1.0))
    assert torch.equal(seen["teacher"], view)
    if stage == cikd.ALI:                                    # the same places, in other colours
        assert not torch.equal(seen["student"], view)
        gray = lambda x: x.mean(1).flatten(1) - x.mean((1, 2, 3))[:, None]
        assert (F.cosine_similarity(gray(seen["student"]), gray(view)) > 0.95).all()
    else:
        assert torch.equal(seen["student"], view)


def test_attention_distance_known_values():
    uniform = torch.full((2, 3, 64, 64), 1 / 64)
    assert cikd.attention_distance(uniform).shape == (2, 3)
    assert float(cikd.attention_distance(uniform)[0, 0]) == pytest.approx(4.14, abs=0.01)
    assert float(cikd.attention_distance(torch.eye(64))) == pytest.approx(0, abs=1e-6)


def test_attention_distance_against_loops():
    torch.manual_seed(0)
    maps = torch.rand(25, 25).softmax(-1)
    want = sum(float(maps[i, j]) * math.hypot(i // 5 - j // 5, i % 5 - j % 5) for i in range(25) for j in range(25)) / 25
    assert float(cikd.attention_distance(maps)) == pytest.approx(want, rel=1e-5)


# ---- 6. LM

def plain_dkd(student, teacher, labels, alpha, beta, T):
    """DKD as its paper writes it, one sample at a time, in float64, with probabilities instead of logarithms."""
    total = 0.0
    for s, t, y in zip((student.double() / T).softmax(1), (teacher.double() / T).softmax(1), labels.tolist()):
        rest = [c for c in range(len(s)) if c != y]
        kl = lambda p, q: sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q))
        tckd = kl([t[y], t[rest].sum()], [s[y], s[rest].sum()])
        nckd = kl(t[rest] / t[rest].sum(), s[rest] / s[rest].sum())
        total += alpha * tckd + beta * nckd
    return T * T * total / len(labels)


@pytest.mark.parametrize("seed,K,T", [(0, 2, 1.0), (1, 10, 1.0), (2, 10, 4.0), (3, 1000, 2.0)])
def test_dkd_is_the_papers_formula(seed, K, T):
    torch.manual_seed(seed)
    student, teacher, labels = torch.randn(5, K) * 3, torch.randn(5, K) * 3, torch.randint(0, K, (5,))
    got = cikd.dkd_loss(student.double(), teacher.double(), labels, 1.3, 4.2, T)
    assert float(got) == pytest.approx(plain_dkd(student, teacher, labels, 1.3, 4.2, T), rel=1e-9)


@pytest.mark.parametrize("K", [2, 3, 100])
def test_dkd_and_classic_kd_are_the_same_by_the_identity(K):
    """KL(teacher || student) = TCKD + (1 - p_y of the teacher) NCKD, sample by sample."""
    torch.manual_seed(K)
    student, teacher, labels = torch.randn(2, 20, K, dtype=torch.float64) .mul(4).unbind(0) + (torch.randint(0, K, (20,)),)
    for s, t, y in zip(student.split(1), teacher.split(1), labels.split(1)):
        classic = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True)
        beta = float(1 - t.softmax(1)[0, y])
        assert float(cikd.dkd_loss(s, t, y, 1.0, beta)) == pytest.approx(float(classic), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("K", [2, 10, 1000])
@pytest.mark.parametrize("dtype,gap", [(torch.float32, 1e4), (torch.bfloat16, 1e3), (torch.float16, 1e3)])
def test_lm_is_finite_when_models_are_sure(K, dtype, gap):
    for student_at, teacher_at in ((0, 0), (1, 0), (0, 1), (1, 1)):          # label 0: both right, one wrong, both wrong
        student = torch.zeros(3, K, dtype=dtype)
        student[:, student_at] = gap
        teacher = torch.zeros(3, K, dtype=dtype)
        teacher[:, teacher_at] = gap
        student.requires_grad_()
        loss, ce, dkd = cikd.lm_loss(student, teacher, torch.zeros(3, dtype=torch.long))
        loss.backward()
        assert torch.isfinite(torch.stack([loss, ce, dkd])).all() and torch.isfinite(student.grad).all()
        if student_at == teacher_at:
            assert float(dkd.detach()) == pytest.approx(0, abs=1e-4)


def test_lm_is_cross_entropy_plus_weighted_dkd():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(8, 10), torch.randn(8, 10), torch.arange(8)
    loss, ce, dkd = cikd.lm_loss(student, teacher, labels, 0.7, 0.1, beta=2.0)
    smooth = F.one_hot(labels, 10) * 0.9 + 0.01
    assert float(ce) == pytest.approx(float(-(smooth * student.log_softmax(1)).sum(1).mean()), rel=1e-5)
    assert float(dkd) == pytest.approx(plain_dkd(student, teacher, labels, 1.0, 2.0, 1.0), rel=1e-5)
    assert float(loss) == pytest.approx(float(ce + 0.7 * dkd), rel=1e-6)


# ---- 7. curriculum

def test_curriculum_switches_once_at_ali_epochs():
    names = [cikd.curriculum("cikd", epoch, 3).name for epoch in range(6)]
    assert names == ["ALI", "ALI", "ALI", "LM", "LM", "LM"]
    assert {cikd.curriculum("scratch", e, 3) for e in range(6)} == {cikd.LABELS}
    assert {cikd.curriculum("kd", e, 3) for e in range(6)} == {cikd.LM}
    assert {cikd.curriculum("joint", e, 3) for e in range(6)} == {cikd.JOINT}
    assert set(cikd.METHODS) == set(next(f for f in fields(cikd.Config) if f.name == "method").metadata["choices"])


@pytest.mark.parametrize("stage,learned", [(cikd.ALI, [1, 0, 0]), (cikd.LM, [0, 1, 1]), (cikd.JOINT, [1, 1, 1]),
                                           (cikd.LABELS, [0, 1, 0])])
def test_the_loss_is_made_of_what_the_stage_learns(stage, learned):
    loss, terms, _ = gradients(stage, torch.arange(12) % 10)
    assert not terms.requires_grad                           # kept until the epoch ends: must not hold the graphs
    assert (terms > 0).int().tolist() == learned
    assert float(loss) == pytest.approx(float(terms[0] + terms[1] + 0.5 * terms[2]), rel=1e-5)


# ---- 8. training

def test_learning_rate_rises_then_falls():
    rates = [cikd.learning_rate((i + 1) / 100, 1.0, 0.01, 0.1) for i in range(100)]
    assert rates[4] == pytest.approx(0.5) and max(rates) == rates[9] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))
    assert [cikd.learning_rate(p, 1.0, 0.0, w) for p, w in ((1.0, 0.0), (1.0, 1.0), (0.5, 1.0))] == pytest.approx([0, 1, 0.5])


def test_weight_decay_and_layer_decay_groups():
    cfg, student, _ = models(layer_decay=0.5)
    groups = cikd.adamw(student, cfg, cikd.LM).param_groups
    where = {id(p): g for g in groups for p in g["params"]}
    assert len(where) == len(list(student.parameters()))
    for name, p in student.named_parameters():
        free = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
        layer = 7 if name.startswith(("norm", "head")) else int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0
        assert where[id(p)]["weight_decay"] == (0 if free else 0.05), name
        assert where[id(p)]["peak"] == pytest.approx(2e-3 * 0.5 ** (7 - layer)), name
    assert {g["peak"] for g in cikd.adamw(student, cfg, cikd.ALI).param_groups} == {2e-3}     # layer decay is LM's
    assert len(cikd.adamw(student, replace(cfg, layer_decay=1.0), cikd.LM).param_groups) == 2         # one fused step each
    assert cikd.resolve(cikd.Config(student="vit_tiny")).lr == 1e-3         # the rate depends on the student


def test_batches_cover_the_epoch_and_keep_one_shape():
    cfg = cikd.resolve(cikd.Config(train_size=50, holdout=20, batch_size=16, crop="pad"))
    data = cikd.load_dataset(cfg)
    torch.manual_seed(0)
    epoch = list(cikd.batches(data, cfg, torch.device("cpu")))
    assert [x.shape[0] for x, _ in epoch] == [16, 16, 16] and epoch[0][0].dtype == torch.float32
    only = list(cikd.batches(data, replace(cfg, batch_size=500), torch.device("cpu")))
    assert len(only) == 1 and sorted(only[0][1].tolist()) == sorted(data.train_labels.tolist())


def test_evaluate_counts_right_answers_in_evaluation_mode():
    student = small_student(drop_path=0.5).train()
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    answers = student.eval()(cikd.to_float(images)).argmax(1)
    labels = torch.where(torch.arange(30) < 12, answers, (answers + 1) % 10)
    assert cikd.evaluate(student.train(), images, labels, batch_size=7) == pytest.approx(40.0) and student.training


COLUMNS = ("stage", "epoch", "loss", "ali", "ce", "dkd", "lr", "accuracy", "attention_distance", "seconds",
           "images_per_second")


def read_metrics(run) -> list[dict]:
    with open(Path(run) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_the_readme_says(tiny):
    result = cikd.train(tiny)
    run = Path(result["folder"])
    assert {p.name for p in run.iterdir()} == {"settings.json", "metrics.csv", "student_init.pt", "student_ali.pt", "student.pt"}
    rows = read_metrics(run)
    assert tuple(rows[0]) == COLUMNS and [r["stage"] for r in rows] == ["ALI", "LM"]
    assert float(rows[-1]["accuracy"]) == result["accuracy"] and result["epochs"] == 2
    facts = json.loads((run / "settings.json").read_text())
    cfg = cikd.Config(**facts["settings"])                   # what a reader needs to build the model again
    student = cikd.build_student(cfg, len(facts["classes"]))
    student.load_state_dict(torch.load(run / "student.pt", weights_only=True), strict=True)
    data = cikd.load_dataset(cfg)
    assert cikd.evaluate(student, data.test_images, data.test_labels) == result["accuracy"]
    init, ali, last = (cikd.load(run / f"student{x}.pt") for x in ("_init", "_ali", ""))
    assert not torch.equal(init["blocks.0.attn.qkv.weight"], ali["blocks.0.attn.qkv.weight"])
    assert torch.equal(init["head.weight"], ali["head.weight"]) and not torch.equal(ali["head.weight"], last["head.weight"])


def test_the_last_epochs_accuracy_counts_not_the_best_ones(tiny, monkeypatch, capsys):
    accuracies = iter([90.0, 70.0, 80.0])
    monkeypatch.setattr(cikd, "evaluate", lambda *_: next(accuracies))
    result = cikd.train(replace(tiny, method="scratch", epochs=3))
    assert result["accuracy"] == 80 and "accuracy 80.0 % after 3 epochs" in capsys.readouterr().out


def test_the_optimizer_is_fresh_after_the_switch_and_ramp_counts_from_it(tiny, monkeypatch):
    made, ramps, loss = [], [], cikd.student_loss
    adamw = cikd.adamw
    monkeypatch.setattr(cikd, "adamw", lambda s, c, stage: made.append(stage.name) or adamw(s, c, stage))
    monkeypatch.setattr(cikd, "student_loss", lambda stage, *a: ramps.append((stage.name, float(a[-1]))) or loss(stage, *a))
    cikd.train(replace(tiny, epochs=5, ali_epochs=2, ramp_epochs=2, batch_size=60))
    assert made == ["ALI", "LM"]
    assert ramps[2:] == [("LM", 0.0), ("LM", 0.5), ("LM", 1.0)] and [r[0] for r in ramps[:2]] == ["ALI", "ALI"]
    rates = [float(r["lr"]) for r in read_metrics(Path(tiny.output_dir) / cikd.resolve(
        replace(tiny, epochs=5, ali_epochs=2, ramp_epochs=2, batch_size=60)).run_name)]
    assert rates[1] == pytest.approx(1e-6) and rates[4] == pytest.approx(1e-6) and rates[2] > 5e-4     # a fresh cosine


def same(run, other):
    """Every tensor and every column but the timings is bit-identical."""
    for name in ("student_init.pt", "student_ali.pt", "student.pt"):
        a, b = cikd.load(Path(run) / name), cikd.load(Path(other) / name)
        assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a), name
    strip = lambda rows: [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in rows]
    assert strip(read_metrics(run)) == strip(read_metrics(other))


class Stop(Exception):
    pass


@pytest.mark.parametrize("where,at", [("teacher", 1), ("student", 1), ("student", 2), ("student", 3)])
def test_a_stopped_run_goes_on_bit_by_bit(where, at, tmp_path, monkeypatch, capsys):
    """Stopped in the teacher's training, in ALI, right at the switch, in LM."""
    cfg = cikd.Config(**TINY | dict(epochs=4, ali_epochs=2, teacher_epochs=2), output_dir=str(tmp_path / "a"))
    whole = cikd.train(cfg)["folder"]
    seed_torch = cikd.seed_torch

    def interrupt(*parts):
        if parts[1:] == (where, at):
            raise KeyboardInterrupt
        seed_torch(*parts)

    monkeypatch.setattr(cikd, "seed_torch", interrupt)
    cut = replace(cfg, output_dir=str(tmp_path / "b"))
    with pytest.raises(KeyboardInterrupt):
        cikd.train(cut)
    line = capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "b" / Path(whole).name / "student.pt").exists()
    monkeypatch.setattr(cikd, "seed_torch", seed_torch)
    assert line.startswith("stopped; to go on: python cikd.py ")
    assert cikd.main(line.split("cikd.py ")[1].split()) == 0                 # exactly what was printed
    same(whole, tmp_path / "b" / Path(whole).name)


KILLER = """
import io, os, signal, sys
import cikd
left, log = int(sys.argv[1]), open(sys.argv[2], "a", buffering=1)

def moment(place):                                           # the n-th moment of this process is its last
    global left
    left -= 1
    if left == 0:
        print("killed", place, file=log)
        os.kill(os.getpid(), signal.SIGKILL)

class Slow(io.FileIO):
    def write(self, content):
        super().write(content[:len(content) // 2])
        moment("half-written " + os.path.basename(self.name))
        return super().write(content[len(content) // 2:])

def watched(function, name):
    def call(*args):
        moment("before " + name)
        result = function(*args)
        moment("after " + name)
        return result
    return call

def begin(*parts, real=cikd.seed_torch):
    if len(parts) == 3:
        print("begun", *parts[1:], file=log)
        moment("in " + parts[1])
    real(*parts)

def batches(*args, real=cikd.batches):
    for batch in real(*args):
        moment("at a step")
        yield batch

cikd.open, cikd.seed_torch, cikd.batches = Slow, begin, batches
os.replace = watched(os.replace, "renaming")
sys.exit(cikd.main(sys.argv[3:]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_dozen_kills_change_nothing_and_lose_one_epoch_at_most(tmp_path):
    """SIGKILL at seeded random moments, again and again, until the run gets to its end."""
    args = ("--train-size 60 --holdout 40 --epochs 4 --ali-epochs 2 --teacher-epochs 2 --batch-size 20 --crop pad "
            "--run-name run --device cpu").split()
    rng, log, kills = random.Random(1), tmp_path / "log.txt", 0
    while True:
        done = subprocess.run([sys.executable, "-c", KILLER, str(rng.randint(5, 24) if kills < 16 else -1), str(log), *args, "--output-dir",
                               str(tmp_path / "b")], cwd=Path(cikd.__file__).parent, capture_output=True, text=True, timeout=300)
        if done.returncode != -signal.SIGKILL:
            break
        kills += 1
    assert done.returncode == 0 and kills >= 12, (kills, done.stderr)
    lines = [line.split() for line in log.read_text().splitlines()]
    begun = [(line[1] == "student", int(line[2])) for line in lines if line[0] == "begun"]
    assert begun == sorted(begun) and set(begun) == {*((False, e) for e in range(2)), *((True, e) for e in range(4))}
    during = [last for last, line in zip(lines, lines[1:]) if line[0] == "killed" and last[0] == "begun"]
    assert {"teacher" if d[1] == "teacher" else "ALI" if int(d[2]) < 2 else "LM" for d in during} == {"teacher", "ALI", "LM"}
    places = [" ".join(line[1:]) for line in lines if line[0] == "killed"]
    assert sum("writ" in p or "renaming" in p for p in places) >= 2 and "at a step" in places, places
    assert run_cli(tmp_path, *args, "--output-dir", "a").returncode == 0
    same(tmp_path / "a" / "run", tmp_path / "b" / "run")
    (one,), (two,) = ((tmp_path / x / "teachers").iterdir() for x in "ab")
    assert read_metrics(one)[1]["loss"] == read_metrics(two)[1]["loss"] and len(read_metrics(two)) == 2
    assert not list((tmp_path / "b" / "run").rglob("*.tmp")) and not list((tmp_path / "b").rglob("last.pt"))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    """No file may grow beyond 2 MB: student_init.pt fits, last.pt does not."""
    resource = pytest.importorskip("resource")
    cfg = cikd.Config(**TINY | dict(epochs=3, method="scratch"), run_name="run", output_dir=str(tmp_path / "a"))
    cikd.train(cfg)
    seed_torch = cikd.seed_torch
    monkeypatch.setattr(cikd, "seed_torch", lambda *parts: cikd.no_such_name if parts[1:] == ("student", 1) else seed_torch(*parts))
    with pytest.raises(AttributeError):
        cikd.train(replace(cfg, output_dir=str(tmp_path / "b")))
    before = (tmp_path / "b" / "run" / "last.pt").read_bytes()
    assert len(before) > 2_000_000 > (tmp_path / "b" / "run" / "student_init.pt").stat().st_size
    full = run_cli(tmp_path, "--resume", "b/run", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)))
    assert full.returncode == 2 and re.fullmatch(r"cikd: error: b/run/last.pt: cannot be written \([^\n]+too large\)[^\n]+\n", full.stderr)
    assert (tmp_path / "b" / "run" / "last.pt").read_bytes() == before and not list((tmp_path / "b" / "run").glob("*.tmp"))
    assert run_cli(tmp_path, "--resume", "b/run").returncode == 0
    assert read_metrics(tmp_path / "a" / "run")[2]["loss"] == read_metrics(tmp_path / "b" / "run")[2]["loss"]
    a, b = (cikd.load(tmp_path / x / "run" / "student.pt") for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_other_settings_or_images_do_not_go_on(tiny, capsys, monkeypatch):
    cikd.train(replace(tiny, run_name="mine"))
    there = ["--output-dir", tiny.output_dir, "--run-name", "mine", "--train-size", 60, "--holdout", 40, "--epochs", 2,
             "--ali-epochs", 1, "--teacher-epochs", 1]
    line = fails(capsys, *there, "--tau", 0.5, "--lr", 0.01)
    assert "tau 0.2 -> 0.5" in line and "lr 0.002 -> 0.01" in line and "--overwrite" in line
    run = Path(tiny.output_dir) / "mine"
    assert "tau 0.2 -> 0.9" in fails(capsys, "--resume", run, "--tau", 0.9)
    before = {p: p.read_bytes() for p in run.iterdir()}
    assert cikd.main([str(a) for a in there]) == 0           # finished: reported again, not run again
    assert before == {p: p.read_bytes() for p in run.iterdir()}
    (run / "student.pt").unlink()
    shapes = cikd.make_shapes
    monkeypatch.setattr(cikd, "make_shapes", lambda n, seed, size: shapes(n, seed + 77, size))
    assert "other images" in fails(capsys, "--resume", run)


def test_a_teacher_is_kept_for_exactly_what_it_depends_on(tiny, monkeypatch):
    """Each fact has a folder of its own; what a teacher does not depend on does not train another."""
    paths, data = set(), cikd.load_dataset(cikd.resolve(tiny))
    monkeypatch.setattr(cikd, "train_teacher", lambda teacher, cfg, data, device, path: paths.add(path) or cikd.save(
        path, teacher.state_dict()))
    def ask(data=data, **kwargs):
        cikd.get_teacher(cikd.resolve(replace(tiny, **kwargs)), data, torch.device("cpu"))
        return len(paths)
    assert ask() == 1 == ask(seed=5, tau=0.7, method="kd", lr=0.1)
    changes = [dict(teacher="resnet56"), dict(teacher_epochs=2), dict(teacher_lr=0.2), dict(batch_size=7), dict(crop="pad"),
               dict(crop_scale=0.5), dict(label_smoothing=0.2), dict(warmup=0.2), dict(min_lr=0.01), dict(data_seed=1),
               dict(data=data._replace(fingerprint="other"))]
    assert [ask(**change) for change in changes] == list(range(2, len(changes) + 2))


def test_the_teacher_learns_smoothed_labels(tiny, tmp_path):
    """A model that has learned nothing has the smoothed cross-entropy of a uniform guess, ln 10, and no other."""
    cfg = cikd.resolve(replace(tiny, teacher_lr=1e-9, label_smoothing=0.4, batch_size=60))
    data, seen = cikd.load_dataset(cfg), []
    teacher = cikd.ResNetTeacher("resnet20", 10, 32)
    teacher.register_forward_hook(lambda _, x, out: seen.append(out[0].detach()) if teacher.training else None)
    cikd.train_teacher(teacher, cfg, data, torch.device("cpu"), tmp_path / "t" / "teacher.pt")
    cikd.seed_torch(cfg.data_seed, "teacher", 0)
    (_, labels), = cikd.batches(data, cfg, torch.device("cpu"))
    smooth = F.one_hot(labels, 10) * 0.6 + 0.04
    want = float(-(smooth * seen[0].log_softmax(1)).sum(1).mean())
    assert float(read_metrics(tmp_path / "t")[0]["ce"]) == pytest.approx(want, rel=1e-4)


def test_another_teacher_does_not_go_on(tiny, monkeypatch, capsys):
    run = Path(cikd.train(tiny)["folder"])
    (run / "student.pt").unlink()
    path = Path(cikd.read_run(run)[0]["teacher_file"])
    cikd.save(path, {k: v + 1 if k == "fc.bias" else v for k, v in cikd.load(path).items()})
    assert "is not the teacher" in fails(capsys, "--resume", run)


@pytest.mark.parametrize("fault,says", [
    ("settings type", "--epochs: '2'"), ("settings key", "another version"), ("settings text", "holds no whole run"),
    ("no metrics", "holds no whole run"), ("last rows", "no checkpoint of this run"), ("last cut", "not a readable checkpoint"),
    ("last optimizer", "no checkpoint of this run"), ("last moments", "no checkpoint of this run"), ("last none", "no checkpoint of this run"),
    ("last flip", "is damaged"), ("student flip", "is damaged"), ("student folder", "not a readable checkpoint"), ("metrics short", "1 of 2 epochs"),
    ("metrics text", "holds no whole run"), ("metrics row", "another version"), ("json 3", "another version"), ("json null", "another version"),
    ("json [" + 9999 * "[", "holds no whole run"), ("set dataset null", "--dataset"), ("set heads [4]", "--heads"), ("set seed true", "--seed"),
    ("set tau null", "--tau"), ("folder is a file", "")], ids=lambda text: text[:20])
def test_damaged_runs(fault, says, tiny, capsys, monkeypatch):
    monkeypatch.setattr(cikd, "save", (lambda real: lambda path, content: (_ for _ in ()).throw(KeyboardInterrupt)
                                       if path.name == "student.pt" and fault.startswith("last") else real(path, content))(cikd.save))
    run = Path(tiny.output_dir) / cikd.resolve(tiny).run_name
    try:
        cikd.train(tiny)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    facts = json.loads((run / "settings.json").read_text())
    if fault == "settings type":
        facts["settings"]["epochs"] = "2"
    if fault == "settings key":
        del facts["data"]
    if fault.startswith("set "):
        facts["settings"][fault.split()[1]] = json.loads(fault.split()[2])
    (run / "settings.json").write_text("{" if fault == "settings text" else fault[5:] if fault.startswith("json") else json.dumps(facts))
    if fault == "no metrics":
        (run / "metrics.csv").unlink()
    if fault in ("last rows", "last optimizer", "last moments", "last none"):
        last = cikd.load(run / "last.pt")
        if fault == "last rows":
            del last["rows"]
        if fault == "last optimizer":
            last["optimizer"] = {}
        if fault == "last moments":
            last["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
        if fault == "last none":
            last["rows"] = []
        cikd.save(run / "last.pt", last)
    if fault.endswith("flip"):                               # one bit, in the middle of the weights
        path = run / ("last.pt" if fault == "last flip" else "student.pt")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x40
        path.write_bytes(content)
    if fault == "student folder":
        (run / "student.pt").unlink()
        (run / "student.pt").mkdir()
    if fault.startswith("metrics"):
        lines = (run / "metrics.csv").read_text().splitlines()
        (run / "metrics.csv").write_text("\n".join({"metrics short": lines[:2], "metrics text": [lines[0], lines[1].replace("0.", "x")],
                                                    "metrics row": [*lines[:2], "ALI,1"]}[fault]))
    if fault == "last cut":
        shorten(run / "last.pt")
    if fault == "folder is a file":
        for path in run.iterdir():
            path.unlink()
        run.rmdir()
        run.write_text("in the way")
    assert says in fails(capsys, "--resume", run)


def test_weights_that_are_not_finite_are_never_saved(tiny, monkeypatch):
    loss, calls = cikd.student_loss, []

    def poisoned(stage, cfg, student, *rest):
        value, terms = loss(stage, cfg, student, *rest)
        calls.append(stage)
        if len(calls) == 4:                                  # the last step of the last epoch: the loss itself is fine
            student.blocks[0].attn.qkv.weight.register_hook(lambda g: g * math.nan)
        return value, terms
    monkeypatch.setattr(cikd, "student_loss", poisoned)
    with pytest.raises(cikd.CIKDError, match="epoch 2, end: a weight is"):
        cikd.train(replace(tiny, batch_size=30))
    run = Path(tiny.output_dir) / cikd.resolve(replace(tiny, batch_size=30)).run_name
    assert not (run / "student.pt").exists() and cikd.all_finite(cikd.load(run / "last.pt")["model"].values())


def test_two_folders_of_one_name_are_told_apart(tmp_path, capsys):
    args = ["--dataset", "folder", "--image-size", 32, "--patch-size", 8, "--student", "vit_micro", "--method", "scratch",
            "--epochs", 1, "--output-dir", tmp_path / "runs", "--data-dir"]
    make_folder(tmp_path / "a" / "pics")
    make_folder(tmp_path / "b" / "pics", train=9)
    assert cikd.main([str(a) for a in [*args, tmp_path / "a" / "pics"]]) == 0
    assert "other images" in fails(capsys, *args, tmp_path / "b" / "pics")


def test_what_the_machine_lacks_is_said_plainly(tiny, monkeypatch, capsys):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce] can't allocate memory"),
                  RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), RuntimeError("CUDA error: out of memory")):
        monkeypatch.setattr(cikd, "train", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert "--batch-size" in fails(capsys)
    monkeypatch.setattr(cikd, "train", lambda *_: (_ for _ in ()).throw(RuntimeError("torch.compile is not supported on Python 3.15+")))
    assert "use --compile off" in fails(capsys)
    monkeypatch.setattr(cikd, "train", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError):                        # what only a programmer can mend keeps its traceback
        cikd.main([])


def test_overwrite_removes_nothing_before_all_it_needs_is_there(tiny, capsys):
    run = Path(cikd.train(replace(tiny, run_name="r"))["folder"])
    files = {p: p.read_bytes() for p in run.iterdir()}
    Path(cikd.read_run(run)[0]["teacher_file"]).write_bytes(b"junk")
    with pytest.raises(cikd.CIKDError, match="teacher.pt: not a readable"):
        cikd.train(replace(tiny, run_name="r", overwrite=True))
    assert {p: p.read_bytes() for p in run.iterdir()} == files
    assert "--overwrite would remove" in fails(capsys, "--resume", run, "--overwrite")


def test_stopped_while_overwriting(tiny, capsys, monkeypatch):
    """Before the old run is removed, the same command is to be given again; after that, --resume goes on."""
    run = Path(cikd.train(replace(tiny, run_name="r"))["folder"])
    (run / "mine.tmp").write_text("the user's own")
    for where, at, says in (("teacher", 0, "to go on: the same command"), ("student", 1, "to go on: python cikd.py --resume")):
        with monkeypatch.context() as patch:
            patch.setattr(cikd, "seed_torch", lambda *parts, real=cikd.seed_torch: (_ for _ in ()).throw(KeyboardInterrupt)
                          if parts[1:] == (where, at) else real(*parts))
            with pytest.raises(KeyboardInterrupt):
                cikd.train(replace(tiny, run_name="r", tau=0.3, teacher_epochs=2, overwrite=True))
        assert says in capsys.readouterr().out and (run / "student.pt").exists() == (where == "teacher")
    assert cikd.main(["--resume", str(run)]) == 0 and cikd.read_run(run)[0]["settings"]["tau"] == 0.3
    assert (run / "mine.tmp").exists()


def test_a_run_goes_on_from_anywhere(tiny, tmp_path, monkeypatch):
    """A stopped run, moved with its teacher and named by another path, trains no second teacher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cikd, "seed_torch", lambda *parts, real=cikd.seed_torch: cikd.stop if parts[1:] == ("student", 1) else real(*parts))
    with pytest.raises(AttributeError):
        cikd.train(replace(tiny, output_dir="here", run_name="r"))
    monkeypatch.undo()
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr(cikd, "train_teacher", lambda *_: pytest.fail("a second teacher"))
    monkeypatch.chdir(tmp_path / "there" / "r")
    assert cikd.main(["--resume", "."]) == 0
    assert not (tmp_path / "here").exists() and (tmp_path / "there" / "r" / "student.pt").exists()


def test_a_closed_stdout_does_not_matter(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert cikd.main(["--heads", "5"]) == 2


def test_overwrite_starts_again(tiny):
    run = Path(cikd.train(tiny)["folder"])
    first = cikd.load(run / "student.pt")
    (run / "student.pt").write_bytes(b"")
    cikd.train(replace(tiny, overwrite=True))
    again = cikd.load(run / "student.pt")
    assert all(torch.equal(first[k], again[k]) for k in first)               # and the same seed gives the same bits


def test_one_seed_gives_one_result(tiny):
    one, two = (cikd.train(replace(tiny, output_dir=tiny.output_dir + x, crop="resized"))["folder"] for x in "12")
    same(one, two)
    other = cikd.load(Path(cikd.train(replace(tiny, seed=1, crop="resized"))["folder"]) / "student.pt")
    assert not any(torch.equal(v, other[k]) for k, v in cikd.load(Path(one) / "student.pt").items() if v.ndim > 1)


def test_seeds_change_runs_and_methods_share_their_start(tiny):
    runs = {(m, s): cikd.load(Path(cikd.train(replace(tiny, method=m, seed=s))["folder"]) / "student_init.pt")
            for m, s in (("cikd", 0), ("kd", 0), ("cikd", 1))}
    assert all(torch.equal(v, runs["kd", 0][k]) for k, v in runs["cikd", 0].items())
    assert not torch.equal(runs["cikd", 0]["head.weight"], runs["cikd", 1]["head.weight"])
    assert len(list((Path(tiny.output_dir) / "teachers").iterdir())) == 1    # trained once, for all


def test_all_methods_see_the_same_images_and_crops_in_the_same_order(tiny, monkeypatch):
    seen, loss = {}, cikd.student_loss
    for method in cikd.METHODS:
        def spy(stage, cfg, student, teacher, view, *rest):
            seen.setdefault(cfg.method, []).append(view.sum((1, 2, 3)))
            return loss(stage, cfg, student, teacher, view, *rest)
        monkeypatch.setattr(cikd, "student_loss", spy)
        cikd.train(replace(tiny, method=method, crop="pad"))
    assert {len(views) for views in seen.values()} == {2 * (60 // 32)}
    assert all(torch.equal(a, b) for m in seen for a, b in zip(seen[m], seen["cikd"], strict=True))


def test_a_loss_that_is_not_finite_stops_the_run(tiny, monkeypatch, capsys):
    loss, calls = cikd.student_loss, []

    def poisoned(stage, *rest):
        calls.append(stage)
        value, terms = loss(stage, *rest)
        return (value * math.nan, terms) if len(calls) == 6 else (value, terms)

    monkeypatch.setattr(cikd, "student_loss", poisoned)
    cfg = replace(tiny, epochs=3, ali_epochs=2, batch_size=20)
    line = fails(capsys, *sum((["--" + f.name.replace("_", "-"), str(getattr(cfg, f.name))] for f in fields(cfg)
                               if getattr(cfg, f.name) not in (None, False)), []))
    assert "ALI, epoch 2, step 3: the loss is nan" in line
    run = Path(tiny.output_dir) / cikd.resolve(cfg).run_name
    assert len(read_metrics(run)) == 1 and not (run / "student_ali.pt").exists()
    assert all(v.isfinite().all() for v in cikd.load(run / "last.pt")["model"].values())
    monkeypatch.setattr(cikd, "student_loss", loss)
    assert cikd.main(["--resume", str(run)]) == 0 and len(read_metrics(run)) == 3


@pytest.mark.parametrize("case", ["constant images", "batch of one", "two classes and a partial batch"])
def test_unusual_data_trains(case, tmp_path):
    root = make_folder(tmp_path / "data", classes=("a", "b"), train=6, test=3)
    cfg = folder_config(root, epochs=2, ali_epochs=1, teacher_epochs=1, output_dir=str(tmp_path / "runs"),
                        batch_size=1 if case == "batch of one" else 500)
    data = cikd.load_dataset(cfg)
    if case == "constant images":
        data = data._replace(train_images=torch.full_like(data.train_images, 128))
    result = cikd.train(cfg, data)
    assert all(math.isfinite(float(r["loss"])) for r in read_metrics(result["folder"]))


def test_own_teacher_and_its_refusals(tiny, tmp_path, capsys):
    run = Path(cikd.train(tiny)["folder"])
    mine = tmp_path / "mine.pt"
    mine.write_bytes(Path(cikd.read_run(run)[0]["teacher_file"]).read_bytes())
    result = cikd.train(replace(tiny, teacher_checkpoint=str(mine), run_name="own"))
    assert all(torch.equal(a, b) for a, b in zip(cikd.load(run / "student.pt").values(),
                                                 cikd.load(Path(result["folder"]) / "student.pt").values()))
    state = cikd.load(mine)
    cikd.save(mine, state | {"fc.bias": state["fc.bias"] + 1})              # the run is finished, but another teacher's now
    with pytest.raises(cikd.CIKDError, match="mine.pt: is not the teacher that"):
        cikd.train(replace(tiny, teacher_checkpoint=str(mine), run_name="own"))
    args = ["--output-dir", tmp_path / "r", "--epochs", 2, "--train-size", 60, "--holdout", 40, "--teacher-checkpoint"]
    assert 'does not fit (Error(s) in loading state_dict for ResNetTeacher: Missing key(s) in state_dict: "layer1.3' in fails(capsys, *args, mine, "--teacher", "resnet56")
    assert "does not fit" in fails(capsys, *args, run / "student.pt")
    cikd.save(tmp_path / "k7.pt", state | {"fc.weight": torch.zeros(7, 64), "fc.bias": torch.zeros(7)})
    assert "size mismatch for fc.weight" in fails(capsys, *args, tmp_path / "k7.pt")
    cikd.save(tmp_path / "more.pt", state | {"aux.weight": torch.zeros(1)})
    assert "aux.weight" in fails(capsys, *args, tmp_path / "more.pt")
    cikd.save(tmp_path / "list.pt", [1, 2])
    assert "does not fit" in fails(capsys, *args, tmp_path / "list.pt")
    cikd.save(tmp_path / "nan.pt", state | {"fc.bias": torch.full((10,), math.nan)})
    assert "not finite" in fails(capsys, *args, tmp_path / "nan.pt")
    assert not (tmp_path / "r").exists()                     # refused before anything is written
    name = "mine-too"
    assert cikd.main([str(a) for a in [*args[:-1], "--run-name", name, "--method", "scratch"]]) == 0
    kept = (tmp_path / "r" / name / "student.pt").read_bytes()
    fails(capsys, *args, tmp_path / "nan.pt", "--run-name", name, "--method", "kd", "--overwrite")
    assert (tmp_path / "r" / name / "student.pt").read_bytes() == kept       # nor is anything removed
    (tmp_path / "cut.pt").write_bytes(mine.read_bytes()[:5000])
    (tmp_path / "none.pt").write_bytes(b"")
    for name in ("cut.pt", "none.pt"):
        assert f"{name}: not a readable checkpoint" in fails(capsys, *args, tmp_path / name)


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["CIKD_EVIL"])),)


def test_a_malicious_checkpoint_does_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CIKD_EVIL", str(tmp_path / "owned"))
    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pt")
    assert "not a readable checkpoint" in fails(capsys, "--output-dir", tmp_path / "r", "--teacher-checkpoint", tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_pretrained_teacher_without_network_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    root = make_folder(tmp_path / "data", size=80)
    assert "--pretrained-teacher: the weights of resnet18" in fails(
        capsys, "--dataset", "folder", "--data-dir", root, "--image-size", 96, "--patch-size", 32, "--pretrained-teacher",
        "--output-dir", tmp_path / "runs")


def test_pretrained_weights_go_everywhere_but_the_classifier(monkeypatch):
    theirs, asked = torchvision.models.resnet18(), []

    class Weights:
        def get_state_dict(self, **_):
            return theirs.state_dict()

    class Enum:
        DEFAULT = Weights()
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: asked.append(name) or Enum)
    teacher = cikd.ResNetTeacher("resnet18", 5, 224)
    fc = teacher.fc.weight.clone()
    cikd.load_imagenet(teacher, "resnet18")
    assert asked == ["resnet18"] and torch.equal(teacher.fc.weight, fc)
    assert torch.equal(teacher.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.txt"
    cikd.save(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(cikd.CIKDError, match="file.txt: cannot be written .disk full"):
        cikd.save(path, b"new")
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1       # no part of the new one is left


def test_a_file_where_a_folder_belongs(tmp_path, capsys):
    (tmp_path / "runs").write_text("in the way")
    fails(capsys, "--output-dir", tmp_path / "runs", "--train-size", 60, "--holdout", 40)


def test_the_loss_compiles_without_breaks_and_changes_nothing():
    labels, ramp = torch.arange(6), torch.tensor(0.5)
    view = torch.rand(6, 3, 32, 32) * 2 - 1
    for stage in (cikd.ALI, cikd.LM, cikd.JOINT, cikd.LABELS):
        cfg, student, teacher = models(drop_path=0.0, jitter=0.0)
        compiled = torch.compile(cikd.student_loss, backend="eager", fullgraph=True, dynamic=False)
        found = []
        for loss_of in (cikd.student_loss, compiled):
            student.zero_grad()
            loss, _ = loss_of(stage, cfg, student, teacher, view, labels, ramp)
            loss.backward()
            found.append((loss.detach(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}))
        (plain, grads), (loss, others) = found
        assert torch.allclose(loss, plain, rtol=1e-5) and list(grads) == list(others)
        assert all(torch.allclose(grads[name], others[name], rtol=1e-3, atol=1e-6) for name in grads)


@pytest.mark.parametrize("stage", [cikd.ALI, cikd.LM, cikd.JOINT, cikd.LABELS])
def test_the_losses_bear_bfloat16(stage):
    """What a GPU computes in, tried on the CPU: nearly the same loss, the same direction, the surrogate itself exact."""
    cfg, student, teacher = models(drop_path=0.0, jitter=0.0)
    view, found = torch.rand(12, 3, 32, 32) * 2 - 1, []
    for low in (False, True):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss, terms = cikd.student_loss(stage, cfg, student, teacher, view, torch.arange(12) % 10, torch.tensor(0.5))
            maps = cikd.teacher_attention(torch.arange(2 * 8 * 64.0).cos().view(2, 8, 8, 8), 8, 2, tau=0.02)
        loss.backward()
        found.append((loss.detach(), terms, maps, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])))
    (loss, terms, maps, direction), (low_loss, low_terms, low_maps, low_direction) = found
    assert low_loss.dtype == torch.float32 and torch.allclose(low_loss, loss, rtol=0.02) and torch.allclose(low_terms, terms, rtol=0.02)
    assert torch.equal(low_maps, maps) and F.cosine_similarity(low_direction, direction, dim=0) > 0.99
    assert not torch.equal(low_direction, direction)                        # so the reduced precision was really used


def test_each_stage_is_compiled_once(tiny, monkeypatch, capsys):
    """Teacher, ALI, LM: three graphs without a break, however often epochs, ramp and learning rate change."""
    from torch._dynamo.testing import CompileCounter
    torch.compiler.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compile(f, backend=counter, fullgraph=True, dynamic=dynamic))
    settings = dict(epochs=5, ali_epochs=2, teacher_epochs=2, ramp_epochs=2, batch_size=20)
    result = cikd.train(replace(tiny, **settings, compile="on", run_name="compiled"))
    assert counter.frame_count == 3
    assert re.findall(r"^(\w+): compiled, \d+ s with the first step$", capsys.readouterr().out, re.M) == ["teacher", "ALI", "LM"]
    plain = cikd.train(replace(tiny, **settings, run_name="plain", teacher_checkpoint=cikd.read_run(Path(result["folder"]))[0]["teacher_file"]))
    for a, b in zip(read_metrics(result["folder"]), read_metrics(plain["folder"]), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)


# ---- 9. command line

def run_cli(cwd, *argv, **kwargs):
    return subprocess.run([sys.executable, str(Path(cikd.__file__).resolve()), *map(str, argv)], cwd=cwd,
                          capture_output=True, text=True, timeout=300, **kwargs)


@pytest.mark.parametrize("method", cikd.METHODS)
def test_end_to_end(method, tmp_path):
    done = run_cli(tmp_path, "--method", method, "--train-size", 60, "--holdout", 40, "--epochs", 2, "--teacher-epochs", 1)
    assert done.returncode == 0 and not done.stderr, done.stderr
    last = done.stdout.splitlines()[-1]
    run, = (p for p in (tmp_path / "runs").iterdir() if p.name != "teachers")
    accuracy = float(read_metrics(run)[-1]["accuracy"])
    assert last.startswith(f"{method} on shapes, seed 0: accuracy {accuracy:.1f} % after 2 epochs") and f"runs/{run.name}" in last
    assert (tmp_path / "runs" / "teachers").exists() == (method != "scratch")        # scratch needs no teacher
    assert "\r" not in done.stdout                           # piped: plain lines


def test_a_bad_argument_in_a_real_process(tmp_path):
    done = run_cli(tmp_path, "--tau", "-1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout and not list(tmp_path.iterdir())


def test_compare_makes_a_table_and_runs_nothing_twice(tmp_path, capsys):
    args = ["--compare", "--seeds", "0", "1", "--train-size", "60", "--holdout", "40", "--epochs", "2", "--teacher-epochs", "1",
            "--output-dir", str(tmp_path)]
    assert cikd.main(args) == 0
    out = capsys.readouterr().out
    table, = tmp_path.rglob("comparison.csv")
    rows = list(csv.DictReader(table.open()))
    assert [(r["method"], r["seed"]) for r in rows] == [(m, s) for s in "01" for m in cikd.METHODS]
    for method in cikd.METHODS:
        values = [float(r["accuracy"]) for r in rows if r["method"] == method]
        assert re.search(rf"^{method}\s+{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}\s+2 ", out, re.M)
    picture = Image.open(table.with_name("comparison.png")).convert("L")
    assert np.asarray(picture).std() > 10                    # not blank
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    assert cikd.main(args) == 0 and files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    alone = cikd.train(cikd.Config(**TINY | dict(output_dir=str(tmp_path / "alone"), method="joint", seed=1)))
    row, = (r for r in rows if (r["method"], r["seed"]) == ("joint", "1"))
    assert float(row["accuracy"]) == alone["accuracy"]       # the same, run alone
    assert all(torch.equal(a, b) for a, b in zip(cikd.load(Path(row["folder"]) / "student.pt").values(),
                                                 cikd.load(Path(alone["folder"]) / "student.pt").values()))


def test_compare_does_not_mix_teachers_and_says_how_to_go_on(tiny, monkeypatch, capsys):
    cfg = replace(tiny, compare=True)
    run = Path(cikd.train(replace(tiny, method="kd"))["folder"])
    facts = json.loads((run / "settings.json").read_text())
    cikd.save(run / "settings.json", facts | dict(teacher="another"))
    with pytest.raises(cikd.CIKDError, match="seed0 and .*seed0: learned from different teachers"):
        cikd.train_many(cfg)
    assert not list(Path(tiny.output_dir).rglob("comparison.csv"))
    cikd.save(run / "settings.json", facts)
    assert len(cikd.train_many(cfg)) == 4
    monkeypatch.setattr(cikd, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cikd.main(["--compare", "--train-size", "60"]) == 130
    assert "the same command, which then goes on to the table" in capsys.readouterr().out


def test_importing_has_no_side_effects(tmp_path):
    code = ("import torch; s = torch.get_rng_state(); import cikd; assert torch.equal(s, torch.get_rng_state());"
            "[getattr(cikd, n) for n in 'Config load_dataset VisionTransformer ResNetTeacher teacher_attention ali_loss "
            "lm_loss curriculum train evaluate main'.split()]; import sys; assert 'matplotlib' not in sys.modules")
    env = os.environ | {"PYTHONPATH": str(Path(cikd.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not list(tmp_path.iterdir()), done.stderr


def test_the_file_keeps_its_shape():
    """Sections in reading order, the method in 300 lines, no line too long."""
    lines = Path(cikd.__file__).read_text().splitlines()
    marks = [i for i, line in enumerate(lines) if line.startswith("# %% ")]
    assert [lines[i][5] for i in marks] == list("123456789")
    assert marks[7] - marks[2] <= 300 and max(map(len, lines)) <= 110


# ---- visualize_attention.py

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished cikd run with snapshots and a finished scratch run, tiny."""
    out = tmp_path_factory.mktemp("runs")
    cfg = cikd.Config(**TINY | dict(epochs=3), output_dir=str(out), snapshot_every=1)
    return [Path(cikd.train(replace(cfg, method=m))["folder"]) for m in ("scratch", "cikd")]


def not_blank(path: Path, frames: int = 1) -> None:
    picture = Image.open(path)
    assert getattr(picture, "n_frames", 1) == frames and picture.width > 300
    assert np.asarray(picture.convert("L")).std() > 10


def test_kernels_of_maps_with_a_known_answer():
    uniform = cikd.attention_kernels(torch.full((2, 3, 25, 25), 1 / 25))
    assert uniform.shape == (2, 3, 9, 9) and torch.allclose(uniform, torch.full_like(uniform, 1 / 25))
    identity = cikd.attention_kernels(torch.eye(25))
    assert identity[4, 4] == 1 and identity.sum() == 1
    shift = torch.zeros(25, 25)                              # every patch looks one to the right, where there is one
    for row in range(5):
        for col in range(4):
            shift[5 * row + col, 5 * row + col + 1] = 1
    kernel = cikd.attention_kernels(shift)
    assert kernel[4, 5] == 1 and kernel.sum() == 1           # one below the middle row would be [5, 4]


def test_kernels_against_loops():
    torch.manual_seed(0)
    maps, total, count = torch.rand(9, 9), torch.zeros(5, 5), torch.zeros(5, 5)
    for q in range(9):
        for k in range(9):
            at = k // 3 - q // 3 + 2, k % 3 - q % 3 + 2
            total[at] += maps[q, k]
            count[at] += 1
    assert torch.allclose(cikd.attention_kernels(maps), total / count)


def test_neighbourhood_share_and_rollout_known_values():
    assert float(va.neighbourhood_share(torch.eye(16))) == 1 == float(va.self_share(torch.eye(16)))
    counts = [4, 6, 6, 4, 6, 9, 9, 6, 6, 9, 9, 6, 4, 6, 6, 4]
    assert float(va.neighbourhood_share(torch.full((16, 16), 1 / 16))) == pytest.approx(np.mean(counts) / 16)
    eye = torch.eye(5).expand(2, 3, 5, 5)
    assert torch.equal(va.rollout([eye, eye]), torch.eye(5).expand(2, 5, 5))
    torch.manual_seed(0)
    a, b = (torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(2))
    half = lambda m: m.mean(1) / 2 + torch.eye(5) / 2
    assert torch.allclose(va.rollout([a, b]), half(b) @ half(a))             # later blocks from the left
    assert torch.allclose(va.rollout([a, b]).sum(-1), torch.ones(2, 5))


def test_every_figure_and_its_numbers(runs, tmp_path, capsys):
    assert va.main([str(r) for r in runs] + ["--output-dir", str(tmp_path), "--gif"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"uniform .* 1\.6 % +11\.8 % +4\.14", table) and runs[0].name in table and "after ALI" in table
    for name in ("heatmaps", "distance", "kernels", "cls", "curriculum"):
        not_blank(tmp_path / f"{name}.png")
    not_blank(tmp_path / "locality.gif", frames=4)           # before training and after each of three epochs
    loaded = [va.load_run(r) for r in (runs[1], runs[0])]
    images, labels = va.run_images(loaded[0], None, None)
    columns = va.heatmaps(loaded, images[:3], labels[:3], tmp_path / "h.png", (2, 5), 5)
    assert list(columns) == ["teacher, layer2\n(surrogate)", "student\nbefore training", "student\nafter ALI",
                             "student\nafter LM", "student\nscratch"]
    for maps in columns.values():
        assert maps.shape == (3, 8, 8) and torch.allclose(maps.sum((1, 2)), torch.ones(3), atol=1e-4)
    want = cikd.student_maps(loaded[0].students["after LM"], cikd.to_float(images[:3]))[5].mean(1)[:, 2 * 8 + 5]
    assert torch.allclose(columns["student\nafter LM"].flatten(1), want)     # row 2, column 5
    one = va.heatmaps(loaded, images[:1], labels[:1], tmp_path / "h.png", (0, 0), 0, head=1)
    want = va.surrogate_maps(loaded[0], images[:1], 0)[:, 1, 0]
    assert torch.allclose(one["teacher, layer1\n(surrogate)"].flatten(1), want)     # block 0 imitates layer1
    panels = va.kernels(loaded, images, tmp_path / "k.png")
    assert [p.shape for p in panels.values()] == [(6, 4, 15, 15)] * 4
    cls = va.cls_attention(loaded[0], images[:2], labels[:2], tmp_path / "c.png", 3)
    assert all(torch.allclose(m.sum((1, 2)), torch.ones(2)) for m in cls.values())
    assert list(cls) == ["mean of heads", *(f"head {h}" for h in range(4)), "rollout"]
    drawn = va.curriculum(loaded, tmp_path / "e.png")
    assert len(drawn["ali"]["cikd"]) == 3 and "scratch" not in drawn["ali"] and "scratch" in drawn["ce"]
    last = read_metrics(runs[1])[-1]
    assert drawn["accuracy"]["cikd"][-1] == float(last["accuracy"])
    measured = va.measure(loaded, cikd.probe(images))
    assert [m["label"] for m in measured] == ["before training", "after ALI", "after LM", "scratch"]
    assert float(measured[2]["distance"].mean()) == pytest.approx(float(last["attention_distance"]), abs=1e-4)
    frames = cikd.load(runs[1] / "kernels" / "epoch_0003.pt")["kernels"].float()
    assert torch.allclose(frames, panels["after LM"], atol=2e-3)             # fp16, and the same 40 images


def test_cls_maps_are_what_the_student_uses(runs):
    student = list(va.load_run(runs[1]).students.values())[-1]
    x = torch.rand(2, 3, 32, 32)
    maps = va.cls_and_patch_maps(student, x)
    assert maps[0].shape == (2, 4, 65, 65) and torch.allclose(maps[0].sum(-1), torch.ones(1), atol=1e-5)
    _, tapped = student.forward_taps(x, (0,))
    q, k, v = tapped[0]
    attention = student.blocks[0].attn
    assert torch.allclose(attention.proj((maps[0] @ v).transpose(1, 2).flatten(2)), attention(q, k, v), atol=1e-5)


def test_own_picture(runs, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "mine.jpg")
    assert va.main([str(runs[1]), "--image", str(tmp_path / "mine.jpg"), "--output-dir", str(tmp_path / "out")]) == 0
    not_blank(tmp_path / "out" / "heatmaps.png")


def test_the_newest_finished_run_is_taken(runs, tmp_path, monkeypatch):
    for i, name in enumerate(("old", "new", "unfinished")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "unfinished":
            (tmp_path / "runs" / name / "student.pt").touch()
            os.utime(tmp_path / "runs" / name / "student.pt", (i, i))
    assert va.newest_run(tmp_path / "runs").name == "new"
    with pytest.raises(cikd.CIKDError, match="no finished run"):
        va.newest_run(tmp_path / "nothing")


def copy_run(run: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for path in run.glob("*.*"):
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_runs_that_were_moved_find_their_teacher(runs, tmp_path, monkeypatch):
    moved = copy_run(runs[1], tmp_path / "elsewhere" / "run")
    facts = json.loads((moved / "settings.json").read_text())
    teacher = Path(facts["teacher_file"])
    copy_run(teacher.parent, tmp_path / "elsewhere" / "teachers" / teacher.parent.name)
    (moved / "settings.json").write_text(json.dumps(facts | {"teacher_file": f"gone/{teacher.parent.name}/teacher.pt"}))
    assert torch.equal(va.load_run(moved).teacher.fc.weight, va.load_run(runs[1]).teacher.fc.weight)


@pytest.mark.parametrize("fault,says", [
    ("missing", "holds no whole run"), ("unfinished", "not finished"), ("truncated", "not a readable checkpoint"),
    ("mismatched", "does not fit"), ("other version", "another version"), ("no teacher", "is not there"), ("other teacher", "is not the teacher"),
    ("no snapshots", "no snapshots"), ("--index 99", "--index"), ("--query 8,0", "--query"), ("--query 1", "--query"),
    ("--block 6", "--block"), ("--head 4", "--head"), ("--image nowhere.png", "nowhere.png"), ("--colour red", "--colour"),
    ("--head x", "--head"), ("--query " + 5000 * "9" + ",0", "--query"), ("--index" + 41 * " 0", "--index"), ("--image ", "not a readable image"),
    ("set heads 7", "--heads"), ("set patch_size 0", "--patch-size"), ("classes 3", "not as it was written"),
    ("epochs", "3 of 7 epochs")], ids=lambda text: text[:20])
def test_visualize_faults(fault, says, runs, tmp_path, capsys):
    run, extra = tmp_path / "run", ["--image", ""] if fault == "--image " else fault.split() if fault.startswith("--") else []
    if fault != "missing":
        copy_run(runs[1], run)
    if fault == "unfinished":
        (run / "student.pt").unlink()
    if fault == "truncated":
        shorten(run / "student_ali.pt")
    facts = json.loads((runs[1] / "settings.json").read_text())
    if fault == "mismatched":
        facts["settings"]["student"] = "vit_tiny"
    if fault == "other version":
        facts["settings"]["colour"] = "red"
    if fault == "no teacher":
        facts["teacher_file"] = "runs/nowhere/teacher.pt"
    if fault == "other teacher":
        facts["teacher"] = "0" * 16
    if fault.startswith("set "):
        facts["settings"][fault.split()[1]] = json.loads(fault.split()[2])
    if fault == "classes 3":
        facts["classes"] = 3
    if fault == "epochs":
        facts["settings"]["epochs"] = 7
    if fault != "missing":
        (run / "settings.json").write_text(json.dumps(facts))
    assert va.main([str(run), "--output-dir", str(tmp_path / "out"), *extra, *["--gif"] * (fault == "no snapshots")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"visualize_attention: error: [^\n]+\n", error) and says in error


def test_names_that_are_formulas_or_no_text_are_drawn_as_they_are(tmp_path, capsys):
    names = (r"a$_$b", r"$\frac$", os.fsdecode(b"c\xff"))
    root = make_folder(tmp_path / "$x^$", classes=names, train=4, test=2)
    args = ["--dataset", "folder", "--image-size", 32, "--patch-size", 8, "--student", "vit_micro", "--epochs", 2, "--teacher-epochs", 1,
            "--data-dir", root, "--output-dir", tmp_path / "runs", "--compare"]
    assert cikd.main([str(a) for a in args]) == 0
    run, = (p for p in (tmp_path / "runs").iterdir() if "-cikd-" in p.name)
    twin = copy_run(run, tmp_path / "runs" / "$2$")                          # its name will be a label
    assert va.main([str(run), str(twin), "--output-dir", str(tmp_path / "out"), "--index", "0", "2", "4"]) == 0


@pytest.mark.parametrize("names,labels", [
    (("a-seed0", "a-seed1", "a-seed10"), ["cikd (seed1)", "cikd (seed10)"]),
    (("a-tau=0.15-seed0", "a-tau=0.1-seed0"), ["cikd (tau=0.1)"]), (("x/a", "y/a", "z/a"), ["cikd (2)", "cikd (3)"]),
    (("first2", "first"), ["cikd (first)"]), (("s-" + 30 * "x", "s-a" + 30 * "y", "s-b" + 30 * "y"), ["cikd (" + 30 * "y" + ")", "cikd (" + 30 * "y" + ") #3"])])
def test_runs_of_one_method_have_different_labels(names, labels, runs):
    shown = va.stages_of([va.load_run(runs[1])._replace(folder=Path(name)) for name in names])
    assert [label for _, _, _, label, _ in shown][3:] == labels


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, capsys):
    other = cikd.train(cikd.Config(**TINY | dict(method="scratch"), patch_size=8, output_dir=str(tmp_path)))["folder"]
    assert va.main([str(runs[1]), other, "--output-dir", str(tmp_path / "out")]) == 2
    assert "another patch_size" in capsys.readouterr().err


# ---- the README

README = Path(cikd.__file__).with_name("README.md").read_text()


def test_every_name_the_readme_mentions_exists():
    text = re.sub(r"\$`.*?`\$", "", README)                  # formulas are no names
    names = set(re.findall(r"`(?:cikd\.|visualize_attention\.)?([A-Za-z_]\w*)(?:\([\w, ]*\))?`", text)) - {"other"}
    known = {*dir(cikd), *dir(va), *dir(cikd.VisionTransformer), *globals(), *cikd.DATASETS, *cikd.STUDENTS, *cikd.TEACHERS,
             *cikd.METHODS, *COLUMNS, *(f.name for f in fields(cikd.Config)), *(s.name for s in (cikd.ALI, cikd.LM, cikd.LABELS)),
             *dict(cikd.VisionTransformer().named_modules()), "teacher", "py", "vit_tiny_patch16_224"}
    assert {"teacher_attention", "ali_loss", "lm_loss", "curriculum", "student_loss"} <= names and names <= known, names - known
    for option in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README)):
        assert option.replace("-", "_") in {f.name for f in fields(cikd.Config)} | {
            "help", "image", "index", "query", "block", "head", "gif"}, option


def test_the_code_in_the_readme_is_the_code():
    """Every line of a snippet that quotes cikd.py stands there, comments and indentation aside."""
    bare = lambda text: {re.sub(r"\s*#.*", "", line).strip().rstrip(",") for line in text.splitlines()}
    code = bare(Path(cikd.__file__).read_text())
    quotes = [q for q in re.findall(r"```python\n(.*?)```", README, re.S) if "import" not in q]
    assert len(quotes) >= 6
    shortened = {"def curriculum(method, epoch, ali_epochs):", "q, k, v = attn.project(x)"}
    for quote in quotes:
        assert bare(quote) - code - shortened == set()


def test_every_picture_and_link_in_the_readme_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        if not target.startswith("http"):
            path = Path(cikd.__file__).parent / target
            assert path.exists(), target
            assert path.suffix not in (".png", ".gif") or path.stat().st_size < 300_000, target


def test_every_metric_and_file_is_explained_in_the_readme():
    for name in (*COLUMNS, "settings.json", "metrics.csv", "student_init.pt", "student_ali.pt", "student.pt", "last.pt",
                 "teacher.pt", "comparison.csv", "comparison.png"):
        assert f"`{name}`" in README, name


def test_the_tables_of_results_are_results_csv():
    """Every measured accuracy stands in a table of the README, the losing ones too, and nothing else does; seeds as mean ± deviation, but
    one by one on held-out images, where not every setting had a second seed."""
    seeds, measured, shown = {}, [], []
    with open(Path(cikd.__file__).parent / "figures" / "results.csv", newline="") as file:
        for row in csv.DictReader(file):
            command = row["command"] if "--holdout" in row["command"] else re.sub(r" --seed \d+", "", row["command"])
            setting = row["method"], command, row["hardware"]
            seeds.setdefault(setting, {}).setdefault(row["seed"], []).append(float(row["accuracy"]))
    for (method, _, _), runs in seeds.items():
        values = [value for value, in runs.values()]                        # no run is counted twice
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        measured.append((method, f"{statistics.mean(values):.1f}{spread}"))
    for line in README[README.index("## Results\n"):README.index("## Speed\n")].replace("**", "").splitlines():
        if cells := re.match(r"\| (scratch|kd|joint|cikd)\b[^|]*\|(.*)\|$", line):
            shown += [(cells[1], cell) for cell in cells[2].split("|") for cell in [cell.strip()] if re.match(r"\d+\.\d( ±|$)", cell)]
    assert sorted(shown) == sorted(measured) and len(shown) >= 30


# ---- speed: `python test_cikd.py [vit_tiny | vit_micro] [auto | on | off]` prints the table of the README's section Speed

def speed(student: str = "vit_tiny", compile: str = "auto") -> None:
    """Images/s of each stage as `train` reports it, on random 32-pixel images, and how near that is to the machine's limit.

    The limit is this machine's rate of large matrix products, in float32 on a CPU and bfloat16 on CUDA, measured in between; what a step
    has to compute are the floating-point operations that torch's FlopCounterMode counts forward and backward, teacher included.
    """
    import resource
    from torch.utils.flop_counter import FlopCounterMode
    cfg = cikd.resolve(cikd.Config(dataset="cifar10", student=student, compile=compile))
    device = cikd.choose_device(cfg)
    cuda = device.type == "cuda"

    def seconds_of(body, repeats=9):
        times = []
        for _ in range(repeats + 2):                         # the first two are a warm-up
            start = time.perf_counter()
            body()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times[2:])[repeats // 2]

    side = 8192 if cuda else 2048
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32) for _ in range(2))
    limits = [2 * side ** 3 / seconds_of(lambda: a @ b)]
    images = torch.randint(0, 256, (cfg.batch_size * (200 if cuda else 6), 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(len(images)) % 10
    data = cikd.Data(images, labels, images[:100], labels[:100], list("0123456789"), "speed")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:            # two epochs of each stage, the first is a warm-up
        for method, epochs in (("scratch", 2), ("kd", 2), ("joint", 2), ("cikd", 3)):
            cikd.train(replace(cfg, method=method, epochs=epochs, ali_epochs=2, teacher_epochs=2, output_dir=folder, run_name=None), data)
            limits.append(2 * side ** 3 / seconds_of(lambda: a @ b))
        for path in Path(folder).rglob("metrics.csv"):
            rows |= {row["stage"]: row for row in read_metrics(path.parent) if row["epoch"] == "2"}

    model, teacher = (m.to(device) for m in (cikd.build_student(cfg, 10), cikd.ResNetTeacher(cfg.teacher, 10, 32)))
    view, y, ramp = cikd.to_float(images[:cfg.batch_size].to(device)), labels[:cfg.batch_size].to(device), torch.ones((), device=device)
    on_device = data._replace(train_images=images.to(device), train_labels=labels.to(device))
    augment = seconds_of(lambda: [None for _ in cikd.batches(on_device, cfg, device)]) / len(images)
    limit = sorted(limits)[len(limits) // 2]
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"\n{student}, {cfg.teacher}, batch {cfg.batch_size}, compile {compile}, {torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU threads'}"
          f", torch {torch.__version__}: limit {limit / 1e12:.3g} TFLOP/s (from {min(limits) / 1e12:.3g} to {max(limits) / 1e12:.3g})")
    print("stage    images/s  GFLOP/image  of limit  augmenting")
    for name, stage in dict(teacher=None, labels=cikd.LABELS, LM=cikd.LM, ALI=cikd.ALI, **{"ALI+LM": cikd.JOINT}).items():
        frozen = cikd.freeze(teacher) if stage else teacher
        with FlopCounterMode(display=False) as counter:
            loss = cikd.student_loss(stage, cfg, model, frozen, view, y, ramp)[0] if stage else F.cross_entropy(frozen(view)[0], y)
            loss.backward()
        flop, rate = counter.get_total_flops() / len(view), float(rows[name]["images_per_second"])
        print(f"{name:8} {rate:8,.0f}  {flop / 1e9:11.2f}  {flop * rate / limit:7.0%}  {augment * rate:10.1%}")
    print(f"peak memory {peak / 1e9:.1f} GB")


if __name__ == "__main__":
    speed(*sys.argv[1:])
