"""The data sets: a table with a row for each, the loaders that serve the rows, the way from an image to a batch."""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.datasets.utils import download_and_extract_archive, download_url


class DataError(ValueError):
    """What is wrong with a data set, in a sentence for its user."""


class Splits(NamedTuple):
    """What a loader returns. A sample is (image, label), an image a path or an (H, W, 3) uint8 array."""

    train: list  # of samples
    val: list
    test: list
    classes: list  # names; a label is an index into it
    origin: str  # who made the split, in words

    def describe(self):
        """The sizes, in words."""
        train, val, test = (len(samples) for samples in self[:3])
        return f"{train} training, {val} validation, {test} test images of {len(self.classes)} classes ({self.origin})"


class DataSet(NamedTuple):
    """A row of the table: where the images are, how they are transformed, and the settings for them."""

    name: str
    classes: int | None
    load: Callable[..., Splits]  # reads the data set: load(row, root, search)
    source: str  # where to download it
    settings: dict = {}  # of a run, where they differ from DEFAULTS in train.py
    lr: dict = {}  # by method, where it differs from LEARNING_RATE in train.py
    crop: bool = False  # FGVC's transforms, random crop and flip; otherwise the whole image is resized
    vtab: bool = False  # VTAB-1k's protocol: trained on all labelled images, tested after the last epoch


def find(name):
    """The row of that name, or one for the folder of that path; DataError if there is neither."""
    if name in TABLE:
        return TABLE[name]
    if Path(name).is_dir():
        folder = Path(name).resolve()
        return DataSet(folder.name, None, partial(class_folders, folder), str(folder), crop=True)
    raise DataError(f"no data set and no folder {name!r}; known by name are {', '.join((*TABLE, *GROUPS))}")


def members(names):
    """The names, with each group replaced by its data sets. The parts of a group may be groups."""
    return [member for name in names for member in (members(GROUPS[name]) if name in GROUPS else [name])]


def load(row, root, search=False):
    """Reads a row's `Splits` below `root`, downloading what can be. With `search`, VTAB-1k is train800 and val200 alone.

    Raises FileNotFoundError for data or images that are not there, and DataError for damaged lists.
    """
    try:
        splits = row.load(row, Path(root), search)
    except (FileNotFoundError, DataError):
        raise
    except Exception as error:  # a line, an id, a whole file that is not what it should be
        raise DataError(f"the lists of {row.name} cannot be read: {type(error).__name__} {error}") from None
    for image, label in splits.train + splits.val + splits.test:
        if isinstance(image, Path) and not image.is_file():
            raise FileNotFoundError(f"{row.name} lists the image {image}, which is not there")
        if not 0 <= label < len(splits.classes):
            raise DataError(f"{row.name}: {image} has label {label}, outside 0 to {len(splits.classes) - 1}")
    return splits


