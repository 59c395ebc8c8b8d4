"""SA2VP: Spatially Aligned-and-Adapted Visual Prompt (Pei et al., AAAI 2024).

Two pathways run through the same frozen encoder layers T_i: the base pathway B carries the image tokens, the prompt
pathway P a learned two-dimensional map of prompt tokens, one for each patch. In every layer one pathway sends the other
a message: a patch token attends only to the tokens around its own place, the class token to all.

    (1)  B_0 = [cls ; patches(I)] + E_pos
    (2)  P_0 = p W_p + b_p + E_pos
    (3)  C_i(X, Y)_t = X_t + Drop(Wo o_t),  o_t = sum over u in N(t) of softmax_u(q . k / sqrt(d / heads)) v_u
         q = Wq LN1(X_t),  k = Wk LN1(Y_u),  v = Wv LN1(Y_u)
    (4)  A_i(Z) = Drop(W_up Drop(GELU(W_down LN(Z))))
    (5)  i not in D:  B_{i+1} = T_i(B_i) + s A_i(C_i(B_i, P_i))               P_{i+1} = T_i(P_i)
    (6)  i in D:      P_{i+1} = T_i(P_i) [+ fusion] + s A_i(C_i(P_i, B_i))    B_{i+1} = T_i(B_i)
    (7)  i in F:      fusion = g_i * T_i(p_i W_i + b_i)
    (8)  loss = 0.8 CE(head(LN(B_L)[cls]), y) + 0.2 CE(head(LN(P_L)[cls]), y)

The numbers are this project's own. N is the number of patches, h x w their grid, h' x w' that of the prompt map (the
same unless scaled), d the width of the encoder, r the inner dimension of prompt maps and adapters. N(t) is the aligned
neighbourhood of token t. D and F are sets of layers. In training B_0, P_0 and T_i's MLPs have dropout too.
"""

import inspect
import math
from pathlib import Path

import torch
from torch import nn

from vit import InputError, fingerprint, interpolate_positions, load_tensors, load_vit, read_file


