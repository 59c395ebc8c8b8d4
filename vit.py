"""A plain Vision Transformer (ViT), written out by hand, and the readers of its published weights.

It knows nothing of prompts. Modules have timm's names, so that a state dict of one loads into the other.
In shapes, N is the number of patches and d the width of a token.
"""

import argparse
import hashlib
import json
import math
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """What its user can mend: a file or an option, in one sentence."""


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

        A batch of one, in q or in k and v, serves that of the other. `mask` (queries, keys) is True where q attends.
        """
        batch = max(len(q), len(k))
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
        self.mlp = nn.Sequential(  # its GELU is the exact one (erf)
            OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), drop1=drop, fc2=nn.Linear(hidden, dim), drop2=drop)
        )

    def qkv(self, x):
        """The first step of the layer: q, k, v of LN1(x), each (batch, heads, tokens, d / heads)."""
        return self.attn.project(self.norm1(x))

    def finish(self, x, q, k, v):
        """The rest of the layer. x and q may hold fewer tokens than k and v: only those to keep."""
        x = x + self.attn.attend(q, k, v)
        return x + self.mlp(self.norm2(x))

    def forward(self, x):
        return self.finish(x, *self.qkv(x))


class PatchEmbed(nn.Module):
    """Cuts images into patches, row by row, and projects each: (batch, 3, height, width) -> (batch, N, d)."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


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
            raise ValueError(f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        if dim % heads:
            raise ValueError(f"width {dim} does not divide into {heads} heads")
        self.grid = tuple(side // patch for side, patch in zip(self.image_size, self.patch_size))  # (h, w)
        self.dim, self.normalize = dim, normalize
        self.patch_embed = PatchEmbed(self.patch_size, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(self.grid), dim))
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(Block(dim, heads, round(mlp_ratio * dim), self.drop) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def describe(self):
        """The sizes, in words."""
        return (f"width {self.dim}, {len(self.blocks)} layers, {self.blocks[0].attn.heads} heads, patch "
                f"{self.patch_size[0]}, image {self.image_size[0]}, normalization {self.normalize}")  # fmt: skip

    def embed(self, images):
        """[cls ; patches] + E_pos: (batch, 3, height, width) -> (batch, 1 + N, d); ValueError for another size."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"images are {tuple(images.shape[-2:])} pixels, the model takes {self.image_size}")
        cls = self.cls_token.expand(len(images), -1, -1)
        return self.drop(torch.cat([cls, self.patch_embed(images)], dim=1) + self.pos_embed)

    def forward(self, images):
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def interpolate_positions(pos_embed, old_grid, new_grid):
    """Resamples position embeddings (1, 1 + h w, d) to another grid, bicubic; the class row is kept."""
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    patches = patches.unflatten(1, tuple(old_grid)).permute(0, 3, 1, 2)  # (1, d, h, w)
    patches = F.interpolate(patches, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


# ---------------------------------------------------------------------- published weights

NORMALIZE = {  # mean and std per RGB channel of [0, 1]
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
META = "https://dl.fbaipublicfiles.com"
BACKBONES = {  # name: (address, first digits of the file's SHA-256 where they are known, normalization)
    "imagenet21k": ("https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz", None, "half"),
    "deit-tiny": (f"{META}/deit/deit_tiny_patch16_224-a1311bcf.pth", "a1311bcf", "imagenet"),
    "deit-small": (f"{META}/deit/deit_small_patch16_224-cd65a155.pth", "cd65a155", "imagenet"),
    "deit-base": (f"{META}/deit/deit_base_patch16_224-b5f2ef4d.pth", "b5f2ef4d", "imagenet"),
    "mae": (f"{META}/mae/pretrain/mae_pretrain_vit_base.pth", None, "imagenet"),
    "dino-small": (f"{META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", None, "imagenet"),
    "dino-base": (f"{META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", None, "imagenet"),
}


def load_vit(weights, image_size=224, heads=None, normalize=None):
    """Reads pre-trained weights into a VisionTransformer of the size that the file has.

    weights     a name in `BACKBONES`, downloaded once, or a file: Google's .npz; .safetensors, .pth or
                .pt with the tensor names of timm (DeiT, MAE, DINO) or torchvision; a best.pt that holds all of a ViT
    image_size  pixels, an int or (height, width); position embeddings are interpolated to its grid
    heads       None: as the file says (only .npz does), else width / 64, which is wrong for ViT-H
    normalize   "half" or "imagenet"; None: as the table says, for other files "half" if .npz

    Nothing in the file is executed. OSError if it cannot be had; ValueError names a tensor that does not fit.
    """
    known = str(weights) in BACKBONES
    path = download(str(weights)) if known else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}; known by name are {', '.join(BACKBONES)}")
    try:
        vit = vit_from_tensors(read_tensors(path), image_size, heads)
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot use {path} as a plain ViT: {error}") from None
    own = BACKBONES[str(weights)][-1] if known else "half" if path.suffix == ".npz" else "imagenet"
    vit.normalize = normalize or own
    return vit


def download(name):
    """Path of a backbone of the table, fetched once into PyTorch's cache; OSError if it does not arrive whole."""
    url, sha256, _ = BACKBONES[name]
    path = Path(torch.hub.get_dir(), "checkpoints", name + Path(url).suffix)
    part = path.with_stem(f"{name}.part")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(part), sha256)
            vit_from_tensors(read_tensors(part))  # tells damage where no checksum is known
            part.replace(path)
        except Exception as error:  # the network's, the checksum's, the file's
            raise OSError(f"cannot download {url} ({error}); fetch it and give --weights PATH") from None
        finally:
            part.unlink(missing_ok=True)
    return path


def fingerprint(vit):
    """SHA-256 of a backbone's weights, to tell one from another."""
    digest = hashlib.sha256()
    for name, tensor in vit.state_dict().items():
        # Of the position embeddings only the class token's: interpolated ones differ in the last bit between machines.
        digest.update((tensor[:, :1] if name == "pos_embed" else tensor).cpu().contiguous().numpy())
    return digest.hexdigest()


NOT_ENCODER = re.compile(r"head|pre_logits|fc_norm|mask_token|decoder_")  # classifiers, DINO's head, MAE's decoder
OTHER_ARCHITECTURE = re.compile(r".*(\.ls[12]\.|\.gamma_[12]$|reg_token|register_tokens|dist_token)")


def vit_from_tensors(tensors, image_size=None, heads=None):
    """The VisionTransformer with these tensors. `image_size` None is that of the position embeddings."""
    tensors = rename(tensors, NAMES)
    if "blocks.0.attn.query.weight" in tensors:
        tensors, file_heads = from_google(tensors)
        if heads not in (None, file_heads):
            raise ValueError(f"it has {file_heads} heads, not {heads}")
        heads = file_heads
    tensors = {name: tensor.float() for name, tensor in tensors.items() if not NOT_ENCODER.match(name)}
    for name in filter(OTHER_ARCHITECTURE.match, tensors):
        raise ValueError(f"{name} (LayerScale, registers, distillation) is of another architecture than the plain ViT")
    for name, ndim in {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2, "pos_embed": 3}.items():
        if name not in tensors or tensors[name].ndim != ndim or 0 in tensors[name].shape:
            raise ValueError(f"it has no {name} of {ndim} dimensions")
    dim, _, *patch_size = tensors["patch_embed.proj.weight"].shape
    hidden, positions = len(tensors["blocks.0.mlp.fc1.weight"]), tensors["pos_embed"].size(1)
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    if heads is None and dim % 64:
        raise ValueError(f"its width {dim} is not a multiple of 64: give the number of heads (--heads)")
    side = math.isqrt(positions - 1)
    image_size = image_size or tuple(side * patch for patch in patch_size)
    vit = VisionTransformer(image_size, patch_size, dim, depth, heads or dim // 64, hidden / dim)
    if positions == 1 + side**2:  # taken for a square grid; any other has to fit as it is
        tensors["pos_embed"] = interpolate_positions(tensors["pos_embed"], (side, side), vit.grid)
    vit.load_state_dict(tensors)  # strict: names what is missing, left over or of another shape
    return vit


def read_tensors(path):
    """Name -> tensor of a .npz, .safetensors, .pth or .pt file (there bare, or under a name such as "model")."""
    if path.suffix == ".safetensors":
        return read_safetensors(bytearray(path.read_bytes()))
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        # Training scripts save their argparse.Namespace beside the weights. It is harmless data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        for wrapper in ("model", "state_dict", "trained"):
            content = content.get(wrapper, content)
        return {name: tensor.detach() for name, tensor in content.items()}
    except Exception as error:  # torch and numpy raise whatever the bytes happen to provoke
        raise ValueError("this is no file of tensors") from error


def read_safetensors(content):
    """Name -> tensor of the content (bytearray) of a .safetensors file; ValueError if it is damaged.

    The format: 8 bytes of header length, little-endian; a JSON header {name: {dtype, shape, data_offsets}};
    and the data, in which the tensors follow one another without gap or overlap.
    """
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    start = end = 8 + int.from_bytes(content[:8], "little")
    if start > len(content):
        raise ValueError("its header is longer than the file")
    try:
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if dtype not in types:
                raise ValueError(f"{name} is of type {dtype}, not of {', '.join(types)}")
            count, dtype = math.prod(shape), types[dtype]
            if start + begin != end or begin + count * dtype.itemsize != stop or start + stop > len(content):
                raise ValueError(f"{name} overlaps another tensor, leaves a gap or is cut off")
            tensors[name] = torch.frombuffer(content, dtype=dtype, count=count, offset=end).reshape(shape)
            end = start + stop
    except (AttributeError, KeyError, TypeError):
        raise ValueError("its header is not that of a .safetensors file") from None
    if end != len(content):
        raise ValueError(f"it has {len(content) - end} bytes too many")
    return tensors


def from_google(tensors):
    """Google's layouts -> (timm's, number of heads); the names are timm's, but for those of q, k and v."""
    heads = tensors["blocks.0.attn.query.weight"].size(1)  # of (d, heads, d / heads)
    for name, tensor in tensors.items():
        if name == "patch_embed.proj.weight":
            tensors[name] = tensor.permute(3, 2, 0, 1)  # height, width, in, out -> out, in, height, width
        elif name.endswith("attn.proj.weight"):
            tensors[name] = tensor.flatten(0, 1).T  # (heads, d / heads, d) -> (d, d)
        elif re.search(r"\.(attn|mlp)\..*weight$", name):
            tensors[name] = tensor.flatten(1).T  # in, out (of q, k, v: heads, d / heads) -> out, in
        elif name.endswith("bias"):
            tensors[name] = tensor.flatten()
    return join_qkv(tensors), heads


def join_qkv(tensors):
    """Joins attn.query, attn.key and attn.value of each layer to attn.qkv."""
    for name in [name for name in tensors if ".attn.query." in name]:
        parts = [tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        tensors[name.replace("query", "qkv")] = torch.cat(parts)
    return tensors


def rename(tensors, names):
    """Applies a table {pattern: replacement} to the tensors' names, in its order."""
    for pattern, replacement in names.items():
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


NAMES = {  # Google's, torchvision's and full fine-tuning's -> timm's
    r"^vit\.": "",
    r"^(cls|class_token)$": "cls_token",
    r"^(Transformer/posembed_input/pos_embedding|encoder\.pos_embedding)$": "pos_embed",
    r"^(embedding/|conv_proj\.)": "patch_embed.proj.",
    r"^(Transformer/encoder_norm/|encoder\.ln\.)": "norm.",
    r"^Transformer/encoderblock_(\d+)/": r"blocks.\1.",
    r"^encoder\.layers\.encoder_layer_": "blocks.",
    r"LayerNorm_0/|\bln_1\.": "norm1.",
    r"LayerNorm_2/|\bln_2\.": "norm2.",
    r"MlpBlock_3/Dense_0/|mlp\.(0|linear_1)\.": "mlp.fc1.",
    r"MlpBlock_3/Dense_1/|mlp\.(3|linear_2)\.": "mlp.fc2.",
    r"MultiHeadDotProductAttention_1/out/|self_attention\.out_proj\.": "attn.proj.",
    r"MultiHeadDotProductAttention_1/(\w+)/": r"attn.\1.",
    r"self_attention\.in_proj_": "attn.qkv.",
    r"(kernel|scale)$": "weight",
}
