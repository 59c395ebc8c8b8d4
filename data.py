"""The data sets: a table with one row for each, the functions that read them, and the way from an image to a batch."""

import hashlib
import json
import math
import os
import tarfile
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from functools import partial
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
    """The samples of a data set. A sample is (image, label), an image a Path or an (H, W, 3) uint8 array."""

    train: list
    val: list
    test: list
    classes: list  # names; a label is an index into this list
    origin: str  # where the split comes from, in words
    notes: list = []  # sentences to print before training

    def describe(self):
        """The number of images in each split, in words."""
        sizes = f"{len(self.train)} training, {len(self.val)} validation, {len(self.test)} test images"
        return f"{sizes} of {len(self.classes)} classes ({self.origin})"


class DataSet(NamedTuple):
    """A row of the table: how to read a data set, and the settings that it overrides."""

    name: str
    read: partial  # read(source, root, search) -> Splits
    source: str = ""  # a URL, or the path of a folder of one's own
    settings: dict = {}  # settings of a run that differ from the defaults for every method
    by_method: dict = {}  # {method: {setting or option: value}}, for one method alone


def find(name):
    """Returns the row of a data set by its name in TABLE, or a row for a folder by its path. Opens no image.

    The settings of a folder were chosen for few images, on validation data. Its batch size is None: it depends on the
    number of training images, see `default_batch_size`. Raises DataError if there is neither row nor folder, unless the
    path is absolute.
    """
    if name in TABLE:
        return TABLE[name]
    folder = Path(os.path.abspath(os.path.expanduser(name)))
    # A run knows its folder by an absolute path. That folder may be gone: --list still shows the run.
    if not os.path.isdir(folder) and not os.path.isabs(name):
        choices = f"a folder (unpack an archive first), a name that --help lists, or a group ({', '.join(GROUPS)})"
        raise DataError(f"no data set and no folder is named {name!r}: give {choices}")
    return DataSet(
        name="/".join(folder.parts[-2:]),  # tells apart two folders of one name
        read=lambda source, root, search: class_folders(source),
        source=str(folder),
        settings={"batch_size": None, "epochs": 20, "transform": "crop-flip"},
        by_method=adapted({"sa2vp": 3e-3, "adapter": 3e-3, "vpt": 3e-3, "linear": 3e-2}, dropout=0.0),
    )


