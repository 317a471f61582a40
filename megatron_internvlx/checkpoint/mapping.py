"""Table that maps Hugging Face tensors to ours, for both directions.

`table(sizes, family, layout)` lists one Entry per tensor of ours. Names of ours are *full names* (see
shards.py). A layout names the tensors of one kind of directory:

    chat      internvl_chat: released InternVL and InternVL-X (InternLM2 has names of its own)
    internvlx ours, with LVTC: released names for vision and projectors, Llama-like names for any decoder
    native    transformers' InternVLForConditionalGeneration, as transformers 4.52 and later name it
    native_old  the same class before that
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_internvlx.checkpoint.ops import GateUp, Op, Rows, Same, SplitQKV, VisionQKV
from megatron_internvlx.config import PVTC_MLP_RATIO
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.sizes import ModelSizes

Shape = tuple[int, ...]
LAYOUTS = ("chat", "internvlx", "native", "native_old")


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the Hugging Face tensors with the same values."""

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    op: Op = field(default_factory=Same)

    @property
    def is_projector(self) -> bool:
        """Whether it belongs to a projector, which may be initialised if it is missing."""
        return self.ours.startswith("projector.") or ".injection." in self.ours


def one(ours: str, theirs: str, *shape: int, op: Op | None = None) -> Entry:
    """An entry with one Hugging Face tensor."""
    return Entry(ours, (theirs,), (shape,), op or Same())


def table(sizes: ModelSizes, family: str, layout: str) -> list[Entry]:
    """Every tensor of the model in the order of the forward pass.

    Args:
        sizes: of the model.
        family: internlm2, qwen2, qwen3, qwen3_moe or llama: how the decoder's tensors are named.
        layout: see the module.
    """
    native = layout.startswith("native")
    root = "model." if layout == "native" else ""
    entries = [*(_native_vision(sizes.vision, root + "vision_tower.") if native else _vision(sizes.vision))]
    grid = sizes.entry_grid
    if native and sizes.projector == "mlp":
        entries += _mlp_projector(sizes, "projector.", root + "multi_modal_projector.", _NATIVE_MLP, grid)
    elif sizes.projector == "mlp":
        entries += _mlp_projector(sizes, "projector.", "mlp1.", _CHAT_MLP, grid)
    else:
        entries += _pvtc(sizes, "projector.", "projector.", grid)
    for layer in sizes.injection_layers:
        ours, theirs = f"{_our_layer(layer)}injection.projector.", f"lvtc_projectors.{layer}."
        if sizes.projector == "mlp":
            entries += _mlp_projector(sizes, ours, theirs, _CHAT_MLP, sizes.high_grid)
        else:
            entries += _pvtc(sizes, ours, theirs, sizes.high_grid)
    if family == "internlm2" and layout == "chat":
        entries += _internlm2(sizes)
    elif layout == "native":
        entries += _llama_like(sizes, "model.language_model.", "lm_head.weight")
    else:
        entries += _llama_like(sizes, "language_model.model.", "language_model.lm_head.weight")
    return entries


def output_names(family: str, layout: str) -> tuple[str, str]:
    """Names of (output layer, embedding) in a directory of this family and layout."""
    if family == "internlm2" and layout == "chat":
        return "language_model.output.weight", "language_model.model.tok_embeddings.weight"
    if layout == "native":
        return "lm_head.weight", "model.language_model.embed_tokens.weight"
    return "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


# ------------------------------------------------------------------------------------------ vision

_VISION_LAYER = "vision_model.encoder.layers."


def vision_layer(ours: str) -> int | None:
    """0-based layer of the vision encoder to which one of our tensors belongs, or None."""
    if not ours.startswith(_VISION_LAYER):
        return None
    return int(ours.removeprefix(_VISION_LAYER).partition(".")[0])


def _embeddings(vit: InternViTConfig, names: tuple[str, str, str]) -> Iterator[Entry]:
    c, p = vit.hidden_size, vit.patch_size
    ours = "vision_model.embeddings."
    yield one(ours + "class_embedding", names[0], 1, 1, c)
    yield one(ours + "position_embedding", names[1], 1, vit.tokens_per_tile, c)
    yield one(ours + "patch_embedding.weight", names[2] + ".weight", c, vit.num_channels, p, p)
    yield one(ours + "patch_embedding.bias", names[2] + ".bias", c)


