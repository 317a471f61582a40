"""Attention of shallow layers: their cache, and their part of a step's attention metadata.

vLLM builds metadata of each cache group for all rows of a step. A shallow layer sees fewer rows, at other positions,
in a shorter cache; which rows is known from the positions that the model gets. So a shallow layer's metadata is built
again at the start of the model's forward pass, by the same backend.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import KVCacheSpec

from megatron_internvlx.serving.cache import DeepSpec, ShallowSpec
from megatron_internvlx.serving.phases import Shallow, cache_slots


@functools.lru_cache
def shallow_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """`backend` with metadata that remember what they were built from."""
    builder: Any = backend.get_builder_cls()

    class ShallowBuilder(builder):
        supports_update_block_table = False

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
            metadata.common, metadata.builder = common_attn_metadata, self
            return metadata

    return subclass_attention_backend("Shallow", backend, ShallowBuilder)


class DeepAttention(Attention):
    """Attention over the rows that the scheduler counts, in a cache group of its own.

    Args:
        part: which group of deep layers it is in; None: that of all layers.
        kwargs: those of vLLM's Attention.
    """

    def __init__(self, *args: Any, part: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.part = part

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec | None:
        """The cache of the layer."""
        spec = super().get_kv_cache_spec(vllm_config)
        return spec if self.part is None else DeepSpec(**_fields(spec), part=self.part)


class ShallowAttention(Attention):
    """Attention over the rows of the shallow phase.

    Args:
        part: which group of shallow layers it is in; None: that of all layers, whose blocks it does not fill.
        low: placeholders of a tile that the layer runs.
        high: placeholders of a tile.
        kwargs: those of vLLM's Attention.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        *,
        part: int | None,
        low: int,
        high: int,
        **kwargs: Any,
    ) -> None:
        cache = kwargs.get("cache_config")
        kind = "auto" if cache is None else cache.cache_dtype
        backend = shallow_backend(get_attn_backend(head_size, torch.get_default_dtype(), kind))
        super().__init__(num_heads, head_size, scale, attn_backend=backend, **kwargs)
        self.part, self.low, self.high = part, low, high

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec | None:
        """The cache of the layer."""
        spec = super().get_kv_cache_spec(vllm_config)
        if self.part is None:
            return spec
        fields = _fields(spec)
        for name in ("sliding_window", "attention_chunk_size", "non_causal"):
            fields.pop(name)
        return ShallowSpec(**fields, part=self.part, low=self.low, high=self.high)


def _fields(spec: Any) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def enter_shallow(context: ForwardContext, layers: list[str], shallow: Shallow) -> None:
    """Give the layers of these names the metadata of a step's shallow phase."""
    metadata: Any = context.attn_metadata
    slots: Any = context.slot_mapping
    changes = _changes(metadata[layers[0]].common, shallow)
    built: dict[int, tuple[Any, torch.Tensor]] = {}  # by the metadata of a group, which its layers share
    for name in layers:
        old = metadata[name]
        if id(old) not in built:
            common, builder = old.common, old.builder
            mapping = cache_slots(shallow, common.block_table_tensor, builder.kv_cache_spec.block_size)
            new = common.replace(slot_mapping=mapping, **changes)
            built[id(old)] = super(type(builder), builder).build(0, new), mapping
        metadata[name], slots[name] = built[id(old)]


def _changes(common: Any, shallow: Shallow) -> dict[str, Any]:
    """Fields of the step's metadata that differ in the shallow phase and are the same for all groups."""
    changes = {
        "query_start_loc": shallow.starts,
        "seq_lens": shallow.lengths,
        "num_actual_tokens": len(shallow.positions),
        "positions": shallow.positions,
        "_num_computed_tokens_cache": None,
        "_token_to_req_indices_cache": None,
    }
    if (
        common.max_query_len == 1
    ):  # one row per request: lengths of the deep phase are bounds, and no one waits
        return changes
    starts, lengths = shallow.starts.cpu(), shallow.lengths.cpu()
    return changes | {
        "query_start_loc_cpu": starts,
        "seq_lens_cpu_upper_bound": lengths,
        "max_query_len": int((starts[1:] - starts[:-1]).max()),
        "max_seq_len": int(lengths.max()),
    }
