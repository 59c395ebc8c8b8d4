"""A plain Vision Transformer (ViT), written out by hand, and the readers of its published weights.

This module knows nothing of prompts. Modules have timm's names, so the state dict of a timm ViT without its head loads
into it, and the other way round.
In shapes, N is the number of patches and d the width of a token.
"""

import argparse
import hashlib
import json
import math
import os
import re
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """An error that the user can fix, in a file or an option. Its message is one sentence on one line."""


class Attention(nn.Module):
    """Multi-head attention in two steps, so that a caller can combine q, k, v of different sources."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x):
        """(batch, tokens, d) -> q, k, v, each (batch, heads, tokens, d / heads)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (batch, tokens, 3, heads, d / heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q, k, v, mask=None):
        """Wo softmax(q k^T / sqrt(d / heads)) v: one token per query, (batch, queries, d).

        A batch of one, in q or in k and v, is broadcast. `mask` (queries, keys) is True where a query attends to a key.
        """
        batch = max(q.size(0), k.size(0))  # len would fix the batch in torch.export
        q, k, v = (tensor.expand(batch, -1, -1, -1) for tensor in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (batch, heads, queries, d / heads)
        return self.proj(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm encoder layer, (batch, tokens, d) -> the same: x + attention(LN1(x)), then x + MLP(LN2(x))."""

    def __init__(self, dim, heads, hidden, drop):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        layers = dict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), drop1=drop, fc2=nn.Linear(hidden, dim), drop2=drop)
        self.mlp = nn.Sequential(OrderedDict(layers))  # its GELU is the exact one (erf)

    def start(self, x):
        """First half of the layer: q, k, v of LN1(x), each (batch, heads, tokens, d / heads)."""
        return self.attn.project(self.norm1(x))

    def finish(self, x, q, k, v):
        """Second half of the layer. x and q may be restricted to the tokens whose output is needed."""
        x = x + self.attn.attend(q, k, v)
        return x + self.mlp(self.norm2(x))

    def forward(self, x):
        return self.finish(x, *self.start(x))


class VisionTransformer(nn.Module):
    """ViT encoder: images (batch, 3, height, width) -> class token after the final LayerNorm, (batch, d).

    image_size  in pixels, an int or (height, width)
    patch_size  the same; InputError if the image size is not a multiple of it
    normalize   the normalization of images that the weights expect, see `mean_and_std`

    One dropout module serves the whole encoder. It is off until a method sets `drop.p`.
    """

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, mlp_ratio=4, normalize="half"):
        super().__init__()
        self.image_size = as_pair(image_size)
        self.patch_size = as_pair(patch_size)
        for side, patch in zip(self.image_size, self.patch_size):
            if side < patch or side % patch:
                raise InputError(f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        if heads < 1 or dim % heads:
            raise InputError(f"width {dim} does not divide into {heads} heads")
        self.grid = tuple(side // patch for side, patch in zip(self.image_size, self.patch_size))  # (h, w)
        self.dim = dim
        self.normalize = canonical_normalize(normalize)
        self.notes = []  # what load_vit decided or assumed, sentences
        proj = nn.Conv2d(3, dim, self.patch_size, self.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj, flatten=nn.Flatten(2)))  # (batch, d, N), row by row
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(self.grid), dim))
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(Block(dim, heads, round(mlp_ratio * dim), self.drop) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)

    def describe(self):
        """The sizes and the normalization, in words."""
        return (
            f"width {self.dim}, layers {len(self.blocks)}, heads {self.blocks[0].attn.heads}, "
            f"patch {self.patch_size[0]}, image {self.image_size[0]}, normalization {self.normalize}"
        )

    def embed(self, images):
        """Drop([cls ; patches] + E_pos), images (batch, 3, height, width) -> (batch, 1 + N, d).

        InputError for images of another size.
        """
        size = tuple(images.shape[-2:])
        if size != self.image_size:
            raise InputError(f"images are {size} pixels, the model takes {self.image_size}")
        cls = self.cls_token.expand(images.size(0), -1, -1)
        tokens = torch.cat([cls, self.patch_embed(images).mT], dim=1)
        return self.drop(tokens + self.pos_embed)

    def forward(self, images):
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def as_pair(size):
    """An int or (height, width) -> (height, width)."""
    if isinstance(size, int):
        return (size, size)
    return tuple(size)


def interpolate_positions(pos_embed, old_grid, new_grid):
    """Resamples position embeddings (1, 1 + h w, d) to another grid, bicubic. The class token's one is kept."""
    if old_grid == new_grid:
        return pos_embed
    cls = pos_embed[:, :1]
    patches = pos_embed[:, 1:].unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, d, h, w)
    patches = F.interpolate(patches, new_grid, mode="bicubic")  # (1, d, h', w')
    return torch.cat([cls, patches.flatten(2).mT], 1)  # (1, 1 + h' w', d)


# ---------------------------------------------------------------------- normalization of images

NORMALIZE = {  # mean and std per RGB channel of [0, 1]
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def mean_and_std(normalize):
    """Returns (mean, std) of a normalization, each three floats: red, green and blue of images in [0, 1].

    `normalize` is a name in `NORMALIZE` or six numbers, the mean followed by the std, also as a pair of three each.
    InputError for anything else.
    """
    if normalize in list(NORMALIZE):
        return NORMALIZE[normalize]
    try:
        values = np.array(normalize, float).reshape(2, 3)  # mean and std
        if not np.isfinite(values).all() or values[1].min() < 1e-6:
            raise ValueError
    except (TypeError, ValueError):  # also of any other count than six
        raise InputError(f"normalization {normalize!r}: expected half, imagenet or six numbers (mean, then std > 0)")
    return tuple(map(tuple, values.tolist()))


def canonical_normalize(normalize):
    """Returns the name of a normalization or, if it has none, its six numbers as a tuple of floats."""
    mean, std = mean_and_std(normalize)
    for name, known in NORMALIZE.items():
        if known == (mean, std):
            return name
    return mean + std


# ---------------------------------------------------------------------- published weights

BACKBONE_ROWS = """
    imagenet21k   half      https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz
    deit-tiny     imagenet  META/deit/deit_tiny_patch16_224-a1311bcf.pth
    deit-small    imagenet  META/deit/deit_small_patch16_224-cd65a155.pth
    deit-base     imagenet  META/deit/deit_base_patch16_224-b5f2ef4d.pth
    mae           imagenet  META/mae/pretrain/mae_pretrain_vit_base.pth
    dino-small    imagenet  META/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth
    dino-base     imagenet  META/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth
    mocov3-base   imagenet  META/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar
    dinov2-small  imagenet  META/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth
    dinov2-base   imagenet  META/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth
"""
BACKBONES = {}  # name: (address, normalization)
for row in BACKBONE_ROWS.strip().splitlines():
    backbone, normalization, url = row.split()
    BACKBONES[backbone] = (url.replace("META", "https://dl.fbaipublicfiles.com"), normalization)


def load_vit(weights, image_size=224, heads=None, normalize=None):
    """Reads pre-trained weights into a VisionTransformer. Nothing is executed. InputError if they are of no plain ViT.

    weights     a name in `BACKBONES`, downloaded once, or a file: Google's .npz; .safetensors, .pth or .pt with the
                names of timm, torchvision, HuggingFace or DINOv2; a best.pt of full fine-tuning
    image_size  pixels, an int or (height, width); position embeddings are interpolated to its grid
    heads       default: read from the file or a config.json beside it, otherwise the usual number for its width
    normalize   see `mean_and_std`; default: read from the same files, otherwise "imagenet"

    The `notes` of the result say what was read from a config.json, assumed or interpolated.
    """
    weights = str(weights)
    path = find_file(weights)
    content = read_file(path)
    try:
        tensors = flatten(content)
        prefix, table, notes = find_encoder(tensors)
        tensors = rename(tensors, prefix, table)
        dim = tensors["cls_token"].size(-1)
        usual = {"heads": usual_heads(dim, prefix), "normalize": "imagenet"}
        known = {}  # from a sure source, so filled in without a note
        if weights in BACKBONES:
            known = usual | {"normalize": BACKBONES[weights][1]}
        elif table is GOOGLE:
            known = {"heads": len(tensors["blocks.0.attn.query.bias"]), "normalize": "half"}
        elif "trained" in content:  # a best.pt of this project
            known = content["backbone"]
        # Each of these steps fills in only what the steps before it left open.
        settings = {"heads": heads, "normalize": normalize}
        fill(settings, known)
        if None in settings.values():
            notes += fill_from_configs(settings, path.parent, dim, count_layers(tensors))
        notes += fill(settings, usual, "assumed")
        if settings["heads"] is None:
            raise InputError(f"its width {dim} is not a multiple of 64: give the number of heads (--heads)")
        if table is GOOGLE:
            tensors = from_google(tensors)
        vit = vit_from_tensors(merge(tensors), settings["heads"], image_size)
        vit.normalize = canonical_normalize(settings["normalize"])
    except Exception as error:  # missing and misshapen tensors raise many kinds of errors
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        advice = f"; it is one of several shards: {SAVE_STATE_DICT}" if "-of-" in path.name else ""
        raise InputError(f"cannot use {path} as a plain ViT: {reason}{advice}")
    vit.notes = notes + vit.notes
    return vit


def find_file(weights):
    """Path of the weights, downloaded if `weights` is a name in `BACKBONES`. InputError if there is no such file."""
    if weights in BACKBONES:
        return download(weights)
    if not is_file(weights):
        raise InputError(f"{weights} is not a file: give --weights (weights=) a file or one of {', '.join(BACKBONES)}")
    return Path(weights)


def download(name):
    """Path of a backbone of the table, downloaded once into PyTorch's cache. InputError if that fails."""
    url = BACKBONES[name][0]
    path = Path(torch.hub.get_dir(), "checkpoints", name + Path(url).suffix)
    if not is_file(path):
        try:
            with arriving(path) as temporary:
                torch.hub.download_url_to_file(url, temporary)
        except Exception as error:  # of the network or the disk
            advice = f"fetch it yourself and save it as {path.name} in {path.parent}, or give --weights PATH"
            raise InputError(f"cannot download {url} ({error}): {advice}")
    return path


@contextmanager
def arriving(path):
    """Yields a temporary path to write a file to. When the block ends without an error, the file moves to `path`.

    So `path` is there whole or not at all. The temporary file lies beside it, under a name of its own. Missing parents
    are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.urandom(8).hex()}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


is_file = os.path.isfile  # Path.is_file raises an error for a path in a folder that may not be looked into


def fingerprint(vit):
    """SHA-256 of a backbone's weights, without the positions of patches, to tell one from another."""
    digest = hashlib.sha256()
    for name, tensor in vit.state_dict().items():
        if name == "pos_embed":
            tensor = tensor[:, :1]  # interpolated values differ in the last bit between machines
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def vit_from_tensors(tensors, heads, image_size):
    """The VisionTransformer with these tensors of timm's names and layouts. InputError names one that does not fit."""
    shape = tensors["patch_embed.proj.weight"].shape
    if len(shape) != 4:
        raise InputError(f"patch_embed.proj.weight is {shape}, expected (d, 3, height, width): no ViT of images")
    dim, _, *patch_size = shape
    hidden = len(tensors["blocks.0.mlp.fc1.weight"])
    vit = VisionTransformer(image_size, patch_size, dim, count_layers(tensors), heads, hidden / dim)
    if tensors["pos_embed"].dim() != 3 or tensors["pos_embed"].size(1) < 2:
        raise InputError(f"pos_embed is {tensors['pos_embed'].shape}, expected (1, 1 + patches, d)")
    positions = tensors["pos_embed"].size(1) - 1
    side = math.isqrt(positions)
    if positions == side**2 and vit.grid != (side, side):  # taken for a square grid; any other has to fit as it is
        if math.prod(vit.grid) == positions:
            raise InputError(f"pos_embed may be a grid of {side} x {side} or of {vit.grid}: choose another image size")
        tensors["pos_embed"] = interpolate_positions(tensors["pos_embed"], (side, side), vit.grid)
        vit.notes.append(f"position embeddings resampled from {side} x {side} to {vit.grid[0]} x {vit.grid[1]} patches")
    load_tensors(vit.state_dict(), tensors)
    return vit


def count_layers(tensors):
    """Number of encoder layers among tensors of timm's names."""
    return sum(name.endswith("norm1.weight") for name in tensors)


def load_tensors(targets, tensors):
    """Copies tensors into those of a model by name. InputError names one that is missing, surplus or misshapen."""
    for name in tensors | targets:
        shape = getattr(tensors.get(name), "shape", "nothing")
        expected = getattr(targets.get(name), "shape", "nothing")
        if shape != expected:
            raise InputError(f"{name} is {shape}, expected {expected}")
        targets[name].detach().copy_(tensors[name])


# ---------------------------------------------------------------------- heads and normalization of published weights


def fill(settings, stated, source=""):
    """Fills in the settings that are None and that `stated` has. Returns a note for each."""
    notes = []
    for key, value in settings.items():
        if value is None and stated.get(key) is not None:
            settings[key] = stated[key]
            notes.append(f"{key} {stated[key]} {source} (--{key} overrides it)")
    return notes


def fill_from_configs(settings, folder, dim, depth):
    """Fills in what timm's or HuggingFace's configuration beside the weights states. Returns notes."""
    notes = []
    for path in (folder / "config.json", folder / "preprocessor_config.json"):
        if not is_file(path):
            continue
        try:
            config = json.loads(path.read_bytes())
            config.update(**(config.get("pretrained_cfg") or {}))  # where timm has the normalization
            for key, size in (("hidden_size", dim), ("num_features", dim), ("num_hidden_layers", depth)):
                if config.get(key, size) != size:
                    return notes + [f"{path.name} ignored: it is of another model, whose {key} is {config[key]}"]
            stated = config_settings(config)
        except Exception as error:  # damaged or unexpected JSON raises many kinds of errors
            raise InputError(f"cannot use {path}: {error}; mend it, or move it away")
        notes += fill(settings, stated, f"read from {path.name}")
    return notes


def config_settings(config):
    """What a configuration states of heads and normalization, a dict. ValueError names a value that is wrong."""
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act is {config['hidden_act']}, but this ViT has gelu: use other weights")
    heads = config.get("num_attention_heads", 1)
    if type(heads) is not int or heads < 1:  # not isinstance, because True is an int
        raise ValueError(f"num_attention_heads is {heads!r}, no positive integer (--heads with --normalize overrides)")
    stated = {"heads": config.get("num_attention_heads")}
    mean_std = [config.get(key, config.get(f"image_{key}")) for key in ("mean", "std")]
    if mean_std != [None, None]:
        stated["normalize"] = canonical_normalize(mean_std)
    return stated


def usual_heads(dim, prefix):
    """The usual number of heads of width `dim`, None if there is none. `prefix` begins its tensors' names."""
    if dim in (1280, 1408, 1664):  # ViT-H, ViT-g and ViT-G
        return 16
    if dim == 384 and "base_encoder" in prefix:  # MoCo-v3's ViT-S
        return 12
    return None if dim % 64 else dim // 64


# ---------------------------------------------------------------------- files of weights

CUT_SHORT = "it is cut short: delete it, and download or copy it again"
SAVE_STATE_DICT = "save model.state_dict() and give that file"


def read_file(path):
    """Reads a .npz, a .safetensors or a file of torch.save. Returns a dict. Nothing is executed.

    InputError if the file cannot be read, is cut short, or holds other objects than tensors and plain data.
    """
    try:
        with open(path, "rb") as file:
            return read_content(file)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}")
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}")