def digest(splits):
    """SHA-256 of names, labels and file sizes of all samples (of arrays their bytes), to tell data from other data."""
    digest = hashlib.sha256()
    for image, label in splits.train + splits.val + splits.test:
        what = f"{'/'.join(image.parts[-2:])} {image.stat().st_size}" if isinstance(image, Path) else image.tobytes()
        digest.update(f"{what} {label}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------- layouts on disk


def class_folders(folder, row, root, search):
    """train/<class>/*, test/<class>/* and, if there is one, val/<class>/*."""
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise FileNotFoundError(f"{folder} needs the folders train/<class>/ and test/<class>/ with images")
    classes, index = find_classes(folder / "train")
    parts = []
    for split in ("train", "val", "test"):
        inside = {path.name for path in (folder / split).glob("*") if path.is_dir()}
        if unknown := inside - set(classes):
            raise DataError(f"{folder / split} has class {min(unknown)!r}, which is missing in {folder / 'train'}")
        found = make_dataset(folder / split, index, IMG_EXTENSIONS, allow_empty=split != "train") if inside else []
        parts.append([(Path(path), label) for path, label in found])
    return hold_out(Splits(*parts, classes, "its own folders"), share=0.1)


def fgvc(folder, images, splits, row, root, search, archive_md5=None):
    """One of FGVC's five sets: a folder of `images`, and train.json, val.json and test.json as published with VPT.

    Those hold {path of an image: class id}. The sorted ids that occur are the labels 0, 1, ...
    """
    folder = root / folder
    fetch(folder / images, row.source, inside=f"**/{images}", md5=archive_md5)
    listed = []
    for split, md5 in zip(("train", "val", "test"), FGVC_MD5[splits].split()):
        url = f"{FGVC_SPLITS}/{splits}/{split}.json"
        fetch(folder / f"{split}.json", url, partial(download_url, url, md5=md5))
        listed.append(json.loads((folder / f"{split}.json").read_text()))

    def locate(path):
        # Flowers and cars are listed with the folder of the images, the others without it. Cars are packed as
        # cars_train/cars_train/1.jpg nowadays, and were as cars_train/1.jpg before.
        place = folder / path
        return place if place.exists() else folder / Path(*dict.fromkeys([images, *Path(path).parts]))

    ids = sorted({class_id for part in listed for class_id in part.values()})
    index = {class_id: label for label, class_id in enumerate(ids)}
    samples = [[(locate(path), index[class_id]) for path, class_id in part.items()] for part in listed]
    names = {label: path.parent.name for part in samples for path, label in part}
    if len(set(names.values())) < len(names):  # flowers and cars have no folder for each class
        names = {label: f"class {class_id}" for class_id, label in index.items()}
    return Splits(*samples, [names[label] for label in range(len(ids))], "VPT's train.json, val.json and test.json")


def vtab(row, root, search):
    """VTAB-1k as its users packed it: lists of "path label", with 800 + 200 images to train on."""
    fetch(root / "vtab-1k", row.source, inside="vtab-1k")
    folder = root / row.name.replace("vtab", "vtab-1k")

    def listed(name):
        pairs = (line.rsplit(maxsplit=1) for line in (folder / f"{name}.txt").read_text().splitlines() if line.strip())
        return [(folder / path, int(label)) for path, label in pairs]

    classes = [f"class {label}" for label in range(row.classes)]
    if search:
        return Splits(listed("train800"), listed("val200"), [], classes, "train800 and val200")
    return Splits(listed("train800val200"), [], listed("test"), classes, "train800val200")


def in_torchvision(kind, on_disk, row, root, search, val=None):
    """torchvision's data set `kind`, which makes `on_disk` below root; `val` is its validation split, if it has one."""
    if kind == "SVHN" and not find_spec("scipy"):
        raise DataError(f"{row.name} comes as .mat files, which scipy reads: pip install scipy")

    def read(split, root, **options):
        which = {"train": split == "train"} if "CIFAR" in kind else {"split": split}
        return getattr(torchvision.datasets, kind)(root, **which, **options)

    splits = ("train", val, "test")
    fetch(root / on_disk, row.source, lambda part: [read(split, part, download=True) for split in splits if split])
    loader = {"loader": Path} if kind in ("DTD", "Food101") else {}  # too large to be read as images here
    try:
        parts = [read(split, root, **loader) if split else [] for split in splits]
    except RuntimeError as error:
        raise FileNotFoundError(f"{row.name} below {root} is not whole ({error}); it comes from {row.source}") from None
    classes = getattr(parts[0], "classes", [f"class {label}" for label in range(row.classes)])
    samples = [[(x if loader else np.asarray(x), int(label)) for x, label in part] for part in parts]
    return hold_out(Splits(*samples, classes, "official split"), share=0.2)


def hold_out(splits, share):
    """Without validation, `share` of each class of train is held out: one image at least, but never its only one."""
    if splits.val:
        return splits
    labels, rng = np.array([label for _, label in splits.train]), np.random.default_rng(0)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(share * len(members))) if len(members) > 1 else 0
        held[rng.permutation(members)[:count]] = True
    train, val = ([sample for sample, out in zip(splits.train, held) if out == side] for side in (False, True))
    return splits._replace(train=train, val=val, origin=f"{splits.origin}, {share:.0%} of train kept for validation")


def fetch(path, source, download=None, inside="*", md5=None):
    """Unless `path` is there, `download(folder)` makes it in a temporary folder, from which it is moved when whole.

    By default that unpacks `source` if it is an archive. What matches `inside` there is moved into the folder of
    `path`, `path` itself last. Raises FileNotFoundError that says where to get it and where to put it.
    """
    if path.exists():
        return
    failure = "has no direct link"
    if download is None and source.endswith((".tgz", ".tar", ".zip")):
        download = partial(download_and_extract_archive, source, md5=md5)
    if download:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            try:
                download(folder)
                for made in sorted(Path(folder).glob(inside), key=lambda made: made.name == path.name):
                    made.rename(path.parent / made.name)
                if path.exists():
                    return
                failure = "is not in the archive"
            except Exception as error:  # the network's, the archive's, the checksum's
                failure = f"cannot be downloaded ({str(error) or type(error).__name__})"
    raise FileNotFoundError(f"{path} is not there, and {failure}: get it from {source} and put it there")


