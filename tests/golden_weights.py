"""Restores the random weights of the golden models, which are kept as a seed and a checksum, not as 14 MB.

The golden weights were drawn by `torch.Generator().manual_seed(seed)`, one `torch.randn` per tensor in the
order of the sorted names, then scaled by the rule of `_value`. `tests/golden/weights.json` holds, per file,
the seed, the shapes and the SHA-256 of all tensor bytes, so a changed random generator fails loudly here
instead of as a mysterious numerical difference. `tests/conftest.py` restores the files before any test runs.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = GOLDEN / "weights.json"


def _value(name: str, drawn: torch.Tensor) -> torch.Tensor:
    """Returns the golden tensor `name` from its standard normal draw."""
    if name.endswith((".ls1", ".ls2")):
        return 0.5 + 0.1 * drawn
    if name.endswith(("tok_embeddings.weight", "embed_tokens.weight", "_embedding")):
        return 0.5 * drawn
    if name.endswith("cls_scale"):
        return drawn
    if name.endswith(".bias"):
        return 0.1 * drawn
    if drawn.dim() == 1:  # norm gains
        return 1 + 0.2 * drawn
    return drawn * drawn[0].numel() ** -0.5


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Returns the SHA-256 of the tensors' bytes in the order of their sorted names."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(tensors[name].contiguous().numpy().tobytes())
    return state.hexdigest()


def draw(seed: int, shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Returns the tensors of one golden file."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _value(name, torch.randn(shapes[name], generator=generator)) for name in sorted(shapes)}


def materialize() -> None:
    """Writes every golden weight file that is absent.

    Raises:
        RuntimeError: if the drawn tensors are not the golden ones.
    """
    for relative, entry in json.loads(MANIFEST.read_text()).items():
        path = GOLDEN / relative
        if path.exists():
            continue
        tensors = draw(entry["seed"], entry["shapes"])
        found = digest(tensors)
        if found != entry["sha256"]:
            raise RuntimeError(
                f"{relative}: torch {torch.__version__} draws other numbers (SHA-256 {found}, expected "
                f"{entry['sha256']}): use the torch version of constraints.txt"
            )
        # Several test processes may get here at once: each writes its own file, the last rename wins.
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, unfinished, metadata={"format": "pt"})
        unfinished.replace(path)