def read_content(file):
    """Reads an open file, whose first bytes tell its kind, whatever its name."""
    start = file.read(256)
    is_zip = start.startswith(b"PK")
    if is_zip and not zipfile.is_zipfile(file):  # a zip ends with its directory
        raise InputError(CUT_SHORT)
    file.seek(0)
    try:
        if start[8:9] == b"{":
            return read_safetensors(file)
        if is_zip and b".npy" in start:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        # Training scripts save their argparse.Namespace beside the weights. It is harmless data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (InputError, OSError):
        raise
    except Exception as error:  # torch, numpy and json raise many kinds of errors on damaged files
        if not is_zip and (not file.read(1) or "unexpected EOF" in str(error)):  # the reader wanted more than there is
            raise InputError(CUT_SHORT)
        raise InputError(f"it is no state dict and begins with {start[:40]}: {SAVE_STATE_DICT}")
    if not isinstance(content, dict):
        raise InputError(f"it holds a {type(content).__name__} and no state dict: {SAVE_STATE_DICT}")
    return content


def read_safetensors(file):
    """Name -> tensor of an open .safetensors file: 8 bytes, the length of the header; a JSON header; the data."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = torch.from_numpy(np.fromfile(file, np.uint8))
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(f"tensor {name} has type {entry['dtype']}, which is not supported")
        dtype = getattr(torch, DTYPES[entry["dtype"]])
        start, end = entry["data_offsets"]
        if end - start != math.prod(entry["shape"]) * dtype.itemsize:
            raise InputError(f"tensor {name} has {end - start} bytes for shape {entry['shape']}: {SAVE_STATE_DICT}")
        tensors[name] = data[start:end].clone().view(dtype).reshape(entry["shape"])
    return tensors


def flatten(content, prefix=""):
    """The tensors in nested dicts: {"model": {"cls_token": tensor}} -> {"model.cls_token": tensor}."""
    tensors = {}
    for key, value in content.items():
        if isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value.detach()
    return tensors


def find_encoder(tensors):
    """Finds the ViT among a file's tensors. Returns (prefix of its tensors' names, its publisher's table, notes)."""
    encoders = {}
    for patches, table in PATCH_EMBEDDINGS.items():
        for name in tensors:
            if name.endswith(patches):
                encoders[name.removesuffix(patches)] = table
    # Of two encoders take the one that the authors of MoCo-v3 and of DINO evaluate.
    is_only = len(encoders) == 1
    prefixes = [prefix for prefix in encoders if is_only or "base_encoder" in prefix or "teacher" in prefix]
    if len(prefixes) != 1:
        raise InputError(
            f"it has {len(encoders)} patch_embed.proj.weight, "
            f"in {list(encoders or tensors)[:5]}: save the state_dict of one ViT"
        )
    prefix = prefixes[0]
    notes = [] if is_only else [f"{prefix[:-1]} read, one of {len(encoders)} encoders in the file"]
    return prefix, encoders[prefix], notes


