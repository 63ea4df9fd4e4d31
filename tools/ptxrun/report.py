"""The report of a run: findings of the checks, traffic and instruction statistics."""

import re
from dataclasses import dataclass, field


@dataclass
class Finding:
    kind: str  # race | oob | uninitialised | pending | sync
    what: str
    loc: str  # source line, e.g. 'kernels.py:36'
    line: int  # line in the PTX
    text: str  # the instruction
    thread: int
    cta: tuple
    count: int = 1  # bytes or lanes, over all occurrences at this instruction

    def __str__(self):
        return (
            f"[{self.kind}] {self.loc} (PTX line {self.line}: {self.text}): thread {self.thread} of CTA {self.cta}: "
            f"{self.what}; {self.count} in total"
        )


@dataclass
class Report:
    kernel: str = ""
    instructions: int = 0  # executed, per CTA (all threads together count one)
    ctas: int = 0
    barriers: int = 0
    divergent_branches: int = 0
    bank_conflicts: int = 0
    seconds: float = 0.0
    findings: list = field(default_factory=list)
    traffic: dict = field(default_factory=dict)  # 'ld' | 'st' | 'atom' | 'cp.async' -> {bytes per access: bytes}
    per_tensor: dict = field(default_factory=dict)  # tensor -> {kind: bytes}
    mma: dict = field(default_factory=dict)  # instruction -> count over warps (warpgroups for wgmma)
    footprint: dict = field(default_factory=dict)  # tensor -> (distinct bytes read, distinct bytes written)
    ptx: str = field(default="", repr=False)
    _seen: dict = field(default_factory=dict, repr=False)

    def add(self, kind, ins, what, lane, cta, count):
        key = (kind, ins.index, re.split(r"[(:]| at ", what)[0])
        if key in self._seen:
            self._seen[key].count += count
        else:
            f = self._seen[key] = Finding(kind, what, ins.loc, ins.line, ins.text, lane, cta, count)
            self.findings.append(f)

    def of(self, kind):
        return [f for f in self.findings if f.kind == kind]

    races = property(lambda self: self.of("race"))
    oob = property(lambda self: self.of("oob"))
    uninitialised = property(lambda self: self.of("uninitialised"))
    ok = property(lambda self: not self.findings)
    mma_count = property(lambda self: sum(self.mma.values()))

    def bytes_read(self):
        return sum(sum(self.traffic.get(k, {}).values()) for k in ("ld", "cp.async"))

    def bytes_written(self):
        return sum(self.traffic.get("st", {}).values())

    def share16(self, *kinds):
        """Fraction of bytes moved in 16-byte accesses."""
        ts = [self.traffic.get(k, {}) for k in kinds or self.traffic]
        total = sum(sum(t.values()) for t in ts)
        return sum(v for t in ts for w, v in t.items() if w >= 16) / total if total else 1.0

    def __str__(self):
        head = (
            f"{self.kernel}: {self.ctas} CTAs, {self.instructions} CTA-instructions in {self.seconds:.2f} s, "
            f"read {self.bytes_read()} B, wrote {self.bytes_written()} B, 16-byte share {self.share16():.0%}, mma {self.mma}"
        )
        return "\n".join([head] + [str(f) for f in self.findings])
