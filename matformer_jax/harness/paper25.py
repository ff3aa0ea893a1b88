"""The 25 tasks of B.2, as the rows of Tables 9 to 13 have them."""

from __future__ import annotations

import dataclasses
import pathlib

TASKS_DIR = pathlib.Path(__file__).parent / "tasks"  # our own definitions of tasks


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table.

  Attributes:
    label: as the paper prints it.
    task: the harness's name of the task.
    metric: which of the task's metrics is shown; "" takes the first of METRICS that it has.
  """

  label: str
  task: str
  metric: str = ""


# What is shown of a task, the first that it has. The paper does not say whether a choice's
# log-likelihood is divided by its length; where the harness does both, we show that.
METRICS = ("acc_norm", "exact_match", "acc", "em", "f1")

PAPER25 = (
  Row("TriviaQA (EM)", "triviaqa", "exact_match"),
  Row("NaturalQuestions (EM)", "nq_open", "exact_match"),
  Row("WebQuestions (EM)", "matformer_webqs", "exact_match"),
  Row("LAMBADA", "lambada_openai", "acc"),
  Row("HellaSwag", "hellaswag", "acc_norm"),
  Row("StoryCloze", "storycloze_2016", "acc"),
  Row("WSC", "matformer_wsc285", "acc"),
  Row("WinoGrande", "winogrande", "acc"),
  Row("Winograd", "wsc273", "acc"),
  Row("RACE-H", "race", "acc"),
  Row("RACE-M", "matformer_race_middle", "acc"),
  Row("PIQA", "piqa", "acc_norm"),
  Row("ARC-C", "arc_challenge", "acc_norm"),
  Row("ARC-E", "arc_easy", "acc_norm"),
  Row("OpenBookQA", "openbookqa", "acc_norm"),
  Row("BoolQ", "boolq", "acc"),
  Row("COPA", "copa", "acc"),
  Row("RTE", "sglue_rte", "acc"),
  Row("WiC", "wic", "acc"),
  Row("MultiRC", "multirc", "acc"),
  Row("ReCoRD", "matformer_record", "acc"),
  Row("CB", "cb", "acc"),
  Row("ANLI-R1", "anli_r1", "acc"),
  Row("ANLI-R2", "anli_r2", "acc"),
  Row("ANLI-R3", "anli_r3", "acc"),
)
SETS = {"paper25": PAPER25}
