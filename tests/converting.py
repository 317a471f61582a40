"""Tiny Hugging Face directories of every family, and their way through a layout of Megatron.

Weights are random; names and shapes come from the table, whose names are checked against the golden
models and against transformers' own classes in `parity/test_convert.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_internvlx.checkpoint.hf_config import model_config
from megatron_internvlx.checkpoint.mapping import output_names, table
from megatron_internvlx.model.sizes import model_sizes

TOKENIZER = Path(__file__).parent / "golden" / "data" / "tokenizers" / "qwen2_fast"
VOCABULARY = 713  # one more than the tokenizer's, and odd, so that tensor parallelism pads it

VISION = {
    "model_type": "intern_vit_6b", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "patch_size": 4, "image_size": 16, "num_channels": 3, "norm_type": "layer_norm",
    "qkv_bias": True, "qk_normalization": False, "initializer_factor": 1.0, "drop_path_rate": 0.0,
}  # fmt: skip
DECODER = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 96, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SIX_B = {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True, "initializer_factor": 0.1}


def internvl(
    architecture: str,
    kind: str,
    *,
    vision: dict[str, Any] | None = None,
    dtype: str = "float32",
    **decoder: Any,
) -> dict[str, Any]:
    """The released format, with the MLP projector."""
    return {
        "model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5,
        "ps_version": "v2", "select_layer": -1, "template": "Hermes-2", "force_image_size": 16,
        "dynamic_image_size": True, "use_thumbnail": True, "min_dynamic_patch": 1, "max_dynamic_patch": 6,
        "torch_dtype": dtype, "vision_config": {**VISION, **(vision or {})},
        "llm_config": {"architectures": [architecture], "model_type": kind, **DECODER, **decoder},
    }  # fmt: skip


def native(dtype: str = "float32", *, vision: dict[str, Any] | None = None, **text: Any) -> dict[str, Any]:
    """transformers' own format."""
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "patch_size": [4, 4], "image_size": [16, 16], "attention_bias": True, "use_qk_norm": False,
        "norm_type": "layer_norm", "layer_scale_init_value": 0.1, "model_type": "internvl_vision",
        **(vision or {}),
    }  # fmt: skip
    text = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **DECODER, **text}
    return {
        "model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5, "image_seq_length": 4, "image_token_id": 705, "dtype": dtype,
        "tie_word_embeddings": False, "vision_config": vision, "text_config": text,
    }  # fmt: skip


def with_lvtc(config: dict[str, Any], **compression: Any) -> dict[str, Any]:
    """Our remote-code format of a model, with an expansion and a further injection."""
    settings = {
        "projector": "pvtc", "expand_layer": 1, "inject_layers": [2], "low_ratio": 0.25, "high_ratio": 0.5,
        "upsample": "bilinear", "pixel_shuffle_version": "v2", **compression,
    }  # fmt: skip
    return config | {"model_type": "internvlx", "compression": settings}


def lvtc_config() -> dict[str, Any]:
    """The remote-code format of a Qwen2 model."""
    return with_lvtc(internvl("Qwen2ForCausalLM", "qwen2"))


