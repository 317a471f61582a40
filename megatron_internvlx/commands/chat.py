"""Ask a model about pictures: in the terminal, on a local page, or one question from a script.

The model is a Hugging Face directory (an export, or a released InternVL or InternVL-X), or a checkpoint directory of
training, which is exported to a temporary directory first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.values import float_in_range, int_in_range
from megatron_internvlx.exit_codes import DONE, INTERRUPTED, MISTAKE

if TYPE_CHECKING:
    from megatron_internvlx.chat.session import Chat
    from megatron_internvlx.evaluation.generation import Sampling

PORT = 7860


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    it = CommandParser(
        "chat",
        (__doc__ or "").splitlines()[0],
        about="The model is a Hugging Face directory (an export, or a released InternVL or InternVL-X), or a "
        "checkpoint directory of training, which is exported to a temporary directory first.",
        examples=(
            "ivlx chat runs/demo/checkpoints",
            "ivlx chat InternVL-X-8B --web",
            'ivlx chat InternVL-X-8B --ask "What is this?" --image photo.jpg',
        ),
        exits={
            DONE: "done",
            MISTAKE: "wrong arguments, files or questions, each with one message",
            INTERRUPTED: "interrupted while loading",
        },
    )
    it.add_argument("model", type=Path, help="Hugging Face directory, or checkpoint directory of training")
    checkpoint = it.add_argument_group("checkpoints")
    checkpoint.add_argument("--iteration", type=int_in_range(0), help="iteration (default: the latest)")
    checkpoint.add_argument(
        "--tokenizer-model", type=Path, help="tokenizer directory (default: that of the training)"
    )
    checkpoint.add_argument(
        "--keep", type=Path, metavar="DIR", help="export to DIR and keep it (default: a temporary directory)"
    )
    once = it.add_argument_group("one question")
    once.add_argument("--ask", metavar="QUESTION", help="print the answer to this question, and end")
    once.add_argument(
        "--image", type=Path, action="append", default=[], metavar="PATH",
        help="picture for the (first) question; repeat it for several",
    )  # fmt: skip
    once.add_argument("--json", action="store_true", help="answers as lines of JSON with their figures")
    page = it.add_argument_group("page")
    page.add_argument("--web", action="store_true", help="serve a local page instead of the terminal")
    page.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1, this machine only)")
    page.add_argument(
        "--port", type=int_in_range(0, 65535), default=PORT, help=f"port; 0: a free one (default: {PORT})"
    )
    answers = it.add_argument_group("answers")
    answers.add_argument("--system", help="system text (default: that of the chat template)")
    answers.add_argument(
        "--max-new-tokens", type=int_in_range(1), default=512, help="tokens of an answer (default: 512)"
    )
    answers.add_argument(
        "--temperature", type=float_in_range(0, 100), default=0.0, help="0: most likely tokens (default: 0)"
    )
    answers.add_argument(
        "--top-p", type=float_in_range(0, 1, above=True), default=1.0,
        help="probability mass of the tokens to draw from (default: 1)",
    )  # fmt: skip
    answers.add_argument("--seed", type=int_in_range(0), default=1234, help="seed of draws (default: 1234)")
    answers.add_argument(
        "--max-tiles", type=int_in_range(1, 1024), help="tiles of a question's pictures (default: as trained)"
    )
    answers.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    answers.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="type of the weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )  # fmt: skip
    return it


def check_options(options: argparse.Namespace) -> None:
    """Check options and paths before anything slow is imported. Raises ValueError."""
    model: Path = options.model
    if not model.is_dir():
        what = "a file, not a directory" if model.exists() else "no such directory"
        hub = f"; for a model of the hub: hf download {model} --local-dir {model.name}"
        raise ValueError(f"{model}: {what}{hub if _like_a_hub_name(model) else ''}")
    if options.web and (options.ask is not None or options.image or options.json):
        raise ValueError("--web: --ask, --image and --json are for the terminal; upload pictures on the page")
    export = (model / "config.json").is_file()
    given = [name for name in ("iteration", "tokenizer_model", "keep") if getattr(options, name) is not None]
    if export and given:
        raise ValueError(
            f"--{given[0].replace('_', '-')}: only for checkpoints; {model} is a Hugging Face directory"
        )
    if options.tokenizer_model and not options.tokenizer_model.is_dir():
        raise ValueError(f"--tokenizer-model {options.tokenizer_model}: no such directory")
    for path in options.image:
        _check_image(path)
    if options.keep and options.keep.exists():
        raise ValueError(f"--keep {options.keep}: exists already; choose another name")


def _check_image(path: Path) -> None:
    try:
        full = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"--image {path}: no user {path.parts[0][1:]} with a home directory") from error
    if not full.is_file():
        raise ValueError(f"--image {path}: {'not a file' if full.exists() else 'no such file'}")


def _like_a_hub_name(model: Path) -> bool:
    return not model.exists() and len(model.parts) == 2 and not model.is_absolute() and model.parts[0] != ".."


def load(options: argparse.Namespace) -> Chat:
    """Load the model, with a line on stderr for each step. Raises ValueError."""
    print("ivlx chat: loading PyTorch ...", file=sys.stderr, flush=True)
    # Imported late: this takes seconds, and help and mistakes should not.
    from megatron_internvlx.chat.loading import Source, load_chat

    source = Source(
        options.model, options.iteration, options.tokenizer_model, options.keep, options.device,
        options.dtype, options.max_tiles,
    )  # fmt: skip
    return load_chat(source, lambda line: print(f"ivlx chat: {line}", file=sys.stderr, flush=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Chat; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        check_options(options)
        chat = load(options)
        from megatron_internvlx.evaluation.generation import Sampling

        sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
        if options.web:
            return _serve(options, chat, sampling)
        return _talk(options, chat, sampling)
    except (OSError, ValueError) as error:
        print(f"ivlx chat: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("ivlx chat: interrupted", file=sys.stderr)
        return INTERRUPTED


def _serve(options: argparse.Namespace, chat: Chat, sampling: Sampling) -> int:
    from megatron_internvlx.chat.conversation import check_system
    from megatron_internvlx.chat.server import serve

    if options.system is not None:
        check_system(options.system, chat.template)
    serve(chat, sampling, options.host, options.port, options.system)
    return DONE


def _talk(options: argparse.Namespace, chat: Chat, sampling: Sampling) -> int:
    from megatron_internvlx.chat.pictures import read_picture
    from megatron_internvlx.chat.terminal import Terminal, chat_by_lines, chat_by_prompt

    interactive = options.ask is None and sys.stdin.isatty() and sys.stdout.isatty()
    terminal = Terminal(chat, sampling, interactive=interactive, as_json=options.json)
    terminal.set_system(options.system)
    terminal.conversation.waiting += [read_picture(path) for path in options.image]
    if options.ask is not None:
        terminal.ask(options.ask)
        return DONE
    if interactive:
        print("\n".join([*chat.about.lines(), "/help lists the commands."]), flush=True)
        chat_by_prompt(terminal)
        return DONE
    chat_by_lines(terminal, iter(sys.stdin))
    return MISTAKE if terminal.mistakes else DONE


if __name__ == "__main__":
    sys.exit(main())
