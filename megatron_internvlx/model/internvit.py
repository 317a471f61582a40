"""InternViT, the vision encoder, on Megatron's transformer block.

Its weights are replicated over the tensor-parallel group and every rank encodes its own tiles, so inside it
all model-parallel groups have one rank. Source: modeling_intern_vit.py of the released InternVL.

Shapes: T tiles, H and W pixels, P patches per side of a square tile (h and w rows and columns of patches of
any tile), S = 1 + h*w tokens (CLS first), C width.
"""

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank
from torch import Tensor, nn

from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.internvit_layers import internvit_block_spec
from megatron_internvlx.parallel.groups import single_rank_groups

# Taken over from the language model's settings: numerics, kernels and where weights are made.
_INHERITED = (
    "params_dtype",
    "fp16",
    "bf16",
    "transformer_impl",
    "attention_backend",
    "deterministic_mode",
    "use_cpu_initialization",
    "gradient_accumulation_fusion",
    "fp32_residual_connection",
)
# Taken over only where the vision encoder runs in FP8 too.
_INHERITED_FP8 = (
    "fp8",
    "fp8_recipe",
    "fp8_margin",
    "fp8_interval",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "fp8_wgrad",
    "fp8_param",
    "tp_only_amax_red",
)


def internvit_transformer_config(
    vit: InternViTConfig, parent: TransformerConfig, *, recompute: bool = False, fp8: bool = False
) -> TransformerConfig:
    """Megatron's config of the encoder: no model parallelism, all layers on this rank.

    Args:
        vit: the architecture.
        parent: the language model's settings, for precision and implementation.
        recompute: keep only each layer's input and recompute the layer in the backward pass.
        fp8: use the parent's FP8 recipe; False: stay in the parent's parameter type.
    """
    names = _INHERITED + (_INHERITED_FP8 if fp8 else ())
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=vit.num_layers,
        hidden_size=vit.hidden_size,
        num_attention_heads=vit.num_heads,
        ffn_hidden_size=vit.ffn_hidden_size,
        normalization={"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}[vit.norm_type],
        layernorm_epsilon=vit.layer_norm_eps,
        activation_func=F.gelu,
        bias_activation_fusion=False,  # Megatron's fused GELU is the tanh approximation
        add_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=vit.initializer_range,
        cuda_graph_modules=[],  # the default is a deprecated value, about which Megatron warns
        perform_initialization=False,  # Megatron's draws differ between tensor-parallel ranks: see InternViT
        **{name: getattr(parent, name) for name in names},
        **(full if recompute else {}),
    )


