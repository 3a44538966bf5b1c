"""Show training rows token by token: targets, context, cut tokens, special tokens, and the packing of rows.

The output is text in the terminal (rich) and one self-contained HTML page.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from data.chat import encode_completions, encode_prompt, encode_rows
from data.chat_template import targets_of
from data.loader import Loader
from data.records import Comparison, Example, Prompt, Ranking, Rated, Record
from model.packing import lay_out
from runtime.display import printable
from runtime.report import bullets, heading, paragraph, write_page

WHOLE = 1 << 30  # a limit in tokens that never cuts
STYLE = """<style>
body { max-width: 80rem } .row { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: flex-start }
.side { flex: 1 1 20rem; min-width: 0 }
.tokens { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.tokens { border: 1px solid #ddd; border-radius: 4px; padding: .4rem .6rem; margin: .3rem 0 1rem }
.t { border-right: 1px solid #0002; padding: .1rem 0 } .target { background: #c9efd0 } .break { color: #999 }
.special { color: #7a3ea8; font-weight: 600 }
.cut { background: #fadcd9; text-decoration: line-through; color: #a33 }
.border { background: #1d4ed8; color: #fff; font-size: 11px; padding: .1rem .35rem; border-radius: 3px }
</style>"""
LEGEND = (
    '<div class="tokens"><span class="t target">target: learned</span> <span class="t">context: read</span> '
    '<span class="t special">special token</span> <span class="t cut">cut: not used</span> '
    '<span class="border">12</span> position in the pack where a document begins</div>'
)


class Token(NamedTuple):
    """One displayed token."""

    id: int
    text: str
    target: bool
    special: bool
    cut: bool = False


class Side(NamedTuple):
    """One row of a batch: a conversation, or one answer to a prompt."""

    name: str
    tokens: list[Token]

    @property
    def title(self) -> str:
        """The name with numbers of tokens, for a heading."""
        read = [token for token in self.tokens if not token.cut]
        cut = len(self.tokens) - len(read)
        return f"{self.name}: {len(read)} tokens, {sum(t.target for t in read)} targets" + (
            f", {cut} cut" if cut else ""
        )


def trace(record: Record, tokenizer, *, max_length: int, max_prompt_length: int) -> list[Side]:
    """Every token of a record as the trainers would read it, with the tokens that they cut.

    Raises:
        ValueError: the trainers would refuse the record.
    """
    if isinstance(record, Example):
        how = {"tools": record.tools}
        rows = encode_rows(record.messages, tokenizer, max_length=WHOLE, **how)
        encode_rows(record.messages, tokenizer, max_length=max_length, **how)
        names = [f"messages[{i}]" for i in targets_of(record.messages)] if len(rows) > 1 else ["conversation"]
        cuts = [[at >= max_length for at in range(len(row["input_ids"]))] for row in rows]
        return [_side(*one, tokenizer) for one in zip(names, rows, cuts, strict=True)]
    if isinstance(record, Prompt):
        ids = encode_prompt(record.prompt, tokenizer, max_length=WHOLE, tools=record.tools)
        return [
            _side("prompt", {"input_ids": ids, "completion_mask": [False] * len(ids)}, [False] * len(ids), tokenizer)
        ]
    assert isinstance(record, Comparison | Ranking | Rated)
    names, texts = _named(record)
    sizes = [(WHOLE, WHOLE), (max_length, max_prompt_length)]
    whole, kept = (
        encode_completions(
            record.prompt, texts, tokenizer, max_length=length, max_prompt_length=prompt, tools=record.tools
        )
        for length, prompt in sizes
    )
    return [
        _side(name, full, _lost(full, row, tokenizer), tokenizer)
        for name, full, row in zip(names, whole, kept, strict=True)
    ]


def _named(record: Comparison | Ranking | Rated) -> tuple[list[str], list[str]]:
    if isinstance(record, Comparison):
        names = ["as good", "as good"] if record.tie else ["chosen", "rejected"]
        return names, [record.chosen, record.rejected]
    if isinstance(record, Ranking):
        order = sorted(range(len(record.ranks)), key=record.ranks.__getitem__)
        return [f"rank {record.ranks[i]:g}" for i in order], [record.completions[i] for i in order]
    return [f"reward {record.reward:g}"], [record.completion]


def _lost(whole: dict, row: dict, tokenizer) -> list[bool]:
    """Whether the cut row lacks each token of the whole row: the prompt's beginning after <s>, or the answer's end."""
    before, left = (list(one["completion_mask"]).index(True) for one in (whole, row))
    begins = before > left and whole["input_ids"][0] == tokenizer.bos_id and left > 1
    lost = [at < before - left + begins and not (begins and at == 0) for at in range(before)]
    answer = len(row["input_ids"]) - left
    return lost + [at >= answer for at in range(len(whole["input_ids"]) - before)]


def _side(name: str, row: dict, cut: Sequence[bool], tokenizer) -> Side:
    ids = [int(i) for i in row["input_ids"]]
    texts, mask = token_texts(ids, tokenizer), row["completion_mask"]
    specials = [tokenizer.backend.id_to_token(i) in tokenizer.specials for i in ids]
    return Side(name, [Token(*one) for one in zip(ids, texts, map(bool, mask), specials, cut, strict=True)])


def token_texts(ids: Sequence[int], tokenizer) -> list[str]:
    """The text that each token adds to the tokens before it. Part of a character is shown as its token."""
    texts = []
    for at, token in enumerate(ids):
        start = tokenizer.decode(ids[at - 1 : at], specials=True) if at else ""
        both = tokenizer.decode(ids[max(at - 1, 0) : at + 1], specials=True)
        text = both[len(start) :] if both.startswith(start) else tokenizer.decode([token], specials=True)
        texts.append(text if text and "\ufffd" not in text else tokenizer.backend.id_to_token(token) or f"<{token}>")
    return texts


def batch_rows(items: Iterable[Any], tokenizer) -> list[tuple[str, list[Side]]]:
    """(FILE:LINE, sides) of each item of a loader's batch. Cut tokens are no longer known, only their number."""
    shown = []
    for item in items:
        rows, where = (item.rows, item.where) if hasattr(item, "rows") else ([item], item["where"])
        names = ["conversation" if any(row["completion_mask"]) else "prompt" for row in rows]
        if len(rows) > 1:
            names = [f"rank {rank:g}" for rank in item.ranks] if len(rows) > 2 else ["chosen", "rejected"]
        lost = [f" ({row['num_cut']} tokens were cut)" if row["num_cut"] else "" for row in rows]
        sides = [
            _side(n + c, row, [False] * len(row["input_ids"]), tokenizer)
            for n, c, row in zip(names, lost, rows, strict=True)
        ]
        shown.append((where, sides))
    return shown


def pack_starts(rows: Sequence[list[Side]]) -> tuple[list[Token], dict[int, str]]:
    """(tokens of the packed stream of a forward, {start: the block or further answer that begins there})."""
    sides = [side for row in rows for side in row]
    kept = [[token for token in side.tokens if not token.cut] for side in sides]
    ids = [torch.tensor([token.id for token in row]) for row in kept]
    prompts = [next((at for at, token in enumerate(row) if token.target), len(row)) for row in kept]
    layout = lay_out(ids, prompts)
    stream: list[Token] = [Token(0, "", False, False)] * layout.size
    starts = {start: f"block at {start}" for start, *_ in layout.cuts}
    for row, prompt, base, offset in zip(kept, prompts, layout.bases, layout.offsets, strict=True):
        for at, token in enumerate(row):
            stream[base + at if at < prompt else offset + at] = token
        if offset != base and offset + prompt not in starts:
            starts[offset + prompt] = f"answer at {offset + prompt}"
    return stream, starts


def show(directory: Path, name: str, title: str, rows: Sequence[tuple[str, list[Side]]], notes: Sequence[str]) -> Path:
    """Print the rows and write `name`.html. Returns its path."""
    console = Console(highlight=False, soft_wrap=True)
    for where, sides in rows:
        for side in sides:
            console.print(Text(f"{where}  {side.title}", style="bold"))
            console.print(terminal_text(side.tokens))
    blocks = [bullets(notes), STYLE, LEGEND]
    for where, sides in rows:
        columns = "".join(f'<div class="side">{paragraph(s.title)}{tokens_html(s.tokens)}</div>' for s in sides)
        blocks += [heading(where), f'<div class="row">{columns}</div>']
    stream, starts = pack_starts([sides for _, sides in rows])
    blocks += [
        heading("As one pack"),
        paragraph(
            f"{len(stream)} tokens in {sum(text.startswith('block') for text in starts.values())} blocks. A token sees "
            "the tokens before it in its block (an answer sees its prompt and itself). Its position counts from the "
            "block's "
            "beginning. No token sees another block."
        ),
        tokens_html(stream, starts),
    ]
    path = directory / f"{name}.html"
    write_page(path, title, *blocks)
    return path


def tokens_html(tokens: Sequence[Token], starts: dict[int, str] | None = None) -> str:
    """Tokens as HTML spans. `starts` adds a mark at the beginning of each document."""
    spans = []
    for at, token in enumerate(tokens):
        if starts and at in starts:
            spans.append(("<br>" if at else "") + f'<span class="border">{escape(starts[at])}</span>')
        kinds = [kind for kind in ("target", "special", "cut") if getattr(token, kind)]
        text = (
            escape(token.text)
            .replace("\n", '<span class="break">⏎</span>\n')
            .replace("\t", '<span class="break">⇥</span>')
        )
        tooltip = f"token {token.id} at {at}: {', '.join(kinds) or 'context'}"
        spans.append(f'<span class="{" ".join(["t", *kinds])}" title="{tooltip}">{text}</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'


def terminal_text(tokens: Sequence[Token]) -> Text:
    """Tokens in colours: targets green, special tokens magenta, cut tokens red and struck out, context plain."""
    text = Text()
    for token in tokens:
        colour = "red strike" if token.cut else "black on green" if token.target else "default"
        text.append(
            printable(token.text).replace("\n", "⏎\n"),
            style=f"bold magenta {'on green' * token.target}" if token.special and not token.cut else colour,
        )
    return text


def show_first_batch(wanted: bool, run, tokenizer, *loaders: Loader | None) -> None:
    """view=true: show the rows of the first step in the terminal and as first_batch.html.

    Rank 0 shows its own share.
    """
    if not wanted or not run.is_main:
        return
    items = [item for loader in loaders if loader is not None for item in loader.peek()]
    notes = [f"{len(items)} items of step {run.step + 1}, of this rank; tokens that were cut are counted, not shown"]
    path = show(run.dir, "first_batch", "The first batch", batch_rows(items, tokenizer), notes)
    run.terminal.say(f"the first batch, token by token: {path}")
