"""The data sets: a table with a row for each, the loaders that serve the rows, the way from an image to a batch."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms


class DataError(ValueError):
    """What is wrong with a data set or an image, and what its user can do, in one sentence."""


class Splits(NamedTuple):
    """What a loader returns. A sample is (image, label), an image a path or an (H, W, 3) uint8 array."""

    train: list  # of samples
    val: list
    test: list
    classes: list  # names; a label is an index into it
    origin: str  # who made the split, in words
    notes: list = []  # sentences to print before the training

    def describe(self):
        """The sizes, in words."""
        train, val, test = map(len, self[:3])
        return f"{train} training, {val} validation, {test} test images of {len(self.classes)} classes ({self.origin})"


class DataSet(NamedTuple):
    """A row of the table: where the images are, how they are transformed, and the settings for them."""

    name: str
    classes: int | None
    load: partial  # load(row, root, search) reads the data set, a `Splits`
    source: str  # where to download it, if not drawn
    settings: dict = {}  # of a run, where they differ from DEFAULTS in train.py
    lr: dict = {}  # by method, where it differs from LEARNING_RATE in train.py
    crop: bool = False  # FGVC's transforms, random crop and flip; otherwise the whole image is resized
    vtab: bool = False  # VTAB-1k's protocol: trained on all labelled images, tested after the last epoch


def find(name):
    """The row of that name, or one for the folder of that path; DataError if there is neither."""
    if name in TABLE:
        return TABLE[name]
    folder = os.path.abspath(os.path.expanduser(name))
    if os.path.isdir(folder):
        return folder_row(Path(folder))
    raise DataError(f"no data set and no folder {name!r}; known by name are {', '.join((*TABLE, *GROUPS))}")


def members(names):
    """The names, with each group (of groups) replaced by its data sets; DataError for a name that is a folder, too."""
    for name in names:
        is_folder = os.path.isdir(f"{name}/train") or any(Path(name).glob("*/*.*"))
        if is_folder and (name in TABLE or name in GROUPS):
            raise DataError(f"{name} is a known data set and a folder here: write ./{name}, or rename the folder")
    return [member for name in names for part in GROUPS.get(name, [name]) for member in GROUPS.get(part, [part])]


def load(row, root, search=False):
    """Reads a row's `Splits` below `root`, downloading what can be. In a search VTAB-1k is just train800 and val200."""
    return row.load(row, Path(root).expanduser(), search)


def digest(splits):
    """A SHA-256 in hex of the classes and each sample's label, path (its last two parts) and file size, or bytes."""
    sha = hashlib.sha256(repr((splits.classes, *map(len, splits[:3]))).encode())
    with reading("an image that is listed"):
        for image, label in sum(splits[:3], []):
            known = (*image.parts[-2:], image.stat().st_size) if isinstance(image, Path) else image.tobytes()
            sha.update(f"{label} {known}".encode())
    return sha.hexdigest()


@contextmanager
def reading(what):
    """Any error in the `with` block becomes a DataError about `what`: damaged files provoke errors of every kind."""
    try:
        yield
    except Exception as error:
        raise DataError(f"cannot read {what}: {str(error) or type(error).__name__}") from error


# ---------------------------------------------------------------------- layouts on disk

PARTS = ("train", "val", "test")
SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # by a folder's name


def images_below(folder):
    """{image: the parts of its path below the folder}, sorted, and the number of all files; no image is hidden."""

    def stop(error):
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}")

    walk = os.walk(folder, onerror=stop, followlinks=True)
    files = sorted(Path(place, name) for place, _, names in walk for name in names)
    images = {}
    for path in files:
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "@", "__MACOSX")) for part in parts)  # by network drives and macOS, too
        if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS and not hidden:
            images[path] = parts
    return images, len(files)