class InternViTEmbeddings(nn.Module):
    """Patches, CLS token and position embedding: pixels `[T, 3, H, W] -> [T, S, C]`.

    Args:
        vit: the architecture.
        dtype: type of the parameters.
    """

    def __init__(self, vit: InternViTConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = vit.patch_size
        self.side = vit.patches_per_side
        width = vit.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width, dtype=dtype))
        self.position_embedding = nn.Parameter(torch.empty(1, vit.tokens_per_tile, width, dtype=dtype))
        # Without torch's own initialization, which would move the default generator.
        self.patch_embedding = nn.utils.skip_init(
            nn.Conv2d,
            vit.num_channels,
            width,
            kernel_size=vit.patch_size,
            stride=vit.patch_size,
            dtype=dtype,
        )

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embedding `[1, 1 + rows*columns, C]` for a grid of patches.

        Other grids than the trained one are interpolated bicubically in fp32, without antialias; the CLS
        token's position is not.
        """
        if (rows, columns) == (self.side, self.side):
            return self.position_embedding
        cls_11C, grid_1PC = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        grid_1CPP = grid_1PC.float().unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        grid_1Chw = F.interpolate(grid_1CPP, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([cls_11C, grid_1Chw.flatten(2).transpose(1, 2).to(cls_11C.dtype)], dim=1)

    def forward(self, pixels_T3HW: Tensor) -> Tensor:
        """Embed tiles; see the class.

        Raises:
            ValueError: if a side is not a multiple of the patch size.
        """
        height, width = pixels_T3HW.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"tiles of {height}x{width} pixels are not whole {self.patch_size}-pixel patches: resize them"
            )
        patches_TChw = self.patch_embedding(pixels_T3HW.to(self.patch_embedding.weight.dtype))
        patches_TSC = patches_TChw.flatten(2).transpose(1, 2)
        cls_T1C = self.class_embedding.expand(patches_TSC.size(0), -1, -1)
        return torch.cat([cls_T1C, patches_TSC], dim=1) + self.positions(*patches_TChw.shape[-2:])


class InternViT(MegatronModule):
    """The vision encoder: tiles of pixels to features.

    Every parameter has `tile_parallel = True`: it is equal on all tensor-parallel ranks and its gradient
    covers only the tiles of this rank, so gradients have to be summed over that group.

    Args:
        vit: the architecture.
        config: the encoder's Megatron settings, from `internvit_transformer_config`.
        tp_group: the group over which the weights are replicated, i.e. the language model's
            tensor-parallel group. None: not replicated.
        attention: `megatron` or `torch`; see `VisionSettings`.

    Raises:
        RuntimeError: if torch.distributed is not initialized.
    """

    def __init__(
        self,
        vit: InternViTConfig,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup | None = None,
        attention: str = "megatron",
    ) -> None:
        super().__init__(config=config)
        self.vit = vit
        self.replica_rank = get_pg_rank(tp_group)
        groups = single_rank_groups()
        self.tp_group = groups.tp
        self.embeddings = InternViTEmbeddings(vit, config.params_dtype)
        self.encoder = TransformerBlock(
            config, internvit_block_spec(vit, config, attention), post_layer_norm=False, pg_collection=groups
        )
        self.reset_parameters()
        for parameter in self.parameters():
            # Megatron's linear layers mark their weights as shards; as replicas they would count once per
            # tensor-parallel rank in the gradient norm.
            parameter.tensor_model_parallel = False
            parameter.tile_parallel = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights, equal on all ranks with the same seed, in every layout.

        The generators are this method's own, so that ranks with and without an encoder stay equal.
        Norms and layer-scale factors keep the values they were built with.
        """
        generators: dict[torch.device, torch.Generator] = {}
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.startswith("embeddings.") or ".linear_" in name:
                device = parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device=device).manual_seed(torch.initial_seed())
                drawn = torch.empty(parameter.shape, dtype=torch.float32, device=device)
                # CLS and positions start at unit variance as in the released code: at 0.02 the position
                # would be lost beside the patch embedding.
                embedding = name in ("embeddings.class_embedding", "embeddings.position_embedding")
                std = 1.0 if embedding else self.vit.initializer_range
                parameter.copy_(drawn.normal_(0, std, generator=generators[device]))

    def freeze(self) -> None:
        """Switch off the gradients of all parameters.

        The mode stays as it is, so drop path remains active in training mode, as in the released code.
        """
        self.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            pixel_values: `[T, 3, H, W]`, normalized, H and W multiples of the patch size; T may be 0.

        Returns:
            features `[T, 1 + h*w, C]`, the selected hidden state, CLS first, patches row by row.
        """
        x_TSC = self.embeddings(pixel_values)
        if x_TSC.size(0) == 0:
            # Megatron's layers cannot reshape nothing; every gradient is zero, none is None.
            return x_TSC + sum(0 * p.sum() for p in self.parameters() if p.requires_grad)
        x_STC = self.encoder(hidden_states=x_TSC.transpose(0, 1).contiguous(), attention_mask=None)
        return x_STC.transpose(0, 1).contiguous()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """State for Megatron's distributed checkpoint, one writer over all replicas.

        The modules inside have a tensor-parallel group of one rank, so each would be the first replica; this method
        sets the replica number to the rank in the real group.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for entry in state.values():
            if isinstance(entry, ShardedTensor | ShardedObject):
                first, _, data_parallel = entry.replica_id
                entry.replica_id = (first, self.replica_rank, data_parallel)
        return state