def rename(tensors, prefix, table):
    """The encoder's tensors in float32 under timm's names. InputError names one that cannot be an encoder's weights."""
    renamed = {}
    for name, tensor in tensors.items():
        timm_name = name.removeprefix(prefix)
        for old, new in table.items():
            timm_name = timm_name.replace(old, new)
        timm_name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", timm_name)  # DINOv2's training has chunks of blocks
        if not name.startswith(prefix) or timm_name.startswith(NOT_ENCODER):
            continue
        if timm_name in renamed:
            raise InputError(f"two of its tensors mean {timm_name}")
        if tensor.dim() == 0 or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise InputError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected dense floats")
        renamed[timm_name] = tensor.float()
        if not renamed[timm_name].isfinite().all():
            raise InputError(f"{name} has values that are NaN or infinite in float32")
    return renamed


def from_google(tensors):
    """To timm's layouts from Google's, where inputs come first and heads have a dimension of their own."""
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensors[name] = tensor.flatten()
        elif "patch_embed" in name:
            tensors[name] = tensor.permute(3, 2, 0, 1)  # height, width, in, out -> out, in, height, width
        elif "attn.proj" in name:
            tensors[name] = tensor.flatten(0, 1).T  # (heads, d / heads, d) -> (d, d)
        elif "attn" in name or "mlp" in name:
            tensors[name] = tensor.flatten(1).T
    return tensors


