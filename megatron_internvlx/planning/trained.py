"""Trained parameters of a run, and the size of the checkpoints that hold them."""

from __future__ import annotations

from megatron_internvlx.planning.activations import MemoryModel
from megatron_internvlx.planning.adapters import all_adapters
from megatron_internvlx.planning.flops import Owner
from megatron_internvlx.planning.parameters import parameters, vision_layer_parameters

_OWNERS: tuple[Owner, ...] = ("vision", "projectors", "llm")


def trained_parameters(model: MemoryModel) -> int:
    """Parameters of the whole model that get a gradient."""
    return sum(_trained_by_owner(model).values()) + sum(all_adapters(model.sizes).values())


def _trained_by_owner(model: MemoryModel) -> dict[Owner, int]:
    sizes = model.sizes
    owned: dict[Owner, int] = dict.fromkeys(_OWNERS, 0)
    for part, count in parameters(sizes).items():
        if part != "adapters":
            projector = part == "entry_projector" or part.startswith("injection_")
            owned["projectors" if projector else "vision" if part == "vision" else "llm"] += count
    unused = sizes.vision.num_layers - sizes.vision.layers_run
    owned["vision"] -= unused * vision_layer_parameters(sizes.vision)
    return {owner: count for owner, count in owned.items() if model.backward.trains(owner)}


def trained_lines(model: MemoryModel, precision: str) -> list[str]:
    """Lines of the dry run: trained parts and, if there are adapters, the trained parameters and the checkpoint."""
    frozen = [owner for owner in _OWNERS if not model.backward.trains(owner)]
    trained = "all" if not frozen else "all but " + ", ".join(frozen)
    adapters = all_adapters(model.sizes)
    if not adapters:
        return [f"trained      {trained}; {precision}"]
    state, own, count = model.per_parameter, sum(adapters.values()), trained_parameters(model)
    base = sum(parameters(model.sizes).values()) - own
    whole = [owner for owner in _OWNERS if model.backward.trains(owner)]
    where = ", ".join(f"{target} {n / 1e6:,.1f} M" for target, n in adapters.items())
    also = f"; whole: {', '.join(whole)}" if whole else ""
    return [
        f"trained      {count / 1e6:,.1f} M = {count / base:.2%} of the base: adapters of rank "
        f"{model.sizes.lora_rank} on {where}{also}; {precision}",
        f"checkpoint   {count * (state.weight + state.optimizer) / 1e9:,.2f} GB with the optimizer's state; "
        f"adapters alone {own * state.weight / 1e9:,.3f} GB = {own / base:.2%} of the base's weights",
    ]
