"""InternVL-X as a vLLM model, with LVTC or in one phase.

The vision encoder and the projectors are those of the exported directory's remote code. With LVTC, vLLM schedules
and counts deep rows; the shallow layers run a part of them (see `phases`), with a cache of their own (see `cache`).

Shapes: n rows of a step, s of them in the shallow phase, T tiles of a step, L vision tokens of width c per tile, p and
q tokens per tile in the two phases, h width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from megatron_internvlx.hf.modeling_internvlx import upsample_matrix
from megatron_internvlx.hf.vision_internvlx import VisionModel, make_projector
from megatron_internvlx.serving.attention import enter_shallow
from megatron_internvlx.serving.cache import image_spans
from megatron_internvlx.serving.decoder import Decoder, caches_of
from megatron_internvlx.serving.phases import kept_rows, row_positions, shallow_step
from megatron_internvlx.serving.processor import DummyInputs, ProcessingInfo, Processor


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class InternVLXForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """Images and text to text."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
            ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
            ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Mark of an image in a prompt."""
        if modality != "image":
            raise ValueError(f"InternVL-X takes images only, no {modality}")
        return "<image>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.config = config
        injections: list[int] = config.injection_layers
        self.lvtc = bool(injections)
        self.shallow = injections[0] if injections else 0
        self.low, self.high = config.low_grid**2, config.high_grid**2
        self.entry = "projector" if config.compression["projector"] == "pvtc" else "mlp1"
        marks: Any = self
        with marks._mark_tower_model(vllm_config, "image"):
            self.vision_model = VisionModel(config.vision_config, config.select_layer)
            self.add_module(self.entry, make_projector(config, config.low_grid))
            self.lvtc_projectors = nn.ModuleDict(
                {str(layer): make_projector(config, config.high_grid) for layer in injections}
            )
        with marks._mark_language_model(vllm_config):
            text = config.llm_config
            tied = config.tie_word_embeddings or text.tie_word_embeddings
            caches = caches_of(
                text.num_hidden_layers, self.shallow, self.low, self.high, vllm_config.cache_config
            )
            self.language_model = Decoder(text, tied, maybe_prefix(prefix, "language_model"), caches)
        layers: Any = self.language_model.model.layers[: self.shallow]
        self.shallow_names: list[str] = [layer.self_attn.attn.layer_name for layer in layers]
        # Vision features of the step's images [T, L, c], and their rows [T, q].
        self.features: torch.Tensor | None = None
        self.visual: torch.Tensor | None = None

    # ------------------------------------------------------------------------------------- images

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """Encoder outputs of each image, a row per placeholder.

        Projected tokens in one phase. With LVTC several projectors need the vision features, so these are cached:
        a row holds the q-th part of a tile's L x c numbers.
        """
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return []
        counts = [int(count) for count in kwargs["tiles"].reshape(-1)]
        features = self.vision_model(pixels)
        if self.lvtc:
            flat = features.flatten(1)
            rows = nn.functional.pad(flat, (0, -flat.shape[1] % self.high)).unflatten(1, (self.high, -1))
        else:
            rows = getattr(self, self.entry)(features)
        return [image.flatten(0, 1) for image in rows.split(counts)]

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings [n, h]; with LVTC a tile's first p placeholders are its projected tokens.

        Raises:
            ValueError: a part of a tile is scheduled.
        """
        self.features = self.visual = None
        if not self.lvtc or multimodal_embeddings is None or not len(multimodal_embeddings):
            return super().embed_input_ids(
                input_ids, multimodal_embeddings=multimodal_embeddings, is_multimodal=is_multimodal
            )
        assert is_multimodal is not None
        x = self.language_model.embed_input_ids(input_ids)
        rows = is_multimodal.nonzero()[:, 0].to(x.device)
        if len(rows) % self.high:
            raise ValueError(
                f"{len(rows)} placeholders are scheduled, no multiple of the {self.high} of a tile"
            )
        vision = self.config.vision_config
        length, width = 1 + self.config.patches**2, vision.hidden_size
        packed = torch.cat(list(multimodal_embeddings)).view(
            -1, self.high, multimodal_embeddings[0].shape[-1]
        )
        self.features = packed.flatten(1)[:, : length * width].unflatten(1, (length, width))
        self.visual = rows.view(-1, self.high)
        first = getattr(self, self.entry)(self.features).flatten(0, 1)
        x[self.visual[:, : self.low].flatten()] = first.to(x.dtype)
        return x

    # ------------------------------------------------------------------------------------ decoder

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """Positions of a prompt's rows in the shallow phase [3, rows], see `row_positions`."""
        return row_positions(len(input_tokens), image_spans(mm_features), self.low, self.high)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **_kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states [n, h] of a step's rows; `positions` [n], or [3, n] with LVTC."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.language_model.embed_input_ids(input_ids)
        x = inputs_embeds
        features, visual = self.features, self.visual
        self.features = self.visual = None
        model = self.language_model.model
        if self.lvtc:
            x, positions = self._shallow(x, positions, features, visual)
        for index, layer in enumerate(model.layers[self.shallow :], self.shallow):
            if index > self.shallow and features is not None and str(index) in self.lvtc_projectors:
                assert visual is not None
                added = self.lvtc_projectors[str(index)](features).flatten(0, 1)
                x = x.index_add(0, visual.flatten(), added.to(x.dtype))
            x = layer(x, positions)
        return model.norm(x)

    def _shallow(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor | None,
        visual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings through the shallow layers and the expansion [n, h], and positions [n] in the deep phase."""
        context = get_forward_context()
        metadata: Any = context.attn_metadata
        if metadata is None:  # vLLM measures memory or warms up, and nothing is cached
            return self._expand(self._run(x, positions[0]), features, visual), positions[0]
        common = metadata[self.shallow_names[0]].common
        scheduled = positions[:, : common.num_actual_tokens]
        kept = (
            None if features is None else kept_rows(scheduled, self.low)
        )  # without images every row is text
        shallow = shallow_step(scheduled, common.query_start_loc, kept)
        enter_shallow(context, self.shallow_names, shallow)
        if kept is None:
            x = self._run(x, shallow.positions)
        else:
            at = kept.nonzero()[:, 0]
            x = x.index_copy(0, at, self._run(x[at], shallow.positions))
        return self._expand(x, features, visual), common.positions

    def _run(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The shallow layers [s, h] at positions [s]."""
        for layer in self.language_model.model.layers[: self.shallow]:
            x = layer(x, positions)
        return x

    def _expand(
        self, x: torch.Tensor, features: torch.Tensor | None, visual: torch.Tensor | None
    ) -> torch.Tensor:
        """Rows [n, h], in which each tile's first p placeholders become q: upsampled, and projected features added."""
        if features is None or visual is None:
            return x
        matrix = upsample_matrix(
            self.config.low_grid, self.config.high_grid, self.config.compression["upsample"]
        )
        tiles = x[visual[:, : self.low]]
        grown = torch.matmul(matrix.to(tiles), tiles) + self.lvtc_projectors[str(self.shallow)](features).to(
            x.dtype
        )
        return x.index_copy(0, visual.flatten(), grown.flatten(0, 1))

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[n, h] -> logits [n, vocabulary]."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors by the names of the exported directory."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def get_mm_mapping(self) -> MultiModelKeys:
        """Names of the parts."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector=self.entry, tower_model="vision_model"
        )