# ---------------------------------------------------------------------- images drawn by the program

COLOURS = {"red": (220, 50, 40), "green": (50, 170, 70), "blue": (50, 90, 220), "yellow": (230, 200, 50)}
SHAPES = {"triangle": 3, "square": 4, "disc": 30}  # sides
KINDS = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
DIRECTIONS = ("right", "below right", "below", "below left", "left", "above left", "above", "above right")
SIDE = 48  # pixels


def draw(rng, *things):
    """A noisy grey image (48, 48, 3) with things on it: (shape, colour, x, y, radius), in pixels."""
    background = rng.integers(100, 156) + rng.normal(0, 12, (SIDE, SIDE, 3))
    image = Image.fromarray(background.clip(0, 255).astype(np.uint8))
    for shape, colour, *circle in things:
        ImageDraw.Draw(image).regular_polygon(circle, SHAPES[shape], fill=COLOURS[colour])
    return np.asarray(image)


def what_and_which_colour(rng, label):
    """An image of the source task: one thing anywhere; its shape and colour are the class."""
    (colour, shape), radius = KINDS[label].split(), rng.uniform(6, 9)
    return draw(rng, (shape, colour, *rng.uniform(radius, SIDE - radius, 2), radius))


def where_is_blue(rng, label):
    """An image of the target task: the class is the direction in which the blue thing lies as seen from the red one.

    Either can be anywhere and of any shape; directions near the border of two classes are left out.
    """
    while True:
        red, blue = rng.uniform(7, SIDE - 7, (2, 2))  # (x, y) each
        dx, dy = blue - red
        off = (math.degrees(math.atan2(dy, dx)) - 45 * label + 180) % 360 - 180
        if math.hypot(dx, dy) > 18 and abs(off) < 17.5:
            break
    shapes, radii = rng.choice([*SHAPES], 2), rng.uniform(5, 8, 2)
    return draw(rng, (shapes[0], "red", *red, radii[0]), (shapes[1], "blue", *blue, radii[1]))


def drawn(draw_one, classes, row, root, search, counts):
    """The images of a drawn task, balanced, and always the same ones."""
    splits = []
    for i, count in enumerate(counts):
        rng, labels = np.random.default_rng(i), [j % len(classes) for j in range(count)]
        splits.append([(draw_one(rng, label), label) for label in labels])
    return Splits(*splits, list(classes), "drawn by the program")


# ---------------------------------------------------------------------- from an image to a batch


def transform(crop, image_size, mean, std, training=False):
    """The paper's transforms: PIL image -> (3, height, width), normalized by mean and std per RGB channel of [0, 1].

    `crop` as FGVC: short side to 256 / 224 of the size, then a random crop and flip in training, the centre crop in
    testing; else as VTAB-1k and HTA: squeezed to the size. `image_size` is (height, width) in pixels.
    """
    steps = [transforms.Resize(round(min(image_size) * 256 / 224) if crop else image_size)]
    if crop and training:
        steps += [transforms.RandomCrop(image_size), transforms.RandomHorizontalFlip()]
    elif crop:
        steps += [transforms.CenterCrop(image_size)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def open_picture(image):
    """A path or an (H, W, 3) uint8 array -> an upright RGB PIL image; ValueError names a damaged file."""
    if not isinstance(image, Path):
        return Image.fromarray(image)
    try:
        with Image.open(image) as image:
            if image.mode.startswith("I;16"):  # Pillow would cut it off at 255
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises whatever the bytes happen to provoke
        raise ValueError(f"cannot read the image {image}: {type(error).__name__}") from None


def find_images(paths):
    """The files among the paths, and for each folder all images below it, by name; FileNotFoundError for none."""
    found = []
    for path in paths:
        inside = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS]
        if not inside:
            raise FileNotFoundError(f"there is no image {path}, and none below it")
        found += sorted(inside)
    return found


class Images(Dataset):
    """Samples as the model takes them: item (index, seed) is an image (3, height, width) and its label.

    The seed is that of the image's random crop and flip.
    """

    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        index, seed = key
        image, label = self.samples[index]
        # Without workers this is the process whose generators serve dropout, which must not notice.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(open_picture(image)), label


