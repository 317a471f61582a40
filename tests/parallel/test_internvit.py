"""InternViT replicated over a tensor-parallel group: 25 heads at TP 2, on the first of two stages only."""

import multiprocessing
from pathlib import Path

import pytest

from tests.distributed import Pool, init_parallel

HEADS, TILES = 25, 3


def _build(select_layer: int = -1):
    from megatron.core import parallel_state

    from megatron_internvlx.model.internvit import InternViT, internvit_transformer_config
    from megatron_internvlx.model.internvit_config import InternViTConfig
    from tests.single import decoder_config

    vit = InternViTConfig(
        hidden_size=2 * HEADS,
        num_layers=2,
        num_heads=HEADS,
        ffn_hidden_size=40,
        patch_size=4,
        image_size=12,
        qk_normalization=True,
        select_layer=select_layer,
        initializer_range=0.2,
    )
    tp_group = parallel_state.get_tensor_model_parallel_group()
    return InternViT(vit, internvit_transformer_config(vit, decoder_config(), recompute=True), tp_group)


def _tiles():
    import torch

    return torch.randn(TILES, 3, 12, 12, generator=torch.Generator().manual_seed(5))


def _encode_and_save(tp: int, pp: int, folder: str | None):
    """Encodes this rank's share; returns features and gradients summed over TP, None off the first stage."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    init_parallel(tp=tp, pp=pp)
    state, result = {}, None
    if parallel_state.is_pipeline_first_stage():
        module = _build()
        rank = parallel_state.get_tensor_model_parallel_rank()
        share = _tiles().tensor_split(tp)[rank]
        features = module(share)
        features.square().sum().backward()
        group = parallel_state.get_tensor_model_parallel_group()
        gradients = {}
        for name, parameter in module.named_parameters():
            torch.distributed.all_reduce(parameter.grad, group=group)
            gradients[name] = parameter.grad.numpy()
        state = module.sharded_state_dict(prefix="vision_model.")
        weights = {name: p.detach().numpy() for name, p in module.named_parameters()}
        result = features.detach().numpy(), gradients, weights
    if folder is not None:
        # The ranks of the pool are daemons, which may not start the process that Megatron writes from.
        multiprocessing.current_process()._config["daemon"] = False
        dist_checkpointing.save(state, folder)
    return result


def _load(folder: str):
    from megatron.core import dist_checkpointing

    init_parallel()
    module = _build(select_layer=-2)
    before = module.encoder.layers[0].mlp.linear_fc1.weight
    before.data.zero_()
    state = dist_checkpointing.load(module.sharded_state_dict(prefix="vision_model."), folder)
    module.load_state_dict({name.removeprefix("vision_model."): value for name, value in state.items()})
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (4, 1)])
def test_tile_parallel_equals_one_rank(pool: Pool, tmp_path: Path, tp: int, pp: int) -> None:
    """Gradients within 1e-5 of the largest; four ranks share three tiles, so one of them has none."""
    import numpy as np

    [(features, gradients, weights)] = pool.run(1, _encode_and_save, 1, 1, None)
    results = [r for r in pool.run(tp * pp, _encode_and_save, tp, pp, str(tmp_path)) if r is not None]
    assert len(results) == tp
    np.testing.assert_allclose(np.concatenate([r[0] for r in results]), features, atol=1e-5, rtol=1e-5)
    for _, partial_sums, own_weights in results:
        for name, expected in gradients.items():
            np.testing.assert_array_equal(own_weights[name], weights[name], err_msg=name)
            scale = max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(partial_sums[name] / scale, expected / scale, atol=1e-5, err_msg=name)
    [loaded] = pool.run(1, _load, str(tmp_path))
    for name, expected in weights.items():
        np.testing.assert_array_equal(loaded[name], expected, err_msg=name)