def _vision_layer(vit: InternViTConfig, ours: str, theirs: str, names: dict[str, str]) -> Iterator[Entry]:
    """Entries common to both formats; `names` has theirs for norms, projection and layer scales."""
    c, f = vit.hidden_size, vit.ffn_hidden_size
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        yield one(f"{ours}{norm}.weight", f"{theirs}{names[norm]}.weight", c)
        if vit.norm_type == "layer_norm":
            yield one(f"{ours}{norm}.bias", f"{theirs}{names[norm]}.bias", c)
    if vit.qk_normalization:
        for name in ("q_norm", "k_norm"):
            yield one(f"{ours}self_attention.{name}.weight", f"{theirs}{names['attention']}.{name}.weight", c)
    for name, linear, rows, columns in (
        ("self_attention.linear_proj", names["proj"], c, c),
        ("mlp.linear_fc1", "mlp.fc1", f, c),
        ("mlp.linear_fc2", "mlp.fc2", c, f),
    ):
        yield one(f"{ours}{name}.weight", f"{theirs}{linear}.weight", rows, columns)
        yield one(f"{ours}{name}.bias", f"{theirs}{linear}.bias", rows)
    yield one(ours + "self_attn_bda.layer_scale", theirs + names["ls1"], c)
    yield one(ours + "mlp_bda.layer_scale", theirs + names["ls2"], c)


_RELEASED_VISION = {
    "input_layernorm": "norm1",
    "pre_mlp_layernorm": "norm2",
    "attention": "attn",
    "proj": "attn.proj",
    "ls1": "ls1",
    "ls2": "ls2",
}
_NATIVE_VISION = {
    "input_layernorm": "layernorm_before",
    "pre_mlp_layernorm": "layernorm_after",
    "attention": "attention",
    "proj": "attention.projection_layer",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}


def _vision(vit: InternViTConfig) -> Iterator[Entry]:
    prefix = "vision_model.embeddings."
    yield from _embeddings(
        vit, (prefix + "class_embedding", prefix + "position_embedding", prefix + "patch_embedding")
    )
    c, qkv = vit.hidden_size, VisionQKV(vit.num_heads)
    for i in range(vit.num_layers):
        ours = theirs = f"{_VISION_LAYER}{i}."
        linear = ours + "self_attention.linear_qkv"
        yield one(linear + ".weight", theirs + "attn.qkv.weight", 3 * c, c, op=qkv)
        if vit.qkv_bias:
            yield one(linear + ".bias", theirs + "attn.qkv.bias", 3 * c, op=qkv)
        yield from _vision_layer(vit, ours, theirs, _RELEASED_VISION)


def _native_vision(vit: InternViTConfig, prefix: str) -> Iterator[Entry]:
    names = ("cls_token", "position_embeddings", "patch_embeddings.projection")
    yield from _embeddings(vit, tuple(f"{prefix}embeddings.{n}" for n in names))  # type: ignore[arg-type]
    c, qkv = vit.hidden_size, SplitQKV(vit.num_heads, vit.num_heads)
    for i in range(vit.num_layers):
        ours, theirs = f"{_VISION_LAYER}{i}.", f"{prefix}encoder.layer.{i}."
        for kind, shape in (("weight", (c, c)), ("bias", (c,))):
            if kind == "weight" or vit.qkv_bias:
                parts = tuple(f"{theirs}attention.{x}_proj.{kind}" for x in "qkv")
                yield Entry(f"{ours}self_attention.linear_qkv.{kind}", parts, (shape,) * 3, qkv)
        yield from _vision_layer(vit, ours, theirs, _NATIVE_VISION)


# -------------------------------------------------------------------------------------- projectors

_CHAT_MLP = {"norm": "0", "linear_fc1": "1", "linear_fc2": "3"}
_NATIVE_MLP = {"norm": "layer_norm", "linear_fc1": "linear_1", "linear_fc2": "linear_2"}


def _mlp_projector(
    sizes: ModelSizes, ours: str, theirs: str, names: dict[str, str], grid: int
) -> Iterator[Entry]:
    h, width = sizes.hidden, sizes.shuffled_width(grid)
    for name, shape in (("norm", (width,)), ("linear_fc1", (h, width)), ("linear_fc2", (h, h))):
        yield one(f"{ours}{name}.weight", f"{theirs}{names[name]}.weight", *shape)
        yield one(f"{ours}{name}.bias", f"{theirs}{names[name]}.bias", shape[0])


def _pvtc(sizes: ModelSizes, ours: str, theirs: str, grid: int) -> Iterator[Entry]:
    h, c = sizes.hidden, sizes.vision.hidden_size
    inner = PVTC_MLP_RATIO * h
    yield one(ours + "cls_scale", theirs + "cls_scale", 1, grid, grid, h)
    for name, mlp, width in (
        ("query_proj", "mlp1", sizes.shuffled_width(grid)),
        ("cls_proj", "mlp2", c),
        ("kv_proj", "mlp3", c),
    ):
        yield one(f"{ours}{name}.norm.weight", f"{theirs}{mlp}.0.weight", width)
        yield one(f"{ours}{name}.linear.weight", f"{theirs}{mlp}.1.weight", h, width)
    for branch in ("attn_local", "attn_global"):
        a, b = f"{ours}{branch}.", f"{theirs}{branch}."
        yield one(a + "norm_query.weight", b + "attn.norm1.weight", h)
        yield one(a + "norm_kv.weight", b + "attn.norm2.weight", h)
        for x in ("q", "k", "v", "proj"):
            yield one(f"{a}linear_{x}.weight", f"{b}attn.{x}.weight", h, h)
        yield one(a + "norm_mlp.weight", b + "mlp.norm.weight", h)
        yield one(a + "linear_gate.weight", b + "mlp.w1.weight", inner, h)
        yield one(a + "linear_up.weight", b + "mlp.w3.weight", inner, h)
        yield one(a + "linear_down.weight", b + "mlp.w2.weight", h, inner)


