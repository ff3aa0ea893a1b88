"""What experiments leave for people: a CSV each, plots, and one report of all claims."""

from __future__ import annotations

import base64
from collections.abc import Sequence
import dataclasses
import html
import pathlib

from matformer_jax import storage, tables
from matformer_jax.experiments.lab import Finding

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .7rem; text-align: left;
border-bottom: 1px solid #ccc; vertical-align: top } img { max-width: 100% }
pre { overflow-x: auto; background: #f6f6f6; padding: .7rem }
.holds { color: #060 } .does { color: #a00 } .undecided { color: #850 }
"""


@dataclasses.dataclass(frozen=True)
class Section:
  """An experiment's part of the report.

  Attributes:
    name: figure2.
    item: what it is in the paper, Figure 2.
    about: in one line.
  """

  name: str
  item: str
  about: str
  finding: Finding


def write(
  root: pathlib.Path, title: str, facts: Sequence[str], sections: Sequence[Section]
) -> None:
  """report.md, report.html and a CSV for every section, into `root`; the plots are there.

  Args:
    facts: what was run, where, and how long it took: a line each.
  """
  for section in sections:
    tables.write_csv(root / f"{section.name}.csv", section.finding.rows)
  storage.replace_file(root / "report.md", _markdown(title, facts, sections).encode())
  storage.replace_file(root / "report.html", _html(root, title, facts, sections).encode())


def _markdown(title: str, facts: Sequence[str], sections: Sequence[Section]) -> str:
  lines = [f"# {title}", "", *(f"- {fact}" for fact in facts), ""]
  lines += ["| item | claim | paper | here | |", "| --- | --- | --- | --- | --- |"]
  for s in sections:
    for claim in s.finding.claims:
      cells = (s.item, claim.says, claim.paper, claim.ours, f"**{claim.verdict}**")
      lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
  for s in sections:
    lines += ["", f"## {s.item}: {s.about}", ""]
    for name, text in s.finding.tables:
      lines += [f"{name}:", "", "```text", text, "```", ""]
    lines += [f"![{caption}]({path.name})" for path, caption in s.finding.plots]
  return "\n".join(lines) + "\n"


def _html(root: pathlib.Path, title: str, facts: Sequence[str], sections: Sequence[Section]) -> str:
  """One file, with the plots in it."""
  escape = html.escape
  parts = [
    f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>",
    f"<style>{_STYLE}</style><h1>{escape(title)}</h1><ul>",
    *(f"<li>{escape(fact)}</li>" for fact in facts),
    "</ul><table><tr><th>item<th>claim<th>paper<th>here<th></tr>",
  ]
  for s in sections:
    for c in s.finding.claims:
      cells = "".join(f"<td>{escape(cell)}" for cell in (s.item, c.says, c.paper, c.ours))
      parts.append(f"<tr>{cells}<td class='{c.verdict.split()[0]}'>{c.verdict}</tr>")
  parts.append("</table>")
  for s in sections:
    parts.append(f"<h2 id='{s.name}'>{escape(s.item)}: {escape(s.about)}</h2>")
    for name, text in s.finding.tables:
      parts.append(f"<p>{escape(name)}</p><pre>{escape(text)}</pre>")
    for path, caption in s.finding.plots:
      data = base64.b64encode((root / path.name).read_bytes()).decode()
      parts.append(f"<img alt='{escape(caption)}' src='data:image/png;base64,{data}'>")
  return "\n".join(parts) + "</html>\n"
