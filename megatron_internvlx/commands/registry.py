"""Table of the commands of `ivlx`, in the order in which a user meets them. Nothing of them is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

PACKAGE = "megatron_internvlx.commands"


@dataclass(frozen=True)
class Command:
    """A command of `ivlx`."""

    name: str
    group: str
    """Heading in the list of commands."""
    summary: str
    """Line in the list of commands."""
    module: str
    """Module of this package with `parser()` and `main()`."""
    shared: bool = False
    """Whether the module has several commands: `parser(name)`, and `main` expects the name first."""

    def load(self) -> ModuleType:
        """Import the module, which is cheap: commands import PyTorch and the like when they run."""
        return import_module(f"{PACKAGE}.{self.module}")

    def parser(self) -> argparse.ArgumentParser:
        """Parser of the command line after the command's name."""
        module = self.load()
        found: argparse.ArgumentParser = module.parser(self.name) if self.shared else module.parser()
        return found


_MACHINE, _DATA, _TRAIN = "This machine", "Data and weights", "Training"
_USE, _MANY, _SHELL = "The trained model", "Many runs, many nodes", "Shell"
COMMANDS = (
    Command("doctor", _MACHINE, "what is installed here, what is slow or missing, and the remedy", "doctor"),
    Command("prepare", _DATA, "your own pictures and questions, in the form that training reads", "prepare"),
    Command("tiles", _DATA, "how an image is cut into tiles under each rule, as a picture", "tiles"),
    Command("import", _DATA, "a Hugging Face directory as a checkpoint that training starts from", "convert", True),
    Command("dry-run", _TRAIN, "check a run and print its memory on any number of GPUs, without them", "dry_run"),
    Command("train", _TRAIN, "train from a recipe: on the CPU, or on all GPUs of this machine", "train"),
    Command("evaluate", _USE, "answers to the questions of a data set, scored, with a page to look at", "evaluate"),
    Command("export", _USE, "a checkpoint as a Hugging Face directory, for AutoModel and generate", "convert", True),
    Command("check-export", _USE, "the same answers by evaluate, generate, a server and vLLM", "check_export"),
    Command("chat", _USE, "talk with a model about pictures, in the terminal or a local web page", "chat"),
    Command("verify", _USE, "outputs and gradients of the Megatron model against expected ones", "convert", True),
    Command("plan", _MANY, "the best split of the layers over pipeline stages, and the time of a step", "plan"),
    Command("scaling", _MANY, "a grid of runs, local or under SLURM, with a report", "scaling"),
    Command("check", _MANY, "GPUs of a node and the links between nodes, before a job", "check"),
    Command("completion", _SHELL, "completion of commands, options and files for bash and zsh", "completion"),
)  # fmt: skip
# What users type who know another program; each leads to the suggestion of a command.
SYNONYMS = {
    "ask": "chat", "bench": "scaling", "convert": "import", "data": "prepare", "dryrun": "dry-run",
    "download": "import", "env": "doctor", "eval": "evaluate", "finetune": "train", "fit": "train",
    "generate": "chat", "infer": "chat", "info": "doctor", "pretrain": "train", "run": "train", "serve": "chat",
    "sft": "train", "test": "evaluate", "tune": "train", "ui": "chat", "web": "chat",
}  # fmt: skip


def find(name: str) -> Command | None:
    """Command of this name, or None."""
    return next((one for one in COMMANDS if one.name == name), None)


def groups() -> Iterator[tuple[str, list[Command]]]:
    """(heading, commands) of the list, in order."""
    for title in dict.fromkeys(one.group for one in COMMANDS):
        yield title, [one for one in COMMANDS if one.group == title]
