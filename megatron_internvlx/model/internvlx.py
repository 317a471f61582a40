"""InternVL-X as Megatron's model: one module per (virtual) pipeline stage.

Shapes: S rows of the current phase (S/TP per rank under sequence parallelism), h LLM width,
T tiles, L = 1+P*P ViT tokens, c ViT width, n supervised rows, V vocabulary.

A stage has: the vision encoder and the entry projector (first stage, with the embedding), its
decoder layers (each injection layer owns its projector), the output layer (last stage).
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_internvlx.data.normalize import normalize_tiles
from megatron_internvlx.model.attention import causal_within_segments
from megatron_internvlx.model.decoder import DecoderInputs, PhaseAttention, PhaseInputs
from megatron_internvlx.model.internvit import InternViT, internvit_transformer_config
from megatron_internvlx.model.layer_specs import decoder_spec, language_model_config
from megatron_internvlx.model.lvtc import merge_visual
from megatron_internvlx.model.pvtc import build_projector
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.parallel.batch import MicroBatch
from megatron_internvlx.parallel.boundary import BoundaryFormat, Budget
from megatron_internvlx.parallel.device_plan import DevicePhase, DevicePlan
from megatron_internvlx.parallel.layout import boundary_content, stage_layers
from megatron_internvlx.platform.kernels import vocab_parallel_cross_entropy

ROTARY_TABLE_STEP = 256


class InternVLX(MegatronModule):
    """Vision encoder, compression and language model of one pipeline stage.

    Args:
        config: Megatron's config of the language model.
        sizes: architecture of the whole model. Logits of the vocabulary's padding are masked, so that the loss
            does not depend on the tensor-parallel size.
        rotary_base: base of RoPE's frequencies.
        rope_scaling_factor: factor of Llama 3's rule; None: plain RoPE.
        freeze_vision: do not compute the gradient of the vision encoder, nor send it between stages.
        vision_recompute: recompute the vision encoder's layers in the backward pass.
        vision_attention: `megatron` or `torch`; see `VisionSettings`.
        vision_fp8: run the vision encoder's layers in the decoder's FP8.
        projector_fp8: run the projectors in the decoder's FP8; else in bf16, inside its layers too.
        budget: sizes of all micro-batches with static boundaries; None: each has its own.
    """

    def __init__(
        self,
        config: TransformerConfig,
        sizes: ModelSizes,
        *,
        max_sequence_length: int,
        rotary_base: float = 10000,
        rope_scaling_factor: float | None = None,
        freeze_vision: bool = False,
        vision_recompute: bool = False,
        vision_attention: str = "megatron",
        vision_fp8: bool = False,
        projector_fp8: bool = False,
        budget: Budget | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = self.pg_collection.tp
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.sizes, self.freeze_vision = sizes, freeze_vision
        self.real_vocab_size = sizes.vocab
        self.share_embeddings_and_output_weights = sizes.tied
        pp_rank = self.pg_collection.pp.rank()
        layers = stage_layers(config, pp_rank, vp_stage)
        self.layers = layers
        self.content_in = boundary_content(layers.first, sizes.injection_layers)
        self.content_out = boundary_content(layers.end, sizes.injection_layers)
        self.boundary = BoundaryFormat(
            config.hidden_size,
            sizes.vision.hidden_size,
            sizes.vision.tokens_per_tile,
            sequence_parallel=config.sequence_parallel,
            group=self.tp_group,
            carry_gradient=not freeze_vision,
            budget=budget,
        )
        if pre_process:
            vision_settings = internvit_transformer_config(
                sizes.vision, config, recompute=vision_recompute, fp8=vision_fp8
            )
            self.vision_model = InternViT(sizes.vision, vision_settings, self.tp_group, vision_attention)
            self.projector = build_projector(
                config, sizes, sizes.entry_grid, self.pg_collection, fp8=projector_fp8
            )
        self.language_model = GPTModel(
            config=language_model_config(config),
            transformer_layer_spec=decoder_spec(
                config, sizes, pp_rank=pp_rank, vp_stage=vp_stage, projector_fp8=projector_fp8
            ),
            vocab_size=sizes.padded_vocab,
            max_sequence_length=max_sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=sizes.tied,
            # Positions differ between the phases, so each layer gets its own; see _phase_inputs.
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        self.rotary = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=rotary_base,
            rope_scaling=rope_scaling_factor is not None,
            rope_scaling_factor=rope_scaling_factor or 1.0,
            cp_group=self.pg_collection.cp,
        )
        if post_process:
            # Only supervised rows reach the output layer, gathered first; see _supervised_rows.
            self.language_model.output_layer.sequence_parallel = False
            self.language_model.output_layer.allreduce_dgrad = self.tp_group.size() > 1

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Tied weight, which Megatron reduces between the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Set the tensor received from the previous stage; called by Megatron's schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, batch: MicroBatch, *, return_logits: bool = False) -> Tensor:
        """Run this stage.

        Returns:
            Not the last stage: the boundary tensor [rows, 1, h].
            Last stage: [n] losses of the supervised rows; in evaluation [2, n], the second row the
            predicted token ids; with `return_logits` [S_deep, V] logits in fp32 instead.
        """
        plan = batch.plan
        features: Tensor | None
        if self.pre_process:
            assert batch.tiles is not None
            features = self.encode(batch.tiles, plan)
            rows = self.embed(plan, features)
        else:
            rows, features = self.boundary.split(self.input_tensor, self.content_in, plan)
            self.language_model.set_input_tensor(rows)
        inputs = self.decoder_inputs(plan, features)
        out = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=rows if self.pre_process else None,
            packed_seq_params=inputs,
            extra_block_kwargs={"context": None if self.freeze_vision else features},
            output_processor=self._logits if return_logits else self._loss,
            output_processor_context=plan,
        )
        if self.post_process:
            return out
        return self.boundary.join(out, features, self.content_out, plan)

    def encode(self, tiles: Tensor, plan: DevicePlan) -> Tensor:
        """Encode this rank's tiles (uint8, or normalised floats), and gather the features of all: [T, L, c].

        The encoder is tile-parallel: weights are replicated over TP and every rank encodes its
        share. The gradient that comes back is the same on all ranks; each keeps its share, and
        training/gradients.py sums the weight gradients over TP.
        """
        dtype = self.config.params_dtype
        pixels = normalize_tiles(tiles, dtype) if tiles.dtype == torch.uint8 else tiles.to(dtype)
        features = self.vision_model(pixels)
        if self.tp_group.size() > 1:
            features = gather_from_sequence_parallel_region(
                features, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return features[: plan.encoded_tiles]

    def embed(self, plan: DevicePlan, features_TLc: Tensor) -> Tensor:
        """Text embeddings with the visual rows of layer 0 in place: [S, 1, h]."""
        text = self.language_model.embedding(input_ids=plan.tokens.unsqueeze(0), position_ids=None)
        rows = merge_visual(text, self.projector(features_TLc), plan)
        if self.config.sequence_parallel:
            rows = scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return rows

    def decoder_inputs(self, plan: DevicePlan, features: Tensor | None) -> DecoderInputs:
        """Inputs of every decoder layer besides its rows, with the features [T, L, c] of a frozen encoder."""
        deep = self._phase_inputs(plan.deep)
        return DecoderInputs(
            plan,
            self._phase_inputs(plan.shallow) if plan.lvtc else deep,
            deep,
            features if self.freeze_vision else None,
            plan.total_weight[0].float() if self.config.num_moe_experts else None,
        )

    def _phase_inputs(self, phase: DevicePhase) -> PhaseInputs:
        table_len = -(-phase.max_seqlen // ROTARY_TABLE_STEP) * ROTARY_TABLE_STEP
        rotary = self.rotary(table_len).index_select(0, phase.position_ids)
        if self.config.transformer_impl == "local":
            attention = PhaseAttention(qkv_format="sbhd")
            attention.segment_lengths = phase.segment_lengths
            if phase.segment_lengths is None:
                attention.allowed = causal_within_segments(phase.position_ids)
        else:
            attention = PhaseAttention(
                qkv_format="thd",
                cu_seqlens_q=phase.cu_seqlens,
                cu_seqlens_kv=phase.cu_seqlens,
                max_seqlen_q=phase.max_seqlen,
                max_seqlen_kv=phase.max_seqlen,
                # Only RoPE takes these, by the row: the fused kernel starts a block for every position of every
                # segment that there may be, which for many short ones is hundreds of thousands.
                cu_seqlens_q_padded=phase.whole,
                cu_seqlens_kv_padded=phase.whole,
                pad_between_seqs=False,
            )
        return PhaseInputs(rotary, attention, self._padding_mask(phase))

    def _padding_mask(self, phase: DevicePhase) -> Tensor | None:
        """True at padding rows, [1, rows of this rank]: experts' load statistics leave them out."""
        if not self.config.num_moe_experts:
            return None
        rows = torch.arange(phase.length, device=phase.position_ids.device)
        if self.config.sequence_parallel:
            rows = rows.chunk(self.tp_group.size())[self.tp_group.rank()]
        return (rows >= phase.used).unsqueeze(0)

    def _supervised_rows(self, hidden_S1h: Tensor, rows: Tensor | None) -> Tensor:
        """Rows that the output layer needs, whole on every TP rank: [n, 1, h]."""
        if self.config.sequence_parallel:
            hidden_S1h = gather_from_sequence_parallel_region(
                hidden_S1h, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return hidden_S1h if rows is None else hidden_S1h.index_select(0, rows)

    def _local_logits(self, rows_n1h: Tensor, output_layer, output_weight) -> Tensor:
        """This TP rank's vocabulary columns, padding columns at the lowest value: [n, 1, V/TP]."""
        logits, _ = output_layer(rows_n1h, weight=output_weight)
        first = self.tp_group.rank() * logits.shape[-1]
        real = min(max(self.real_vocab_size - first, 0), logits.shape[-1])
        if real < logits.shape[-1]:
            # Autograd need not know: their share of the loss's gradient is exactly 0.
            logits.detach()[..., real:] = torch.finfo(logits.dtype).min
        return logits

    def _loss(self, *, hidden_states, output_layer, output_weight, context: DevicePlan, **_) -> Tensor:
        rows = self._supervised_rows(hidden_states, context.loss_rows)
        logits = self._local_logits(rows, output_layer, output_weight)
        predicted = None if self.training else self._argmax(logits)
        losses = vocab_parallel_cross_entropy(logits, context.targets.long(), self.tp_group)
        return losses if predicted is None else torch.stack([losses, predicted.to(losses.dtype)])

    def _argmax(self, logits_n1V: Tensor) -> Tensor:
        """Most likely token id per row over all vocabulary shards: [n]."""
        value, index = logits_n1V.float().squeeze(1).max(dim=-1)
        if self.tp_group.size() == 1:
            return index
        index = index + self.tp_group.rank() * logits_n1V.shape[-1]
        values = gather_from_tensor_model_parallel_region(value[:, None], group=self.tp_group)
        indices = gather_from_tensor_model_parallel_region(index[:, None], group=self.tp_group)
        return indices.gather(1, values.argmax(dim=1, keepdim=True)).squeeze(1)

    def _logits(self, *, hidden_states, output_layer, output_weight, **_) -> Tensor:
        rows = self._supervised_rows(hidden_states, None)
        logits = self._local_logits(rows, output_layer, output_weight)
        whole = gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
        return whole[:, 0, : self.real_vocab_size].float()