INTERNLM2 = internvl("InternLM2ForCausalLM", "internlm2", bias=False)
FAMILIES: dict[str, dict[str, Any]] = {
    "internvlx": INTERNLM2 | {"pvtc": True},
    "internlm2": internvl("InternLM2ForCausalLM", "internlm2", bias=False, dtype="bfloat16"),
    "qwen2_tied": internvl("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True, vision=SIX_B),
    "qwen3": internvl("Qwen3ForCausalLM", "qwen3", head_dim=16, dtype="bfloat16"),
    "llama": internvl("LlamaForCausalLM", "llama"),
    "qwen3_moe": internvl("Qwen3MoeForCausalLM", "qwen3_moe", head_dim=16, **MOE),
    "native": native(),
    "native_old": native() | {"old": True},
    "lvtc": lvtc_config(),
    "lvtc_internlm2": with_lvtc(INTERNLM2),
}
MARKS = ("pvtc", "old")
"""Keys of a family that are for `make_directory`, and stand in no config.json."""


class Named:
    """Enough of a weight directory for `model_config`."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)

    def equal(self, first: str, second: str) -> bool:
        return True


def make_directory(
    folder: Path, config: dict[str, Any], *, shards: int = 1, scale: float = 1.0, tokenizer: bool = False
) -> Path:
    """Write a directory with random weights; `scale` multiplies matrices. Returns `folder`."""
    pvtc = config.get("pvtc") or config["model_type"] == "internvlx"
    marks = ["projector.cls_scale"] if pvtc else []
    if config["model_type"] == "internvl" and not config.get("old"):
        marks.append("model.")
    config = {key: value for key, value in config.items() if key not in MARKS}
    ours = model_config(config, Named(*marks))
    generator = torch.Generator().manual_seed(3)
    dtype = getattr(torch, ours.dtype)
    sizes = model_sizes(ours.arguments)
    tensors: dict[str, torch.Tensor] = {}
    for entry in table(sizes, ours.family, ours.layout):
        for name, shape in zip(entry.theirs, entry.shapes, strict=True):
            drawn = torch.randn(shape, generator=generator)
            if len(shape) == 1:
                drawn = (0.1 * drawn) if name.endswith("bias") else 1 + 0.1 * drawn
            elif name.endswith(("embed_tokens.weight", "_embedding", "cls_scale")):
                drawn = 0.5 * drawn
            else:
                drawn = drawn * scale * shape[-1] ** -0.5
            tensors[name] = drawn.to(dtype)
    if sizes.tied:
        head, embedding = output_names(ours.family, ours.layout)
        tensors[head] = tensors[embedding].clone()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if tokenizer:
        shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    _save(folder, tensors, shards)
    return folder


def _save(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def differences(expected: Path, found: Path) -> list[str]:
    """What two directories do not share: files, bytes of weights, index and config."""
    wanted = {p.name for p in expected.iterdir()}
    if (found / "modeling_internvlx.py").exists():
        # config.json is written anew, with the remote code's classes, and the tokenizer's end is the template's.
        wanted -= {"config.json", "tokenizer_config.json", "special_tokens_map.json"}
    problems = [f"no {name}" for name in sorted(wanted - {p.name for p in found.iterdir()})]
    for name in sorted(wanted):
        if not problems and (expected / name).read_bytes() != (found / name).read_bytes():
            problems.append(f"{name} differs")
    return problems


# -------------------------------------------------------------------------------------- in a rank


def load_and_save(layout: list[str], checkpoints: dict[str, str], folder: str) -> None:
    """On a rank: Megatron loads every checkpoint into the layout and saves it again under its name."""
    from megatron_internvlx import platform

    platform.setup()
    import megatron.training.checkpointing as checkpointing
    from megatron.core.enums import ModelType
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model

    from megatron_internvlx import arguments
    from megatron_internvlx.training.builder import ModelProvider
    from tests.distributed import forget_megatron

    # The ranks of the pool are daemons, which may not start the process that Megatron writes from.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    for name, checkpoint in checkpoints.items():
        saved, sys.argv = sys.argv, [
            "load_and_save", "--recipe", f"{checkpoint}/recipe.yaml", "--tokenizer-model", str(TOKENIZER),
            "--data", "none", "--train-iters", "1", "--lr", "1e-3", "--global-batch-size", "8",
            "--seq-length", "256", "--save-interval", "1", "--save", f"{folder}/{name}",
            "--no-save-optim", "--no-save-rng", *layout,
        ]  # fmt: skip
        try:
            args = arguments.parse()
        finally:
            sys.argv = saved
        initialize_megatron()
        model = get_model(ModelProvider(args), ModelType.encoder_or_decoder, wrap_with_ddp=False)
        for stage in model:
            for parameter in stage.parameters():
                parameter.data.fill_(float("nan"))
        checkpointing.load_checkpoint(model, None, None)
        checkpointing.save_checkpoint(1, model, None, None, 0)
        forget_megatron()
