"""What a verification is asked for, as every rank of it is told."""

from __future__ import annotations

from dataclasses import dataclass

RECIPE, GRADIENTS = "recipe.yaml", "gradients.safetensors"


@dataclass(frozen=True)
class Layout:
    """How the model is cut over ranks; names are those of Megatron's arguments."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    stages: str | None = None
    """--pipeline-model-parallel-layout."""
    virtual: int | None = None
    """--num-virtual-stages-per-pipeline-rank."""
    extra: tuple[str, ...] = ()
    """Further arguments of Megatron or ours."""

    @property
    def ranks(self) -> int:
        """Processes that this layout needs at least."""
        return self.pipeline * max(self.tensor, self.expert)

    def arguments(self) -> list[str]:
        """As command-line arguments."""
        found = ["--tensor-model-parallel-size", str(self.tensor)]
        found += ["--pipeline-model-parallel-size", str(self.pipeline)]
        if self.expert > 1:
            found += ["--expert-model-parallel-size", str(self.expert), "--expert-tensor-parallel-size", "1"]
        if self.stages:
            found += ["--pipeline-model-parallel-layout", self.stages]
        if self.virtual:
            found += ["--num-virtual-stages-per-pipeline-rank", str(self.virtual)]
        return [*found, *self.extra]


@dataclass(frozen=True)
class Request:
    """What every rank is told."""

    folder: str
    """Holds the recipe; ranks leave their results there."""
    inputs: str
    layout: Layout
    gradients: bool
    image_token: int | None
    hf: str | None = None
    load: str | None = None
    allow_pickle: bool = False
