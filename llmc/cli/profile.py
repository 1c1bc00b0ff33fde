"""llmc profile show: which shapes arrived, what ran them, what that cost, and what is wasted."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli import add_command
from llmc.errors import ModelError

if TYPE_CHECKING:
    from llmc.runtime.profile import Heat, Profile

BAR = 30  # characters of the longest bar
WIDEST = 200  # pixels of it
TIERS = ("exact", "ranged", "generic")
MARKS = {"exact": "#", "ranged": "=", "generic": "-"}
HEADS = ("calls", "ms/call", "time", "waste", "tier", "own code")


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
    print(histogram(profile, rows, max(1, arguments.top)))
    if arguments.html:
        arguments.html.write_text(page(profile, rows))
    return 0


class Row:
    """One shape: its share of all time, what runs it, and what of that is wasted."""

    def __init__(self, profile: Profile, heat: Heat):
        from llmc.runtime.tiers import waste_of

        self.heat = heat
        cells = {name: cell for (shape, name), cell in profile.cells.items() if shape == heat.shape}
        total = sum(cell.weighted_seconds for cell in profile.cells.values()) or 1.0
        self.share = heat.seconds / total
        verdict = profile.verdicts.get(heat.shape)
        self.verdict = "" if verdict is None else (
            f"{verdict.state} {verdict.gain:+.1%}" if verdict.state != "failed" else "failed")
        self.tiers = {tier: sum(cell.weighted_seconds for name, cell in cells.items()
                                if tier_of(name) == tier) / total for tier in TIERS}
        sizes = dict(zip(profile.names, heat.shape, strict=True))
        on_device = profile.target.startswith("nvptx")
        self.waste = waste_of(sizes["tokens"], on_device) if sizes.get("tokens") else None
        # A trial's two variants have run it; the verdict says which of them does now.
        others = [tier for tier in TIERS if tier != "exact" or verdict is None]
        kept = verdict is not None and verdict.state == "kept"
        self.tier = "exact" if kept else max(others, key=lambda tier: self.tiers[tier])

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.heat.shape))

    def cells(self) -> tuple[str, ...]:
        """What HEADS name."""
        waste = "" if self.waste is None else f"{self.waste:.1%}"
        return (f"{self.heat.calls:.0f}", f"{self.heat.mean * 1e3:.3f}", f"{self.share:.1%}", waste,
                self.tier, self.verdict)


def tier_of(variant: str) -> str:
    """By its name."""
    if "=" in variant:
        return "ranged" if ".." in variant else "exact"
    return "generic" if variant == "generic" else "ranged"


def histogram(profile: Profile, rows: list[Row], top: int) -> str:
    """Shapes by time as text: a bar has a mark for each tier's part."""
    longest = max((row.share for row in rows), default=0.0) or 1.0
    first = "x".join(profile.names)
    width = max([len(first), *(len(row.shape) for row in rows[:top])])
    lines = [f"{first:{width}} {_line(HEADS)}".rstrip()]
    lines += [f"{row.shape:{width}} {_line(row.cells())} {bar(row, longest)}" for row in rows[:top]]
    if rest := rows[top:]:
        lines.append(f"{len(rest)} more shapes: {sum(row.share for row in rest):.1%} of the time")
    return "\n".join([*heading(profile), *lines, *ranges(profile), *summary(rows)])


def _line(cells: tuple[str, ...]) -> str:
    calls, mean, share, waste, tier, verdict = cells
    return f"{calls:>9} {mean:>9} {share:>6} {waste:>6}  {tier:8} {verdict:16}"


def bar(row: Row, longest: float) -> str:
    """The row's share of the time."""
    return "".join(MARKS[tier] * round(BAR * row.tiers[tier] / longest) for tier in TIERS)


def heading(profile: Profile) -> list[str]:
    return [f"{profile.model} on {profile.target}"] if profile.model else []


def ranges(profile: Profile) -> list[str]:
    return [f"code for {low} to {high} tokens: {verdict.state} {verdict.gain:+.1%}"
            for (low, high), verdict in sorted(profile.ranges.items())]


def summary(rows: list[Row]) -> list[str]:
    """What remains to be gained."""
    shares = {tier: sum(row.tiers[tier] for row in rows) for tier in TIERS}
    wasted = sum(row.share * (row.waste or 0.0) / (1.0 + (row.waste or 0.0)) for row in rows)
    return ["time by tier: " + ", ".join(f"{tier} ({MARKS[tier]}) {share:.1%}"
                                         for tier, share in shares.items()),
            f"waste, rows of tiles that hold no token: at most {wasted:.1%} of the time"]


def page(profile: Profile, rows: list[Row]) -> str:
    """The same as one HTML page that needs nothing else."""
    longest = max((row.share for row in rows), default=0.0) or 1.0
    heads = "".join(f"<th>{html.escape(head)}" for head in (" x ".join(profile.names), *HEADS, ""))
    body = "\n".join(
        f"<tr><td>{row.shape}" + "".join(f"<td>{html.escape(cell)}" for cell in row.cells())
        + "<td>" + "".join(f"<i class={tier} style='width:{WIDEST * part / longest:.0f}px'></i>"
                           for tier, part in row.tiers.items() if part) for row in rows)
    words = "".join(f"<p>{html.escape(line)}" for line in (*heading(profile), *ranges(profile)))
    legend = " ".join(f"<span><i class={tier}></i> {tier}</span>" for tier in TIERS)
    remains = "".join(f"<p>{html.escape(line)}" for line in summary(rows))
    return (f"<!doctype html><html lang=en><meta charset=utf-8>"
            f"<meta name=viewport content='width=device-width'><title>llmc profile</title>"
            f"<style>{STYLE}</style><h1>Shapes by time</h1>{words}{remains}<p>{legend}"
            f"<div><table><tr>{heads}\n{body}\n</table></div>\n")


STYLE = (":root{color-scheme:light dark}"
         "body{font:14px/1.5 system-ui,sans-serif;margin:2em;max-width:75em}h1{font-size:1.4em}"
         "p{margin:.3em 0}div{overflow-x:auto;margin-top:1em}table{border-collapse:collapse}"
         "td,th{padding:3px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid #8884;"
         "font-variant-numeric:tabular-nums}td:last-child{text-align:left}"
         "i{display:inline-block;height:12px;min-width:1px}span i{width:12px}span{margin-right:1em}"
         ".exact{background:#2a7}.ranged{background:#48c}.generic{background:#999}")
