"""A Vision Transformer (ViT) written out by hand, and the loaders for its published weights.

This file knows nothing of prompts. Modules are named as timm names them, so that a state dict of
one loads into the other. In comments: B images, T = 1 + N tokens, d the width.
"""

import argparse
import hashlib
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HALF = (0.5, 0.5, 0.5)  # mean and std that Google's weights expect
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGENET21K_URL = "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz"
IMAGENET21K_MD5 = "d9715d"  # its first digits

# Tensors of published files that the encoder has no use for: classifiers, and what MAE trains with.
NOT_ENCODER = re.compile(r"head|pre_logits|fc_norm|mask_token|decoder_")


class Attention(nn.Module):
    """Multi-head self attention in two halves, so that a caller can mix q, k, v of several sources."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x, keep=None):
        """(B, T, d) -> q, k, v, each (B, heads, T, d / heads); q just of the first `keep` tokens, if given."""
        dim = x.size(-1)
        (wq, wkv), (bq, bkv) = (tensor.split((dim, 2 * dim)) for tensor in (self.qkv.weight, self.qkv.bias))
        q, kv = F.linear(x[:, :keep], wq, bq), F.linear(x, wkv, bkv)
        return [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, dim=-1))]

    def attend(self, q, k, v, mask=None):
        """Wo softmax(q k' / sqrt(d / heads)) v: (B, T, d) for T queries.

        A batch of one, in q or in k and v, serves the whole batch of the other. `mask` (T, T') is
        True where a query may look; None lets it look everywhere.
        """
        batch = max(q.size(0), k.size(0))
        q, k, v = (t.expand(batch, -1, -1, -1) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, T, d / heads)
        return self.proj(o.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """An encoder layer's two-layer perceptron, d -> hidden -> d for each token, with exact (erf) GELU."""

    def __init__(self, dim, hidden, dropout):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, d) -> (B, T, d)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """One pre-norm encoder layer: x + attention(LN1(x)), then x + MLP(LN2(x))."""

    def __init__(self, dim, heads, hidden, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden, dropout)

    def qkv(self, x, keep=None):
        """What the layer's attention works on: (B, T, d) -> q, k, v, each (B, heads, T, d / heads).

        Whoever wants no more than the first `keep` tokens out of the layer needs no other queries.
        """
        return self.attn.project(self.norm1(x), keep)

    def finish(self, x, q, k, v):
        """The rest of the layer, given `qkv`; x and q hold the tokens that are kept."""
        x = x + self.attn.attend(q, k, v)
        return x + self.mlp(self.norm2(x))

    def forward(self, x):
        """(B, T, d) -> (B, T, d)."""
        return self.finish(x, *self.qkv(x))


class PatchEmbed(nn.Module):
    """Cuts images into patches, row by row, and projects each to the width d; sizes are in pixels."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        """(B, 3, H, W) -> (B, N, d)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT encoder: (B, 3, H, W) -> (B, dim), the class token after the final LayerNorm.

    `image_size` and `patch_size` are pixels, an int or a (height, width) pair. `mean` and `std` are
    attributes: the normalisation of the input that the weights expect, per RGB channel of [0, 1].
    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, heads=12, mlp_ratio=4, dropout=0.0):
        super().__init__()
        self.image_size, self.patch_size = _pair(image_size), _pair(patch_size)
        if any(side < patch or side % patch for side, patch in zip(self.image_size, self.patch_size)):
            raise ValueError(f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        if dim % heads:
            raise ValueError(f"width {dim} does not divide into {heads} heads")
        self.grid = tuple(side // patch for side, patch in zip(self.image_size, self.patch_size))  # (h, w)
        self.mean, self.std = HALF, HALF
        self.patch_embed = PatchEmbed(self.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, round(mlp_ratio * dim), dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def dim(self):
        """d, the width of a token."""
        return self.cls_token.size(-1)

    def embed(self, images):
        """[cls ; patches] + E_pos: (B, 3, H, W) -> (B, 1 + N, dim)."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"images are {tuple(images.shape[-2:])} pixels, the model takes {self.image_size}")
        patches = self.patch_embed(images)
        cls = self.cls_token.expand(len(images), -1, -1)
        return self.drop(torch.cat([cls, patches], dim=1) + self.pos_embed)

    def forward(self, images):
        """(B, 3, H, W) -> (B, dim); ValueError for images of another size."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def fingerprint(self):
        """SHA-256 of the weights, to tell one backbone from another.

        Of the position embeddings just the class token's: the others may have been interpolated, and
        then differ in the last bit on another machine.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if name == "pos_embed":
                tensor = tensor[:, :1]
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy())
        return digest.hexdigest()


def interpolate_positions(pos_embed, old_grid, new_grid):
    """Resamples position embeddings (1, 1 + h w, d) to another grid, bicubic; the class row is kept."""
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    patches = patches.unflatten(1, tuple(old_grid)).permute(0, 3, 1, 2)  # (1, d, h, w)
    patches = F.interpolate(patches, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


def load_vit(path, image_size=224, heads=None, mean=None, std=None):
    """Reads pre-trained weights into a VisionTransformer of the size that the file has.

    path        Google's .npz; a .pth or .pt with the names of timm, DeiT and MAE, or of torchvision;
                or the name "imagenet21k", which is downloaded once (the paper's ViT-B/16)
    image_size  pixels; position embeddings are interpolated where the grid differs (a square number of
                them is taken for a square grid)
    heads       where the file does not tell (only .npz does): this, or else width / 64, which is wrong
                for some, ViT-H among them (16 heads of 80)
    mean, std   per RGB channel; by default 0.5 for .npz, ImageNet's for the others

    No pickled code is executed. Raises ValueError, naming the tensor, if one is missing, left over
    or of a wrong shape, and FileNotFoundError if there is no such file.
    """
    path = download_imagenet21k() if str(path) == "imagenet21k" else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}; give a .npz, .pth or .pt file, or imagenet21k")
    try:
        if path.suffix == ".npz":
            tensors, file_heads = _from_google(read_npz(path))
            heads, mean, std = file_heads, mean or HALF, std or HALF
        else:
            tensors = rename(read_torch(path), TORCHVISION_NAMES)
            mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
        return vit_from_tensors(tensors, image_size, heads, mean, std)
    except KeyError as error:
        raise ValueError(f"{path} is not a ViT: it has no tensor {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def vit_from_tensors(tensors, image_size=None, heads=None, mean=HALF, std=HALF):
    """Builds the VisionTransformer whose tensors, by timm's names, these are.

    `image_size` None is the size the position embeddings were made for. Raises KeyError if a tensor
    that tells the sizes is missing, ValueError as `load_vit`.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not NOT_ENCODER.match(name)}
    dim, _, *patch_size = shape(tensors, "patch_embed.proj.weight", 4)
    hidden, _ = shape(tensors, "blocks.0.mlp.fc1.weight", 2)
    _, positions, _ = shape(tensors, "pos_embed", 3)
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    if heads is None and dim % 64:
        raise ValueError(f"its width {dim} is not a multiple of 64: give the number of heads")

    count = positions - 1
    side = math.isqrt(max(0, count))
    if image_size is None:
        image_size = (side * patch_size[0], side * patch_size[1])
    vit = VisionTransformer(image_size, patch_size, dim, depth, heads or dim // 64, hidden / dim)
    if side**2 == count:  # a square grid; any other has to fit as it is
        tensors["pos_embed"] = interpolate_positions(tensors["pos_embed"].float(), (side, side), vit.grid)
    check_exactly(vit.state_dict(), tensors)
    vit.load_state_dict(tensors)
    vit.mean, vit.std = tuple(mean), tuple(std)
    return vit


def check_exactly(expected, tensors):
    """ValueError, naming the tensor, unless these are all the expected ones, in their shapes, and no others."""
    for what, names in ("missing", expected.keys() - tensors.keys()), ("left over", tensors.keys() - expected.keys()):
        if names:
            raise ValueError(f"{len(names)} tensor(s) {what}, {min(names)} among them")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")


def shape(tensors, name, dimensions):
    """The shape of a tensor that tells sizes; ValueError names it if it has another number of dimensions, or none."""
    found = tuple(tensors[name].shape)
    if len(found) != dimensions or 0 in found:
        raise ValueError(f"{name} has shape {found}, not {dimensions} dimensions")
    return found


def read_torch(path):
    """The state dict in a .pth or .pt file, bare or under "model" or "state_dict", without executing anything."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        # Training scripts like to put their argparse.Namespace beside the weights: harmless data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes happen to provoke
        raise ValueError("this is no file of PyTorch tensors") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    items = content.items() if isinstance(content, dict) else ()
    if not items or not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in items):
        raise ValueError("this is no state dict of tensors")
    return content


def read_npz(path):
    """The arrays of a .npz file as tensors, without executing anything."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:
        raise ValueError("this is no .npz file of arrays") from error


def _from_google(arrays):
    """Google's names and layouts -> (tensors by timm's names, number of heads)."""
    take = arrays.pop
    shape(arrays, "embedding/kernel", 4)
    tensors = {
        "cls_token": take("cls"),
        "pos_embed": take("Transformer/posembed_input/pos_embedding"),
        "patch_embed.proj.weight": take("embedding/kernel").permute(3, 2, 0, 1),  # HWIO -> OIHW
        "patch_embed.proj.bias": take("embedding/bias"),
        "norm.weight": take("Transformer/encoder_norm/scale"),
        "norm.bias": take("Transformer/encoder_norm/bias"),
    }
    heads = None
    for i in range(len({name.split("/")[1] for name in arrays if "/encoderblock_" in name})):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for their_norm, our_norm in ("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2"):
            tensors[f"{ours}.{our_norm}.weight"] = take(f"{theirs}/{their_norm}/scale")
            tensors[f"{ours}.{our_norm}.bias"] = take(f"{theirs}/{their_norm}/bias")
        for their_layer, our_layer in ("Dense_0", "fc1"), ("Dense_1", "fc2"):
            tensors[f"{ours}.mlp.{our_layer}.weight"] = take(f"{theirs}/MlpBlock_3/{their_layer}/kernel").T
            tensors[f"{ours}.mlp.{our_layer}.bias"] = take(f"{theirs}/MlpBlock_3/{their_layer}/bias")
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value", "out"):
            shape(arrays, f"{attention}/{name}/kernel", 3)
        kernels = [take(f"{attention}/{name}/kernel") for name in ("query", "key", "value")]  # (d, heads, d / heads)
        biases = [take(f"{attention}/{name}/bias") for name in ("query", "key", "value")]
        heads = kernels[0].size(1)
        tensors[f"{ours}.attn.qkv.weight"] = torch.cat([kernel.flatten(1).T for kernel in kernels])
        tensors[f"{ours}.attn.qkv.bias"] = torch.cat([bias.flatten() for bias in biases])
        tensors[f"{ours}.attn.proj.weight"] = take(f"{attention}/out/kernel").flatten(0, 1).T
        tensors[f"{ours}.attn.proj.bias"] = take(f"{attention}/out/bias")
    return tensors | arrays, heads  # whatever is left in arrays keeps its name, and is refused by it


TORCHVISION_NAMES = {
    r"^class_token$": "cls_token",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^encoder\.ln\.": "norm.",
    r"^encoder\.layers\.encoder_layer_": "blocks.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(0|linear_1)\.": ".mlp.fc1.",
    r"\.mlp\.(3|linear_2)\.": ".mlp.fc2.",
}


def rename(tensors, names):
    """Applies a table of {pattern: replacement} to the names, in its order."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in names.items():
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    return renamed


def download_imagenet21k():
    """Path of the paper's weights, fetched into PyTorch's cache on first use; OSError if that fails."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / "ViT-B_16-imagenet21k.npz"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        torch.hub.download_url_to_file(IMAGENET21K_URL, str(part))
        if not hashlib.md5(part.read_bytes()).hexdigest().startswith(IMAGENET21K_MD5):
            raise OSError("it arrived damaged")
        part.replace(path)
    except OSError as error:  # urllib's errors are OSErrors too
        raise OSError(f"cannot download {IMAGENET21K_URL} ({error}); fetch it and give --weights PATH") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)
