"""KV-cache blocks of shallow layers, which hold fewer rows than the scheduler counts.

vLLM asks the manager of a cache group for blocks by the number of rows of a request. Shallow layers run fewer of
them; how many fewer depends on where the images of the request are, which a manager is not told. Therefore the
scheduler tells it, when a request arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec
from vllm.v1.request import Request

from megatron_internvlx.serving.phases import Spans, chunk_end, shallow_length


def image_spans(features: Sequence[Any]) -> list[tuple[int, int]]:
    """(first row, placeholders) of the images of a request, from vLLM's descriptions of them."""
    spans = []
    for feature in features:
        place = feature.mm_position
        inside = place.is_embed
        first = 0 if inside is None else int(inside.int().argmax())
        spans.append((place.offset + first, place.get_num_embeds()))
    return spans


class ShallowManager(SingleTypeKVCacheManager):
    """Blocks of shallow layers. A request whose images are not known gets blocks for all its rows."""

    def __init__(self, kv_cache_spec: ShallowSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.low, self.high = kv_cache_spec.low, kv_cache_spec.high
        self.spans: dict[str, Spans] = {}

    def rows(self, request_id: str, rows: int) -> int:
        """Rows that the shallow layers hold of the first `rows` rows of a request."""
        return shallow_length(rows, self.spans.get(request_id, ()), self.low, self.high)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **kwargs: Any,
    ) -> int:
        """New blocks that a request of `num_tokens` rows needs."""
        return super().get_num_blocks_to_allocate(
            request_id,
            self.rows(request_id, num_tokens),
            new_computed_blocks,
            self.rows(request_id, total_computed_tokens),
            self.rows(request_id, num_local_computed_tokens),
            self.rows(request_id, num_tokens_main_model),
            **kwargs,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """The new blocks of a request of `num_tokens` rows."""
        return super().allocate_new_blocks(
            request_id, self.rows(request_id, num_tokens), self.rows(request_id, num_tokens_main_model)
        )

    @classmethod
    def find_longest_cache_hit(cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any,
                               **kwargs: Any) -> tuple[tuple[list[KVCacheBlock], ...], int]:  # fmt: skip
        """Nothing: prefix caching is off."""
        return tuple([] for _ in kv_cache_group_ids), 0


@register_kv_cache_spec(manager_class=ShallowManager)
@dataclass(frozen=True, kw_only=True)
class ShallowSpec(AttentionSpec):
    """Cache of a shallow layer.

    Args:
        low: placeholders of a tile that the layer runs.
        high: placeholders of a tile.
        part: which of the groups the layer is in; see `layer_parts`.
    """

    low: int
    high: int
    part: int

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of the longest request, which is one without images."""
        return -(-vllm_config.model_config.max_model_len // self.block_size) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class DeepSpec(FullAttentionSpec):
    """Cache of a deep layer; `part`: which of the groups the layer is in, see `layer_parts`."""

    part: int

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Layers of one part only share a group."""
        return KVCacheSpec.merge.__func__(cls, specs)


class PhaseScheduler(Scheduler):
    """vLLM's scheduler, which tells the managers of shallow layers about images and does not stop inside one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spans: dict[str, Spans] = {}
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, ShallowManager):
                manager.spans = self.spans

    def add_request(self, request: Request) -> None:
        """Take a new request."""
        self.spans[request.request_id] = image_spans(request.mm_features or ())
        super().add_request(request)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.spans.pop(request.request_id, None)

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        end = num_computed_tokens + num_new_tokens
        end = chunk_end(num_computed_tokens, end, self.spans.get(request.request_id, ()))
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, end - num_computed_tokens, *args, **kwargs
        )