@cache  # so that all runs of a command have the same settings
def folder_row(folder):
    """The row of a folder of one's own. Its settings were chosen for few images, on validation data."""
    splits = class_folders(folder)
    name = "/".join(folder.parts[-2:])  # tells apart two folders of one name
    settings = {"batch_size": min(64, max(4, len(splits.train) // 16)), "epochs": 20, "dropout": 0.0}
    lr = {"sa2vp": 3e-3, "adapter": 3e-3, "vpt": 3e-3}
    return DataSet(name, None, lambda row, root, search: splits, str(folder), settings, lr, crop=True)


def class_folders(folder):
    """train/<class>/*, with val/<class>/* and test/<class>/* where they are; or <class>/* alone, all of it train."""
    images, files = images_below(folder)
    own = any(len(parts) > 2 and parts[0] in SPLIT_OF for parts in images.values())
    found = []
    for image, parts in images.items():
        split, *inside = parts if own else ("train", *parts)
        if split in SPLIT_OF and len(inside) > 1:  # the folder of a class, and what is in it
            with opened(image):
                found.append((image, SPLIT_OF[split], inside[0]))
    classes = sorted({name for _, split, name in found if split == "train"})
    unknown = sorted({name for *_, name in found} - {*classes})
    if unknown or len(classes) < 2:
        has = f"of {', '.join(classes) or 'no class'} and none of {', '.join(unknown) or 'others'}"
        raise DataError(f"{folder} needs training images in two or more <class>/ or train/<class>/: it has some {has}")
    train, val, test = ([(image, classes.index(name)) for image, of, name in found if of == part] for part in PARTS)
    origin = "class folders"
    if not test:
        train, test = hold_out(train, 0.2)
        origin += ", a fifth held out for test"
    if not val:
        train, val = hold_out(train, 0.1)
        origin += ", a tenth of train held out for validation"
    if not test or not val:
        raise DataError(f"{folder} has too few images to hold out any for val or test: add some")
    counts = Counter(classes[label] for _, label in train)
    notes = [f"{count} training images of {name} are few: add some" for name, count in counts.items() if count < 5]
    for part, samples in {"validation": val, "test": test}.items():
        if len(samples) < 30:
            notes.append(f"{len(samples)} {part} images are few, one is {100 / len(samples):.0f} points: add some")
    if files > len(found):
        notes.append(f"{files - len(found)} files are left out: they are hidden, no images or in no class's folder")
    return Splits(train, val, test, classes, origin, notes)


def fgvc(folder, images, lists, md5s, row, root, search, **checksum):
    """One of FGVC's five sets: the folders of its `images`, and train.json, val.json and test.json as VPT has them.

    Those, of these `md5s`, hold {path of an image: class id}. The sorted ids that occur are the labels 0, 1, ...
    """
    folder, paths = root / folder, {}
    for name in images:
        fetch(folder / name, row.source, partial(unpack, row.source, **checksum), f"**/{name}")
        # By the last two parts, as cars are packed with cars_train/ and cars_test/ once or twice.
        paths |= {path.parts[-2:]: path for path in images_below(folder / name)[0]}
    found = []
    for split, md5 in zip(PARTS, md5s.split()):
        path, url = folder / f"{split}.json", f"{FGVC_SPLITS}/{lists}/{split}.json"
        fetch(path, url, partial(datasets.utils.download_url, url, md5=md5))
        with reading(f"the list {path}, which comes from {url}"):
            pairs = json.loads(path.read_bytes()).items()
            found.append([(paths.get(Path(name).parts[-2:], folder / name), int(class_id)) for name, class_id in pairs])
    names = {class_id: image.parent.name for image, class_id in sum(found, [])}
    if len({*names.values()}) < len(names):  # flowers and cars have no folder for each class
        names = {class_id: f"class {class_id}" for class_id in names}
    ids = sorted(names)
    samples = [[(image, ids.index(class_id)) for image, class_id in part] for part in found]
    return Splits(*samples, [names[class_id] for class_id in ids], "train.json, val.json and test.json")


def vtab(row, root, search):
    """VTAB-1k as its users packed it: lists of "path label", with 800 + 200 images to train on."""
    fetch(root / "vtab-1k", row.source, partial(unpack, row.source), "vtab-1k")

    def listed(name):
        path = root / row.name.replace("vtab", "vtab-1k") / f"{name}.txt"
        with reading(f"{path}, which comes from {row.source} and has lines of a path and a label below {row.classes}"):
            lines = [line.rsplit(maxsplit=1) for line in path.read_text("utf-8-sig").splitlines()]
            return [(path.parent / image, range(row.classes).index(int(label))) for image, label in lines]

    classes = [f"class {label}" for label in range(row.classes)]
    if search:
        return Splits(listed("train800"), listed("val200"), [], classes, "train800 and val200")
    return Splits(listed("train800val200"), [], listed("test"), classes, "train800val200")


def in_torchvision(kind, on_disk, row, root, search, splits=("train", "test"), **options):
    """torchvision's data set `kind`, which makes `on_disk` below root, has these splits and takes these options."""
    read = getattr(datasets, kind)
    fetch(root / on_disk, row.source, lambda folder: [read(folder, split, download=True) for split in splits])
    with reading(f"{row.name} below {root}, which comes from {row.source}"):
        parts = [read(root, split, **options) for split in splits]
        samples = [[(x if isinstance(x, Path) else np.asarray(x), int(label)) for x, label in part] for part in parts]
    classes = getattr(parts[0], "classes", [f"class {label}" for label in range(row.classes)])
    train, *val, test = samples
    if val:
        return Splits(train, *val, test, classes, "official split")
    train, val = hold_out(train, 0.2)
    return Splits(train, val, test, classes, "official split, a fifth of train held out for validation")


def hold_out(samples, share):
    """Samples kept and samples held out: `share` of each class, at least one image but never its only one."""
    labels, rng = np.array([label for _, label in samples]), np.random.default_rng(0)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        if len(own) > 1:
            held[own[: max(1, round(share * len(own)))]] = True
    return [[samples[i] for i in np.flatnonzero(side)] for side in (~held, held)]


def fetch(path, source, download, inside="*"):
    """If `path` is missing, `download(folder)` writes to a temporary folder, of which `inside` is then moved to `path`.

    Files move when all are there, in the order of their names. Where another process was faster, its files are used.
    DataError says where to get `path` and where to put it.
    """
    if os.path.exists(path):
        return
    why = "it is not in the archive"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            download(folder)
            for made in sorted(Path(folder).glob(inside)):
                made.replace(path.parent / made.name)
    except Exception as error:  # the network's, the archive's, the checksum's, the disk's
        why = error
    if not os.path.exists(path):
        raise DataError(f"{path} is missing and cannot be downloaded ({why}): get it from {source} and put it there")


def unpack(source, folder, **checksum):
    """Downloads an archive into a folder and unpacks it there, nothing outside of it; checks its md5 or sha256."""
    if not source.endswith((".tgz", ".tar", ".zip")):
        raise DataError("it has no direct link")
    datasets.utils.download_url(source, folder)
    archive = Path(folder, Path(source).name)
    for algorithm, digits in checksum.items():
        if hashlib.new(algorithm, np.memmap(archive)).hexdigest() != digits:
            raise DataError(f"its {algorithm} is not {digits}")
    shutil.unpack_archive(archive, folder, **{} if archive.suffix == ".zip" else {"filter": "data"})


# ---------------------------------------------------------------------- images drawn by the program

COLOURS = {"red": (220, 50, 40), "green": (50, 170, 70), "blue": (50, 90, 220), "yellow": (230, 200, 50)}
SHAPES = {"triangle": 3, "square": 4, "disc": 30}  # sides
KINDS = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
DIRECTIONS = ["right", "below right", "below", "below left", "left", "above left", "above", "above right"]
SIDE = 48  # pixels


def draw(rng, things):
    """A noisy grey image (48, 48, 3) with things on it: (shape, colour, (x, y), radius), in pixels."""
    background = rng.integers(100, 156) + rng.normal(0, 12, (SIDE, SIDE, 3))
    image = Image.fromarray(background.clip(0, 255).astype(np.uint8))
    for shape, colour, centre, radius in things:
        ImageDraw.Draw(image).regular_polygon((*centre, radius), SHAPES[shape], fill=COLOURS[colour])
    return np.asarray(image)


def what_and_which_colour(rng, label):
    """An image of the source task: one thing anywhere; its shape and colour are the class."""
    (colour, shape), radius = KINDS[label].split(), rng.uniform(6, 9)
    return draw(rng, [(shape, colour, rng.uniform(radius, SIDE - radius, 2), radius)])


def where_is_blue(rng, label):
    """An image of the target task: the class is the direction from the red thing to the blue one, of any two shapes."""
    while True:
        red, blue = rng.uniform(7, SIDE - 7, (2, 2))  # (x, y) each
        dx, dy = blue - red
        off = math.remainder(math.degrees(math.atan2(dy, dx)) - 45 * label, 360)
        if math.hypot(dx, dy) > 18 and abs(off) < 17.5:  # not near the border of two classes
            return draw(rng, zip(rng.choice([*SHAPES], 2), ("red", "blue"), (red, blue), rng.uniform(5, 8, 2)))


def drawn(draw_one, classes, row, root, search, counts):
    """The images of a drawn task, balanced, and always the same ones."""
    splits = []
    for i, count in enumerate(counts):
        rng = np.random.default_rng(i)
        splits.append([(draw_one(rng, j % len(classes)), j % len(classes)) for j in range(count)])
    return Splits(*splits, classes, "drawn by the program")


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


@contextmanager
def opened(path):
    """In a `with` block, the PIL image of a file, not yet decoded; DataError names a file that is damaged or none."""
    # Given a path, Pillow maps some TIFFs to memory and turns them twice.
    with reading(f"the image {path}"), open(path, "rb") as file, Image.open(file) as image:
        if image.mode == "F" or image.mode.startswith("I") and image.format not in ("PNG", "PPM", "JPEG2000"):
            raise ValueError(f"pixels of mode {image.mode} have no agreed scale, save them with 8 bits or as PNG")
        yield image


def open_picture(image):
    """A path or an (H, W, 3) uint8 array -> an upright RGB PIL image, on white; DataError names a damaged file."""
    if not isinstance(image, Path):
        return Image.fromarray(image)
    with opened(image) as picture:
        picture.load()
        with suppress(Exception):  # whatever is wrong with the metadata, the image is sound
            ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            deep = np.asarray(picture)
            deep = np.where(deep == picture.info.get("transparency"), 255, deep // 257)
            picture = Image.fromarray(deep.astype(np.uint8))
        elif picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        return picture.convert("RGB")


def find_images(paths):
    """The files among the paths, and for each folder all images below it, sorted; DataError for none."""
    found = []
    for path in paths:
        found += images_below(path)[0] if os.path.isdir(path) else [path]
    if not found:
        raise DataError(f"there is no image in {[*map(str, paths)]}: give images or folders of them")
    return found


class Images(Dataset):
    """Item (index, seed) is an image, (3, height, width), with the crop and flip that the seed draws, and its label."""

    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __getitem__(self, key):
        index, seed = key
        image, label = self.samples[index]
        # Without workers this is the process whose generators serve dropout, which must not notice.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(open_picture(image)), label


class Shuffled:
    """Keys of `Images`, in a new order with new seeds in every epoch; both depend on `seed` and `epoch` alone."""

    def __init__(self, count, seed):
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        return zip(rng.permutation(self.count).tolist(), rng.integers(2**63, size=self.count).tolist())


def make_loader(samples, input, batch_size, workers, shuffle_seed=None):
    """A DataLoader of batches: images (batch, 3, height, width), labels (batch,). Its workers live as long as it does.

    `input` holds the arguments of `transform`. With a `shuffle_seed` it is for training: augmented, shuffled anew for
    every `loader.sampler.epoch`, and without the last incomplete batch.
    """
    training, workers = shuffle_seed is not None, workers if samples else 0
    if training and len(samples) < batch_size:
        raise DataError(f"{len(samples)} training images are fewer than one batch of {batch_size}: lower --batch-size")
    sampler = Shuffled(len(samples), shuffle_seed) if training else [(index, 0) for index in range(len(samples))]
    return DataLoader(
        Images(samples, transform(**input, training=training)), batch_size, sampler=sampler, drop_last=training,
        num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # not the one that serves dropout, which would then depend on the workers
    )  # fmt: skip


# ---------------------------------------------------------------------- the table

FGVC_SPLITS = "https://raw.githubusercontent.com/savadikarc/gift/f0cb80cb4db413ecd108dd7e74fef27105eb6b97/data"
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
FGVC = [
    DataSet("cub", 200, partial(fgvc, "CUB_200_2011", ["images"], "cub",
        "8aedcb810c68c7410607a6801bc131d8 ccbb8956711c47a59caff813075c9fe6 5f3c7af28e087ba27079ddc6a4e7846e",
        md5="97eceeb196236b17998738112f37df78"), "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"),
    DataSet("nabirds", 555, partial(fgvc, "nabirds", ["images"], "nabirds",
        "3835cf47e4617721556316d3b9f79db8 5f6e32ed373af37be26f5c7d5f9632d9 77f59e1fc2becded3c11b8a4bde70018"),
        "https://dl.allaboutbirds.org/nabirds", {"inner_dim": 32}),
    DataSet("flowers", 102, partial(fgvc, "flowers-102", ["jpg"], "oxfordflowers",
        "9e998dfd1e7131c799b7fcd38d559a96 0f08ac53a5739f0026763bd0aac3e054 ada4f0666adcfa3260f719a84a64b928",
        md5="52808999861908f626f3c1f4e79d11fa"),
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz", {"inner_dim": 8}),
    DataSet("dogs", 120, partial(fgvc, "dogs", ["Images"], "stanforddogs",
        "937d4b859e7ca68f6667b9bf207e782a 0a372499e9610c87403ce2a85ecae16e 6e02d6c4ae0ad89c9f64f1b9c9bebcb5",
        sha256="a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58"),
        "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar", {"inner_dim": 32}),
    DataSet("cars", 196, partial(fgvc, "stanford_cars", ["cars_train", "cars_test"], "stanfordcars",
        "bde33e7dba5c6885bd4bbe44b49c036c db39ee040d9d38f7d929508f0b4cedb7 8a5e55b4d0d7bde3551fa80a0f5505d7"),
        "https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset",
        {"inner_dim": 64, "scale": 1.5, "fusion_layers": (4,)}),
]  # fmt: skip
TORCHVISION = [
    DataSet("cifar10", 10, partial(in_torchvision, "CIFAR10", "cifar-10-batches-py", splits=(True, False)), CIFAR),
    DataSet("cifar100", 100, partial(in_torchvision, "CIFAR100", "cifar-100-python", splits=(True, False)), CIFAR),
    DataSet("dtd", 47, partial(in_torchvision, "DTD", "dtd", splits=PARTS, loader=Path),
            "https://www.robots.ox.ac.uk/~vgg/data/dtd"),
    DataSet("food101", 101, partial(in_torchvision, "Food101", "food-101", loader=Path),
            "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"),
    DataSet("gtsrb", 43, partial(in_torchvision, "GTSRB", "gtsrb"), "https://benchmark.ini.rub.de/gtsrb_dataset.html"),
    DataSet("svhn", 10, partial(in_torchvision, "SVHN", "train_32x32.mat"), "http://ufldl.stanford.edu/housenumbers"),
]  # fmt: skip
VTAB = {  # group: (r, s and batch size of most tasks, the classes of each task)
    "vtab/natural": (8, 0.1, 64, {
        "vtab/caltech101": 102, "vtab/cifar": 100, "vtab/dtd": 47, "vtab/oxford_flowers102": 102,
        "vtab/oxford_iiit_pet": 37, "vtab/svhn": 10, "vtab/sun397": 397}),
    "vtab/specialized": (16, 1.5, 40, {
        "vtab/patch_camelyon": 2, "vtab/eurosat": 10, "vtab/resisc45": 45, "vtab/diabetic_retinopathy": 5}),
    "vtab/structured": (32, 1.5, 40, {
        "vtab/clevr_count": 8, "vtab/clevr_dist": 6, "vtab/dmlab": 6, "vtab/kitti": 4, "vtab/dsprites_loc": 16,
        "vtab/dsprites_ori": 16, "vtab/smallnorb_azi": 18, "vtab/smallnorb_ele": 9}),
}  # fmt: skip
UNUSUAL = {  # settings of the other tasks
    "vtab/svhn": {"inner_dim": 16, "scale": 0.5},
    "vtab/resisc45": {"scale": 0.5},
    "vtab/dsprites_ori": {"inner_dim": 16, "scale": 0.1},
    "vtab/smallnorb_ele": {"scale": 0.5},
}
GENTLE = ("vtab/oxford_iiit_pet", "vtab/clevr_count")  # which take half the learning rate
ROWS = [
    *(row._replace(crop=True) for row in FGVC),
    *(DataSet(name, classes, vtab, "https://huggingface.co/datasets/XiN0919/VTAB-1k/resolve/main/vtab-1k.zip",
              {"inner_dim": r, "scale": s, "batch_size": batch_size} | UNUSUAL.get(name, {}),
              {"sa2vp": 5e-4} if name in GENTLE else {}, vtab=True)
      for r, s, batch_size, tasks in VTAB.values() for name, classes in tasks.items()),
    *(row._replace(name=f"hta/{row.name}", settings={"inner_dim": 64}) for row in FGVC[:-1] + TORCHVISION),
    DataSet("shapes", 8, partial(drawn, where_is_blue, DIRECTIONS, counts=(1000, 400, 1000)), "",
            {"scale": 1.0, "batch_size": 32, "dropout": 0.0, "epochs": 30, "weights": "runs/shapes-vit/best.pt",
             "image_size": SIDE},
            {"sa2vp": 1e-2, "vpt": 1e-2, "adapter": 1e-2, "full": 1e-3}),  # searched on validation data
    DataSet("shapes-source", 12, partial(drawn, what_and_which_colour, KINDS, counts=(7200, 360, 360)), "",
            {"weights": None, "image_size": SIDE}),
]  # fmt: skip
TABLE = {row.name: row for row in ROWS}
GROUPS = {  # in the paper's order; VTAB's mean is that of its three parts
    "fgvc": [row.name for row in FGVC],
    **{group: [*tasks] for group, (*_, tasks) in VTAB.items()},
    "vtab": [*VTAB],
    "hta": [name for name in TABLE if name.startswith("hta/")],
}