def merge(tensors):
    """Joins attn.query, attn.key and attn.value to attn.qkv. Folds LayerScale into the layer before it."""
    for name in list(tensors):
        if ".attn.query." in name:
            joined = name.replace("query", "qkv")
            if joined in tensors:
                raise InputError(f"two of its tensors mean {joined}")
            query, key, value = [tensors.pop(name.replace("query", kind)) for kind in ("query", "key", "value")]
            if not query.shape == key.shape == value.shape:
                raise InputError(f"{name} is {query.shape}, but its key {key.shape} and its value {value.shape}")
            tensors[joined] = torch.cat([query, key, value])
        elif name.endswith("gain"):  # x + g (W h + b) = x + (g W) h + g b
            gain = tensors.pop(name)
            layer = name.removesuffix("gain")
            if gain.shape != tensors[f"{layer}bias"].shape:
                raise InputError(f"{name} is {gain.shape}, expected {tensors[f'{layer}bias'].shape}")
            tensors[f"{layer}weight"] *= gain[:, None]
            tensors[f"{layer}bias"] *= gain
    return tensors


# ---------------------------------------------------------------------- names

NOT_ENCODER = ("head", "pre_logits", "fc_norm", "pooler", "mask_token", "decoder_")  # as in MAE and DINO


def read_table(text):
    """First column -> second column of a text."""
    return dict(line.split() for line in text.strip().splitlines())


