"""One model in a process of its own; steps when the parent says so. Started by common.Worker."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch


def main() -> None:
    """Build what the JSON argument describes, then answer each line of input with a step's result."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(settings.get("threads", torch.get_num_threads()))
    trainer: Any
    if settings["kind"] == "ours":
        from benchmarks.trainer import Trainer

        trainer = Trainer(settings["argv"], settings["micro_batches"])
        model: Any = trainer.model[0]
    else:
        from benchmarks.plain import PlainTrainer

        trainer = PlainTrainer(settings["kind"], settings["size"], settings["micro_batches"])
        model = trainer.model
    answer({"parameters": sum(p.numel() for p in model.parameters())})
    for _ in sys.stdin:
        answer(trainer.step())


def answer(values: dict[str, Any]) -> None:
    """One line to the parent."""
    print("RESULT " + json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
