"""How many of the tags and brackets that a model opens it also closes, beside those of real text.

    python benchmarks/xml_closing.py runs/gf-lstm-5x700 runs/lstm --samples 100 --length 2000 --json xml.json

Each model continues real openings: --prompt-bytes bytes of validation text from a <page> on, with a tag open at their
end; where there are fewer such pages than samples, pages are used again, with other draws. Of a sample are counted,
each kind on its own (`KINDS`):

    tag         <page>, <text xml:space="preserve">, </text>; those that close themselves, <x />, are left out
    entity tag  &lt;ref&gt;, &lt;/ref&gt;: tags of the article, escaped as in enwik8. <x /> is left out, and so are
                <br>, <hr>, <img>, which need no end
    link        [[ and ]]
    template    {{ and }}

What opens is counted if its last byte was written by the model and at least --left bytes follow. It is closed if the
next closing one that belongs to none opened in between has its name: a closing one takes what was opened last off a
stack, whatever that is called, and is right if the names agree. So <a><b></a></b> closes neither. What is open where
the sample ends is not closed. What the prompt left open is counted apart, in the same way.

The ceiling is the same count on the text that really follows the prompts, as long. Intervals (95 %) are Wilson's, for
as many independent trials as have the variance between the samples that opened any (gfrnn.training.grid.ratio): tags of
one sample are not independent. Names of tags are in the JSON.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from gfrnn import cli
from gfrnn.config import UserError
from gfrnn.data import load_text, read_bytes
from gfrnn.nn import LanguageModel
from gfrnn.runs import checkpoint_origin, find_checkpoint, load_model, versions, write_json
from gfrnn.training.evaluate import progress_bar
from gfrnn.training.grid import ratio
from gfrnn.training.sample import device_of, generate_all

# what closes is in the first group, the name in the second, what follows it in the third
_TAG = re.compile(rb"<(/?)([A-Za-z][\w:.-]*)((?:\s[^<>]*)?/?)>")
_ENTITY_TAG = re.compile(rb"&lt;(/?)([A-Za-z][\w:.-]*)((?:\s(?:(?!&[lg]t;)[^<>])*)?/?)&gt;")
_LINK = re.compile(rb"\[\[|\]\]")
_TEMPLATE = re.compile(rb"\{\{|\}\}")
_NEED_NO_END = {b"br", b"hr", b"img"}


class Mark(NamedTuple):
    """Something that opens or closes."""

    end: int
    """Position after its last byte."""
    name: bytes
    opens: bool


def tags(pattern: re.Pattern[bytes], text: bytes) -> Iterator[Mark]:
    for found in pattern.finditer(text):
        closing, name, rest = found.groups()
        if not rest.endswith(b"/") and name.lower() not in _NEED_NO_END:
            yield Mark(found.end(), name.lower(), not closing)


def brackets(pattern: re.Pattern[bytes], text: bytes) -> Iterator[Mark]:
    for found in pattern.finditer(text):
        yield Mark(found.end(), b"", found.group() in (b"[[", b"{{"))


KINDS: dict[str, Callable[[bytes], Iterator[Mark]]] = {
    "tag": lambda text: tags(_TAG, text),
    "entity tag": lambda text: tags(_ENTITY_TAG, text),
    "link": lambda text: brackets(_LINK, text),
    "template": lambda text: brackets(_TEMPLATE, text),
}


@dataclass
class Count:
    """Of one kind in one sample."""

    opened: collections.Counter[bytes] = field(default_factory=collections.Counter)
    """By the sample, with enough left after it; by name."""
    closed: collections.Counter[bytes] = field(default_factory=collections.Counter)
    """Of these, rightly."""
    prompt_opened: int = 0
    """Open where the prompt ends."""
    prompt_closed: int = 0
    stray: int = 0
    """Closing ones in the sample, of nothing."""


def count(kind: str, prompt: bytes, sample: bytes, left: int) -> Count:
    """Of what `sample`, which follows `prompt`, opens with at least `left` bytes after it, and what it closes."""
    begin, last = len(prompt), len(prompt) + len(sample) - left
    marks = list(KINDS[kind](prompt + sample))
    stack: list[Mark] = []
    for mark in marks:
        if mark.end <= begin and mark.opens:
            stack.append(mark)
        elif mark.end <= begin and stack:
            stack.pop()
    found = Count(prompt_opened=len(stack))
    for mark in marks:
        if mark.end <= begin:
            continue
        if mark.opens:
            stack.append(mark)
            found.opened[mark.name] += mark.end <= last
        elif not stack:
            found.stray += 1
        elif (opening := stack.pop()).end <= begin:
            found.prompt_closed += opening.name == mark.name
        elif opening.end <= last:
            found.closed[mark.name] += opening.name == mark.name
    return found


def total(kind: str, prompts: Sequence[bytes], samples: Sequence[bytes], left: int) -> dict[str, Any]:
    """Of all samples: counts, shares with their intervals, and names."""
    counts = [count(kind, prompt, sample, left) for prompt, sample in zip(prompts, samples, strict=True)]
    opened = sum((each.opened for each in counts), collections.Counter[bytes]())
    closed = sum((each.closed for each in counts), collections.Counter[bytes]())
    names = {name.decode("latin-1"): [closed[name], n] for name, n in opened.most_common()}
    return {
        "opened": share([each.closed.total() for each in counts], [each.opened.total() for each in counts]),
        "left_open_by_prompt": share([each.prompt_closed for each in counts], [each.prompt_opened for each in counts]),
        "closing_nothing": sum(each.stray for each in counts),
        "closed_of_opened_by_name": names,
    }


def share(parts: list[int], wholes: list[int]) -> dict[str, Any]:
    """closed, opened, and the share of these with its interval; None where nothing was opened."""
    found: dict[str, Any] = {"closed": sum(parts), "opened": sum(wholes)}
    if not sum(wholes):
        return {**found, "share": None, "low": None, "high": None}
    counted = [pair for pair in zip(parts, wholes, strict=True) if pair[1]]  # samples that opened nothing say nothing
    value, low, high = ratio(*np.array(counted).T)
    return {**found, "share": value, "low": low, "high": high}


def openings(text: bytes, samples: int, prompt_bytes: int, length: int) -> list[tuple[bytes, bytes]]:
    """(prompt, what follows it, `length` bytes) of pages spread evenly over the text, a tag being open between the two.

    Fewer than asked for where the text has not so many. Raises UserError if it has none.
    """
    found = []
    for page in re.finditer(rb"<page>", text):
        cut = page.start() + prompt_bytes
        prompt, rest = text[page.start() : cut], text[cut : cut + length]
        if len(rest) == length and count("tag", prompt, b"", 0).prompt_opened:
            found.append((prompt, rest))
    if not found:
        raise UserError(
            f"the text has no <page> with a tag open {prompt_bytes} bytes later and {length} bytes after that: give a "
            "longer one with --text-file, or smaller --prompt-bytes and --length"
        )
    number = min(samples, len(found))
    return [found[k * len(found) // number] for k in range(number)]


def main() -> None:
    cli.run(_main)


def _main() -> None:
    args = arguments()
    text = source(args)
    pairs = openings(text, args.samples, args.prompt_bytes, args.length)
    device = device_of(args.device)
    prompts = [pairs[k % len(pairs)][0] for k in range(args.samples)]
    about = {name: getattr(args, name) for name in OPTIONS} | {"device": device, "versions": versions()}
    results: dict[str, Any] = {"about": {**about, "prompts": len(pairs), "date": time.strftime("%F")}, "models": {}}
    for run in args.runs:
        model, _, path = load_model(run)
        if not isinstance(model, LanguageModel):
            raise UserError(f"{run} is a model of programs; give one of text")
        begin = time.perf_counter()
        with progress_bar(run) as bar:
            options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed, "progress": bar}
            samples = generate_all(model.to(device), prompts, args.length, **options)
        found = {"checkpoint": str(path), "seconds": time.perf_counter() - begin}
        results["models"][run] = found | {kind: total(kind, prompts, samples, args.left) for kind in KINDS}
        if args.samples_dir is not None:
            args.samples_dir.mkdir(parents=True, exist_ok=True)
            for k, sample in enumerate(samples):
                (args.samples_dir / f"{len(results['models'])}-{k:04d}.txt").write_bytes(prompts[k] + sample)
    real_prompts, real = zip(*pairs, strict=True)
    results["real"] = {kind: total(kind, real_prompts, real, args.left) for kind in KINDS}
    show(results)
    if args.json is not None:
        write_json(args.json.resolve(), results)


OPTIONS = ("samples", "length", "prompt_bytes", "left", "temperature", "top_p", "seed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run or checkpoint folders, or names of models")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--length", type=int, default=2000, help="bytes of a sample")
    parser.add_argument("--prompt-bytes", type=int, default=500, help="of validation text, from a <page> on")
    parser.add_argument("--left", type=int, default=500, help="count what is opened so many bytes before the end")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-file", type=Path, help="take openings from this text; default: validation text")
    parser.add_argument("--corpus-file", type=Path, help="the corpus that the runs were trained on, if it has moved")
    parser.add_argument("--data-dir", type=Path, help="where corpora are kept, if not where the first run had them")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples-dir", type=Path, help="also write prompts and samples there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in ("samples", "length", "prompt_bytes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.left < args.length:
        parser.error(f"--left is {args.left}; it must be from 0 to less than --length")
    if not (args.temperature >= 0 and 0 < args.top_p <= 1):
        parser.error("--temperature must not be negative, and --top-p above 0 and at most 1")
    if args.json is not None:
        cli.check_writable("--json", args.json)
    return args


def source(args: argparse.Namespace) -> bytes:
    """The text that openings are taken from: held out, for every run. Raises UserError if it is not."""
    origins = {run: checkpoint_origin(find_checkpoint(run)) for run in args.runs}
    if args.text_file is not None:
        return bytes(read_bytes(args.text_file))
    first, _ = origins[args.runs[0]]
    corpus = load_text(first.data.moved(args.corpus_file, args.data_dir))
    for run, (_, md5) in origins.items():
        if md5 not in (None, corpus.md5):
            raise UserError(f"{run} was trained on another text than {corpus.name}: give one held out with --text-file")
    return bytes(corpus.valid)


def show(results: dict[str, Any]) -> None:
    about, rows = results["about"], {**results["models"], "real text": results["real"]}
    table = Table(
        title=f"Closed of opened, {about['samples']} samples of {about['length']} bytes, temperature "
        f"{about['temperature']:g}",
        caption=f"{about['prompts']} prompts of {about['prompt_bytes']} bytes; counted with {about['left']} bytes left",
    )
    for column in ("model", "what", "opened by the sample", "of which closed", "left open by the prompt", "closed"):
        table.add_column(column, justify="left" if column in ("model", "what") else "right")
    for name, found in rows.items():
        for kind in KINDS:
            cells = []
            for whose in ("opened", "left_open_by_prompt"):
                own = found[kind][whose]
                cells += [str(own["opened"]), percent(own)]
            table.add_row(name if kind == "tag" else "", kind, *cells, end_section=kind == "template")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def percent(own: dict[str, Any]) -> str:
    if own["share"] is None:
        return "-"
    value, low, high = (100 * own[name] for name in ("share", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
