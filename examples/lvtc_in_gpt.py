"""LVTC in a Megatron GPT of your own: the rows of images grow fourfold inside the decoder.

A micro-batch has two images, each of one of eight things, and answers that name them. Text and 2x2 rows per image
run through layers 0 to K-1; at the entry of layer K each image gets 4x4 rows. Features may come from any encoder.
"""

import numpy as np
import torch
from torch import Tensor

from megatron_internvlx import platform

platform.setup()  # before Megatron, which then runs on the CPU too
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer

from megatron_internvlx.data.plan import IGNORE, PlanSettings, build_plan
from megatron_internvlx.model.attention import PackedDotProductAttention
from megatron_internvlx.model.decoder import PhaseAttention
from megatron_internvlx.model.lvtc import LVTCInjection, merge_visual
from megatron_internvlx.model.pvtc import PVTC
from megatron_internvlx.parallel.batch import DevicePlan, device_plan

LAYERS, K, WIDTH, VISION_WIDTH, VOCABULARY, THINGS = 4, 2, 64, 32, 16, 8
PATCHES, LOW, HIGH = 8, 2, 4  # sides: of an image's patches, and of its rows before and from layer K on


class GrowingLayer(TransformerLayer):
    """Megatron's layer on the rows of its phase; layer K expands them first."""

    def __init__(self, config: TransformerConfig, submodules, **kwargs) -> None:
        super().__init__(config, submodules, **kwargs)
        if self.layer_number == K + 1:  # Megatron counts from 1
            projector = PVTC(config, VISION_WIDTH, grid=HIGH, patches=PATCHES)
            sides = {"low_grid": LOW, "high_grid": HIGH, "upsample": "bilinear"}
            self.injection = LVTCInjection(config, projector, expand=True, group=self.tp_group, **sides)

    def forward(self, hidden_states: Tensor, *, packed_seq_params, **kwargs):
        """Rows [S, 1, h] -> rows of this layer's phase."""
        features, plan, rotary = packed_seq_params
        if self.layer_number == K + 1:
            hidden_states = self.injection(hidden_states, features, plan)
        phase = plan.deep if self.layer_number > K else plan.shallow
        attention = PhaseAttention(qkv_format="sbhd")
        attention.segment_lengths = phase.segment_lengths  # a sample sees only itself
        kwargs["rotary_pos_emb"] = rotary.index_select(0, phase.position_ids)
        return super().forward(hidden_states, packed_seq_params=attention, **kwargs)


class GrowingGPT(GPTModel):
    """Megatron's GPT with images among its tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        layer = get_gpt_layer_local_submodules(normalization="RMSNorm")
        layer.self_attention.submodules.core_attention = PackedDotProductAttention
        spec = ModuleSpec(GrowingLayer, submodules=layer)
        super().__init__(config, spec, VOCABULARY, max_sequence_length=64, position_embedding_type="none")
        self.projector = PVTC(config, VISION_WIDTH, grid=LOW, patches=PATCHES)
        self.rotary = RotaryEmbedding(config.kv_channels, rotary_percent=1.0)

    def forward(self, features: Tensor, plan: DevicePlan) -> Tensor:  # type: ignore[override]
        """Features [T, 1+P*P, c] of the micro-batch's images -> mean loss of the supervised tokens."""
        text = self.embedding(input_ids=plan.tokens[None], position_ids=None)
        rows = merge_visual(text, self.projector(features), plan)
        inputs = (features, plan, self.rotary(64))
        logits = super().forward(None, None, None, decoder_input=rows, packed_seq_params=inputs)  # type: ignore[arg-type]
        return torch.nn.functional.cross_entropy(logits[0, plan.loss_rows], plan.targets.long())


def micro_batch(rng: np.random.Generator, looks: Tensor) -> tuple[Tensor, DevicePlan]:
    """Two samples: a start token, an image, a question, the answer."""
    things = rng.integers(THINGS, size=2)
    ids = [np.array([1, *[0] * HIGH**2, 2, 3 + thing]) for thing in things]
    labels = [np.array([*[IGNORE] * (len(row) - 1), row[-1]]) for row in ids]
    visual = [row == 0 for row in ids]
    plan = build_plan(ids, labels, visual, PlanSettings(LOW, HIGH))
    features = looks[things, None] + 0.3 * torch.randn(2, 1 + PATCHES**2, VISION_WIDTH)
    return features.to(platform.device()), device_plan(plan)


def train(steps: int = 50) -> tuple[list[int], list[float]]:
    """Returns how many rows leave each layer, and the loss of each step."""
    torch.manual_seed(1)
    torch.set_num_threads(1)  # the model is tiny
    sizes = {"num_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 4, "normalization": "RMSNorm"}
    local = {"transformer_impl": "local", "use_cpu_initialization": True, "cuda_graph_modules": []}
    config = TransformerConfig(**sizes, **local, hidden_dropout=0.0, attention_dropout=0.0)
    model = GrowingGPT(config).to(platform.device())
    rows = [0] * LAYERS
    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_hook(lambda _m, _i, out, number=number: rows.__setitem__(number, len(out[0])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rng, looks, losses = np.random.default_rng(1), torch.randn(THINGS, VISION_WIDTH), []
    for _ in range(steps):
        loss = model(*micro_batch(rng, looks))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return rows, losses


if __name__ == "__main__":
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(platform.backend(), store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    rows, losses = train()
    print("\n".join(f"layer {number}: {count} rows" for number, count in enumerate(rows)))
    print(
        f"loss of the first ten steps {np.mean(losses[:10]):.2f}, of the last ten {np.mean(losses[-10:]):.2f}"
    )
