"""The data sets: a table with a row for each, a few loaders that serve the rows, and the pictures' way to a batch.

A loader returns `Splits`: samples (picture, label) for training, validation and test, a picture
being a path or an (H, W, 3) uint8 array, a label an index into the class names.
"""

import json
import math
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.datasets.utils import download_and_extract_archive


class Splits(NamedTuple):
    train: list
    val: list
    test: list
    classes: list  # names; a label is an index into it
    origin: str  # who made the split, in words


@dataclass(frozen=True)
class DataSet:
    """A row of the table: where the pictures are, how they are shown, and SA2VP's settings for them."""

    name: str
    load: Callable[[Path, int], Splits]  # (the folder that holds all data sets, seed)
    crop: bool = True  # FGVC's transforms: random crop and flip; else the whole picture, squeezed, always the same
    image_size: int = 224
    drawn: bool = False  # by the program: for its own small ViT, and read in no time
    inner_dim: int = 16
    scale: float = 0.1
    batch_size: int = 64
    epochs: int = 100
    dropout: float = 0.1
    lr: dict = field(default_factory=dict)  # by method, where it is not the method's own


def find(name):
    """The row of that name, or one for the folder of that path; ValueError if there is neither."""
    if name in TABLE:
        return TABLE[name]
    if Path(name).is_dir():
        return DataSet(Path(name).resolve().name, lambda root, seed: class_folders(Path(name), seed))
    raise ValueError(f"no data set and no folder {name!r}; the data sets are {', '.join(TABLE)}")


def load(data_set, root, seed):
    """Reads a row's `Splits`, downloading what can be.

    Raises FileNotFoundError for data or pictures that are not there, ValueError for damaged lists.
    """
    splits = data_set.load(Path(root), seed)
    for samples in splits[:3]:
        for picture, label in samples:
            if isinstance(picture, Path) and not picture.is_file():
                raise FileNotFoundError(f"{data_set.name} lists the picture {picture}, which is not there")
            if not 0 <= label < len(splits.classes):
                raise ValueError(f"{data_set.name}: {picture} has label {label}, outside 0 to {len(splits.classes) - 1}")
    return splits


# ---------------------------------------------------------------------- layouts on disk


def class_folders(folder, seed):
    """train/<class>/*, test/<class>/* and, if there is one, val/<class>/*."""
    try:
        classes, index = find_classes(folder / "train")
        train = _listed(make_dataset(folder / "train", index, IMG_EXTENSIONS))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} needs train/<class>/ and test/<class>/ with pictures: {error}") from None

    def held(split):
        unknown = set(find_classes(folder / split)[0]) - set(classes)
        if unknown:
            raise ValueError(f"{folder / split} has class {min(unknown)!r}, which {folder / 'train'} has not")
        return _listed(make_dataset(folder / split, index, IMG_EXTENSIONS, allow_empty=True))

    if not (folder / "test").is_dir():
        raise FileNotFoundError(f"{folder} has no folder test/<class>/")
    if (folder / "val").is_dir():
        return Splits(train, held("val"), held("test"), classes, "its own folders")
    train, val = hold_out(train, seed)
    return Splits(train, val, held("test"), classes, "its own folders, validation held out of train")


def official_texts(folder, seed):
    """images.txt, image_class_labels.txt, train_test_split.txt and classes.txt, as CUB-200-2011 has them."""

    def table(name):
        return dict(line.split(maxsplit=1) for line in (folder / name).read_text().splitlines() if line.strip())

    paths, labels, is_train, names = (
        table(f"{name}.txt") for name in ("images", "image_class_labels", "train_test_split", "classes")
    )
    ids = sorted(set(labels.values()), key=int)  # those that occur, in numeric order, are 0, 1, ...
    index = {class_id: label for label, class_id in enumerate(ids)}
    split = {"0": [], "1": []}
    for image, path in paths.items():
        split[is_train[image].strip()].append((folder / "images" / path.strip(), index[labels[image]]))
    train, val = hold_out(split["1"], seed)
    classes = [names[class_id].strip() for class_id in ids]
    return Splits(train, val, split["0"], classes, "official split, validation held out of train")


def json_splits(folder, images, num_classes, first_id=1):
    """train.json, val.json and test.json as VPT published them: {"path below images": class id}."""
    splits, names = [], [f"class {label}" for label in range(num_classes)]
    for split in ("train", "val", "test"):
        listed = json.loads((folder / f"{split}.json").read_text())
        splits.append([(images / path, int(class_id) - first_id) for path, class_id in listed.items()])
        for picture, label in splits[-1]:
            if 0 <= label < num_classes:
                names[label] = picture.parent.name
    return Splits(*splits, names, "VPT's train.json, val.json and test.json")


def cub(root, seed):
    folder = root / "CUB_200_2011"
    url = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
    fetch(url, folder, md5="97eceeb196236b17998738112f37df78")
    if (folder / "train.json").exists():
        return json_splits(folder, folder / "images", num_classes=200)
    return official_texts(folder, seed)


def hold_out(samples, seed):
    """10 % of each class, at least one picture, drawn by seed: (the rest, what is held out)."""
    by_class = defaultdict(list)
    for sample in samples:
        by_class[sample[1]].append(sample)
    rest, held = [], []
    rng = np.random.default_rng(seed)
    for label in sorted(by_class):
        members = by_class[label]
        count = max(1, round(0.1 * len(members))) if len(members) > 1 else 0
        chosen = set(rng.permutation(len(members))[:count].tolist())
        for i, member in enumerate(members):
            (held if i in chosen else rest).append(member)
    return rest, held


