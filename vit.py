"""A plain Vision Transformer (ViT), written out by hand, and the readers of its published weights.

It knows nothing of prompts. Modules have timm's names, so that a state dict of one loads into the other.
In shapes, N is the number of patches and d the width of a token.
"""

import argparse
import hashlib
import json
import math
import re
import tempfile
from collections import OrderedDict
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """What its user can mend, a file or an option, in one sentence on one line."""


class Attention(nn.Module):
    """Multi-head attention in two steps, so that a caller can combine q, k, v of different sources."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x):
        """(batch, tokens, d) -> q, k, v, each (batch, heads, tokens, d / heads)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q, k, v, mask=None):
        """Wo softmax(q k^T / sqrt(d / heads)) v: a token for each query, (batch, queries, d).

        A batch of one (q, or k and v) is broadcast to the other's. `mask` (queries, keys) is True where q attends.
        """
        batch = max(q.size(0), k.size(0))  # not len, which would fix the batch in torch.export
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
        mlp = dict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), drop1=drop, fc2=nn.Linear(hidden, dim), drop2=drop)
        self.mlp = nn.Sequential(OrderedDict(mlp))  # its GELU is the exact one (erf)

    def qkv(self, x):
        """The first step of the layer: q, k, v of LN1(x), each (batch, heads, tokens, d / heads)."""
        return self.attn.project(self.norm1(x))

    def finish(self, x, q, k, v):
        """The rest of the layer. x and q may be restricted to the tokens whose output is needed."""
        x = x + self.attn.attend(q, k, v)
        return x + self.mlp(self.norm2(x))

    def forward(self, x):
        return self.finish(x, *self.qkv(x))


