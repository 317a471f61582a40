"""Files that let an exported directory with LVTC run by itself: code, processor, chat template, model card.

Chat template and model card are written for directories without LVTC too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_internvlx import hf
from megatron_internvlx.checkpoint.checks import has_tokenizer, read_object
from megatron_internvlx.checkpoint.end_token import GENERATION, pad_id, stop_ids, token_text, write_end_token
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.hf_write import remote_code_config
from megatron_internvlx.data.conversation import IMAGE, IMG_CONTEXT, Template, get_template
from megatron_internvlx.data.internlm2_tokenizer import is_internlm2, write_fast_tokenizer
from megatron_internvlx.data.rvtc import MEANINGS
from megatron_internvlx.data.tokenizer import read_tokenizer
from megatron_internvlx.model.sizes import ModelSizes

if TYPE_CHECKING:
    from megatron_internvlx.checkpoint.export_plan import ExportPlan

TEMPLATE_FILE, PROCESSOR = "chat_template.jinja", "processor_config.json"
PROCESSOR_CODE = "processing_internvlx.py"


def write_remote_code(plan: ExportPlan, partial: Path) -> None:
    """Add all files except weights and tokenizer files, which must be in `partial` already.

    Raises ConversionError if there is no tokenizer with the image tokens.
    """
    source = Path(hf.__file__).parent
    for path in sorted(source.glob("*_internvlx.py")):
        shutil.copyfile(path, partial / path.name)
    if is_internlm2(partial):
        write_fast_tokenizer(partial)
    template = write_chat_template(plan, partial)
    ids = token_ids(partial, template)
    config = remote_code_config(plan.arguments, plan.family, plan.sizes.tied, plan.dtype, ids)
    write_json(partial / "config.json", config)
    write_json(partial / PROCESSOR, processor_config(plan))
    write_json(partial / GENERATION, generation_config(ids))
    write_end_token(partial, template.end)  # last: the ids above include the end token of before
    (partial / "README.md").write_text(model_card(plan, partial), encoding="utf-8")


def write_processor(plan: ExportPlan, partial: Path) -> None:
    """Add our processor to a directory without LVTC, unless it has the original's.

    The native format of transformers may have its own. The released format has none: its preprocessor_config.json
    is only for an image encoder.
    """
    if not has_our_processor(partial):
        kept = (PROCESSOR, "preprocessor_config.json") if plan.layout.startswith("native") else (PROCESSOR,)
        if any((partial / name).is_file() for name in kept):
            return
    shutil.copyfile(Path(hf.__file__).parent / PROCESSOR_CODE, partial / PROCESSOR_CODE)
    write_json(partial / PROCESSOR, processor_config(plan))


def has_our_processor(directory: Path) -> bool:
    """Whether a directory contains our processor, as remote code from hf/."""
    path = directory / PROCESSOR
    return path.is_file() and read_object(path).get("processor_class") == "InternVLXProcessor"


def tokenizer_problem(directory: Path) -> str | None:
    """Reason why the tokenizer of a directory does not work with a processor; None if no problem is found.

    Checks only the text of the files: the tokenizer may be code, which is not run.
    """
    if not has_tokenizer(directory):
        return "it has no tokenizer"
    names = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
    paths = [directory / name for name in names if (directory / name).is_file()]
    if not any(IMG_CONTEXT in path.read_text(encoding="utf-8", errors="replace") for path in paths):
        return f"its tokenizer has no token {IMG_CONTEXT}"
    return None


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a directory, without running code of the directory and without prompting the user.

    Raises ConversionError if there is none, or if it needs code.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no warning about the model type of config.json, which has remote code too
    try:
        return read_tokenizer(directory)
    except Exception as error:  # the type of error depends on the files of the directory
        if "custom code" in str(error):
            raise ConversionError(
                f"{directory}: its tokenizer needs Python code, which is not run here (InternLM2's is read without); "
                "save it as tokenizer.json"
            ) from error
        raise ConversionError(
            f"{directory}: the tokenizer cannot be loaded (set export's --like to a directory with one): "
            f"{str(error).strip().partition(chr(10))[0]}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def token_ids(directory: Path, template: Template) -> dict[str, Any]:
    """Token ids for config.json: `eos_token_id` lists every id that ends an answer.

    These are the template's end, the tokenizer's own, and those of generation_config.json, which in an export has the
    original tokenizer's. Raises ConversionError if the tokenizer is missing or has no image token.
    """
    tokenizer = load_tokenizer(directory)
    image = tokenizer.convert_tokens_to_ids(IMG_CONTEXT)
    end = tokenizer.convert_tokens_to_ids(template.end)
    if image is None or image == tokenizer.unk_token_id:
        raise ConversionError(f"{directory}: its tokenizer has no token {IMG_CONTEXT}")
    eos = [i for i in (end, tokenizer.eos_token_id) if i is not None and i != tokenizer.unk_token_id]
    eos += [i for i in stop_ids(directory) if i < len(tokenizer)]
    pads = (tokenizer.pad_token_id, pad_id(directory), tokenizer.eos_token_id)
    return {
        "image_token_id": image,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(set(eos)),
        "pad_token_id": next((i for i in pads if i is not None), None),
    }


def check_tokenizer(plan: ExportPlan) -> None:
    """Check the tokenizer before anything is written. Raises ConversionError if it is missing or unsuitable."""
    if plan.side is None:
        raise ConversionError("no tokenizer found next to the checkpoint: set --like to a directory with one")
    token_ids(plan.side, get_template(plan.arguments.get("conversation_template", "internvl2_5")))


def processor_config(plan: ExportPlan) -> dict[str, Any]:
    """Content of processor_config.json: tile settings as in training."""
    return {
        "auto_map": {"AutoProcessor": "processing_internvlx.InternVLXProcessor"},
        "processor_class": "InternVLXProcessor",
        **processor_settings(plan.arguments, plan.sizes),
    }


def processor_settings(arguments: Mapping[str, Any], sizes: ModelSizes) -> dict[str, Any]:
    """Constructor arguments of the processor, besides a tokenizer."""
    get = arguments.get
    return {
        "tile_size": sizes.vision.image_size,
        "tokens_per_tile": sizes.high_grid**2,
        "min_tiles": get("min_tiles", 1),
        "max_tiles": get("max_tiles", 12),
        "use_thumbnail": not get("no_thumbnail", False),
        "dynamic_image_size": not get("static_image_size", False),
        "rvtc": get("rvtc", "edge"),
    }


def generation_config(ids: Mapping[str, Any]) -> dict[str, Any]:
    """Content of generation_config.json: greedy decoding until the template's end token."""
    kept = {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in kept.items() if value is not None} | {"do_sample": False}


