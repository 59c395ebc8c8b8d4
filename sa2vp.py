"""SA2VP: Spatially Aligned-and-Adapted Visual Prompt (Pei et al., AAAI 2024).

Two pathways run through the same frozen encoder layers T_i: the base pathway B carries the image
tokens, the prompt pathway P a learned two-dimensional map of prompt tokens, one for each patch. In
every layer one pathway speaks to the other: a patch token hears just the tokens around its own place,
the class token hears all.

    (1)  B_0 = [cls ; patches(I)] + E_pos
    (2)  P_0 = p W_p + b_p + E_pos
    (3)  C_i(X, Y)_t = X_t + Drop(Wo o_t),  o_t = sum over u in N(t) of softmax_u(q . k / sqrt(d / heads)) v_u
         q = Wq LN1(X_t),  k = Wk LN1(Y_u),  v = Wv LN1(Y_u)
    (4)  A_i(Z) = Drop(W_up Drop(GELU(W_down LN(Z))))
    (5)  i not in D:  B_{i+1} = T_i(B_i) + s A_i(C_i(B_i, P_i))               P_{i+1} = T_i(P_i)
    (6)  i in D:      P_{i+1} = T_i(P_i) [+ fusion] + s A_i(C_i(P_i, B_i))    B_{i+1} = T_i(B_i)
    (7)  i in F:      fusion = g_i * T_i(p_i W_i + b_i)
    (8)  loss = 0.8 CE(head(LN(B_L)[cls]), y) + 0.2 CE(head(LN(P_L)[cls]), y)

The numbers are this project's own. In training B_0, P_0 and the MLPs inside T_i have dropout too. In
comments: B images, T = 1 + N tokens of the receiving pathway (T' of the giving one), d the encoder's
width, r the inner dimension.

The classes in this order: PromptMap (2), SpatiallyAlignedCrossAttention (3), PromptAdapter (4),
BilateralInteraction (5, 6) with InterLayerPromptFusion (7), and SA2VP, which is all of it; then the
baselines LinearProbe, FullFineTuning and VPTDeep. A tuned model is read by `load`, or `load_official`.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from vit import HALF, check_exactly, interpolate_positions, load_vit, read_torch, rename, shape, vit_from_tensors


class PromptMap(nn.Module):
    """The prompt map, Eq. (2) without E_pos: p W + b, low rank, a class token and h' x w' prompt tokens.

    Entry (y, x) of the map belongs to the patch at the same place. p is (1, 1 + h' w', r), W is r -> d.
    """

    def __init__(self, grid, inner_dim, dim):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, 1 + math.prod(grid), inner_dim))  # p
        self.proj = _linear(inner_dim, dim)  # W, b
        nn.init.trunc_normal_(self.tokens, std=0.02)

    def forward(self):
        """() -> (1, 1 + h' w', d)."""
        return self.proj(self.tokens)


class SpatiallyAlignedCrossAttention(nn.Module):
    """Spatially aligned cross attention, Eq. (3): C_i(X, Y), with layer i's own frozen weights, none of its own.

    `grid` is the receiving pathway's (h, w), `other_grid` the giving one's, `window` the side of the
    aligned neighbourhood N(t) in cells, or None for no alignment. Raises ValueError as `aligned_neighbourhood`.
    """

    def __init__(self, grid, other_grid, window, dropout):
        super().__init__()
        mask = None if window is None else aligned_neighbourhood(grid, other_grid, window)
        self.register_buffer("mask", mask, persistent=False)  # N(t), (T, T')
        self.drop = nn.Dropout(dropout)

    def forward(self, layer, x, q, k, v):
        """x (B, T, d) -> (B, T, d): q are layer i's queries of x, k and v its keys and values of the other pathway.

        Each is (B, heads, T or T', d / heads).
        """
        mask = None if self.mask is None else self.mask[: x.size(1)]  # the last layer keeps the class token's row alone
        return x + self.drop(layer.attn.attend(q, k, v, mask))


class PromptAdapter(nn.Module):
    """The prompt adapter, Eq. (4): A_i(Z), d -> r -> d with its own LayerNorm and no residual."""

    def __init__(self, dim, inner_dim, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.down = _linear(dim, inner_dim)
        self.up = _linear(inner_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, z):
        """(B, T, d) -> (B, T, d), the prompting message before its weight s."""
        return self.drop(self.up(self.drop(F.gelu(self.down(self.norm(z))))))


class InterLayerPromptFusion(nn.Module):
    """Inter-layer prompt fusion, Eq. (7): g_i * T_i(p_i W_i + b_i), a new prompt map through layer i.

    The gate g_i (d,) weighs the channels. No position embedding is added to p_i.
    """

    def __init__(self, grid, inner_dim, dim):
        super().__init__()
        self.prompt_map = PromptMap(grid, inner_dim, dim)
        self.gate = nn.Parameter(torch.empty(dim))  # g_i
        nn.init.normal_(self.gate, std=0.02)

    def forward(self, layer):
        """Frozen layer i -> (1, 1 + h' w', d): it does not depend on the image, so one serves the batch."""
        return self.gate * layer(self.prompt_map())


class BilateralInteraction(nn.Module):
    """Bilateral interaction: takes both pathways through frozen layer i, one prompting the other.

    Knowledge prompting P -> B, Eq. (5); or, where `distills`, knowledge distillation B -> P, Eq. (6),
    with `fusion`, if given, Eq. (7). Of the `last` layer only the class tokens are computed.
    """

    def __init__(self, cross_attention, adapter, scale, distills, last, fusion=None):
        super().__init__()
        self.cross_attention, self.adapter, self.fusion = cross_attention, adapter, fusion
        self.scale, self.distills, self.last = scale, distills, last

    def forward(self, layer, base, prompt, predict=False):
        """B_i (B, 1 + N, d), P_i (B, 1 + h' w', d) -> B_{i+1}, P_{i+1}; to `predict`, the last layer's P is None.

        The q, k, v of T_i are those of C_i: they are computed once. The prompt pathway stays a batch
        of one up to the first layer in D, because nothing in it depends on the image yet.
        """
        keep = 1 if self.last else None
        qb, kb, vb = layer.qkv(base, keep)
        qp, kp, vp = layer.qkv(prompt, keep)
        base, prompt = base[:, :keep], prompt[:, :keep]

        next_base = layer.finish(base, qb, kb, vb)
        if not self.distills:  # Eq. (5); alpha is s
            message = self.adapter(self.cross_attention(layer, base, qb, kp, vp))
            next_base = torch.add(next_base, message, alpha=self.scale)
        if predict and self.last:
            return next_base, None

        next_prompt = layer.finish(prompt, qp, kp, vp)
        if self.fusion is not None:  # Eq. (7)
            next_prompt = next_prompt + self.fusion(layer)[:, :keep]
        if self.distills:  # Eq. (6)
            message = self.adapter(self.cross_attention(layer, prompt, qp, kb, vb))
            next_prompt = torch.add(next_prompt, message, alpha=self.scale)
        return next_base, next_prompt


class SA2VP(nn.Module):
    """A frozen ViT tuned by a spatially aligned-and-adapted prompt map.

    vit            the pre-trained backbone; it is frozen here, and gets this `dropout`
    num_classes    outputs of the head that both pathways share
    inner_dim      r, the rank of the prompt maps and the width inside the adapters
    scale          s, the weight of a prompting message
    dropout        share of zeros, in training, in both pathways, the encoder's MLPs, the cross
                   attention and the adapters
    window         side of the aligned neighbourhood in cells, odd; None lets every token attend to all
    prompt_grid    (h', w') of a scaled prompt map; None is the image's own grid
    distill_layers D, where the base pathway speaks to the prompt pathway; by default every fourth from
                   0; () is none
    fusion_layers  F, a subset of D, where a new prompt map enters; by default D without 0
    freeze_adapters  leaves the adapters as they were drawn: for an ablation

    Raises ValueError for values out of range.
    """

    def __init__(
        self, vit, num_classes, inner_dim=16, scale=0.1, dropout=0.1, window=3, prompt_grid=None,
        distill_layers=None, fusion_layers=None, freeze_adapters=False,
    ):  # fmt: skip
        super().__init__()
        depth, dim = len(vit.blocks), vit.dim
        if distill_layers is None:
            distill_layers = range(0, depth, 4)
        distill_layers = tuple(distill_layers)
        if fusion_layers is None:
            fusion_layers = [i for i in distill_layers if i != 0]
        fusion_layers = tuple(fusion_layers)
        if not set(fusion_layers) <= set(distill_layers) <= set(range(depth)):
            raise ValueError(
                f"fusion layers {fusion_layers} must be among the distillation layers {distill_layers}, "
                f"and those among 0 to {depth - 1}"
            )
        if inner_dim < 1:
            raise ValueError(f"inner dimension {inner_dim} must be at least 1")
        self.prompt_grid = tuple(prompt_grid or vit.grid)
        if min(self.prompt_grid) < 1:
            raise ValueError(f"prompt grid {self.prompt_grid} must be at least 1 x 1")

        self.vit = freeze(vit, dropout)
        self.prompt_map = PromptMap(self.prompt_grid, inner_dim, dim)
        self.drop = nn.Dropout(dropout)
        self.interactions = nn.ModuleList()
        for i in range(depth):
            grids = (self.prompt_grid, vit.grid) if i in distill_layers else (vit.grid, self.prompt_grid)
            self.interactions.append(
                BilateralInteraction(
                    SpatiallyAlignedCrossAttention(*grids, window, dropout),
                    PromptAdapter(dim, inner_dim, dropout).requires_grad_(not freeze_adapters),
                    scale,
                    distills=i in distill_layers,
                    last=i == depth - 1,
                    fusion=InterLayerPromptFusion(self.prompt_grid, inner_dim, dim) if i in fusion_layers else None,
                )
            )
        self.head = _head(dim, num_classes)

    def forward(self, images, predict=False):
        """Figure 2: images (B, 3, H, W) -> class scores of the base and the prompt pathway, each (B, num_classes).

        `predict` leaves out what the base pathway's scores do not need; those of the prompt pathway are None.
        """
        base = self.vit.embed(images)  # Eq. (1), (B, 1 + N, d)
        prompt = self.drop(self.prompt_map() + self.prompt_positions())  # Eq. (2), (1, 1 + h' w', d)
        for layer, interact in zip(self.vit.blocks, self.interactions):
            base, prompt = interact(layer, base, prompt, predict)  # Eq. (3) to (7)
        base_logits = self.head(self.vit.norm(base[:, 0]))
        if predict:
            return base_logits, None
        return base_logits, self.head(self.vit.norm(prompt[:, 0])).expand_as(base_logits)

    def predict(self, images):
        """Class scores of the base pathway alone, (B, num_classes): those that predict."""
        return self(images, predict=True)[0]

    def prompt_positions(self):
        """E_pos as the prompt pathway borrows it: the image's own, at the prompt map's size."""
        return interpolate_positions(self.vit.pos_embed, self.vit.grid, self.prompt_grid)


class LinearProbe(nn.Module):
    """Baseline: nothing but a linear head on the frozen class token."""

    def __init__(self, vit, num_classes):
        super().__init__()
        self.vit = freeze(vit)
        self.head = _head(vit.dim, num_classes)

    def forward(self, images):
        """(B, 3, H, W) -> (logits,), one pathway's class scores (B, num_classes)."""
        return (self.head(self.vit(images)),)

    def predict(self, images):
        """(B, 3, H, W) -> class scores (B, num_classes)."""
        return self(images)[0]


class FullFineTuning(LinearProbe):
    """Baseline: everything is trained, the backbone too."""

    def __init__(self, vit, num_classes):
        super().__init__(vit, num_classes)
        self.vit.requires_grad_(True)


class VPTDeep(nn.Module):
    """Baseline: Visual Prompt Tuning (Jia et al., 2022), `prompts` new prompt tokens in every layer."""

    def __init__(self, vit, num_classes, prompts=50):
        super().__init__()
        self.vit = freeze(vit)
        self.prompts = nn.Parameter(torch.empty(len(vit.blocks), 1, prompts, vit.dim))
        bound = math.sqrt(6 / (3 * math.prod(vit.patch_size) + vit.dim))  # as VPT draws them
        nn.init.uniform_(self.prompts, -bound, bound)
        self.head = _head(vit.dim, num_classes)

    def forward(self, images):
        """(B, 3, H, W) -> (logits,), one pathway's class scores (B, num_classes)."""
        x = self.vit.embed(images)
        batch, length, _ = x.shape
        for block, prompts in zip(self.vit.blocks, self.prompts):
            # Attention has no order, so the prompts may stand last; those that come out are dropped.
            x = block(torch.cat([x, prompts.expand(batch, -1, -1)], dim=1))[:, :length]
        return (self.head(self.vit.norm(x[:, 0])),)

    def predict(self, images):
        """(B, 3, H, W) -> class scores (B, num_classes)."""
        return self(images)[0]


METHODS = {"sa2vp": SA2VP, "vpt": VPTDeep, "linear": LinearProbe, "full": FullFineTuning}

# What a checkpoint holds, at the least.
CHECKPOINT = set(
    "trained method options classes settings weights fingerprint heads image_size crop mean std root".split()
)


def two_pathway_loss(logits, labels):
    """Eq. (8) for (base_logits, prompt_logits); plain cross-entropy for a baseline's (logits,).

    Scores (B, num_classes), labels (B,), whole numbers from 0 -> the batch's mean loss, a scalar.
    """
    weights = (0.8, 0.2) if len(logits) == 2 else (1.0,)
    return sum(weight * F.cross_entropy(scores, labels) for weight, scores in zip(weights, logits))


def aligned_neighbourhood(grid, other_grid, window):
    """N(t) as a boolean matrix (1 + h w, 1 + h' w'): may token t attend to token u of the other map?

    A patch token sees the tokens whose cell centre lies less than window / 2 cells away in y and in x,
    a cell being one of the coarser grid, and not the class token; the class token sees all. At equal
    sizes and window 3 that is the 3x3 neighbourhood, cut off at the border. ValueError if the window is
    not odd and positive, or a neighbourhood is empty.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window} must be odd and positive, or none")
    (h, w), (h2, w2) = grid, other_grid

    def near(n, n2):  # centres (y + 0.5) / n and (y' + 0.5) / n2, in integers so that no rounding decides
        y, y2 = torch.arange(n)[:, None], torch.arange(n2)
        return ((2 * y + 1) * n2 - (2 * y2 + 1) * n).abs() < window * max(n, n2)  # (n, n2)

    mask = torch.ones(1 + h * w, 1 + h2 * w2, dtype=torch.bool)
    mask[1:, 0] = False
    mask[1:, 1:] = (near(h, h2)[:, None, :, None] & near(w, w2)[:, None, :]).flatten(2).flatten(0, 1)
    if not mask.any(dim=1).all():
        raise ValueError(f"window {window} leaves a token of {h}x{w} nothing to attend to in {h2}x{w2}: take a larger")
    return mask


def freeze(vit, dropout=0.0):
    """No gradients for the backbone, and `dropout` where its layers have it. All methods start from here."""
    for module in vit.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return vit.requires_grad_(False)


def trained_parameters(model):
    """Name -> parameter of all that is trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_parameters(model):
    """Name -> parameter of all but a frozen backbone, for a checkpoint: megabytes where that has hundreds."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad or not name.startswith("vit.")}


def count_trained(model):
    """How many numbers are trained, the head not counted, as the field reports it."""
    return sum(tensor.numel() for name, tensor in trained_parameters(model).items() if not name.startswith("head."))


def watched(model, images, modules):
    """What each of the modules gives, the first time it is called, when the model sees the images."""
    seen = {}

    def remember(module, _, output):
        seen.setdefault(module, output)

    hooks = [module.register_forward_hook(remember) for module in modules]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[module] for module in modules]


@torch.inference_mode()
def class_attention(model, images):
    """What the class token attends to in the last layer's self attention: (B, 3, H, W) -> (B, h, w), mean over heads.

    Of SA2VP, in the base pathway. `model` is a method or a bare VisionTransformer, in evaluation mode.
    A picture's shares sum up to 1, less what falls on the class token itself and, in VPT, on the prompts.
    """
    vit = getattr(model, "vit", model)
    layer = vit.blocks[-1]
    (normed,) = watched(model, images, [layer.norm1])  # SA2VP calls it twice, first for the base pathway
    q, k, _ = layer.attn.project(normed, keep=1)
    attention = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).softmax(dim=-1)  # (B, heads, 1, T)
    return attention.mean(dim=1)[:, 0, 1 : 1 + math.prod(vit.grid)].unflatten(1, vit.grid)


@torch.inference_mode()
def prompting_strength(model, images):
    """How much the prompts change each image token of an SA2VP: (B, 3, H, W) -> (B, h, w).

    The norm of the prompting message s A_i(C_i(B_i, P_i)) of Eq. (5), summed over the layers that
    prompt; of the last one only the class token is left, so it has no part. `model` is in evaluation mode.
    """
    prompting = [interact for interact in model.interactions if not (interact.distills or interact.last)]
    messages = watched(model, images, [interact.adapter for interact in prompting])  # each (B, 1 + N, d)
    norms = [interact.scale * message[:, 1:].norm(dim=-1) for interact, message in zip(prompting, messages)]
    nothing = images.new_zeros(len(images), math.prod(model.vit.grid))
    return sum(norms, start=nothing).unflatten(1, model.vit.grid)


def load(path, weights=None):
    """Reads a tuned model, `best.pt`: (model ready for prediction, meta).

    meta is what else the file says, a dict: `classes` (names), `image_size` (height and width in
    pixels), `mean` and `std` (per RGB channel), `crop` (see data.transform), `settings` of the run, and
    more. `weights` tells where the backbone is, if not where the run had it. Raises FileNotFoundError if a
    file is not there, ValueError if it is no checkpoint of this project or the backbone is another
    one than it was tuned on.
    """
    meta = read_checkpoint(path)
    trained, weights = meta.pop("trained"), weights or meta["weights"]
    if weights is None:
        raise ValueError(f"{path} was trained from scratch, not tuned: there is no backbone to put it on")
    vit = load_vit(weights, meta["image_size"], meta["heads"], meta["mean"], meta["std"])
    if vit.fingerprint() != meta["fingerprint"]:
        raise ValueError(f"{path} was tuned on another backbone than {weights}")
    try:
        model = METHODS[meta["method"]](vit, len(meta["classes"]), **meta["options"])
        load_trained(model, trained)
    except (TypeError, ValueError) as error:  # options or tensors that the method has not
        raise ValueError(f"{path}: {error}") from None
    return model.eval(), meta


def read_checkpoint(path):
    """What a best.pt or last.pt holds, a dict; nothing in it is executed."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint {path}") from None
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint of this project") from error
    complete = isinstance(saved, dict) and CHECKPOINT <= saved.keys()
    if not complete or saved["method"] not in METHODS or not isinstance(saved["trained"], dict):
        raise ValueError(f"{path} is no checkpoint of this project")
    return saved


