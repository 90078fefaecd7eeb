"""benchmarks/xml_closing.py: the counter by hand-written texts, and a real model through the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from gfrnn.config import UserError
from launch import ROOT, SMALL, environment, train, warm_python
from xml_closing import KINDS, count, openings, share, total

# kind, prompt, sample, bytes left, (opened, closed, left open by the prompt, of these closed, closing nothing)
CASES = [
    ("tag", b"", b"<a>x</a>", 0, (1, 1, 0, 0, 0)),
    ("tag", b"", b"<a>x", 0, (1, 0, 0, 0, 0)),
    ("tag", b"", b"<a><b>x</b></a>", 0, (2, 2, 0, 0, 0)),
    ("tag", b"", b"<a><b>x</a></b>", 0, (2, 0, 0, 0, 0)),  # crossed: neither
    ("tag", b"", b"<a><b></c></a>", 0, (2, 1, 0, 0, 0)),  # </c> takes <b> away, wrongly
    ("tag", b"", b"<a><b></a>", 0, (2, 0, 0, 0, 0)),  # <b> is in the way
    ("tag", b"", b"</a><a></a>", 0, (1, 1, 0, 0, 1)),
    ("tag", b"", b'<text xml:space="preserve">x</text><x /><x/><br>', 0, (1, 1, 0, 0, 0)),
    ("tag", b"", b"a < b > c <3> </ a>", 0, (0, 0, 0, 0, 0)),
    ("tag", b"<page><title>A", b"</title></page>", 0, (0, 0, 2, 2, 0)),
    ("tag", b"<page><title>A", b"</text></page>", 0, (0, 0, 2, 1, 0)),
    ("tag", b"<page><title>A</title>", b"<x>", 0, (1, 0, 1, 0, 0)),
    ("tag", b"<page><title>A", b"", 0, (0, 0, 2, 0, 0)),
    ("tag", b"<page><ti", b"tle></title>", 0, (1, 1, 1, 0, 0)),  # whose last byte is the sample's
    ("tag", b"<page><id>1</", b"id></page>", 0, (0, 0, 2, 2, 0)),
    ("tag", b"", b"<a></a><b></b>", 4, (2, 2, 0, 0, 0)),
    ("tag", b"", b"<a></a><b></b>", 5, (1, 1, 0, 0, 0)),
    ("tag", b"", b"<a><b></b></a>", 9, (1, 1, 0, 0, 0)),  # <b> is not counted, and <a> is closed past it
    ("entity tag", b"", b"&lt;ref&gt;x&lt;/ref&gt; &lt;ref name=&quot;a&quot; /&gt; &lt;BR&gt;", 0, (1, 1, 0, 0, 0)),
    ("entity tag", b"", b"&lt;REF x=1&gt;x&lt;/ref&gt;&lt;!-- b --&gt;<a></b>", 0, (1, 1, 0, 0, 0)),
    ("entity tag", b"&lt;sup&gt;", b"&lt;/sub&gt;", 0, (0, 0, 1, 0, 0)),
    ("link", b"", b"[[Image:a|[[b]] c]] [x] [[d]", 0, (3, 2, 0, 0, 0)),
    ("link", b"[[", b"a]] b]]", 0, (0, 0, 1, 1, 1)),
    ("template", b"{{", b"a|{{b}}}} }}", 0, (1, 1, 1, 1, 1)),
]


@pytest.mark.parametrize(("kind", "prompt", "sample", "left", "expected"), CASES)
def test_counts(kind: str, prompt: bytes, sample: bytes, left: int, expected: tuple[int, ...]) -> None:
    found = count(kind, prompt, sample, left)
    closed = found.closed.total()
    assert (found.opened.total(), closed, found.prompt_opened, found.prompt_closed, found.stray) == expected


def test_totals_are_of_all_samples() -> None:
    found = total("tag", [b"<p>"] * 3, [b"</p><a></a>", b"<a>", b"<b></c>"], 0)
    assert (found["opened"]["closed"], found["opened"]["opened"]) == (1, 3)
    assert (found["left_open_by_prompt"]["closed"], found["left_open_by_prompt"]["opened"]) == (1, 3)
    assert found["closed_of_opened_by_name"] == {"a": [1, 2], "b": [0, 1]}
    assert found["opened"]["share"] == pytest.approx(1 / 3)
    assert found["opened"]["low"] < 1 / 3 < found["opened"]["high"]


def test_the_interval_is_wilson_s() -> None:
    """Of samples that opened one tag each, 80 of 101 closed: their variance is that of 100 independent trials."""
    found = share([1] * 80 + [0] * 21 + [0] * 50, [1] * 101 + [0] * 50)
    p, n, z = 80 / 101, 100, 1.959964
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=1e-6)
    # samples in which all tags share one fate are worth as many trials as there are samples
    alike = share([4] * 80 + [0] * 21, [4] * 101)
    assert (alike["low"], alike["high"]) == pytest.approx(expected, abs=1e-6)
    assert share([3], [3])["low"] < 0.3  # one sample is one trial
    assert share([2, 2], [2, 2])["high"] == 1.0
    assert share([0], [0])["share"] is None


def test_openings_end_with_a_tag_open() -> None:
    page = b"<page><title>T</title><text>" + b"x" * 40 + b"</text></page>\n"
    text = page * 5
    found = openings(text, 3, 35, 30)
    assert len(found) == 3
    for prompt, rest in found:
        assert prompt == page[:35]
        assert (prompt + rest) in text
        assert len(rest) == 30
    assert len(openings(text, 100, 35, 30)) == 5  # all there are, once each
    assert len(openings(text, 100, 35, 70)) == 4  # the last page has not so many bytes after the prompt
    for prompt_bytes, length in ((len(page) - 1, 30), (35, 1000)):
        with pytest.raises(UserError, match="no <page> with a tag open"):
            openings(text, 3, prompt_bytes, length)


def test_a_real_model_is_counted(tmp_path: Path) -> None:
    # a text that a tiny net learns a little of: pages of one kind
    text = b"".join(
        b"<page>\n  <title>%d</title>\n  [[a]] {{b}} &lt;i&gt;c&lt;/i&gt;\n</page>\n" % k for k in range(900)
    )
    (tmp_path / "pages").write_bytes(text)
    data = ["--corpus-file", str(tmp_path / "pages"), "--data-dir", str(tmp_path / "data")]
    status, _, err = train(tmp_path / "run", [*SMALL, *data, "--max-updates", "30"])
    assert status == 0, err
    sizes = ["--samples", "7", "--length", "150", "--prompt-bytes", "20", "--left", "30"]
    command = [ROOT / "benchmarks/xml_closing.py", tmp_path / "run", *sizes]
    files = ["--json", tmp_path / "found.json", "--samples-dir", tmp_path / "samples"]
    cold = [sys.executable, *command, *files]
    done = subprocess.run(cold, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    samples = [path.read_bytes() for path in sorted((tmp_path / "samples").iterdir())]
    assert len(set(samples)) == 7  # draws of their own
    assert {len(sample) for sample in samples} == {170}
    (model,) = found["models"].values()
    for kind in KINDS:
        counts = [count(kind, sample[:20], sample[20:], 30) for sample in samples]
        assert model[kind]["opened"]["opened"] == sum(each.opened.total() for each in counts)
        assert model[kind]["left_open_by_prompt"]["closed"] == sum(each.prompt_closed for each in counts)
    assert model["tag"]["left_open_by_prompt"]["opened"] == 14  # <page><title> of each
    for kind in ("link", "template", "entity tag"):  # the ceiling: this text closes all of them
        real = found["real"][kind]["opened"]
        assert real["closed"] == real["opened"] > 0
    assert "real text" in done.stdout
    wrong = warm_python(*command, "--left", "150")
    assert wrong.returncode == 2
    assert "--left is 150" in wrong.stderr