class VisionTransformer(nn.Module):
    """ViT encoder: images (batch, 3, height, width) -> class token after the final LayerNorm, (batch, d).

    `image_size` and `patch_size` are in pixels, an int or (height, width). `normalize` names what the weights
    expect, a key of `NORMALIZE`. One dropout module serves the whole encoder; it is off until a method sets `drop.p`.
    """

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, mlp_ratio=4, normalize="half"):
        super().__init__()
        sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in (image_size, patch_size)]
        self.image_size, self.patch_size = sizes
        if any(side < patch or side % patch for side, patch in zip(self.image_size, self.patch_size)):
            raise InputError(f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        if dim % heads:
            raise InputError(f"width {dim} does not divide into {heads} heads")
        self.grid = tuple(side // patch for side, patch in zip(self.image_size, self.patch_size))  # (h, w)
        self.dim, self.normalize, self.notes = dim, normalize, []  # notes: what load_vit assumed, sentences
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
        """The sizes, in words."""
        return (f"width {self.dim}, layers {len(self.blocks)}, heads {self.blocks[0].attn.heads}, patch "
                f"{self.patch_size[0]}, image {self.image_size[0]}, normalization {self.normalize}")  # fmt: skip

    def embed(self, images):
        """[cls ; patches] + E_pos: (batch, 3, height, width) -> (batch, 1 + N, d); InputError for another size."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise InputError(f"images are {tuple(images.shape[-2:])} pixels, the model takes {self.image_size}")
        cls = self.cls_token.expand(images.size(0), -1, -1)
        return self.drop(torch.cat([cls, self.patch_embed(images).mT], dim=1) + self.pos_embed)

    def forward(self, images):
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def interpolate_positions(pos_embed, old_grid, new_grid):
    """Resamples position embeddings (1, 1 + h w, d) to another grid, bicubic; the class token's is kept."""
    if old_grid == new_grid:
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:].unflatten(1, old_grid)
    patches = F.interpolate(patches.permute(0, 3, 1, 2), new_grid, mode="bicubic")  # (1, d, h', w')
    return torch.cat([cls, patches.flatten(2).mT], 1)  # (1, 1 + h' w', d)


# ---------------------------------------------------------------------- published weights

NORMALIZE = {"half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # mean and std per RGB channel of [0, 1]
             "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}  # fmt: skip
META = "https://dl.fbaipublicfiles.com"
BACKBONES = {  # name: (address, first digits of the file's SHA-256 where they are known, normalization)
    "imagenet21k": ("https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz", None, "half"),
    "deit-tiny": (f"{META}/deit/deit_tiny_patch16_224-a1311bcf.pth", "a1311bcf", "imagenet"),
    "deit-small": (f"{META}/deit/deit_small_patch16_224-cd65a155.pth", "cd65a155", "imagenet"),
    "deit-base": (f"{META}/deit/deit_base_patch16_224-b5f2ef4d.pth", "b5f2ef4d", "imagenet"),
    "mae": (f"{META}/mae/pretrain/mae_pretrain_vit_base.pth", None, "imagenet"),
    "dino-small": (f"{META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", None, "imagenet"),
    "dino-base": (f"{META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", None, "imagenet"),
    "mocov3-base": (f"{META}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar", None, "imagenet"),
    "dinov2-small": (f"{META}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth", "b938bf1b", "imagenet"),
    "dinov2-base": (f"{META}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth", None, "imagenet"),
}


def load_vit(weights, image_size=224, heads=None, normalize=None):
    """Reads pre-trained weights into a VisionTransformer, executing nothing. InputError if they are of no plain ViT.

    weights     a name in `BACKBONES`, downloaded once, or a file: Google's .npz; .safetensors, .pth or .pt with the
                names of timm, torchvision, HuggingFace or DINOv2; a best.pt of full fine-tuning
    image_size  pixels, an int or (height, width); position embeddings are interpolated to its grid
    heads, normalize  None: as the file or a config.json beside it says, else assumed, which the result's `notes` say
    """
    row = BACKBONES.get(str(weights))
    path = download(str(weights)) if row else Path(weights)
    if not path.is_file():
        raise InputError(f"there is no file {path}: give --weights (weights=) a file or one of {', '.join(BACKBONES)}")
    content = read_file(path)
    google = "embedding/kernel" in content
    try:
        tensors, prefix, notes = find_encoder(rename(flatten(content), NAMES))
        dim = tensors["cls_token"].size(-1)
        if row:
            said = {"heads": dim // 64, "normalize": row[-1]}
        elif google:
            said = {"heads": len(tensors["blocks.0.attn.query.bias"]), "normalize": "half"}
        else:  # a best.pt of this project has its own
            said = content["backbone"] if "trained" in content else read_config(path.parent)
        heads, normalize = heads or said["heads"], normalize or said["normalize"]
        if not heads:
            if dim % 64:
                raise InputError(f"its width {dim} is not a multiple of 64: give the number of heads (--heads)")
            heads = 16 if dim in (1280, 1408, 1664) else dim // 64  # ViT-H, ViT-g and ViT-G have 16
            if dim == 384 and "base_encoder" in prefix:  # MoCo-v3's ViT-S
                heads = 12
            notes.append(f"heads assumed: {heads} (--heads changes it)")
        if not normalize:
            normalize = "imagenet"
            notes.append("ImageNet normalization assumed (--normalize changes it)")
        if normalize not in NORMALIZE:
            raise InputError(f"its mean and std, {normalize}, have no name here: give --normalize")
        vit = vit_from_tensors(to_timm(tensors, google), heads, image_size)
    except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:  # of missing or misshapen tensors
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"cannot use {path} as a plain ViT: {reason}") from None
    vit.normalize, vit.notes = normalize, notes
    return vit


def download(name):
    """Path of a backbone of the table, fetched once into PyTorch's cache; InputError if it does not arrive complete."""
    url, sha256, _ = BACKBONES[name]
    path = Path(torch.hub.get_dir(), "checkpoints", name + Path(url).suffix)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # this process's own
                part = Path(folder, path.name)
                torch.hub.download_url_to_file(url, part, sha256)
                load_vit(part)  # tells damage where no checksum is known
                part.replace(path)
    except (OSError, HTTPException, RuntimeError, InputError) as error:  # the network's, the checksum's, the file's
        if not path.exists():  # nor has another process put it there
            raise InputError(f"cannot download {url} ({error}); fetch it and give --weights PATH") from None
    return path


def fingerprint(vit):
    """SHA-256 of a backbone's weights, to tell one from another."""
    digest = hashlib.sha256()
    for name, tensor in vit.state_dict().items():
        # Skip the patch position embeddings: interpolated values differ in the last bit between machines.
        digest.update((tensor[:, :1] if name == "pos_embed" else tensor).cpu().contiguous().numpy())
    return digest.hexdigest()


def vit_from_tensors(tensors, heads, image_size):
    """The VisionTransformer with these tensors of timm's names and layouts; InputError names one that does not fit."""
    dim, _, *patch_size = tensors["patch_embed.proj.weight"].shape
    hidden, positions = len(tensors["blocks.0.mlp.fc1.weight"]), tensors["pos_embed"].size(1) - 1
    depth = sum(name.endswith("norm1.weight") for name in tensors)
    vit, side = VisionTransformer(image_size, patch_size, dim, depth, heads, hidden / dim), math.isqrt(positions)
    if positions == side**2:  # taken for a square grid; any other has to fit as it is
        if vit.grid != (side, side) and math.prod(vit.grid) == positions:
            raise InputError(f"pos_embed may be a grid of {side} x {side} or of {vit.grid}: take another image size")
        tensors["pos_embed"] = interpolate_positions(tensors["pos_embed"], (side, side), vit.grid)
    load_tensors(vit.state_dict(), tensors)
    return vit


def load_tensors(own, tensors):
    """Copies tensors into a model's own; InputError names one that is missing, left over or of another shape."""
    for name in tensors | own:
        found, expected = (getattr(named.get(name), "shape", "nothing") for named in (tensors, own))
        if found != expected:
            raise InputError(f"{name} is {found}, expected {expected}")
        own[name].detach().copy_(tensors[name])


def read_file(path):
    """What a .npz, a .safetensors or a file of torch.save holds, a dict; nothing is executed. InputError if damaged."""
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    try:
        if start[8:9] == b"{":  # the first bytes tell a file's kind, whatever its name
            return read_safetensors(bytearray(Path(path).read_bytes()))
        if start.startswith(b"PK") and b".npy" in start:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        # Training scripts save their argparse.Namespace beside the weights. It is harmless data.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch, numpy and json raise many kinds of errors on damaged files
        reason = "is cut short or damaged (delete it) or holds other objects than tensors (save a state_dict)"
        raise InputError(f"{path} {reason}; it begins with {start[:40]}") from error


def read_safetensors(content):
    """Name -> tensor of a .safetensors file (bytearray): 8 bytes, the length of the header; a JSON header; the data."""
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    start = end = 8 + int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8:start]), {}
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = end, start + entry["data_offsets"][1]  # without a gap
        tensors[name] = torch.frombuffer(content[begin:end], dtype=types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_config(folder):
    """Heads and normalization, a dict, if timm's or HuggingFace's configuration in the weights' folder has them."""
    config = {}
    for path in filter(Path.is_file, (folder / "config.json", folder / "preprocessor_config.json")):
        try:
            config |= json.loads(path.read_bytes())
        except (OSError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error})") from None
    config |= config.get("pretrained_cfg") or {}  # timm's
    mean, std = (tuple(config.get(name) or config.get(f"image_{name}") or ()) for name in ("mean", "std"))
    names = [name for name, pair in NORMALIZE.items() if pair == (mean, std)]
    return {"heads": config.get("num_attention_heads"), "normalize": names[0] if names else mean + std}


