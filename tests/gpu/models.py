"""The same small model with local modules and with Transformer Engine's, and a micro-batch for it."""

from tests.whole_model import micro_batch, plan_for, whole_model  # isort: skip  (sets Megatron up)
import numpy as np
import torch

from megatron_internvlx.data.plan import IGNORE
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.parallel.batch import MicroBatch

VOCABULARY = 512
# 16x16 patches: 16 shallow and 64 deep tokens per tile; every width a multiple of FP8's 16, with MXFP8's 32.
VISION = InternViTConfig(
    hidden_size=256, num_layers=2, num_heads=4, ffn_hidden_size=512, patch_size=14, image_size=224
)
LOCAL_NORMS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}


def local_name(name: str) -> str:
    """What the local modules call a Transformer Engine parameter: norms are fused into linear layers there."""
    for fused, alone in LOCAL_NORMS.items():
        name = name.replace(fused, alone)
    return name


def build(implementation: str, dtype: torch.dtype, **decoder: object) -> InternVLX:
    """A model with LVTC and one more injection, on the device."""
    return whole_model(
        VISION,
        vocab_size=VOCABULARY,
        rotary_base=10000,
        compression={"injection_layers": (2, 3), "low_grid": 4},
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=64,
        add_qkv_bias=True,
        transformer_impl=implementation,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **decoder,
    ).to(device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)


def copy_weights(source: InternVLX, target: InternVLX) -> None:
    """Weights by name, whichever modules hold them."""
    weights = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            found = weights.get(name)
            parameter.copy_(weights[local_name(name)] if found is None else found)


def batch(model: InternVLX, changed: int | None = None) -> MicroBatch:
    """Three samples with 1, 0 and 2 tiles, rows aligned for FP8; `changed` gets other words and pixels."""
    rng = np.random.default_rng(0)
    per_tile = model.sizes.high_grid**2
    ids, labels, visual, tiles = [], [], [], []
    for number, (count, text) in enumerate(((1, 40), (0, 72), (2, 56))):
        words = rng.integers(1, VOCABULARY, text)
        pixels = rng.standard_normal((count, 3, 224, 224))
        if number == changed:
            words, pixels = (words * 7 + 1) % VOCABULARY, -pixels
        tokens = np.concatenate([np.zeros(count * per_tile, int), words])
        ids.append(tokens)
        visual.append(np.arange(len(tokens)) < count * per_tile)
        labels.append(np.where(np.arange(len(tokens)) >= count * per_tile + 4, tokens, IGNORE))
        tiles.append(pixels)
    plan = plan_for(model, ids, labels, visual, alignment=32)
    device = next(model.parameters()).device
    return micro_batch(plan, torch.tensor(np.concatenate(tiles), dtype=torch.float32, device=device))
