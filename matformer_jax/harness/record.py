"""ReCoRD: which of a passage's entities fills the gap of a sentence (functions of record.yaml).

The harness's own task is scored by a function of transformers, which this package does not need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GAP = "@placeholder"


def process_docs(dataset):
  """Entities and answers each once, in one order."""
  unique = lambda doc: {name: sorted(set(doc[name])) for name in ("entities", "answers")}
  return dataset.map(unique)


def doc_to_text(doc: Mapping[str, Any]) -> str:
  """The passage, and its highlights as a list that the filled sentence continues."""
  passage, *highlights = doc["passage"].strip().split("\n@highlight\n")
  return f"{passage}\n\n" + "".join(f"  - {line}.\n" for line in highlights)


def doc_to_target(doc: Mapping[str, Any]) -> str:
  """The sentence with an answer."""
  return _fill(doc, doc["answers"][0])


def doc_to_choice(doc: Mapping[str, Any]) -> list[str]:
  """The sentence with each entity."""
  return [_fill(doc, entity) for entity in doc["entities"]]


def process_results(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict:
  """Accuracy: whether the likeliest entity is one of the answers."""
  likeliest = max(range(len(results)), key=lambda i: results[i][0])
  words = lambda text: text.lower().split()
  chosen = words(doc["entities"][likeliest])
  return {"acc": float(any(chosen == words(answer) for answer in doc["answers"]))}


def _fill(doc: Mapping[str, Any], entity: str) -> str:
  return f"  - {doc['query']}".replace(GAP, entity)