class FullPrecisionLinear(nn.Linear):
    """A linear layer without autocast, so that logits and the residual streams of prompts keep their precision."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class PromptMap(nn.Module):
    """The prompt map, Eq. (2) without E_pos: p W + b, (1, 1 + h' w', d): a class token, then one for each place."""

    def __init__(self, grid, inner_dim, dim):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, 1 + math.prod(grid), inner_dim))  # p, of width r
        self.proj = FullPrecisionLinear(inner_dim, dim)  # W and b, r -> d
        nn.init.trunc_normal_(self.tokens, std=0.02)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.normal_(self.proj.bias, std=1e-6)

    def forward(self):
        return self.proj(self.tokens)


def aligned_neighbourhood(grid, other, window):
    """N(t) as a boolean matrix (1 + h w, 1 + h' w'): does token t attend to token u of the other map?

    The class token attends to all, a patch token to the patch tokens whose cell centre is within window / 2 cells of
    the coarser grid in y and x: 3x3 for window 3 at equal sizes, cut off at the border. InputError if one is empty.
    """
    def near(n, m):  # of n and m cells along one axis, (n, m)
        y, z = torch.arange(n)[:, None], torch.arange(m)
        # The distance of the centres (y + 0.5) / n and (z + 0.5) / m, in integers, so that no rounding decides.
        return ((2 * y + 1) * m - (2 * z + 1) * n).abs() < window * max(n, m)

    patches = torch.kron(*map(near, grid, other))  # (h w, h' w'): near(h, h') in y and near(w, w') in x
    mask = nn.functional.pad(patches, (1, 0, 1, 0))  # a row and a column of False, number 0: the class tokens
    mask[0] = True  # the class token attends to all
    if window % 2 == 0 or not mask.any(1).all():
        raise InputError(f"window {window} must be odd and leave no token of {grid} nothing to attend to in {other}")
    return mask


class SpatiallyAlignedCrossAttention(nn.Module):
    """Spatially aligned cross attention, Eq. (3): X (batch, tokens, d) -> C_i(X, Y). All weights are frozen layer i's.

    q, k, v = Wq LN1(X), Wk LN1(Y), Wv LN1(Y) come from `layer.qkv`, which computes them once for T_i and C_i.
    `mask` is the aligned neighbourhood N(t), (tokens of X, tokens of Y); None: each attends to all.
    """

    def __init__(self, mask, drop):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.drop = drop

    def forward(self, layer, x, q, k, v):
        return x + self.drop(layer.attn.attend(q, k, v, self.mask))


class PromptAdapter(nn.Module):
    """The prompt adapter, Eq. (4): A_i(Z), (batch, tokens, d) -> the same, by way of r. It has no residual."""

    def __init__(self, dim, inner_dim, drop):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.down = nn.Linear(dim, inner_dim)
        self.up = nn.Linear(inner_dim, dim)
        self.drop = drop
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, z):
        # As in the released code. The paper's figure draws ReLU in place of GELU, and no LayerNorm.
        return self.drop(self.up(self.drop(nn.functional.gelu(self.down(self.norm(z))))))


class InterLayerPromptFusion(nn.Module):
    """Inter-layer prompt fusion, Eq. (7): g_i * T_i(p_i W_i + b_i), a new prompt map through frozen layer i.

    It does not depend on the image: one, (1, 1 + h' w', d), serves the batch. No position embedding is added to p_i.
    """

    def __init__(self, grid, inner_dim, dim):
        super().__init__()
        self.prompt_map = PromptMap(grid, inner_dim, dim)
        self.gate = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))  # g_i; (1, d), so that it has weight decay

    def forward(self, layer):
        return self.gate * layer(self.prompt_map())


class BilateralInteraction(nn.Module):
    """Bilateral interaction: takes both pathways through frozen layer i, while one sends the other a message.

    Knowledge prompting P -> B, Eq. (5); or, where it `distills`, knowledge distillation B -> P, Eq. (6), and
    where it `fuses`, inter-layer prompt fusion, Eq. (7). Only the class tokens leave the `last` layer.
    """

    def __init__(self, vit, prompt_grid, inner_dim, scale, window, distills, fuses, last):
        super().__init__()
        grids = (prompt_grid, vit.grid) if distills else (vit.grid, prompt_grid)  # of X (queries) and Y (keys, values)
        mask = None if window is None or last else aligned_neighbourhood(*grids, window)  # last: only class tokens ask
        self.cross_attention = SpatiallyAlignedCrossAttention(mask, vit.drop)
        self.adapter = PromptAdapter(vit.dim, inner_dim, vit.drop)
        self.fusion = InterLayerPromptFusion(prompt_grid, inner_dim, vit.dim) if fuses else None
        self.scale, self.distills, self.last = scale, distills, last

    def forward(self, layer, base, prompt):
        """B_i (batch, 1 + N, d), P_i (batch, 1 + h' w', d) -> B_{i+1}, P_{i+1}."""
        # P_i does not depend on the image before the first layer in D: until then it is a batch of one.
        qb, kb, vb = layer.qkv(base)
        qp, kp, vp = layer.qkv(prompt)
        kept = slice(1) if self.last else slice(None)  # only the class tokens leave the last layer
        base, qb, prompt, qp = base[:, kept], qb[:, :, kept], prompt[:, kept], qp[:, :, kept]

        next_base = layer.finish(base, qb, kb, vb)  # T_i(B_i)
        next_prompt = layer.finish(prompt, qp, kp, vp)  # T_i(P_i)
        if self.fusion:  # Eq. (7)
            next_prompt = next_prompt + self.fusion(layer)[:, kept]
        if self.distills:  # Eq. (6)
            next_prompt = next_prompt + self.scale * self.adapter(self.cross_attention(layer, prompt, qp, kb, vb))
        else:  # Eq. (5)
            next_base = next_base + self.scale * self.adapter(self.cross_attention(layer, base, qb, kp, vp))
        return next_base, next_prompt


class SA2VP(nn.Module):
    """A frozen ViT, tuned by a spatially aligned-and-adapted prompt map. InputError for options out of range.

    vit             the pre-trained backbone; it is changed in place: frozen, and given this `dropout`
    num_classes     outputs of the head, which both pathways share
    inner_dim       r, the rank of the prompt maps and the width inside the adapters
    scale           s, the weight of a message
    dropout         rate of `vit.drop`, which serves B_0, P_0, the MLPs, the cross attention and the adapters alike
    window          side of the aligned neighbourhood in cells, odd; None: every token attends to all
    prompt_grid     (h', w') of a scaled prompt map; None: the image's own grid; "half": half of that
    distill_layers  D, where B sends P the message; None: every fourth layer from 0; (): no layer
    fusion_layers   F, a subset of D, where a new prompt map enters; None: D without 0
    """

    def __init__(self, vit, num_classes, inner_dim=16, scale=0.1, dropout=0.1, window=3, prompt_grid=None,
                 distill_layers=None, fusion_layers=None):  # fmt: skip
        super().__init__()
        depth = len(vit.blocks)
        # As in the released code the first interaction distils; in the paper's figure it prompts.
        distill = set(range(0, depth, 4) if distill_layers is None else distill_layers)
        fusion = distill - {0} if fusion_layers is None else set(fusion_layers)
        if not fusion <= distill <= set(range(depth)):
            raise InputError(f"fusion layers {fusion} must be a subset of distill layers {distill} of 0 to {depth - 1}")
        if prompt_grid == "half":
            prompt_grid = tuple(side // 2 for side in vit.grid)
        self.prompt_grid = grid = prompt_grid or vit.grid
        self.vit = freeze(vit, dropout)
        self.prompt_map = PromptMap(grid, inner_dim, vit.dim)
        self.interactions = nn.ModuleList(
            BilateralInteraction(vit, grid, inner_dim, scale, window, i in distill, i in fusion, i == depth - 1)
            for i in range(depth)
        )
        self.head = make_head(vit, num_classes)

    def forward(self, images):
        """Figure 2: (batch, 3, height, width) -> scores (batch, num_classes) of each pathway; the base's predict."""
        base = self.vit.embed(images)  # Eq. (1), (batch, 1 + N, d)
        prompt = self.vit.drop(self.embed_prompts())  # Eq. (2), (1, 1 + h' w', d)
        for layer, interaction in zip(self.vit.blocks, self.interactions):
            base, prompt = interaction(layer, base, prompt)  # Eq. (3) to (7)
        base_logits, prompt_logits = (self.head(self.vit.norm(tokens[:, 0])) for tokens in (base, prompt))
        return base_logits, prompt_logits.expand_as(base_logits)

    def embed_prompts(self):
        """p W_p + b_p + E_pos, (1, 1 + h' w', d). E_pos is the image's, interpolated to the prompt grid."""
        return self.prompt_map() + interpolate_positions(self.vit.pos_embed, self.vit.grid, self.prompt_grid)