def load_trained(model, tensors):
    """Puts what `saved_parameters` gave back into a model of the same shape; ValueError names what does not fit."""
    check_exactly(saved_parameters(model), tensors)
    model.load_state_dict(tensors, strict=False)


def load_official(path, scale=0.1, heads=None):
    """Reads a checkpoint of the authors' released code -> SA2VP, ready for prediction.

    Sizes are read off the file; `scale` and `heads` (by default width / 64) are not in it. With one new
    prompt map in place of two, it enters at the first of the fusion layers. No pickled code is
    executed. Raises ValueError, naming the tensor, if one is missing, left over or of a wrong shape.
    """
    try:
        return _from_official(read_torch(path), scale, heads).eval()
    except KeyError as error:
        raise ValueError(f"{path} is no checkpoint of the released SA2VP: it has no tensor {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# The released code's names -> ours; its q, k, v and its stacked new prompt maps are taken apart below.
OFFICIAL_NAMES = {
    r"^vit_base\.transformer\.(embeddings|encoder)\.": "",
    r"^(cls_token)$": r"vit.\1",
    r"^position_embeddings$": "vit.pos_embed",
    r"^patch_embeddings\.": "vit.patch_embed.proj.",
    r"^encoder_norm\.": "vit.norm.",
    r"^layer\.(\d+)\.attention_norm\.": r"vit.blocks.\1.norm1.",
    r"^layer\.(\d+)\.ffn_norm\.": r"vit.blocks.\1.norm2.",
    r"^layer\.(\d+)\.ffn\.": r"vit.blocks.\1.mlp.",
    r"^layer\.(\d+)\.attn\.out\.": r"vit.blocks.\1.attn.proj.",
    r"^layer\.(\d+)\.attn\.": r"vit.blocks.\1.attn.",
    r"^ppt$": "prompt_map.tokens",
    r"^ppt_proj\.": "prompt_map.proj.",
    r"^cross_attn\.(\d+)\.ffn_norm\.": r"interactions.\1.adapter.norm.",
    r"^cross_attn\.(\d+)\.ffn\.fc1\.": r"interactions.\1.adapter.down.",
    r"^cross_attn\.(\d+)\.ffn\.fc2\.": r"interactions.\1.adapter.up.",
    r"^class_head\.": "head.",
}


def _from_official(official, scale, heads):
    tensors = rename(official, OFFICIAL_NAMES)
    depth = len({name for name in tensors if re.fullmatch(r"vit\.blocks\.\d+\.norm1\.weight", name)})
    for i in range(depth):
        block, cross = f"vit.blocks.{i}", f"cross_attn.{i}"
        copies = {f"{cross}.attention_norm": f"{block}.norm1", f"{cross}.attn.to_out": f"{block}.attn.proj"}
        copies |= {f"{cross}.attn.to_{kind[0]}": f"{block}.attn.{kind}" for kind in ("query", "key", "value")}
        for part in ("weight", "bias"):
            for copy, original in copies.items():
                if not torch.equal(tensors.pop(f"{copy}.{part}"), tensors[f"{original}.{part}"]):
                    raise ValueError(f"{copy}.{part} is not the copy of layer {i}'s own that it should be")
            qkv = [tensors.pop(f"{block}.attn.{kind}.{part}") for kind in ("query", "key", "value")]
            if len({tensor.shape for tensor in qkv}) > 1:
                raise ValueError(f"{block}.attn: query, key and value {part} have different shapes")
            tensors[f"{block}.attn.qkv.{part}"] = torch.cat(qkv)

    # New prompt maps are stacked: p_4, p_8 in one tensor, g_4, g_8 in another. Cars has one map, and
    # with it a second projection and gate that nothing uses.
    maps, *_ = shape(tensors, "deep_ppt", 4)
    fusion_layers = range(4, depth, 4)[:maps]
    if len(fusion_layers) < maps or shape(tensors, "cross_conv", 2)[0] not in (maps, 2):
        raise ValueError(f"deep_ppt and cross_conv do not fit each other, or {depth} layers")
    new_maps, gates = tensors.pop("deep_ppt"), tensors.pop("cross_conv")
    for j, i in enumerate(fusion_layers):
        fusion = f"interactions.{i}.fusion"
        tensors[f"{fusion}.prompt_map.tokens"], tensors[f"{fusion}.gate"] = new_maps[j], gates[j]
        for part in ("weight", "bias"):
            tensors[f"{fusion}.prompt_map.proj.{part}"] = tensors.pop(f"deep_proj.{j}.{part}")
    if maps == 1:
        for part in ("weight", "bias"):
            tensors.pop(f"deep_proj.1.{part}", None)

    vit_tensors = {name.removeprefix("vit."): tensors.pop(name) for name in list(tensors) if name.startswith("vit.")}
    vit = vit_from_tensors(vit_tensors, heads=heads, mean=HALF, std=HALF)
    num_classes, _ = shape(tensors, "head.weight", 2)
    _, _, inner_dim = shape(tensors, "prompt_map.tokens", 3)
    model = SA2VP(vit, num_classes, inner_dim, scale, fusion_layers=fusion_layers)
    load_trained(model, tensors)
    return model


def _linear(inputs, outputs):
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.normal_(layer.bias, std=1e-6)
    return layer


def _head(dim, num_classes):
    head = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    return head