def has_chat_template(directory: Path) -> bool:
    """Whether a directory has a chat template, as a separate file or in the tokenizer's configuration."""
    if any((directory / name).is_file() for name in (TEMPLATE_FILE, "chat_template.json")):
        return True
    settings = directory / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in read_object(settings)


def write_chat_template(plan: ExportPlan, partial: Path) -> Template:
    """Write the training template, and remove any other chat template from the directory."""
    template = get_template(plan.arguments.get("conversation_template", "internvl2_5"))
    image = IMG_CONTEXT if plan.layout.startswith("native") else IMAGE
    (partial / TEMPLATE_FILE).write_text(chat_template(template, image), encoding="utf-8")
    (partial / "chat_template.json").unlink(missing_ok=True)  # of older processors
    settings = partial / "tokenizer_config.json"
    if settings.is_file() and "chat_template" in (content := read_object(settings)):
        del content["chat_template"]
        write_json(settings, content)
    return template


def chat_template(template: Template, image: str = IMAGE) -> str:
    """Training template in Jinja, for messages with role and content (a text, or a list of parts).

    `image` is the placeholder that the processor replaces with the tokens of an image.
    """

    def quote(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    text = "message.content if message.content is string else parts.text"
    strip = " | trim" if template.strip else ""
    end = quote(template.end + template.gap)
    return (
        "{%- if messages[0].role != 'system' -%}"
        f"{{{{- {quote(template.system_header + template.system)} + {end} }}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- set parts = namespace(text='') -%}"
        "{%- if message.content is not string -%}{%- for part in message.content -%}"
        f"{{%- set parts.text = parts.text + ({quote(image + chr(10))} if part.type == 'image' else part.text) -%}}"
        "{%- endfor -%}{%- endif -%}"
        f"{{%- set headers = {{'system': {quote(template.system_header)}, "
        f"'user': {quote(template.user_header)}, 'assistant': {quote(template.answer_header)}}} -%}}"
        f"{{{{- headers[message.role] + (({text}){strip}) + {end} }}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {quote(template.answer_header)} }}}}{{%- endif -%}}"
    )


_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [internvl-x, visual-token-compression]
---

# InternVL-X

{summary} Trained with Megatron-InternVL-X.

{usage}
"""
_GENERATE = """DIRECTORY is this directory, or its name on the Hugging Face hub.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("DIRECTORY"{model_code})
processor = AutoProcessor.from_pretrained("DIRECTORY"{processor_code})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open("picture.jpg")], text=prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`transformers serve DIRECTORY --trust-remote-code` answers OpenAI's chat requests with it.
"""
_RELEASED = """Tensors and `config.json` have the names of the released InternVL-X code, whose `InternVLChatModel` loads
them. Megatron-InternVL-X answers questions with them, too: `ivlx evaluate --hf DIRECTORY --data meta.json`.
DIRECTORY is this directory, or for `from_pretrained` its name on the Hugging Face hub.
The processor makes the inputs, images cut as in training:

```python
from PIL import Image
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained("DIRECTORY"{processor_code})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open("picture.jpg")], text=prompt, return_tensors="pt")
```
"""
# Precedes code that does not work yet.
_INCOMPLETE = """**This directory is not complete: {problem}.** Put the files of a tokenizer with the tokens `<img>`,
`<IMG_CONTEXT>` and `</img>` into it, or export again with `--like`, a directory that has them. Then:

"""


def model_card(plan: ExportPlan, directory: Path) -> str:
    """Text of README.md: usage, configuration, data and training of the model.

    `directory` must contain all other files; only code that works with them is shown.
    """
    get, sizes = plan.arguments.get, plan.sizes
    low, high, side = sizes.entry_grid**2, sizes.high_grid**2, sizes.vision.image_size
    visual, injections = f"{high} tokens per tile", []
    if sizes.injection_layers:
        visual = f"{low} tokens per tile before layer {sizes.injection_layers[0]}, {high} from it on"
        injections = [("Injections at layers", ", ".join(map(str, sizes.injection_layers)))]
    facts = [
        ("Language model", f"{plan.family}, {sizes.layers} layers, width {sizes.hidden}"),
        ("Vision encoder", f"InternViT, {sizes.vision.num_layers} layers, width {sizes.vision.hidden_size}"),
        ("Tile", f"{side} x {side} pixels, {sizes.vision.patches_per_side**2} patches"),
        ("Projector", f"{sizes.projector}, pixel shuffle {get('pixel_shuffle_version', 'v2')}"),
        ("Visual tokens", visual),
        *injections,
        ("Tile grid", grid_rule(plan.arguments)),
        ("Chat template", get("conversation_template", "internvl2_5")),
        *_describe_end(directory),
        ("Weights", f"{plan.dtype}, {sum(i.nbytes for i in plan.tensors.values()) / 1e6:.1f} MB"),
        ("Data", _describe_data(plan)),
        ("Training", _describe_training(plan)),
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return f"{_CARD.format(summary=_summary(plan), usage=_usage(plan, directory))}| | |\n|---|---|\n{rows}\n"


def _describe_end(directory: Path) -> list[tuple[str, str]]:
    """Row about the token that ends an answer; none if the directory does not say it."""
    settings = directory / "tokenizer_config.json"
    token = token_text(read_object(settings).get("eos_token")) if settings.is_file() else ""
    stops = ", ".join(map(str, sorted(stop_ids(directory))))
    if not (token and stops):
        return []
    return [
        ("End of an answer", f"`{token}`, the tokenizer's `eos_token`; generation stops at the ids {stops}")
    ]


def _usage(plan: ExportPlan, directory: Path) -> str:
    code = ", trust_remote_code=True"
    text = (_RELEASED if plan.layout == "chat" else _GENERATE).format(
        model_code=code if plan.layout == "internvlx" else "",
        processor_code=code if has_our_processor(directory) else "",
    )
    problem = tokenizer_problem(directory)
    return (_INCOMPLETE.format(problem=problem) if problem else "") + text


def _summary(plan: ExportPlan) -> str:
    """Sentence about the compression of visual tokens."""
    steps = [
        text
        for used, text in (
            (plan.sizes.projector == "pvtc", "in the projector (PVTC)"),
            (plan.sizes.injection_layers, "inside the language model (LVTC)"),
            (plan.arguments.get("rvtc", "edge") != "off", "when the image is cut into tiles (RVTC)"),
        )
        if used
    ]
    if not steps:
        return "A vision-language model."
    return f"A vision-language model whose visual tokens are compressed {' and '.join(steps)}."


def grid_rule(arguments: Mapping[str, Any]) -> str:
    """Tiles into which training cut an image, and by which rule."""
    get = arguments.get
    if get("static_image_size", False):
        return "1 tile, to which the image is stretched"
    rule = get("rvtc", "edge")
    return f"{get('min_tiles', 1)} to {get('max_tiles', 12)} tiles, RVTC {rule} ({MEANINGS[rule]})"


def _describe_data(plan: ExportPlan) -> str:
    """Data sets and record counts of the meta.json or prepared directory of training, if it still exists."""
    data = plan.arguments.get("data")
    if not plan.iteration or not data:
        return "not recorded"
    try:
        sets = _prepared_sets(Path(data)) if Path(data).is_dir() else _meta_sets(Path(data))
    except (ConversionError, AttributeError, KeyError, TypeError, ValueError):
        return Path(data).name
    more = f" and {len(sets) - 20} more" if len(sets) > 20 else ""
    return f"{Path(data).name}: {', '.join(sets[:20])}{more}"


def _meta_sets(meta: Path) -> list[str]:
    return [
        _describe_set(name, entry.get("length"), entry.get("repeat_time", 1))
        for name, entry in read_object(meta).items()
    ]


def _prepared_sets(directory: Path) -> list[str]:
    from megatron_internvlx.data.prepared import prepared_sets

    return [_describe_set(entry.name, entry.train, entry.repeat_time) for entry in prepared_sets(directory)]


def _describe_set(name: str, records: int | None, repeat: float) -> str:
    facts = [f"{records} records"] if records is not None else []
    facts += [f"{repeat:g} times"] if repeat != 1 else []
    return f"{name} ({', '.join(facts)})" if facts else name


def _describe_training(plan: ExportPlan) -> str:
    get = plan.arguments.get
    if not plan.iteration:
        return "none after import"
    samples = get("consumed_train_samples") or plan.iteration * (get("global_batch_size") or 1)
    facts = f"{plan.iteration} steps, {samples} samples, global batch {get('global_batch_size')}"
    facts += f", learning rate {get('lr')}"
    if get("fp8"):
        facts += f", FP8 {get('fp8_recipe') or get('fp8')}"
    facts += f", {'bf16' if get('bf16') else 'fp16' if get('fp16') else 'fp32'}"
    frozen = [part for part in ("vision", "llm", "projectors") if get(f"freeze_{part}")]
    return facts + (f", frozen: {', '.join(frozen)}" if frozen else "")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