def two_pathway_loss(logits, labels):
    """Eq. (8), mean over the batch, of (base_logits, prompt_logits); plain cross-entropy of a baseline's (logits,)."""
    weights = (0.8, 0.2) if len(logits) == 2 else (1.0,)
    return sum(weight * nn.functional.cross_entropy(scores, labels) for weight, scores in zip(weights, logits))


def freeze(vit, dropout=0.0):
    """Freezes the backbone in place, and sets the rate of its dropout."""
    vit.drop.p = dropout
    return vit.requires_grad_(False)


def make_head(vit, num_classes):
    """The linear classifier, d -> num_classes."""
    head = FullPrecisionLinear(vit.dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    return head


# ---------------------------------------------------------------------- baselines


class ViTClassifier(nn.Module):
    """A linear head on the class token: images (batch, 3, height, width) -> (logits,), (batch, num_classes).

    As it stands it is full fine-tuning, or on a frozen ViT the linear probe. Other baselines change `layer`.
    """

    def __init__(self, vit, num_classes):
        super().__init__()
        self.vit = vit
        self.head = make_head(vit, num_classes)

    def layer(self, i, x):
        """T_i(x), (batch, 1 + N, d) -> the same."""
        return self.vit.blocks[i](x)

    def forward(self, images):
        x = self.vit.embed(images)
        for i in range(len(self.vit.blocks)):
            x = self.layer(i, x)
        return (self.head(self.vit.norm(x[:, 0])),)


def linear_probe(vit, num_classes):
    """Only the head is trained."""
    return ViTClassifier(freeze(vit), num_classes)


class VPTDeep(ViTClassifier):
    """Visual Prompt Tuning (Jia et al., 2022): `prompts` new prompt tokens in every layer of a frozen ViT."""

    def __init__(self, vit, num_classes, prompts=50):
        super().__init__(freeze(vit), num_classes)
        bound = (6 / (3 * math.prod(vit.patch_size) + vit.dim)) ** 0.5  # as VPT draws them
        self.prompts = nn.Parameter(torch.empty(len(vit.blocks), prompts, vit.dim).uniform_(-bound, bound))

    def layer(self, i, x):
        """T_i([x ; prompts]) without the prompts' outputs. Attention ignores order, so they can come last."""
        return super().layer(i, torch.cat([x, self.prompts[i].expand(x.size(0), -1, -1)], dim=1))[:, : x.size(1)]


class AdapterTuning(ViTClassifier):
    """SA2VP's adapters without prompts, in a frozen ViT: B_{i+1} = T_i(B_i) + s A_i(B_i)."""

    def __init__(self, vit, num_classes, inner_dim=16, scale=0.1, dropout=0.1):
        super().__init__(freeze(vit, dropout), num_classes)
        self.scale = scale
        self.adapters = nn.ModuleList(PromptAdapter(vit.dim, inner_dim, vit.drop) for _ in vit.blocks)

    def layer(self, i, x):
        """T_i(x) + s A_i(x)."""
        return super().layer(i, x) + self.scale * self.adapters[i](x)


METHODS = {"sa2vp": SA2VP, "vpt": VPTDeep, "adapter": AdapterTuning, "linear": linear_probe, "full": ViTClassifier}


def options(method):
    """Names of a method's options, a set; InputError if there is no such method."""
    if method not in METHODS:
        raise InputError(f"there is no method {method}: take one of {', '.join(METHODS)}")
    return inspect.signature(METHODS[method]).parameters.keys() - {"vit", "num_classes"}


def build(vit, num_classes, settings):
    """The method named settings["method"] on a backbone, with those of the settings that are its options."""
    own = {name: settings[name] for name in options(settings["method"]) if name in settings}
    return METHODS[settings["method"]](vit, num_classes, **own)


# ---------------------------------------------------------------------- looking inside


@torch.inference_mode()
def class_attention(model, images):
    """What the class token attends to in the last layer's self attention: (batch, 3, height, width) -> (batch, h, w).

    The mean over the heads; of SA2VP, in the base pathway. `model` is a method or a bare VisionTransformer,
    in evaluation mode. Values sum to 1 minus the class token's attention to itself and to VPT's prompts.
    """
    vit, seen = getattr(model, "vit", model), []
    hook = vit.blocks[-1].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(images)
    hook.remove()
    q, k, _ = vit.blocks[-1].attn.project(seen[0])  # SA2VP sends the base pathway through a layer first
    attention = (q[:, :, :1] @ k.mT / q.size(-1) ** 0.5).softmax(-1)  # (batch, heads, 1, tokens)
    return attention.mean(1)[:, 0, 1 : vit.pos_embed.size(1)].unflatten(1, vit.grid)


@torch.inference_mode()
def prompting_strength(model, images):
    """How much the prompts of an SA2VP change each image token: (batch, 3, height, width) -> (batch, h, w).

    The norm of B_{i+1} - T_i(B_i), summed over all layers but the last. `model` is in evaluation mode.
    """
    base, prompt, strength = model.vit.embed(images), model.embed_prompts(), 0
    for layer, interaction in zip(model.vit.blocks[:-1], model.interactions):
        unprompted = layer(base)
        base, prompt = interaction(layer, base, prompt)
        strength += (base - unprompted)[:, 1:].norm(dim=-1)  # (batch, N)
    return strength.unflatten(1, model.vit.grid)


# ---------------------------------------------------------------------- files


def trained_parameters(model):
    """Name -> parameter of all that is trained, which is what a checkpoint holds."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model, tensors):
    """Puts `trained_parameters` back; InputError names one that is missing, left over or of another shape."""
    load_tensors(trained_parameters(model), tensors)


def count_trained(model):
    """How many numbers are trained, without the head, as the field counts them."""
    return sum(p.numel() for name, p in trained_parameters(model).items() if not name.startswith("head."))


def read_checkpoint(path):
    """What a best.pt or last.pt holds, a dict; nothing in it is executed. InputError if it is something else."""
    checkpoint = read_file(path)
    for name in "trained settings classes backbone fingerprint input root history".split():
        if name not in checkpoint:
            raise InputError(f"{path} is no checkpoint of this version: it has no {name}")
    return checkpoint


def load(path, weights=None):
    """Reads a tuned model, best.pt or its folder: (model in evaluation mode, meta); InputError if it does not fit.

    meta is the rest of the file: `classes` (names), `input` (arguments of data.transform), `settings` and more. The
    backbone is in `weights`, where the run had it or, of that name, beside best.pt; that of `full` is in best.pt.
    """
    path = Path(path, "best.pt") if Path(path).is_dir() else Path(path)
    meta = read_checkpoint(path)
    try:
        settings = meta["settings"]
        weights = path if settings["method"] == "full" else weights or settings["weights"]
        beside = path.with_name(Path(weights).name)
        if beside.is_file() and beside != path and not Path(weights).is_file():
            weights = beside
        vit = load_vit(weights, **meta["backbone"])
        if weights != path and fingerprint(vit) != meta["fingerprint"]:
            raise InputError(f"it was tuned on another backbone than {weights}: give --weights (weights=)")
        model = build(vit, len(meta["classes"]), settings)
        load_trained(model, meta.pop("trained"))
    except (KeyError, TypeError, InputError) as error:  # of settings or tensors that do not fit
        raise InputError(f"cannot load {path}: {error}") from error
    return model.eval(), meta