DTYPES = read_table("""
    BOOL     bool
    U8       uint8
    U16      uint16
    U32      uint32
    U64      uint64
    I8       int8
    I16      int16
    I32      int32
    I64      int64
    F8_E4M3  float8_e4m3fn
    F8_E5M2  float8_e5m2
    F16      float16
    BF16     bfloat16
    F32      float32
    F64      float64
    C64      complex64
""")  # of .safetensors -> of PyTorch

# What to replace in each publisher's names, in this order, to get timm's. A gain is LayerScale's.
TIMM = read_table("""
    ls1.gamma                                   attn.proj.gain
    ls2.gamma                                   mlp.fc2.gain
""")
GOOGLE = read_table("""
    embedding/                                  patch_embed.proj.
    cls                                         cls_token
    Transformer/posembed_input/pos_embedding    pos_embed
    Transformer/encoder_norm/                   norm.
    Transformer/encoderblock_                   blocks.
    LayerNorm_0                                 norm1
    LayerNorm_2                                 norm2
    MultiHeadDotProductAttention_1/out          attn.proj
    MultiHeadDotProductAttention_1              attn
    MlpBlock_3/Dense_0                          mlp.fc1
    MlpBlock_3/Dense_1                          mlp.fc2
    kernel                                      weight
    scale                                       weight
    /                                           .
""")
TORCHVISION = read_table("""
    conv_proj.                                  patch_embed.proj.
    class_token                                 cls_token
    encoder.pos_embedding                       pos_embed
    encoder.ln.                                 norm.
    encoder.layers.encoder_layer_               blocks.
    ln_1                                        norm1
    ln_2                                        norm2
    self_attention.in_proj_                     attn.qkv.
    self_attention.out_proj                     attn.proj
    mlp.0                                       mlp.fc1
    mlp.3                                       mlp.fc2
    mlp.linear_1                                mlp.fc1
    mlp.linear_2                                mlp.fc2
""")
HUGGINGFACE = read_table("""
    embeddings.patch_embeddings.projection.     patch_embed.proj.
    embeddings.cls_token                        cls_token
    embeddings.mask_token                       mask_token
    embeddings.position_embeddings              pos_embed
    layernorm.                                  norm.
    encoder.layer.                              blocks.
    layers.                                     blocks.
    layernorm_before                            norm1
    layernorm_after                             norm2
    attention.attention                         attn
    attention.output.dense                      attn.proj
    attention.q_proj                            attn.query
    attention.k_proj                            attn.key
    attention.v_proj                            attn.value
    attention.o_proj                            attn.proj
    intermediate.dense                          mlp.fc1
    output.dense                                mlp.fc2
    layer_scale1.lambda1                        attn.proj.gain
    layer_scale2.lambda1                        mlp.fc2.gain
""")
PATCH_EMBEDDINGS = {  # by the name of which a publisher is known
    "patch_embed.proj.weight": TIMM,
    "embedding/kernel": GOOGLE,
    "conv_proj.weight": TORCHVISION,
    "embeddings.patch_embeddings.projection.weight": HUGGINGFACE,
}
