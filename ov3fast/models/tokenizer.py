"""Texts <-> ids, on the `tokenizers` library: BERT-uncased WordPiece (in the package) and CLIP's BPE (vocabulary file given).

Layouts (official src/transforms/bert_ops.py, my_bert_tokenize_v2):
    kind="text"       [bos] words [eos] pad ... [CLS]      the text encoder pools the last place
    kind="caption"    [bos] words [eos] pad ...
Words that do not fit are cut; [eos] and [CLS] are kept. CLIP's BPE has start and end of text only: its end of text also stands for
[CLS].
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ov3fast.io import atomic_write

NAMES = ("wordpiece", "clip_bpe")
SPECIALS = ("[PAD]", "[bos]", "[eos]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLIP_SPECIALS = ("<start_of_text>", "<end_of_text>")
FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


class Tokenizer:
    """Lays texts out as ids; `backend` is the tokenizers.Tokenizer that splits them.

    pad_id, bos_id, eos_id and cls_id are ids; vocab_size is the number of embedding rows that cover every id.
    """

    def __init__(self, name: str, backend: Any) -> None:
        self.name = name
        self.backend = backend
        bos, eos, cls, pad = CLIP_SPECIALS[0], CLIP_SPECIALS[1], CLIP_SPECIALS[1], None
        if name == "wordpiece":
            pad, bos, eos, _, cls, *_ = SPECIALS
        self.bos_id, self.eos_id, self.cls_id = (self._special(token) for token in (bos, eos, cls))
        # CLIP pads with 0, which is also the id of "!"; only what stands before the end of text is read.
        self.pad_id = 0 if pad is None else self._special(pad)

    @property
    def vocab_size(self) -> int:
        largest: int = max(self.backend.get_vocab().values())
        return largest + 1

    def __call__(self, texts: Sequence[str], length: int, kind: Literal["text", "caption"] = "text") -> Tensor:
        """Texts -> ids [B, length] int64 in the layout of `kind`. ValueError for a length that can't hold the special ids."""
        if isinstance(texts, str):
            raise TypeError("tokenizer: texts must be a list of strings, got one string; wrap it in a list")
        if kind not in ("text", "caption"):
            raise ValueError(f"tokenizer: kind must be 'text' or 'caption', got {kind!r}")
        room = length - (3 if kind == "text" else 2)
        if room < 0:
            raise ValueError(f"tokenizer: length must be at least {3 if kind == 'text' else 2} for kind={kind!r}, got {length}")
        ids = torch.full((len(texts), length), self.pad_id, dtype=torch.int64)
        for row, encoding in enumerate(self.backend.encode_batch(list(texts), add_special_tokens=False)):
            line = [self.bos_id, *encoding.ids[:room], self.eos_id]
            ids[row, : len(line)] = torch.tensor(line)
        if kind == "text":
            ids[:, -1] = self.cls_id
        return ids

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """One row of ids -> text, up to the first end of text; special ids and ids without a piece are left out."""
        row = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if row and isinstance(row[0], list):
            raise ValueError("tokenizer: decode takes one row of ids, got a matrix; decode its rows one by one")
        if self.eos_id in row:
            row = row[: row.index(self.eos_id)]
        skip = {self.bos_id, self.cls_id} | ({self.pad_id} if self.name == "wordpiece" else set())
        text: str = self.backend.decode([i for i in row if i not in skip], skip_special_tokens=False)
        return text.strip()

    def restrict(self, texts: Iterable[str]) -> Tokenizer:
        """A WordPiece tokenizer with only the pieces that `texts` use, the special ones and every single character.

        Ids are dense and keep the old order (special pieces first), so nothing that could be spelt before becomes [UNK].
        """
        if self.name != "wordpiece":
            raise ValueError(f"tokenizer: restrict works on wordpiece only, got {self.name!r}")
        pieces = sorted(self.backend.get_vocab().items(), key=lambda item: item[1])
        used = {i for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False) for i in encoding.ids}
        kept = [piece for piece, i in pieces if i in used or len(piece.removeprefix("##")) == 1]
        return get_tokenizer("wordpiece", pieces=[*SPECIALS, *(piece for piece in kept if piece not in SPECIALS)])

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `load_tokenizer` reads."""
        folder = Path(folder)
        with atomic_write(folder / FILE) as temporary:
            self.backend.save(str(temporary))
        with atomic_write(folder / CONFIG_FILE) as temporary:
            temporary.write_text(json.dumps({"name": self.name}) + "\n", encoding="utf-8")

    def _special(self, token: str) -> int:
        index: int | None = self.backend.token_to_id(token)
        if index is None:
            raise ValueError(f"tokenizer: the vocabulary has no {token}; a {self.name} vocabulary needs it")
        return index


def get_tokenizer(
    name: str = "wordpiece", vocab_file: str | Path | None = None, pieces: Sequence[str] | None = None
) -> Tokenizer:
    """ "wordpiece" (the package's BERT-uncased vocabulary, another vocab_file, or pieces) or "clip_bpe" (vocab_file needed).

    vocab_file: for WordPiece one piece a line; for CLIP open_clip's bpe_simple_vocab_16e6.txt.gz (or unpacked).
    """
    if name not in NAMES:
        raise ValueError(f"tokenizer: name must be one of {', '.join(NAMES)}; got {name!r}")
    if name == "wordpiece":
        return Tokenizer(name, _wordpiece(pieces if pieces is not None else _read_pieces(vocab_file)))
    if vocab_file is None:
        raise ValueError("tokenizer: clip_bpe needs vocab_file, the path of open_clip's bpe_simple_vocab_16e6.txt.gz")
    return Tokenizer(name, _clip_bpe(_existing(vocab_file)))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote to `folder`. FileNotFoundError or ValueError names the file."""
    from tokenizers import Tokenizer as Backend

    folder = Path(folder).expanduser()
    name = json.loads(_existing(folder / CONFIG_FILE).read_text(encoding="utf-8")).get("name")
    if name not in NAMES:
        raise ValueError(f"tokenizer: {folder / CONFIG_FILE} names {name!r}; name must be one of {', '.join(NAMES)}")
    path = _existing(folder / FILE)
    try:
        return Tokenizer(name, Backend.from_file(str(path)))
    except ValueError:
        raise
    except Exception as error:  # the Rust library raises plain Exception for a file that it can't parse
        raise ValueError(f"tokenizer: {path} is not a tokenizers file: {error}") from error


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: no file {path}")
    return path


def _read_pieces(vocab_file: str | Path | None) -> list[str]:
    if vocab_file is None:
        text = resources.files("ov3fast").joinpath("assets", "bert_uncased_vocab.txt").read_text(encoding="utf-8")
    else:
        text = _existing(vocab_file).read_text(encoding="utf-8")
    return text.rstrip("\n").split("\n")


def _wordpiece(pieces: Sequence[str]) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ValueError(f"tokenizer: the vocabulary repeats {len(pieces) - len(vocabulary)} of its {len(pieces)} pieces")
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _clip_bpe(path: Path) -> Any:
    """CLIP's vocabulary: 256 bytes, the same at a word's end, one piece per merge, two special tokens."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    raw = path.read_bytes()
    lines = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8").split("\n")
    # The first line is a version header; CLIP reads no more merges than fill its 49,408 ids.
    pairs = (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    letters = _byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges), *CLIP_SPECIALS]
    backend = Backend(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, end_of_word_suffix="</w>", unk_token=CLIP_SPECIALS[1])
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return backend


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in CLIP's order: the printable bytes as they are, the rest from U+0100 up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