# ----------------------------------------------------------------------------------------- decoder

_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_OUTPUT = "language_model.output_layer.weight"
_FINAL_NORM = "language_model.decoder.final_layernorm.weight"


def _our_layer(index: int) -> str:
    return f"language_model.decoder.layers.{index}."


def _internlm2(sizes: ModelSizes) -> Iterator[Entry]:
    h, f = sizes.hidden, sizes.ffn
    root, rows = "language_model.model.", Rows(sizes.vocab)
    yield one(_EMBEDDING, root + "tok_embeddings.weight", sizes.vocab, h, op=rows)
    qkv_rows = sizes.query_width + 2 * sizes.key_width
    for i in range(sizes.layers):
        a, b = _our_layer(i), f"{root}layers.{i}."
        yield one(a + "input_layernorm.weight", b + "attention_norm.weight", h)
        yield one(a + "self_attention.linear_qkv.weight", b + "attention.wqkv.weight", qkv_rows, h)
        yield one(a + "self_attention.linear_proj.weight", b + "attention.wo.weight", h, sizes.query_width)
        yield one(a + "pre_mlp_layernorm.weight", b + "ffn_norm.weight", h)
        yield Entry(
            a + "mlp.linear_fc1.weight",
            (b + "feed_forward.w1.weight", b + "feed_forward.w3.weight"),
            ((f, h), (f, h)),
            GateUp(),
        )
        yield one(a + "mlp.linear_fc2.weight", b + "feed_forward.w2.weight", h, f)
    yield one(_FINAL_NORM, root + "norm.weight", h)
    if not sizes.tied:
        yield one(_OUTPUT, "language_model.output.weight", sizes.vocab, h, op=rows)


def _llama_like(sizes: ModelSizes, root: str, head: str) -> Iterator[Entry]:
    h, rows = sizes.hidden, Rows(sizes.vocab)
    yield one(_EMBEDDING, root + "embed_tokens.weight", sizes.vocab, h, op=rows)
    for i in range(sizes.layers):
        a, b = _our_layer(i), f"{root}layers.{i}."
        yield one(a + "input_layernorm.weight", b + "input_layernorm.weight", h)
        yield from _attention(sizes, a, b)
        yield one(a + "pre_mlp_layernorm.weight", b + "post_attention_layernorm.weight", h)
        if not sizes.experts:
            yield from _gated(a + "mlp.", b + "mlp.", h, sizes.ffn)
            continue
        yield one(a + "mlp.router.weight", b + "mlp.gate.weight", sizes.experts, h)
        for e in range(sizes.experts):
            yield from _gated(
                f"{a}mlp.experts.local_experts.{e}.", f"{b}mlp.experts.{e}.", h, sizes.expert_ffn
            )
    yield one(_FINAL_NORM, root + "norm.weight", h)
    if not sizes.tied:
        yield one(_OUTPUT, head, sizes.vocab, h, op=rows)


def _attention(sizes: ModelSizes, ours: str, theirs: str) -> Iterator[Entry]:
    h, d = sizes.hidden, sizes.head_dim
    a, b = ours + "self_attention.", theirs + "self_attn."
    widths = (sizes.query_width, sizes.key_width, sizes.key_width)
    split = SplitQKV(sizes.heads, sizes.kv_groups)
    for kind in ("weight", "bias") if sizes.qkv_bias else ("weight",):
        parts = tuple(f"{b}{x}_proj.{kind}" for x in "qkv")
        shapes = tuple((rows, h) if kind == "weight" else (rows,) for rows in widths)
        yield Entry(f"{a}linear_qkv.{kind}", parts, shapes, split)
    if sizes.qk_norm:
        yield one(a + "q_layernorm.weight", b + "q_norm.weight", d)
        yield one(a + "k_layernorm.weight", b + "k_norm.weight", d)
    yield one(a + "linear_proj.weight", b + "o_proj.weight", h, sizes.query_width)


def _gated(ours: str, theirs: str, h: int, f: int) -> Iterator[Entry]:
    parts = (theirs + "gate_proj.weight", theirs + "up_proj.weight")
    yield Entry(ours + "linear_fc1.weight", parts, ((f, h), (f, h)), GateUp())
    yield one(ours + "linear_fc2.weight", theirs + "down_proj.weight", h, f)
