"""Parameters of a verification, passed to every rank."""

from __future__ import annotations

from dataclasses import dataclass

RECIPE, GRADIENTS = "recipe.yaml", "gradients.safetensors"


@dataclass(frozen=True)
class Layout:
    """Parallel layout of the model, with the meaning of Megatron's arguments."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    stages: str | None = None
    """--pipeline-model-parallel-layout."""
    virtual: int | None = None
    """--num-virtual-stages-per-pipeline-rank."""
    extra: tuple[str, ...] = ()
    """Further command-line arguments."""

    @property
    def ranks(self) -> int:
        """Minimum number of processes of this layout."""
        return self.pipeline * max(self.tensor, self.expert)

    def arguments(self) -> list[str]:
        """Layout as command-line arguments."""
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
    """Parameters of a verification."""

    folder: str
    """Directory with the recipe, to which the ranks write their results."""
    inputs: str
    layout: Layout
    gradients: bool
    image_token: int | None
    hf: str | None = None
    load: str | None = None
    allow_pickle: bool = False
