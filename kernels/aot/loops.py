"""Counts what each loop of a kernel executes per iteration, from its machine code: instructions, MUFU operations, matrix products, global bytes.

Loops are the natural loops of the control flow graph. Spin loops (a few instructions that neither load nor multiply) are merged into the code around
them. Conditional code counts as executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

COUNTED = ("issue", "mufu", "flops", "bytes")

WAITING = 12
"""A loop of at most this many instructions, none of which does any work, is taken for a spin on a barrier."""

_LABEL = re.compile(r"^\s*(\.L\w+):")
_NVIDIA = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_AMD = re.compile(r"^\s+([a-z]\w+)(.*)")
_TARGET = re.compile(r"(\.L\w+)")
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_AMD_WIDTHS = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "short": 2,
    "ushort": 2,
    "byte": 1,
    "ubyte": 1,
    "sbyte": 1,
}
_HMMA_DEPTH = {"16816": 16, "1688": 8, "1684": 4}


def nvidia_width(opcode: list[str]) -> int:
    """Bytes per thread of an access, given the parts of its opcode."""
    return max((_WIDTHS[part] for part in opcode if part in _WIDTHS), default=4)


def amd_width(words: list[str]) -> int:
    """Bytes per lane of an access, given the words of its opcode."""
    return next((_AMD_WIDTHS[word] for word in words if word in _AMD_WIDTHS), 4)


def of_nvidia(sass: str) -> list[dict[str, Any]]:
    """The loops of a kernel (see `nest`), counted per warp."""
    return nest(_nvidia_lines(sass))


def of_amd(assembly: str) -> list[dict[str, Any]]:
    return nest(_amd_lines(assembly))


@dataclass
class Line:
    """An instruction: its label, its branch target, whether execution can fall through to the next, and its counts."""

    counts: dict[str, float]
    labels: list[str] = field(default_factory=list)
    target: str | None = None
    falls_through: bool = True


def nest(lines: list[Line]) -> list[dict[str, Any]]:
    """[{"parent": index or None, "at", "issue", "mufu", "flops", "bytes"}]: the kernel itself first, then its loops, outer before inner.

    `at` is the position in the text. A loop's counts exclude those of its inner loops.
    """
    blocks, after = _blocks(lines)
    bodies = [set(range(len(blocks)))] + [body for body in _loops(after) if not _waits(blocks, body)]
    found = []
    for index, body in enumerate(bodies):
        around = [other for other in range(index) if body < bodies[other]]
        own = body - set().union(*(other for other in bodies if other < body))
        counts = {what: sum(line.counts[what] for block in own for line in blocks[block]) for what in COUNTED}
        found.append({"parent": around[-1] if around else None, "at": min(body), **counts})
    return found


def _blocks(lines: list[Line]) -> tuple[list[list[Line]], list[set[int]]]:
    """Basic blocks, and the successors of each."""
    blocks: list[list[Line]] = [[]]
    for line in lines:
        if line.labels and blocks[-1]:
            blocks.append([])
        blocks[-1].append(line)
        if line.target or not line.falls_through:
            blocks.append([])
    places = {label: number for number, block in enumerate(blocks) if block for label in block[0].labels}
    after = []
    for number, block in enumerate(blocks):
        last = block[-1] if block else Line({})
        following = {number + 1} if last.falls_through and number + 1 < len(blocks) else set()
        after.append(following | ({places[last.target]} if last.target in places else set()))
    return blocks, after


def _loops(after: list[set[int]]) -> list[set[int]]:
    """Natural loops, outer before inner: a header that dominates a block that branches back to it, and everything in between."""
    before: list[set[int]] = [set() for _ in after]
    for block, following in enumerate(after):
        for other in following:
            before[other].add(block)
    reachable, todo = {0}, [0]
    while todo:
        for other in after[todo.pop()] - reachable:
            reachable.add(other)
            todo.append(other)
    dominators = {block: {0} if block == 0 else set(reachable) for block in reachable}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            new = {block} | set.intersection(*(dominators[other] for other in before[block] & reachable))
            changed |= new != dominators[block]
            dominators[block] = new
    bodies: dict[int, set[int]] = {}
    for block in reachable:
        for head in after[block] & dominators[block]:
            body, todo = bodies.setdefault(head, {head}), [block]
            while todo:
                if (other := todo.pop()) not in body:
                    body.add(other)
                    todo += before[other] & reachable
    return sorted(bodies.values(), key=len, reverse=True)


def _waits(blocks: list[list[Line]], body: set[int]) -> bool:
    inside = [line.counts for block in body for line in blocks[block]]
    return len(inside) <= WAITING and not any(counts["flops"] or counts["bytes"] or counts["mufu"] for counts in inside)


def _counts(issue: float = 1, mufu: float = 0, flops: float = 0, bytes: float = 0) -> dict[str, float]:
    return {"issue": issue, "mufu": mufu, "flops": flops, "bytes": bytes}


def _nvidia_lines(sass: str) -> list[Line]:
    lines, labels = [], []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif instruction := _NVIDIA.match(line):
            opcode, rest = instruction[1].split("."), instruction[2]
            if opcode[0] == "NOP":
                continue
            target = _TARGET.search(rest) if opcode[0] == "BRA" else None
            conditional = "@" in line or re.match(r"\s*!?U?P\d", rest) is not None or "DIV" in opcode
            access = opcode[0] in ("LDG", "STG", "LDGSTS")
            width = nvidia_width(opcode) if access else 0
            counts = _counts(mufu=opcode[0] == "MUFU", flops=_nvidia_flops(opcode), bytes=32 * width)
            leaves = opcode[0] in ("BRA", "EXIT") and not conditional
            lines.append(Line(counts, labels, target[1] if target else None, not leaves))
            labels = []
    return lines


def _nvidia_flops(opcode: list[str]) -> float:
    """Per warp; in a warpgroup product each warp does a quarter. A TF32 product is one of the three that make up a float32 product."""
    third = 3 if "TF32" in opcode else 1
    if opcode[0] == "HMMA":
        return 2 * 16 * 8 * _HMMA_DEPTH[opcode[1]] / third
    if opcode[0] == "HGMMA":
        m, n, k = map(int, opcode[1].split("x"))
        return 2 * m * n * k / 4 / third
    return 0


def _amd_lines(assembly: str) -> list[Line]:
    lines, labels = [], []
    for line in assembly.splitlines():
        if label := re.match(r"^(\.L\w+):", line):
            labels.append(label[1])
        elif instruction := _AMD.match(line):
            opcode, rest = instruction[1], instruction[2]
            if opcode == "s_endpgm":
                break
            words = opcode.split("_")
            access = words[0] in ("global", "buffer", "flat") and words[1] in ("load", "store")
            width = amd_width(words) if access else 0
            mufu = words[0] == "v" and words[1] in ("exp", "log", "rcp", "rsq", "sqrt", "sin", "cos")
            target = _TARGET.search(rest) if words[:2] in (["s", "branch"], ["s", "cbranch"]) else None
            counts = _counts(issue=words[0] == "v", mufu=mufu, flops=_amd_flops(opcode), bytes=64 * width)
            lines.append(Line(counts, labels, target[1] if target else None, words[:2] != ["s", "branch"]))
            labels = []
    return lines


def _amd_flops(opcode: str) -> float:
    shape = re.match(r"v_s?mfmac?_\w+?_(\d+)x(\d+)x(\d+)", opcode)
    return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0


def trips(
    loops: list[dict[str, Any]], known: tuple[float, ...], shares: tuple[float, ...], flops: float, bytes: float
) -> list[float]:
    """How often each loop's body runs in one program.

    The trip counts of innermost loops follow from the program's products (`flops`, per warp), divided by `shares` if there are as many loops, else
    equally; those of the other loops are given in `known`, by depth. Without products to count, innermost loops also follow `known` or, beyond its
    end, the program's global traffic (`bytes`, per warp).
    """
    parents = {loop["parent"] for loop in loops}
    depths = [0] * len(loops)
    for index, loop in enumerate(loops[1:], 1):
        depths[index] = depths[loop["parent"]] + 1
    innermost = [index for index in range(1, len(loops)) if index not in parents]
    what, total = ("flops", flops) if any(loop["flops"] for loop in loops) else ("bytes", bytes)
    counted = {i for i in innermost if loops[i][what] and (what == "flops" or depths[i] > len(known))}
    times = [1.0] * len(loops)
    for index in range(1, len(loops)):
        turns = known[depths[index] - 1] if index not in counted and depths[index] <= len(known) else 1.0
        times[index] = times[loops[index]["parent"]] * turns
    told = sorted((i for i in innermost if i not in counted and depths[i] <= len(known)), key=lambda i: loops[i]["at"])
    if what == "bytes" and len(told) == len(shares):
        for index, share in zip(told, shares, strict=True):
            times[index] *= share / sum(shares)
    fixed = sum(times[index] * loops[index][what] for index in range(len(loops)) if index not in counted)
    in_text = sorted(counted, key=lambda index: loops[index]["at"])
    for index, share in zip(in_text, shares if len(shares) == len(counted) else [1] * len(counted), strict=True):
        times[index] *= share
    each = sum(times[index] * loops[index][what] for index in counted)
    turns = max(0.0, (total - fixed) / each) if each else 1.0
    return [times[index] * (turns if index in counted else 1) for index in range(len(loops))]


def inner(loops: list[dict[str, Any]]) -> Iterator[bool]:
    """Whether each is an innermost loop."""
    parents = {loop["parent"] for loop in loops}
    yield from (index > 0 and index not in parents for index in range(len(loops)))
