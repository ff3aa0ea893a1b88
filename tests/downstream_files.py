"""A few examples of every task of the paper, in the columns that its public dataset has."""

import json
import pathlib

EXAMPLES = 4  # of the split that is measured
_NOUNS = ("river", "lamp", "garden", "engine", "letter", "window", "basket", "bridge")


def _rows(kind: str, count: int, first: int = 0) -> list[dict]:
  return [_row(kind, i) for i in range(first, first + count)]


def _row(kind: str, i: int) -> dict:
  a, b, c, d = (_NOUNS[(i + k) % len(_NOUNS)] for k in range(4))
  story = f"The {a} stood near the {b}. Every morning a man looked at the {a} and at the {c}."
  choices = {"text": [a, b, c, d], "label": ["A", "B", "C", "D"]}
  pair = {"premise": story, "hypothesis": f"The {a} is near the {b}.", "label": i % 3, "idx": i}
  schema = f"The {a} did not fit beside the {b} because it was too large."
  problems = [
    {"question": "The man looked at the  _  .", "answer": "A", "options": [a, b, c, d]},
    {"question": f"What is near the {b}?", "answer": "ABCD"[i % 4], "options": [b, c, d, a]},
  ]
  match kind:
    case "triviaqa":
      return {"question": f"What is near the {a}", "answer": {"value": b, "aliases": [b, c]}}
    case "nq_open":
      return {"question": f"what is near the {a}", "answer": [b, c]}
    case "webqs":
      return {"url": "", "question": f"what is near the {a}?", "answers": [c, b]}
    case "lambada":
      return {"text": f"{story} At last he reached the {a}"}
    case "hellaswag":
      endings = [f"opens the {x} [step] and leaves." for x in (a, b, c, d)]
      text = {"activity_label": "Repairing", "ctx_a": story, "ctx_b": "he", "ctx": f"{story} He"}
      return {"ind": i, **text, "endings": endings, "label": str(i % 4)}
    case "storycloze":
      sentences = {f"input_sentence_{k}": f"Part {k} is about the {a}." for k in (1, 2, 3, 4)}
      quiz = {"sentence_quiz1": f"He kept the {a}.", "sentence_quiz2": f"He lost the {b}."}
      return {"story_id": str(i), **sentences, **quiz, "answer_right_ending": 1 + i % 2}
    case "winograd":
      at = schema.index(" it ") + 1
      options = [f"The {a}", f"The {b}"]
      gap = {"pronoun": "it", "pronoun_loc": at, "quote": "it was too large", "quote_loc": at}
      return {"text": schema, **gap, "options": options, "label": i % 2, "source": "test"}
    case "winogrande":
      sentence = schema.replace(" it ", " _ ")
      return {"sentence": sentence, "option1": a, "option2": b, "answer": str(1 + i % 2)}
    case "race":
      return {"article": story, "problems": repr(problems)}
    case "piqa":
      return {"goal": f"carry a {a}", "sol1": f"use a {b}", "sol2": f"use a {c}", "label": i % 2}
    case "arc":
      question = f"What is near the {b}?"
      return {"id": str(i), "question": question, "choices": choices, "answerKey": "ABCD"[i % 4]}
    case "openbookqa":
      stem = f"Near the {b} there is a"
      return {"id": str(i), "question_stem": stem, "choices": choices, "answerKey": "ABCD"[i % 4]}
    case "boolq":
      return {"question": f"is the {a} near the {b}", "passage": story, "label": i % 2, "idx": i}
    case "copa":
      text = {"premise": f"The {a} fell.", "choice1": f"The {b} broke.", "choice2": "It rained."}
      return {**text, "question": ("cause", "effect")[i % 2], "label": i % 2, "idx": i}
    case "rte":
      return {**pair, "label": i % 2}
    case "pair":
      return pair
    case "wic":
      first, second = f"A {a} by the road.", f"He saw the {a}."
      spans = {"start1": 2, "end1": 2 + len(a), "start2": 11, "end2": 11 + len(a)}
      return {"word": a, "sentence1": first, "sentence2": second, **spans, "label": i % 2, "idx": i}
    case "multirc":
      question = {"paragraph": story, "question": f"What is near the {b}?", "answer": f"The {a}"}
      return {**question, "label": i % 2, "idx": {"paragraph": 0, "question": i, "answer": 0}}
    case "record":
      passage = f"{story}\n@highlight\nThe {a} is old\n@highlight\nThe {b} is new"
      names = {"entities": [a, b, c, a], "answers": [a, a]}
      return {"passage": passage, "query": "A man repaired the @placeholder.", **names, "idx": i}
  raise ValueError(kind)


# Task -> (kind of its examples, the split that is measured, the others).
SPLITS = {
  "triviaqa": ("triviaqa", "validation", "train"),
  "nq_open": ("nq_open", "validation", "train"),
  "matformer_webqs": ("webqs", "test", "train"),
  "lambada_openai": ("lambada", "test"),
  "hellaswag": ("hellaswag", "validation", "train"),
  "storycloze_2016": ("storycloze", "test", "validation"),
  "matformer_wsc285": ("winograd", "test"),
  "winogrande": ("winogrande", "validation", "train"),
  "wsc273": ("winograd", "test"),
  "race": ("race", "test"),
  "matformer_race_middle": ("race", "test"),
  "piqa": ("piqa", "validation", "train"),
  "arc_challenge": ("arc", "test", "train", "validation"),
  "arc_easy": ("arc", "test", "train", "validation"),
  "openbookqa": ("openbookqa", "test", "train", "validation"),
  "boolq": ("boolq", "validation", "train"),
  "copa": ("copa", "validation", "train"),
  "sglue_rte": ("rte", "validation", "train"),
  "wic": ("wic", "validation", "train"),
  "multirc": ("multirc", "validation", "train"),
  "matformer_record": ("record", "validation", "train"),
  "cb": ("pair", "validation", "train"),
  "anli_r1": ("pair", "test_r1", "train_r1", "dev_r1"),
  "anli_r2": ("pair", "test_r2", "train_r2", "dev_r2"),
  "anli_r3": ("pair", "test_r3", "train_r3", "dev_r3"),
}


def write(directory: pathlib.Path) -> pathlib.Path:
  """DIRECTORY/task/split.jsonl of every task."""
  for task, (kind, measured, *others) in SPLITS.items():
    folder = directory / task
    folder.mkdir(parents=True)
    for n, split in enumerate((measured, *others)):
      rows = _rows(kind, 2 if n else EXAMPLES, 10 * n)
      (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return directory
