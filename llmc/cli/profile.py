"""llmc profile show: which shapes arrived, what ran them, and what that cost."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli import add_command
from llmc.errors import ModelError

if TYPE_CHECKING:
    from llmc.runtime.profile import Heat, Profile

BAR = 40  # characters of the longest bar


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "profile", run,
        "Show a profile of shapes (a .json file of the cache's profiles folder).",
        "llmc profile show ~/.cache/llmc/profiles/0a1b.json --html shapes.html")
    parser.add_argument("action", choices=("show",))
    parser.add_argument("file", type=Path)
    parser.add_argument("--top", type=int, default=20, help="shapes to show (default: 20)")
    parser.add_argument("--html", type=Path, help="write a self-contained page there as well")


def run(arguments) -> int:
    from llmc.runtime.profile import read_profile

    profile = read_profile(arguments.file)
    if profile is None:
        reason = "is no profile" if arguments.file.is_file() else "no such file"
        raise ModelError(f"{arguments.file}: {reason}; `llmc cache ls` lists those there are")
    rows = [Row(profile, heat) for heat in profile.hottest()]
    print(histogram(rows, profile.names, max(1, arguments.top)))
    for (low, high), verdict in sorted(profile.ranges.items()):
        print(f"code for {low} to {high} tokens: {verdict.state} {verdict.gain:+.1%}")
    if arguments.html:
        arguments.html.write_text(page(rows, profile.names))
    return 0


class Row:
    """One shape: its share of all time, and what runs it."""

    def __init__(self, profile: Profile, heat: Heat):
        self.heat = heat
        total = sum(cell.weighted_seconds for cell in profile.cells.values())
        self.share = heat.seconds / total if total else 0.0
        self.variants = sorted(name for shape, name in profile.cells if shape == heat.shape)
        verdict = profile.verdicts.get(heat.shape)
        self.verdict = "" if verdict is None else (
            f"{verdict.state} {verdict.gain:+.1%}" if verdict.state != "failed" else "failed")

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.heat.shape))

    @property
    def tier(self) -> str:
        """The best tier that ran this shape."""
        if any("=" in name and ".." not in name for name in self.variants):
            return "exact"
        return "generic" if self.variants == ["generic"] else "ranged"


def histogram(rows: list[Row], names: tuple[str, ...], top: int) -> str:
    """Shapes by time, as text, and what remains on generic code."""
    longest = max((row.share for row in rows), default=0.0) or 1.0
    lines = [f"{'x'.join(names):24} {'calls':>9} {'ms/call':>9} {'time':>6}  tier     own code"]
    for row in rows[:top]:
        bar = "#" * round(BAR * row.share / longest)
        lines.append(f"{row.shape:24} {row.heat.calls:9.0f} {row.heat.mean * 1e3:9.3f} "
                     f"{row.share:6.1%}  {row.tier:8} {row.verdict:16} {bar}")
    if rest := rows[top:]:
        lines.append(f"{len(rest)} more shapes {sum(row.share for row in rest):>40.1%}")
    lines.append(summary(rows))
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    shares = {tier: sum(row.share for row in rows if row.tier == tier)
              for tier in ("exact", "ranged", "generic")}
    return "time by tier: " + ", ".join(f"{tier} {share:.1%}" for tier, share in shares.items())


def page(rows: list[Row], names: tuple[str, ...]) -> str:
    """The same as one HTML page that needs nothing else."""
    longest = max((row.share for row in rows), default=0.0) or 1.0
    body = "\n".join(
        f"<tr class={row.tier}><td>{row.shape}<td>{row.heat.calls:.0f}"
        f"<td>{row.heat.mean * 1e3:.3f}<td>{row.share:.1%}<td>{row.tier}"
        f"<td>{html.escape(row.verdict)}"
        f"<td><i style='width:{300 * row.share / longest:.0f}px'></i>" for row in rows)
    heads = "".join(f"<th>{head}" for head in (
        html.escape(" x ".join(names)), "calls", "ms a call", "time", "tier", "own code", ""))
    return (f"<!doctype html><meta charset=utf-8><title>llmc profile</title><style>{STYLE}</style>"
            f"<h1>Shapes by time</h1><p>{summary(rows)}<table><tr>{heads}\n{body}\n</table>\n")


STYLE = ("body{font:14px sans-serif;margin:2em}td,th{padding:2px 12px;text-align:right}"
         "td:last-child{text-align:left}i{display:block;height:12px;background:#999}"
         ".exact i{background:#2a7}.ranged i{background:#48c}")
