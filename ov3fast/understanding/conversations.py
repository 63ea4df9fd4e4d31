"""LLaVA's JSON formats, and tokenization of conversations with loss on the answers only.

    [{"id": "0", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                       {"from": "gpt", "value": "A cat."}]}]

A conversation is tokenized in pieces (question, text before the answer, answer with its end), so the mask follows from which
piece an id came from, and the prompt at inference is exactly the prefix seen in training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

IMAGE, IGNORED = -200, -100
"""Placeholder id of an image token (outside any vocabulary), and the label of positions without loss."""
PLACE = "<image>"
QUESTIONERS, ANSWERERS = ("human", "user"), ("gpt", "assistant")


class Turn(NamedTuple):
    """sees: the image precedes this question. answer: None if it is to be generated."""

    question: str
    answer: str | None
    sees: bool = False


class Conversation(NamedTuple):
    turns: tuple[Turn, ...]
    image: str | None = None


def read_conversations(path: str | Path) -> list[Conversation]:
    """Reads a file in LLaVA's format: a JSON list, or .jsonl with the same records.

    As in LLaVA, a leading assistant message is dropped and <image> is moved to the front of its question. ValueError names the
    invalid record.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"conversations: no file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"conversations: {path} is not JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"conversations: {path} must be a list of records with conversations")
    return [_conversation(record, f"{path}, record {number}") for number, record in enumerate(records)]


def _conversation(record: Any, what: str) -> Conversation:
    lines = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, dict) and isinstance(line.get("value"), str) for line in lines):
        raise ValueError(f"conversations: {what} has no list `conversations` of from and value")
    if lines and lines[0].get("from") in ANSWERERS:
        lines = lines[1:]
    roles = [line.get("from") for line in lines]
    turns_fit = all(role in (ANSWERERS if place % 2 else QUESTIONERS) for place, role in enumerate(roles))
    if not lines or len(lines) % 2 or not turns_fit:
        raise ValueError(f"conversations: {what} must take turns, human and gpt; got {', '.join(map(str, roles)) or 'nothing'}")
    image = record.get("image")
    places = sum(line["value"].count(PLACE) for line in lines)
    if image is not None and (not isinstance(image, str) or places != 1) or image is None and places:
        raise ValueError(
            f"conversations: {what} must have {PLACE} once where it has an image; got {places} and image {image!r}"
        )
    turns = []
    for question, answer in zip(lines[::2], lines[1::2], strict=True):
        if PLACE in answer["value"]:
            raise ValueError(f"conversations: {what} has {PLACE} in an answer")
        sees = PLACE in question["value"]
        turns.append(Turn(question["value"].replace(PLACE, "").strip(), answer["value"].strip(), sees))
    return Conversation(tuple(turns), image)


def write_conversations(path: str | Path, conversations: Sequence[Conversation]) -> None:
    """Inverse of `read_conversations`; writes atomically."""
    from ov3fast.io import atomic_write

    records = []
    for number, one in enumerate(conversations):
        lines = []
        for turn in one.turns:
            lines.append({"from": "human", "value": f"{PLACE}\n{turn.question}" if turn.sees else turn.question})
            lines.append({"from": "gpt", "value": turn.answer})
        records.append({"id": str(number), **({} if one.image is None else {"image": one.image}), "conversations": lines})
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


class Template(NamedTuple):
    """Text around a conversation: `system`, then for each turn `before`, question, `between`, answer, `after`. {eos} and {sep}
    are the tokenizer's special tokens. asks: False omits the questions. after_image: text between image and question."""

    before: str = ""
    between: str = ""
    after: str = "{eos}"
    system: str = ""
    asks: bool = True
    after_image: str = "\n"


TEMPLATES = {
    "plain": Template(after="\n", asks=False, after_image=""),
    "short": Template(between="{sep}", after_image=""),
    "vicuna": Template(
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the user's questions. ",
        before="USER: ",
        between=" ASSISTANT: ",
    ),
    "chatml": Template(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        before="<|im_start|>user\n",
        between="<|im_end|>\n<|im_start|>assistant\n",
        after="<|im_end|>\n",
    ),
}
"""plain: image and caption, LLaVA's first stage. vicuna: LLaVA-1.5's. chatml: Qwen2's, SmolLM2's. short: for small models."""


class Example(NamedTuple):
    """ids and labels have equal length; label t is either id t or IGNORED."""

    ids: list[int]
    labels: list[int]
    image: str | None


class Encoder:
    """Conversations -> Examples with a transformers tokenizer. image_tokens: IMAGE ids per image; 0 for a blind model."""

    def __init__(self, tokenizer: Any, template: str, image_tokens: int) -> None:
        if template not in TEMPLATES:
            raise ValueError(f"template must be one of {', '.join(TEMPLATES)}; got {template!r}")
        self.template, self.image_tokens = TEMPLATES[template], image_tokens
        special = {"eos": tokenizer.eos_token, "sep": tokenizer.sep_token}
        missing = [name for name in special if f"{{{name}}}" in "".join(map(str, self.template)) and special[name] is None]
        if missing:
            raise ValueError(f"template {template!r} needs the tokenizer's {missing[0]}_token, and it has none")
        self._special = {f"{{{name}}}": token or "" for name, token in special.items()}
        begins = tokenizer("")["input_ids"][:1]
        self._begin = begins if begins == [tokenizer.bos_token_id] else []
        self._tokenized = lru_cache(1 << 18)(lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
        self.end = self._text(self.template.after)
        """Token ids that end an answer; generation stops at the first."""
        if not self.end:
            raise ValueError(f"template {template!r}: its end has no token in this vocabulary")

    def __call__(self, conversation: Conversation, max_length: int | None = None) -> Example | None:
        """None if truncation to max_length leaves no answer or cuts into the image."""
        template = self.template
        ids, labels = [*self._begin, *self._text(template.system)], []
        whole_image = 0
        for turn in conversation.turns:
            ids += self._text(template.before)
            if turn.sees and self.image_tokens:
                ids += [IMAGE] * self.image_tokens
                whole_image = len(ids)
                ids += self._text(template.after_image)
            if template.asks:
                ids += self._tokenized(turn.question)
            ids += self._text(template.between)
            labels += [IGNORED] * (len(ids) - len(labels))
            if turn.answer is not None:
                answer = [*self._tokenized(turn.answer), *self.end]
                ids += answer
                labels += answer
        # Nothing predicts the first token.
        labels[:1] = [IGNORED]
        ids, labels = ids[:max_length], labels[:max_length]
        answers = conversation.turns[-1].answer is None or any(label != IGNORED for label in labels)
        return (
            Example(ids, labels, conversation.image if whole_image else None) if answers and whole_image <= len(ids) else None
        )

    def prompt(self, question: str, image: str | None) -> Example:
        """The prompt: everything that precedes the answer."""
        found = self(Conversation((Turn(question, None, image is not None),), image))
        assert found is not None
        return found

    def _text(self, text: str) -> tuple[int, ...]:
        for name, token in self._special.items():
            text = text.replace(name, token)
        return self._tokenized(text) if text else ()