class Shuffled(Sampler):
    """Keys of `Images`, in a new order with new seeds in every epoch; both depend on `seed` and `epoch` alone."""

    def __init__(self, count, seed):
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        return iter(list(zip(rng.permutation(self.count).tolist(), rng.integers(2**63, size=self.count).tolist())))


def make_loader(samples, input, batch_size, workers, shuffle_seed=None):
    """A DataLoader of batches: images (batch, 3, height, width), labels (batch,). Its workers live as long as it does.

    `input` holds the arguments of `transform`. With a `shuffle_seed` it is for training: augmented, shuffled anew for
    every `loader.sampler.epoch`, and without the last incomplete batch.
    """
    training, workers = shuffle_seed is not None, workers if samples else 0
    if training and len(samples) < batch_size:
        raise DataError(f"{len(samples)} training images are fewer than one batch of {batch_size}: use a smaller --batch-size")
    sampler = Shuffled(len(samples), shuffle_seed) if training else [(index, 0) for index in range(len(samples))]
    return DataLoader(
        Images(samples, transform(**input, training=training)), batch_size, sampler=sampler, drop_last=training,
        num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # not the one that serves dropout, which would then depend on the workers
    )  # fmt: skip


# ---------------------------------------------------------------------- the table

FGVC_SPLITS = "https://raw.githubusercontent.com/savadikarc/gift/f0cb80cb4db413ecd108dd7e74fef27105eb6b97/data"
FGVC_MD5 = {  # of train.json, val.json and test.json
    "cub": "8aedcb810c68c7410607a6801bc131d8 ccbb8956711c47a59caff813075c9fe6 5f3c7af28e087ba27079ddc6a4e7846e",
    "nabirds": "3835cf47e4617721556316d3b9f79db8 5f6e32ed373af37be26f5c7d5f9632d9 77f59e1fc2becded3c11b8a4bde70018",
    "oxfordflowers": "9e998dfd1e7131c799b7fcd38d559a96 0f08ac53a5739f0026763bd0aac3e054 ada4f0666adcfa3260f719a84a64b928",
    "stanforddogs": "937d4b859e7ca68f6667b9bf207e782a 0a372499e9610c87403ce2a85ecae16e 6e02d6c4ae0ad89c9f64f1b9c9bebcb5",
    "stanfordcars": "bde33e7dba5c6885bd4bbe44b49c036c db39ee040d9d38f7d929508f0b4cedb7 8a5e55b4d0d7bde3551fa80a0f5505d7",
}
MIRROR = "https://huggingface.co/datasets/XiN0919"

# (layout, source)
CUB = (
    partial(fgvc, "CUB_200_2011", "images", "cub", archive_md5="97eceeb196236b17998738112f37df78"),
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
)
NABIRDS = partial(fgvc, "nabirds", "images", "nabirds"), "https://dl.allaboutbirds.org/nabirds"
FLOWERS = (
    partial(fgvc, "flowers-102", "jpg", "oxfordflowers", archive_md5="52808999861908f626f3c1f4e79d11fa"),
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz",
)
DOGS = partial(fgvc, "dogs", "Images", "stanforddogs"), "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar"
CARS = partial(fgvc, "stanford_cars", "cars_train", "stanfordcars"), f"{MIRROR}/FGVC"
VTAB = vtab, f"{MIRROR}/VTAB-1k/resolve/main/vtab-1k.zip"
CIFAR10 = partial(in_torchvision, "CIFAR10", "cifar-10-batches-py"), "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR100 = partial(in_torchvision, "CIFAR100", "cifar-100-python"), "https://www.cs.toronto.edu/~kriz/cifar.html"
DTD = partial(in_torchvision, "DTD", "dtd", val="val"), "https://www.robots.ox.ac.uk/~vgg/data/dtd"
FOOD101 = partial(in_torchvision, "Food101", "food-101"), "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"
GTSRB = partial(in_torchvision, "GTSRB", "gtsrb"), "https://benchmark.ini.rub.de/gtsrb_dataset.html"
SVHN = partial(in_torchvision, "SVHN", "test_32x32.mat"), "http://ufldl.stanford.edu/housenumbers"
TARGET = partial(drawn, where_is_blue, DIRECTIONS, counts=(1000, 400, 1000)), "drawn by the program"
SOURCE = partial(drawn, what_and_which_colour, KINDS, counts=(7200, 360, 360)), "drawn by the program"
TARGET_LR = {"sa2vp": 1e-2, "vpt": 1e-2, "adapter": 1e-2, "linear": 1e-2, "full": 1e-3}  # searched on validation data