def flatten(content, prefix=""):
    """The tensors in nested dicts: {"model": {"cls_token": tensor}} -> {"model.cls_token": tensor}."""
    tensors = {}
    for key, value in content.items():
        if isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value.detach()
    return tensors


def rename(tensors, names):
    """Applies a table {pattern: replacement} to the tensors' names, in its order; InputError if two become one."""
    for pattern, replacement in names.items():
        renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
        if len(renamed) < len(tensors):
            raise InputError(f"two of its tensors mean {replacement}")
        tensors = renamed
    return tensors


def find_encoder(tensors):
    """The ViT among a file's tensors: (its tensors, what stood before their names, a list of notes)."""
    found = [name.removesuffix(PATCHES) for name in tensors if name.endswith(PATCHES)]
    # Of two encoders, the one that the authors of MoCo-v3 and of DINO evaluate.
    taken = [prefix for prefix in found if re.search("base_encoder|teacher", prefix)] or found
    if len(taken) != 1:
        raise InputError(f"it has {PATCHES} {len(found)} times, in {(found or [*tensors])[:5]}: save one state_dict")
    prefix = taken[0]
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return own, prefix, [f"{prefix[:-1]} of {len(found)} encoders in the file"] if len(found) > 1 else []


def to_timm(tensors, google=False):
    """Tensors of timm's names in timm's layouts and float32; what a ViT has besides its encoder is left out."""
    tensors = {name: tensor.float() for name, tensor in tensors.items() if not NOT_ENCODER.match(name)}
    for name, tensor in tensors.items() if google else ():  # inputs come first, heads have a dimension of their own
        if name.endswith("bias"):
            tensors[name] = tensor.flatten()
        elif "patch_embed" in name:
            tensors[name] = tensor.permute(3, 2, 0, 1)  # height, width, in, out -> out, in, height, width
        elif "attn.proj" in name:
            tensors[name] = tensor.flatten(0, 1).T  # (heads, d / heads, d) -> (d, d)
        elif "attn" in name or "mlp" in name:
            tensors[name] = tensor.flatten(1).T
    for name in [name for name in tensors if ".attn.query." in name]:
        parts = [tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        tensors[name.replace("query", "qkv")] = torch.cat(parts)
    for name in [name for name in tensors if name.endswith("gain")]:  # x + g (W h + b) = x + (g W) h + g b
        gain, layer = tensors.pop(name), name.removesuffix("gain")
        tensors[layer + "weight"] *= gain[:, None]
        tensors[layer + "bias"] *= gain
    return tensors


PATCHES = "patch_embed.proj.weight"
NOT_ENCODER = re.compile(r"head|pre_logits|fc_norm|pooler|(embeddings\.)?mask_token|decoder_")  # as in MAE and DINO
NAMES = {  # Google's, torchvision's, HuggingFace's and DINOv2's -> timm's
    r"\b(cls|class_token|embeddings\.cls_token)$": "cls_token",
    r"(Transformer/posembed_input/|\bencoder\.|\bembeddings\.)(pos_embedding|position_embeddings)$": "pos_embed",
    r"\b(embedding/|conv_proj\.|embeddings\.patch_embeddings\.projection\.)": "patch_embed.proj.",
    r"(Transformer/encoder_norm/|\bencoder\.ln\.|\blayernorm\.)": "norm.",
    r"(Transformer/encoderblock_|encoder\.layers\.encoder_layer_|\b(encoder\.layer|layers)\.)(\d+)[/.]": r"blocks.\3.",
    r"LayerNorm_0/|\b(ln_1|layernorm_before)\.": "norm1.",
    r"LayerNorm_2/|\b(ln_2|layernorm_after)\.": "norm2.",
    r"MultiHeadDotProductAttention_1/out/|\w*attention\.(out_proj|output\.dense|o_proj)\.": "attn.proj.",
    r"MlpBlock_3/Dense_0/|mlp\.(0|linear_1)\.|\bintermediate\.dense\.": "mlp.fc1.",
    r"MlpBlock_3/Dense_1/|mlp\.(3|linear_2)\.|\boutput\.dense\.": "mlp.fc2.",
    r"(MultiHeadDotProductAttention_1|attention\.attention)[/.](\w+)[/.]": r"attn.\2.",
    r"\battention\.q_proj\.": "attn.query.",
    r"\battention\.k_proj\.": "attn.key.",
    r"\battention\.v_proj\.": "attn.value.",
    r"\bself_attention\.in_proj_": "attn.qkv.",
    r"\b(ls1\.gamma|layer_scale1\.lambda1)$": "attn.proj.gain",
    r"\b(ls2\.gamma|layer_scale2\.lambda1)$": "mlp.fc2.gain",
    r"(kernel|scale)$": "weight",
}
