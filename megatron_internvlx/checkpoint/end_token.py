"""The token that ends an answer, the same in all files of an exported directory.

Servers and evaluation harnesses stop at `tokenizer.eos_token_id`. That is `</s>` in InternLM2's tokenizer and
`<|endoftext|>` in base Qwen2's, while an answer of a trained model ends with its chat template's token: it would run
on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_internvlx.checkpoint.checks import read_object

SETTINGS, MAP, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"


def stop_ids(directory: Path) -> set[int]:
    """Ids at which the directory's generation_config.json ends an answer; empty if there is none.

    Raises ConversionError if the file is not a JSON object.
    """
    found = _generation(directory).get("eos_token_id")
    return {i for i in (found if isinstance(found, list) else [found]) if type(i) is int and i >= 0}


def pad_id(directory: Path) -> int | None:
    """Id of padding in the directory's generation_config.json, or None.

    Raises ConversionError if the file is not a JSON object.
    """
    found = _generation(directory).get("pad_token_id")
    return found if type(found) is int and found >= 0 else None


def _generation(directory: Path) -> dict[str, Any]:
    path = directory / GENERATION
    return read_object(path) if path.is_file() else {}


def added_ids(directory: Path) -> dict[str, int]:
    """Ids of the tokens that the tokenizer's files add to its vocabulary, read without loading the tokenizer.

    Raises ConversionError if a file is not a JSON object.
    """
    return {name: i for name, i in _added(directory) if isinstance(name, str) and type(i) is int}


def _added(directory: Path) -> Iterator[tuple[Any, Any]]:
    plain, whole, settings = (directory / n for n in ("added_tokens.json", "tokenizer.json", SETTINGS))
    if plain.is_file():
        yield from read_object(plain).items()
    tokens = read_object(whole).get("added_tokens") if whole.is_file() else None
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(token, dict):
            yield token.get("content"), token.get("id")
    tokens = read_object(settings).get("added_tokens_decoder") if settings.is_file() else None
    for number, token in tokens.items() if isinstance(tokens, dict) else ():
        if isinstance(token, dict) and number.isdecimal():
            yield token.get("content"), int(number)


def write_end_token(directory: Path, end: str) -> None:
    """Make `end` the tokenizer's `eos_token`; the rest of its files stays as it is, byte for byte.

    Raises ConversionError if a file is not a JSON object.
    """
    for name in (SETTINGS, MAP):
        path = directory / name
        if path.is_file():
            read_object(path)
            text = path.read_bytes().decode("utf-8")
            path.write_bytes(_with_token(text, end).encode("utf-8"))
        elif name == SETTINGS:
            path.write_bytes((json.dumps({"eos_token": end}, ensure_ascii=False) + "\n").encode("utf-8"))


def add_stop_token(directory: Path, end: str) -> None:
    """Make `end` the token that ends an answer in the tokenizer's and generation's files of a directory.

    generation_config.json keeps the ids that it has. Without a tokenizer that has the token nothing is changed.
    Raises ConversionError if a file is not a JSON object.
    """
    ids = added_ids(directory)
    if end not in ids:
        return
    settings, path = directory / SETTINGS, directory / GENERATION
    before = read_object(settings) if settings.is_file() else {}
    named = {
        role: ids.get(token_text(before.get(role)), None) for role in ("bos_token", "eos_token", "pad_token")
    }
    stops = stop_ids(directory)
    wanted = stops | {i for i in (ids[end], named["eos_token"]) if i is not None}
    write_end_token(directory, end)
    if path.is_file() and wanted == stops:
        return
    content = read_object(path) if path.is_file() else start_of_generation(named)
    content["eos_token_id"] = sorted(wanted)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def start_of_generation(named: Mapping[str, int | None]) -> dict[str, Any]:
    """Content of a new generation_config.json before its stop ids: greedy decoding, and the ids of bos and pad."""
    ids = {"bos_token_id": named["bos_token"], "pad_token_id": named["pad_token"]}
    return {name: i for name, i in ids.items() if i is not None} | {"do_sample": False}


def token_text(token: Any) -> str:
    """Text of a token in tokenizer_config.json: the text itself, or an object with it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _with_token(text: str, end: str) -> str:
    """JSON text of an object whose `eos_token` is `end`, in the form that it has: a text, or an object with one."""
    before = json.loads(text).get("eos_token")
    if token_text(before) == end:
        return text
    if not isinstance(before, dict):
        return _with_value(text, "eos_token", end, json.dumps(end, ensure_ascii=False))
    inner = next((found for _, _, found in _values(text, "eos_token") if json.loads(found) == before), "{}")
    inner = _with_value(inner, "content", end, json.dumps(end, ensure_ascii=False))
    return _with_value(text, "eos_token", {**before, "content": end}, inner)


def _with_value(text: str, key: str, value: Any, written: str) -> str:
    """JSON text of an object with another `value`, `written` so, of a key; the rest of the text is unchanged.

    A key that the object does not have is added, for which the text is written anew.
    """
    wanted = {**json.loads(text), key: value}
    for start, stop, _ in _values(text, key):
        changed = text[:start] + written + text[stop:]
        if json.loads(changed) == wanted:
            return changed
    return json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"


def _values(text: str, key: str) -> Iterator[tuple[int, int, str]]:
    """(start, stop, text) of everything in a JSON text that stands after this key, at any depth."""
    decoder = json.JSONDecoder()
    for match in re.finditer(rf'"{re.escape(key)}"\s*:\s*', text):
        try:
            _, stop = decoder.raw_decode(text, match.end())
        except ValueError:  # inside a string
            continue
        yield match.end(), stop, text[match.end() : stop]