FGVC = dict(crop=True)
NATURAL, OTHERS = dict(vtab=True), dict(vtab=True, batch_size=40)
GENTLE = dict(lr={"sa2vp": 5e-4})



def row(name, classes, load, source, inner_dim, scale, lr={}, crop=False, vtab=False, **settings):
    """A row of the table; what DataSet does not name is a setting of a run."""
    return DataSet(name, classes, load, source, dict(inner_dim=inner_dim, scale=scale, **settings), lr, crop, vtab)


ROWS = (
    #       name                  classes  *(layout, source)  r  s
    row("cub",                     200, *CUB,      16, 0.1, **FGVC),
    row("nabirds",                 555, *NABIRDS,  32, 0.1, **FGVC),
    row("flowers",                 102, *FLOWERS,   8, 0.1, **FGVC),
    row("dogs",                    120, *DOGS,     32, 0.1, **FGVC),
    row("cars",                    196, *CARS,     64, 1.5, **FGVC, fusion_layers=(4,)),
    row("vtab/caltech101",         102, *VTAB,      8, 0.1, **NATURAL),
    row("vtab/cifar",              100, *VTAB,      8, 0.1, **NATURAL),
    row("vtab/dtd",                 47, *VTAB,      8, 0.1, **NATURAL),
    row("vtab/oxford_flowers102",  102, *VTAB,      8, 0.1, **NATURAL),
    row("vtab/oxford_iiit_pet",     37, *VTAB,      8, 0.1, **NATURAL, **GENTLE),
    row("vtab/svhn",                10, *VTAB,     16, 0.5, **NATURAL),
    row("vtab/sun397",             397, *VTAB,      8, 0.1, **NATURAL),
    row("vtab/patch_camelyon",       2, *VTAB,     16, 1.5, **OTHERS),
    row("vtab/eurosat",             10, *VTAB,     16, 1.5, **OTHERS),
    row("vtab/resisc45",            45, *VTAB,     16, 0.5, **OTHERS),
    row("vtab/diabetic_retinopathy", 5, *VTAB,     16, 1.5, **OTHERS),
    row("vtab/clevr_count",          8, *VTAB,     32, 1.5, **OTHERS, **GENTLE),
    row("vtab/clevr_dist",           6, *VTAB,     32, 1.5, **OTHERS),
    row("vtab/dmlab",                6, *VTAB,     32, 1.5, **OTHERS),
    row("vtab/kitti",                4, *VTAB,     32, 1.5, **OTHERS),
    row("vtab/dsprites_loc",        16, *VTAB,     32, 1.5, **OTHERS),
    row("vtab/dsprites_ori",        16, *VTAB,     16, 0.1, **OTHERS),
    row("vtab/smallnorb_azi",       18, *VTAB,     32, 1.5, **OTHERS),
    row("vtab/smallnorb_ele",        9, *VTAB,     32, 0.5, **OTHERS),
    row("hta/cub",                 200, *CUB,      64, 0.1),
    row("hta/nabirds",             555, *NABIRDS,  64, 0.1),
    row("hta/flowers",             102, *FLOWERS,  64, 0.1),
    row("hta/dogs",                120, *DOGS,     64, 0.1),
    row("hta/cifar10",              10, *CIFAR10,  64, 0.1),
    row("hta/cifar100",            100, *CIFAR100, 64, 0.1),
    row("hta/dtd",                  47, *DTD,      64, 0.1),
    row("hta/food101",             101, *FOOD101,  64, 0.1),
    row("hta/gtsrb",                43, *GTSRB,    64, 0.1),
    row("hta/svhn",                 10, *SVHN,     64, 0.1),
    row("shapes",                    8, *TARGET,   16, 1.0, batch_size=32, lr=TARGET_LR, dropout=0.0, epochs=30,
            weights="runs/shapes-vit/best.pt", image_size=SIDE),
    row("shapes-source",            12, *SOURCE,   16, 1.0, weights=None, image_size=SIDE),
)  # fmt: skip
TABLE = {row.name: row for row in ROWS}

# Groups in the paper's order. VTAB's mean is that of its three parts.
NAMES = [row.name for row in ROWS]
GROUPS = {
    "fgvc": NAMES[:5],
    "vtab/natural": NAMES[5:12],
    "vtab/specialized": NAMES[12:16],
    "vtab/structured": NAMES[16:24],
    "vtab": ["vtab/natural", "vtab/specialized", "vtab/structured"],
    "hta": NAMES[24:34],
}