def fetch(url, folder, md5=None):
    """Downloads and unpacks an archive that holds `folder`, unless it is there; nothing half-done is left.

    Raises FileNotFoundError that says what to fetch, and where to put it.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as part:
        try:
            download_and_extract_archive(url, part, md5=md5)
            (Path(part) / folder.name).rename(folder)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"cannot download {url} ({error}); unpack it by hand to {folder}") from None


def _listed(samples):
    return [(Path(path), label) for path, label in samples]


# ---------------------------------------------------------------------- pictures drawn by the program

COLOURS = {"red": (220, 50, 40), "green": (50, 170, 70), "blue": (50, 90, 220), "yellow": (230, 200, 50)}
SHAPES = ("disc", "ring", "square", "cross")
DIRECTIONS = ("right", "below right", "below", "below left", "left", "above left", "above", "above right")
KINDS = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
SIDE = 48  # pixels


def draw(rng, *things):
    """A noisy grey picture (48, 48, 3) with things on it: (shape, colour, x, y, radius), in pixels."""
    background = rng.integers(100, 156) + rng.normal(0, 12, (SIDE, SIDE, 3))
    picture = Image.fromarray(background.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for shape, colour, x, y, r in things:
        colour, box = COLOURS[colour], (x - r, y - r, x + r, y + r)
        if shape == "disc":
            pen.ellipse(box, fill=colour)
        elif shape == "ring":
            pen.ellipse(box, outline=colour, width=3)
        elif shape == "square":
            pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
        else:
            pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=colour)
            pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=colour)
    return np.asarray(picture)


def what_and_which_colour(rng, count):
    """The source task: one thing anywhere; its shape and colour are the class."""
    samples = []
    for i in range(count):
        label = i % len(KINDS)
        colour, shape = KINDS[label].split()
        r = rng.uniform(6, 9)
        samples.append((draw(rng, (shape, colour, *rng.uniform(r, SIDE - r, 2), r)), label))
    return samples


def where_is_blue(rng, count):
    """The target task: the direction in which the blue thing lies as seen from the red one.

    Either can be anywhere and of any shape; directions near the border of two classes are left out.
    """
    sector = 360 / len(DIRECTIONS)
    samples = []
    for i in range(count):
        label = i % len(DIRECTIONS)
        while True:
            red, blue = rng.uniform(7, SIDE - 7, (2, 2))  # (x, y) each
            dx, dy = blue - red
            off = (math.degrees(math.atan2(dy, dx)) - sector * label + 180) % 360 - 180
            if math.hypot(dx, dy) > 18 and abs(off) < sector / 2 - 5:
                break
        things = [(rng.choice(SHAPES), c, *place, rng.uniform(5, 8)) for c, place in (("red", red), ("blue", blue))]
        samples.append((draw(rng, *things), label))
    return samples


def drawn(task, classes, train, val, test):
    """A loader of drawn pictures: always the same ones, whatever the seed of a run."""

    def load(root, seed):
        counts = {"train": train, "val": val, "test": test}
        splits = [task(np.random.default_rng(i), count) for i, count in enumerate(counts.values())]
        return Splits(*splits, list(classes), "drawn by the program")

    return load


# ---------------------------------------------------------------------- from a picture to a batch


def transform(crop, training, image_size, mean, std):
    """The paper's transforms: PIL picture -> normalised (3, H, W).

    `crop` as FGVC: short side to 256 / 224 of the size, then a random crop and flip in training, the
    centre crop in testing; else as VTAB-1k and HTA: squeezed to the size. `image_size` is (height, width).
    """
    if not crop:
        steps = [transforms.Resize(image_size)]
    elif training:
        steps = [transforms.RandomCrop(image_size), transforms.RandomHorizontalFlip()]
    else:
        steps = [transforms.CenterCrop(image_size)]
    if crop:
        steps.insert(0, transforms.Resize(round(min(image_size) * 256 / 224)))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def open_picture(picture):
    """A path or an (H, W, 3) uint8 array -> an upright RGB PIL picture; ValueError names a damaged file."""
    if not isinstance(picture, Path):
        return Image.fromarray(picture)
    try:
        with Image.open(picture) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises whatever the bytes happen to provoke
        raise ValueError(f"cannot read the picture {picture}: {str(error).splitlines()[0]}") from None


class Pictures(Dataset):
    """Samples as (image (3, H, W), label), asked for by (index, seed of this picture's augmentation)."""

    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        index, seed = item
        picture, label = self.samples[index]
        # Its own seed makes a crop the same whichever worker makes it, and leaves the model's dropout alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(open_picture(picture)), label


class Shuffled:
    """The order of an epoch and the seeds of its augmentations; both follow from (seed, epoch)."""

    def __init__(self, count, seed):
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        yield from zip(rng.permutation(self.count).tolist(), rng.integers(2**63, size=self.count).tolist())


def batches(samples, transform, batch_size, workers, shuffle_seed=None):
    """A DataLoader; shuffled, and without a last incomplete batch, if there is a `shuffle_seed`."""
    training = shuffle_seed is not None
    return DataLoader(
        Pictures(samples, transform),
        batch_size,
        sampler=Shuffled(len(samples), shuffle_seed) if training else [(i, 0) for i in range(len(samples))],
        drop_last=training,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, or it would draw from the one that dropout uses
    )


TABLE = {
    row.name: row
    for row in (
        DataSet("cub", cub),
        DataSet(
            "shapes", drawn(where_is_blue, DIRECTIONS, 1000, 400, 1000), crop=False, image_size=SIDE, drawn=True,
            scale=1.0, dropout=0.0, epochs=30, lr={"sa2vp": 5e-3, "vpt": 5e-3, "linear": 1e-2, "full": 1e-3},
        ),
        DataSet("shapes-source", drawn(what_and_which_colour, KINDS, 8000, 400, 400), crop=False, image_size=SIDE, drawn=True),
    )
}  # fmt: skip