def default_batch_size(count):
    """The batch size for a folder with this number of training images: at least 16 steps an epoch, if possible."""
    return min(64, max(4, count // 16))


def members(names):
    """Replaces each group of data sets by its members."""
    expanded = []
    for name in names:
        expanded += GROUPS.get(name, [name])
    return expanded


def load(row, root, search=False):
    """Returns the `Splits` of a row, read below `root`. Downloads what is missing, if it can be downloaded.

    With `search`, VTAB-1k has its 800 images for training and 200 for validation, and no test images.
    """
    splits = row.read(row.source, Path(root).expanduser(), search)
    if not splits.test and not search:
        raise DataError(f"{row.name} below {root} has no test images: get it again from {row.source}")
    return splits


def digest(splits):
    """A SHA-256 in hex of the classes and of each sample: its label, and its array or its file's size and path.

    Of a path, only the last two parts count.
    """
    header = (splits.classes, *map(len, splits[:3]))
    sha = hashlib.sha256(repr(header).encode())
    with reading("an image that is listed", "; put it back, or get the data set again"):
        for image, label in splits.train + splits.val + splits.test:
            content = (*image.parts[-2:], image.stat().st_size) if isinstance(image, Path) else image.tobytes()
            sha.update(f"{label} {content}".encode())
    return sha.hexdigest()


@contextmanager
def reading(what, advice=""):
    """Turns any error in the `with` block into a DataError: damaged files provoke errors of every kind."""
    try:
        yield
    except Exception as error:
        raise DataError(f"cannot read {what}: {str(error) or type(error).__name__}{advice}") from error


def shorten(names, limit):
    """The first names, and how many more there are, as text that every terminal can print."""
    text = ", ".join(map(str, names[:limit]))
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text.encode("utf-8", "backslashreplace").decode()


# ---------------------------------------------------------------------- a folder of one's own

# The split that a folder holds, by its name in lower case.
SPLIT_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
SYSTEM_FOLDERS = {"#recycle", "#snapshot", "$recycle.bin", "lost+found", "__macosx", "system volume information"}


def class_folders(folder):
    """Reads train/<class>/, val/<class>/ and test/<class>/, or <class>/ alone. A missing split is held out.

    Raises DataError if it is not clear which folders are splits and classes, or if a file cannot be opened as an image.
    """
    images, left_out = images_below(folder)
    split_of = split_folders(folder, images, left_out)
    named = {"train": [], "val": [], "test": []}  # (path, name of the class)
    ranks = {}  # {path: hash}: the lowest are held out, so a new image hardly changes the choice
    subfolders = Counter()
    for path, parts in images.items():
        inside = parts[1:] if split_of else parts  # (class, ..., file)
        if len(inside) < 2:
            left_out["images outside class folders"].append(Path(*parts))
            continue
        if len(inside) > 2:
            subfolders["/".join(parts[:-1])] += 1
        with opened(path):  # most damaged files are noticed here, before training
            named[split_of.get(parts[0], "train")].append((path, inside[0]))
        name = unicodedata.normalize("NFC", "/".join(inside[1:]))  # macOS has another form of letters such as é
        ranks[path] = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()

    classes = check_classes(folder, named)
    train, val, test = label_samples(named, classes)
    origin = "class folders"
    if not test:
        train, test = hold_out(train, 0.2, ranks)
        origin += ", a fifth held out for test"
    if not val:
        train, val = hold_out(train, 0.1, ranks)
        origin += ", a tenth of train held out for validation"
    if not test or not val:
        raise DataError(f"{folder} has too few images to hold out any for validation or test: add some")
    splits = Splits(train, val, test, classes, origin)
    return splits._replace(notes=folder_notes(splits, subfolders, left_out))


def images_below(folder):
    """Returns ({image: parts of its path below the folder}, {reason: paths below it that are left out}), sorted."""
    folder = Path(folder)
    with reading(f"the folder {folder}", "; unpack an archive first; if it has moved, give its place by --data"):
        root = folder.resolve()
        files = [path.relative_to(folder) for path in walk(folder, root, set(root.parents))]
    runs = {class_path(path.parts) for path in files if path.name == "best.pt"}
    images = {}
    left_out = defaultdict(list)
    for path in sorted(files, key=lambda path: path.parts):  # on Windows, too, upper case before lower
        if is_system(path.name):
            left_out["hidden or system files"].append(path)
        elif path.suffix.lower() not in datasets.folder.IMG_EXTENSIONS:
            left_out["files without an image extension"].append(path)
        elif class_path(path.parts) in runs:
            left_out["images in a folder of runs (with a best.pt)"].append(path)
        else:
            images[folder / path] = path.parts
    return images, left_out


def walk(folder, root, visited):
    """Yields all files below a folder, and the folders that are skipped.

    Skipped are system folders, and links to folders that are read anyway or lie above.
    """
    visited.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if is_system(path.name) or not path.is_dir():
            yield path
            continue
        real = path.resolve()
        if real in visited or (path.is_symlink() and real.is_relative_to(root)):
            yield path
        else:
            yield from walk(path, root, visited)


def is_system(name):
    """Whether a file or folder is hidden, or made by macOS, Windows or a network drive (such as @eaDir)."""
    return name.startswith((".", "@")) or name.lower() in SYSTEM_FOLDERS


def class_path(parts):
    """The first parts of a path, which lead to the folder that would be its class."""
    if split_named(parts[0]):
        return parts[:2]
    return parts[:1]


def split_named(name):
    """The split that a folder of this name holds, None if it is no split's name."""
    return SPLIT_OF.get(name.strip().lower())


def split_folders(folder, images, left_out):
    """Returns {name of a split's folder: split}, empty if the class folders lie directly in the folder.

    Raises DataError if a folder with images is neither a class nor a split.
    """
    if not images:
        files = shorten(sum(left_out.values(), []), 3)
        raise DataError(f"{folder} has no images but {files or 'is empty'}: unpack archives, convert to JPEG or PNG")
    split_of = {}
    with_classes = set()  # splits that have class folders with images
    others = set()  # other folders with images
    for parts in images.values():
        split = split_named(parts[0])
        if split:
            split_of[parts[0]] = split
            if len(parts) > 2:
                with_classes.add(split)
        elif len(parts) > 1:
            others.add(parts[0])
    if others and not with_classes and set(split_of.values()) <= {"train"}:  # "train" may be a class
        return {}
    if others:
        raise DataError(f"{folder} has splits, but also images in {shorten(sorted(others), 5)}: move them to a split")
    if "train" not in with_classes:
        raise DataError(
            f"{folder} has {', '.join(split_of) or 'images'}, "
            "but no training images in <class>/ or train/<class>/: add some"
        )
    for path in Path(folder).iterdir():
        if path.is_dir() and split_named(path.name) not in (None, *with_classes):
            raise DataError(f"{path} has no class folders with images: sort images into <class>/, or move it away")
    if len(with_classes) < len(split_of):
        raise DataError(f"{folder} has two names of one split among {', '.join(split_of)}: merge these folders")
    return split_of


def check_classes(folder, named):
    """Returns the sorted classes of the training images. Raises DataError if others differ from them, or look alike."""
    classes = sorted({name for _, name in named["train"]})
    others = {name for _, name in named["val"] + named["test"]}
    unknown = sorted(others.difference(classes))
    alike = {}
    for name in classes + unknown:
        other = alike.setdefault(unicodedata.normalize("NFC", name.strip().casefold()), name)
        if other != name:
            pair = f"{other!r} and {name!r} in {folder}"
            raise DataError(f"{pair} differ only in case, spaces or Unicode form: merge these classes or rename one")
    if unknown:
        raise DataError(f"{folder} has no training images of the classes {shorten(unknown, 5)}: add some")
    if len(classes) < 2:
        raise DataError(f"{folder} needs images in two or more <class>/ or train/<class>/: it has {classes[0]}/ alone")
    return classes


def label_samples(named, classes):
    """Turns the lists of (image, class) in a dict into lists of (image, label)."""
    labels = {name: label for label, name in enumerate(classes)}
    splits = []
    for pairs in named.values():
        splits.append([(image, labels[name]) for image, name in pairs])
    return splits


def folder_notes(splits, subfolders, left_out):
    """What to print about a folder before training: the classes, what is left out, and of what there is little."""
    counts = Counter(splits.classes[label] for _, label in splits.train + splits.val + splits.test)
    notes = [f"images of each class: {shorten(counted(counts), 20)}"]
    if subfolders:
        notes.append(f"images in sub-folders count for the class above: {shorten(counted(subfolders), 20)}")
    for reason, paths in left_out.items():
        notes.append(f"left out {len(paths)} {reason}: {shorten(paths, 5)}")
    for split, samples in (("validation", splits.val), ("test", splits.test)):
        if len(samples) < 30:
            notes.append(f"{len(samples)} {split} images are few: one is {100 / len(samples):.1f} points of accuracy")
    return notes


def counted(counts):
    """{name: count} -> ["name count", ...]."""
    return [f"{name} {count}" for name, count in counts.items()]


def hold_out(samples, share, ranks=None):
    """Splits samples into (kept, held out). Holds out `share` of each class, at least one but never the only one.

    Those of lowest rank are held out, where `ranks` is {image: rank}. Without ranks the choice is random, and fixed.
    """
    classes = defaultdict(list)  # {label: indices of its samples}
    for index, (_, label) in enumerate(samples):
        classes[label].append(index)
    rng = np.random.default_rng(0)
    held_out = set()
    for _, indices in sorted(classes.items()):
        if len(indices) > 1:
            count = max(1, round(share * len(indices)))
            if ranks:
                indices.sort(key=lambda index: ranks[samples[index][0]])
            else:
                rng.shuffle(indices)
            held_out.update(indices[:count])
    kept = [sample for index, sample in enumerate(samples) if index not in held_out]
    return kept, [samples[index] for index in sorted(held_out)]


# ---------------------------------------------------------------------- the benchmarks


def read_fgvc(folder, images, archive_folder, lists, source, root, search):
    """Reads one of FGVC's five sets: the folders of its images, and train.json, val.json and test.json as in VPT.

    The lists hold {path of an image: class id}. The sorted ids that occur are the labels 0, 1, ...
    """
    folder = root / folder
    paths = {}
    for name in images.split(","):
        fetch(folder / name, source, root / archive_folder)
        # By the last two parts, as cars are packed with cars_train/ and cars_test/ once or twice.
        for path in images_below(folder / name)[0]:
            paths[path.parts[-2:]] = path
    listed = {"train": [], "val": [], "test": []}
    names = {}  # {class id: name}
    for split, samples in listed.items():
        path = folder / f"{split}.json"
        url = f"{FGVC_SPLITS}/{lists}/{split}.json"
        fetch(path, url, folder)
        with reading(f"the list {path} (delete it if it is damaged; it comes from {url})"):
            for name, class_id in json.loads(path.read_bytes()).items():
                image = paths.get(Path(name).parts[-2:], folder / name)
                samples.append((image, int(class_id)))
                names[int(class_id)] = image.parent.name
    ids = sorted(names)
    classes = [names[class_id] for class_id in ids]
    if len(set(classes)) < len(ids):  # flowers and cars have no folder for each class
        classes = [f"class {class_id}" for class_id in ids]
    train, val, test = label_samples(listed, ids)
    return Splits(train, val, test, classes, "train.json, val.json and test.json")


def read_vtab(task, classes, source, root, search):
    """Reads a task of VTAB-1k as its users packed it: 800 + 200 images to train on, in lists of "path label"."""
    fetch(root / "vtab-1k", source, root)
    listed = partial(read_list, root / "vtab-1k" / task, classes)
    names = [f"class {label}" for label in range(classes)]
    if search:
        return Splits(listed("train800"), listed("val200"), [], names, "train800 and val200")
    return Splits(listed("train800val200"), [], listed("test"), names, "train800val200")


def read_list(folder, classes, name):
    """Returns the samples of one of VTAB-1k's lists."""
    path = folder / f"{name}.txt"
    samples = []
    with reading(f"{path} (lines of a path and a label below {classes}; delete vtab-1k/ if it is damaged)"):
        for line in path.read_text("utf-8-sig").splitlines():
            image, label = line.rsplit(maxsplit=1)
            if not 0 <= int(label) < classes:
                raise ValueError(f"there is a label {label}")
            samples.append((folder / image, int(label)))
    return samples


def read_torchvision(kind, classes, source, root, search):
    """Reads torchvision's data set `kind`, which downloads itself."""
    read = getattr(datasets, kind)
    splits = TORCHVISION_SPLITS.get(kind, ("train", "test"))
    if kind in ("DTD", "Food101"):
        read = partial(read, loader=Path)  # its images are decoded later
    samples = []
    with reading(f"{kind} below {root}", f"; lay it out as torchvision does, from {source}, or delete what is damaged"):
        for split in splits:
            images = read(root, split, download=True)
            samples.append([(x if isinstance(x, Path) else np.asarray(x), int(label)) for x, label in images])
        if len({label for _, label in samples[0]}) < classes:  # torchvision numbers the folders that are there
            raise ValueError("some classes have no training images")
    names = getattr(images, "classes", [f"class {label}" for label in range(classes)])
    if len(splits) == 3:
        return Splits(*samples, names, "official split")
    train, val = hold_out(samples[0], 0.2)
    return Splits(train, val, samples[1], names, "official split, a fifth of train held out for validation")


# Before Python 3.14 a tar archive may write outside the folder in which it is unpacked, unless this is set.
tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)


def fetch(path, source, folder):
    """Downloads `source` to a folder, and unpacks it there if it is an archive, unless `path` is there already.

    Raises DataError that says where to get `path` and where to put it.
    """
    if os.path.exists(path):
        return
    md5 = CHECKSUMS.get("/".join(source.split("/")[-2:]))
    try:
        if source.endswith(".json"):
            datasets.utils.download_url(source, folder, md5=md5)
        elif source.endswith((".tgz", ".tar", ".zip")):
            datasets.utils.download_and_extract_archive(source, folder, md5=md5)
        else:
            raise ValueError("it has no direct link")
    except Exception as error:  # the network's, the archive's, the checksum's, the disk's
        if os.path.isfile(path):
            os.remove(path)  # its checksum is wrong
        why = f"{path} is missing and cannot be downloaded ({error}): delete what is left of an earlier download"
        raise DataError(f"{why}, or get it from {source} and put it there") from None


# ---------------------------------------------------------------------- images drawn by the program

COLOURS = {"red": (220, 50, 40), "green": (50, 170, 70), "blue": (50, 90, 220), "yellow": (230, 200, 50)}
SHAPES = {"triangle": 3, "square": 4, "disc": 30}  # sides
KINDS = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
DIRECTIONS = "right, below right, below, below left, left, above left, above, above right".split(", ")
SIDE = 48  # pixels


def draw(rng, objects):
    """Draws a noisy grey image (48, 48, 3) with objects on it: (shape, colour, (x, y), radius), in pixels."""
    background = rng.integers(100, 156) + rng.normal(0, 12, (SIDE, SIDE, 3))
    image = Image.fromarray(background.clip(0, 255).astype(np.uint8))
    for shape, colour, centre, radius in objects:
        ImageDraw.Draw(image).regular_polygon((*centre, radius), SHAPES[shape], fill=COLOURS[colour])
    return np.asarray(image)


def what_and_which_colour(rng, label):
    """Draws an image of the source task: one object anywhere. Its shape and colour are the class."""
    colour, shape = KINDS[label].split()
    radius = rng.uniform(6, 9)
    centre = rng.uniform(radius, SIDE - radius, 2)
    return draw(rng, [(shape, colour, centre, radius)])


def where_is_blue(rng, label):
    """Draws an image of the target task: a red and a blue object. The class is the direction from red to blue."""
    while True:
        red, blue = rng.uniform(7, SIDE - 7, (2, 2))  # (x, y) each
        dx, dy = blue - red
        deviation = math.remainder(math.degrees(math.atan2(dy, dx)) - 45 * label, 360)
        if math.hypot(dx, dy) > 18 and abs(deviation) < 17.5:  # not near the border of two classes
            break
    shapes = rng.choice(list(SHAPES), 2)
    return draw(rng, zip(shapes, ("red", "blue"), (red, blue), rng.uniform(5, 8, 2)))


def read_drawn(draw_one, classes, counts, source, root, search):
    """Draws the images of a task. The classes are balanced, and the images are always the same."""
    splits = []
    for seed, count in enumerate(counts):
        rng = np.random.default_rng(seed)
        labels = [index % len(classes) for index in range(count)]
        splits.append([(draw_one(rng, label), label) for label in labels])
    return Splits(*splits, classes, "drawn by the program")


# ---------------------------------------------------------------------- from an image to a batch


TRANSFORMS = ("crop-flip", "crop", "resize")


def transform(kind, image_size, mean, std, training=False):
    """Returns a transform: PIL image -> (3, height, width), normalized by mean and std per RGB channel.

    Args:
        kind: "crop-flip" (FGVC): the short side is resized to 256 / 224 of the longer of `image_size`; then a random
            crop and flip in training, the centre crop in testing. "crop": the same without flip. "resize" (VTAB-1k,
            HTA): the whole image is squeezed to the size. Raises DataError for anything else.
        image_size: (height, width) in pixels.
        mean, std: of each channel, for values in [0, 1].
    """
    if kind not in TRANSFORMS:
        raise DataError(f"there is no transform {kind!r}: use {', '.join(TRANSFORMS)}")
    if kind == "resize":
        steps = [transforms.Resize(image_size)]
    else:
        crop = transforms.RandomCrop if training else transforms.CenterCrop
        steps = [transforms.Resize(round(max(image_size) * 256 / 224)), crop(image_size)]
    if kind == "crop-flip" and training:
        steps.append(transforms.RandomHorizontalFlip())
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def open_picture(image):
    """Returns an upright RGB PIL image, on white where it is transparent.

    `image` is a path, a PIL image, or a uint8 array (H, W, 3) or (H, W). Raises DataError for anything else, and for
    what is damaged or cannot be converted without a guess.
    """
    if isinstance(image, (str, Path)):
        with opened(image) as picture:
            return upright_rgb(picture)
    with reading("an image in memory", "; give a path, a PIL image or a uint8 array (H, W, 3) or (H, W)"):
        if not isinstance(image, Image.Image):
            if image.dtype != np.uint8 or image.ndim != 2 and image.shape[2:] != (3,):
                raise ValueError(f"it is an array {tuple(image.shape)} of {image.dtype}")
            image = Image.fromarray(image)
        check_pixels(image)
        return upright_rgb(image.copy())


@contextmanager
def opened(path):
    """In a `with` block, the PIL image of a file, not yet decoded. DataError names a file that cannot be read."""
    # Given a path, Pillow memory-maps some TIFFs and rotates them twice.
    with reading(f"the image {path}", "; check its name, make it a small JPEG, or omit it"), open(path, "rb") as file:
        picture = Image.open(file)
        check_pixels(picture)
        yield picture


def check_pixels(picture):
    """Raises ValueError for an image whose shape or pixel values would silently give nonsense."""
    if max(picture.size) > 100 * min(picture.size):  # resized by its short side, it would fill the memory
        raise ValueError(f"of its {picture.width} x {picture.height} pixels one side is over 100 times the other")
    bits = getattr(picture, "tag_v2", {}).get(258, 8)  # BitsPerSample of a TIFF, for each band
    deep = picture.mode.startswith("I") and picture.format not in ("PNG", "PPM", "JPEG2000")
    if picture.mode == "F" or deep or np.max(bits) > 8:
        raise ValueError(f"pixels of mode {picture.mode} with more than 8 bits have no agreed scale")


def upright_rgb(picture):
    """Converts a PIL image to RGB, upright and on white. Changes `picture`."""
    picture.load()
    with suppress(Exception):  # whatever is wrong with the metadata, the image is sound
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        deep = np.asarray(picture)
        grey = np.where(deep == picture.info.get("transparency"), 255, deep // 257)
        picture = Image.fromarray(grey.astype(np.uint8))
    elif picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def find_images(paths):
    """Returns the files among the paths and all images below the folders among them, and the other files there."""
    images = []
    others = []
    for path in paths:
        if os.path.isdir(path):
            below, left_out = images_below(path)
            images += below
            others += sum(left_out.values(), [])
        else:
            images.append(Path(path))
    return images, others


def unreadable(images):
    """Decodes every image once. Returns {image: reason} for those that cannot be decoded."""
    reasons = {}
    for image in images:
        try:
            open_picture(image)
        except DataError as error:
            reasons[image] = str(error)
    return reasons


class Images(Dataset):
    """Maps (index, seed) to (image, label): a (3, height, width) tensor, which the seed crops and flips, and an int."""

    def __init__(self, samples, preprocess):
        self.samples = samples
        self.preprocess = preprocess

    def __getitem__(self, key):
        index, seed = key
        image, label = self.samples[index]
        # Without workers, dropout draws from the same generator, which is therefore restored afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            pixels = self.preprocess(open_picture(image))
        return pixels, label


class Shuffled:
    """Keys of `Images`, in a new order with new seeds in every epoch. Both depend on `seed` and `epoch` alone."""

    def __init__(self, count, seed):
        self.count = count
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return self.count

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.count)
        seeds = rng.integers(2**63, size=self.count)
        return zip(order.tolist(), seeds.tolist())


def make_loader(samples, preprocessing, batch_size, workers, shuffle_seed=None):
    """Returns a DataLoader of batches: images (batch, 3, height, width) and labels (batch,).

    `preprocessing` is a dict of arguments of `transform`. A loader with a `shuffle_seed` is for training: it augments,
    shuffles anew for every `loader.sampler.epoch`, and drops the last incomplete batch. Otherwise it keeps the order.
    """
    training = shuffle_seed is not None
    if training and len(samples) < batch_size:
        raise DataError(f"{len(samples)} training images are fewer than one batch of {batch_size}: lower --batch-size")
    # The released code on one GPU has one order for all epochs, so the images of the last, incomplete batch are never
    # trained on (40 of VTAB natural's 1,000).
    sampler = Shuffled(len(samples), shuffle_seed) if training else [(index, 0) for index in range(len(samples))]
    return DataLoader(
        Images(samples, transform(**preprocessing, training=training)),
        batch_size,
        sampler=sampler,
        drop_last=training,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_initialized(),  # not with --cpu
        generator=torch.Generator(),  # not the one that serves dropout, which would then depend on the workers
    )


# ---------------------------------------------------------------------- the table


def adapted(lr={}, **options):
    """Returns a row's `by_method`: `options` for sa2vp and adapter alike, and each method's learning rate in `lr`."""
    by_method = {"sa2vp": dict(options), "adapter": dict(options)}
    for method, rate in lr.items():
        by_method.setdefault(method, {})["lr"] = rate
    return by_method


def read_rows(text):
    """The lines of a text table, each a list of words."""
    return [line.split() for line in text.strip().splitlines()]


FGVC_SPLITS = "https://raw.githubusercontent.com/savadikarc/gift/f0cb80cb4db413ecd108dd7e74fef27105eb6b97/data"
FGVC = """
    cub      CUB_200_2011   images                .            cub            16  0.1
    nabirds  nabirds        images                -            nabirds        32  0.1
    flowers  flowers-102    jpg                   flowers-102  oxfordflowers   8  0.1
    dogs     dogs           Images                dogs         stanforddogs   32  0.1
    cars     stanford_cars  cars_train,cars_test  -            stanfordcars   64  1.5
"""  # name; folder below root; folders of images in it; folder to unpack in; folder of FGVC_SPLITS; inner_dim, scale
# The released code has batch sizes of 40, 64 or 128, rates of 5e-4 (its README) or 1e-3 (its scripts), and the raw
# ids of nabirds as labels.
FGVC_SOURCES = """
    cub      https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz
    nabirds  https://dl.allaboutbirds.org/nabirds
    flowers  https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz
    dogs     http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar
    cars     https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset
"""
CHECKSUM_ROWS = """
    files/CUB_200_2011.tgz    97eceeb196236b17998738112f37df78
    102/102flowers.tgz        52808999861908f626f3c1f4e79d11fa
    cub/train.json            8aedcb810c68c7410607a6801bc131d8
    cub/val.json              ccbb8956711c47a59caff813075c9fe6
    cub/test.json             5f3c7af28e087ba27079ddc6a4e7846e
    nabirds/train.json        3835cf47e4617721556316d3b9f79db8
    nabirds/val.json          5f6e32ed373af37be26f5c7d5f9632d9
    nabirds/test.json         77f59e1fc2becded3c11b8a4bde70018
    oxfordflowers/train.json  9e998dfd1e7131c799b7fcd38d559a96
    oxfordflowers/val.json    0f08ac53a5739f0026763bd0aac3e054
    oxfordflowers/test.json   ada4f0666adcfa3260f719a84a64b928
    stanforddogs/train.json   937d4b859e7ca68f6667b9bf207e782a
    stanforddogs/val.json     0a372499e9610c87403ce2a85ecae16e
    stanforddogs/test.json    6e02d6c4ae0ad89c9f64f1b9c9bebcb5
    stanfordcars/train.json   bde33e7dba5c6885bd4bbe44b49c036c
    stanfordcars/val.json     db39ee040d9d38f7d929508f0b4cedb7
    stanfordcars/test.json    8a5e55b4d0d7bde3551fa80a0f5505d7
"""  # the end of a file's address, its MD5
CHECKSUMS = dict(read_rows(CHECKSUM_ROWS))
TORCHVISION = """
    cifar10   CIFAR10    0  https://www.cs.toronto.edu/~kriz/cifar.html
    cifar100  CIFAR100   0  https://www.cs.toronto.edu/~kriz/cifar.html
    dtd       DTD        0  https://www.robots.ox.ac.uk/~vgg/data/dtd
    food101   Food101    0  http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz
    gtsrb     GTSRB     43  https://benchmark.ini.rub.de/gtsrb_dataset.html
    svhn      SVHN      10  http://ufldl.stanford.edu/housenumbers
"""  # name, class in torchvision, number of classes where it names none, source
TORCHVISION_SPLITS = {"CIFAR10": (True, False), "CIFAR100": (True, False), "DTD": ("train", "val", "test")}
VTAB_1K = "https://huggingface.co/datasets/XiN0919/VTAB-1k/resolve/main/vtab-1k.zip"
VTAB = {  # group: a table of tasks, number of classes, inner_dim, scale, batch size and learning rate of SA2VP
    "vtab/natural": """
        caltech101                102    8  0.1  64  1e-3
        cifar                     100    8  0.1  64  1e-3
        dtd                        47    8  0.1  64  1e-3
        oxford_flowers102         102    8  0.1  64  1e-3
        oxford_iiit_pet            37    8  0.1  64  5e-4
        svhn                       10   16  0.5  64  1e-3
        sun397                    397    8  0.1  64  1e-3
    """,
    "vtab/specialized": """
        patch_camelyon              2   16  1.5  40  1e-3
        eurosat                    10   16  1.5  40  1e-3
        resisc45                   45   16  0.5  40  1e-3
        diabetic_retinopathy        5   16  1.5  40  1e-3
    """,
    "vtab/structured": """
        clevr_count                 8   32  1.5  40  5e-4
        clevr_dist                  6   32  1.5  40  1e-3
        dmlab                       6   32  1.5  40  1e-3
        kitti                       4   32  1.5  40  1e-3
        dsprites_loc               16   32  1.5  40  1e-3
        dsprites_ori               16   16  0.1  40  1e-3
        smallnorb_azi              18   32  1.5  40  1e-3
        smallnorb_ele               9   32  0.5  40  1e-3
    """,
}
# Rows of no group: images drawn by the program. Other data sets can be added here.
DRAWN = [
    DataSet(
        "shapes",
        partial(read_drawn, where_is_blue, DIRECTIONS, (1000, 400, 1000)),
        settings={
            "weights": "runs/shapes-vit/best.pt",
            "image_size": SIDE,
            "transform": "crop",  # 1,000 images are few: without random crops they are learned by heart
            "batch_size": 32,
            "epochs": 60,
        },
        by_method=adapted(  # all but vpt's rate were searched with this ViT
            {"sa2vp": 2e-3, "vpt": 1e-2, "adapter": 2e-3, "linear": 1e-1, "full": 1e-3},
            inner_dim=64,
            scale=2.0,
            dropout=0.0,
        ),
    ),
    DataSet(
        "shapes-source",
        partial(read_drawn, what_and_which_colour, KINDS, (7200, 360, 360)),
        settings={"weights": "scratch", "image_size": SIDE},
    ),
]


def make_table():
    """Returns ({name: row}, {group: names of its data sets})."""
    rows = []
    groups = {"fgvc": [], "vtab": []}
    for name, folder, images, archive_folder, lists, inner_dim, scale in read_rows(FGVC):
        groups["fgvc"].append(name)
        read = partial(read_fgvc, folder, images, archive_folder, lists)
        by_method = adapted(inner_dim=int(inner_dim), scale=float(scale))
        rows.append(DataSet(name, read, dict(read_rows(FGVC_SOURCES))[name], {"transform": "crop-flip"}, by_method))
    rows[-1].by_method["sa2vp"]["fusion_layers"] = (4,)  # cars: one new map; that it is in layer 4 is inferred
    for group, tasks in VTAB.items():
        groups[group] = []
        for task, classes, inner_dim, scale, batch_size, lr in read_rows(tasks):
            groups[group].append(f"vtab/{task}")
            groups["vtab"].append(f"vtab/{task}")
            read = partial(read_vtab, task, int(classes))
            # VTAB-1k's protocol keeps the last epoch: no image is left for validation.
            settings = {"keep": "last", "batch_size": int(batch_size)}
            by_method = adapted({"sa2vp": float(lr)}, inner_dim=int(inner_dim), scale=float(scale))
            rows.append(DataSet(f"vtab/{task}", read, VTAB_1K, settings, by_method))
    # The released code's table of HTA has six data sets. In five of them, test accuracy chooses the epoch; validation
    # images of GTSRB and Food101 can be training images, too. Here all images are resized, by default.
    full_size = rows[:4]  # FGVC's without cars
    for name, kind, classes, source in read_rows(TORCHVISION):
        full_size.append(DataSet(name, partial(read_torchvision, kind, int(classes)), source))
    groups["hta"] = []
    for row in full_size:
        groups["hta"].append(f"hta/{row.name}")
        rows.append(row._replace(name=f"hta/{row.name}", settings={}, by_method=adapted(inner_dim=64)))
    return {row.name: row for row in rows + DRAWN}, groups


TABLE, GROUPS = make_table()
