"""Measures sizes of a trained language model on public tasks, as Tables 9 to 13 do.

  python -m matformer_jax.downstream --workdir=runs/mine --granularities=S,M,L,XL \\
      --tasks=paper25 --num_fewshot=1 --out=runs/mine/downstream

Writes table.md, table.csv and table.json into --out: a row per task, a column per size, their
average, and the validation loss. What is measured is kept there too, one file per task and size,
and not measured again: the same command goes on after an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import csv
import hashlib
import io
import json
import logging
import pathlib
import tempfile
from typing import Any

from absl import flags
import tqdm

from matformer_jax import cli, runtime, storage, tables
from matformer_jax import granularity as gran
from matformer_jax.checkpoints import checkpoint
from matformer_jax.errors import UserError, did_you_mean, first_line, import_extra
from matformer_jax.evaluate import evaluate
from matformer_jax.harness.paper25 import METRICS, SETS, TASKS_DIR, Row
from matformer_jax.loading import LanguageModel, load, open_task

DATA_FILES = (".jsonl", ".json")


# ---------------------------------------------------------------------- tasks


def parse_tasks(names: Sequence[str], known: Sequence[str], groups: Sequence[str]) -> list[Row]:
  """Rows of the table for names of tasks and of sets of them, each once.

  Raises:
    UserError: for a name that is neither, or one of the harness's own groups of tasks.
  """
  rows: dict[str, Row] = {}
  for name in names:
    if name in groups and name not in known:
      raise UserError(f"--tasks: {name} is a group; give its tasks, of which each is a row")
    if name not in SETS and name not in known:
      near = did_you_mean(name, [*SETS, *known])
      near = near if "did you mean" in near else "; `lm_eval ls tasks` lists them"
      raise UserError(f"--tasks: no task is called {name!r}{near}")
    for row in SETS.get(name, (Row(name, name),)):
      rows.setdefault(row.task, row)
  return list(rows.values())


def local_data(directory: str | None, task: str) -> dict[str, str]:
  """{split: file} of DIR/task/split.jsonl; {} where there is no such directory.

  Raises:
    UserError: where DIR is no directory, or DIR/task holds no such file.
  """
  if not directory:
    return {}
  if not storage.local(directory, "--data").is_dir():
    raise UserError(f"--data={directory}: no such directory; give one with TASK/SPLIT.jsonl")
  folder = pathlib.Path(directory, task)
  if not folder.is_dir():
    return {}
  files = {p.stem: str(p) for p in sorted(folder.iterdir()) if p.suffix in DATA_FILES}
  if not files:
    raise UserError(f"{folder} holds no SPLIT.jsonl, such as validation.jsonl")
  return files


def load_task(manager: Any, name: str, data: str | None) -> Any:
  """A task of the harness, with its examples.

  Raises:
    UserError: if they are not here and cannot be downloaded.
  """
  files = local_data(data, name)
  try:
    if files:
      loaded = _load_with_files(manager, name, files)
    else:
      loaded = manager.load([name])["tasks"]
  except ImportError as e:
    raise UserError(f"task {name} needs a package that is not installed ({first_line(e)})") from e
  except Exception as e:  # the library's, of many kinds: of networks, scripts, files
    if files:
      while e.__cause__ is not None:  # what the library wraps
        e = e.__cause__
      what = first_line(e)
      if isinstance(e, KeyError) and e.args[0] in ("train", "validation", "test"):
        what = f"it needs {e.args[0]}.jsonl too"
      raise UserError(f"task {name}: {data}/{name} does not fit it: {what}") from e
    config = manager.task_index[name].cfg or {}
    dataset = ", ".join(str(config[k]) for k in ("dataset_path", "dataset_name") if config.get(k))
    cache = import_extra("datasets", "evaluating on public tasks", "eval").config.HF_DATASETS_CACHE
    raise UserError(
      f"task {name}: the dataset {dataset} is not in {cache} and could not be downloaded "
      f"({first_line(e)}); copy that directory from a machine that has it, or put its splits into "
      f"DIR/{name}/SPLIT.jsonl and give --data=DIR"
    ) from e
  return loaded[name]


def _load_with_files(manager: Any, name: str, files: Mapping[str, str]) -> dict[str, Any]:
  """The task on local examples, by a definition that includes its own."""
  definition = {
    "include": str(manager.task_index[name].yaml_path),
    "dataset_path": "json",
    "dataset_name": None,
    "dataset_kwargs": {"data_files": files},
  }
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory, f"{name}.yaml")
    path.write_text(json.dumps(definition))  # JSON is YAML
    return manager.load([str(path)])["tasks"]


# -------------------------------------------------------------------- results


class Store:
  """What has been measured, one JSON file per task and size, each with all that it depends on."""

  def __init__(self, directory: storage.Path):
    self._directory = directory

  def _path(self, key: Mapping[str, Any]) -> storage.Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return self._directory / f"{key['task']}-{digest}.json"

  def read(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result that has this key; None where there is none."""
    try:
      found = json.loads(self._path(key).read_bytes())
    except (OSError, ValueError):
      return None
    return found if found.get("key") == key else None

  def write(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps a result, and returns it with its key."""
    self._directory.mkdir(parents=True, exist_ok=True)
    found = {"key": dict(key), **result}
    storage.replace_file(self._path(key), runtime.to_json(found, 1).encode())
    return found


def result_of(evaluated: Mapping[str, Any], row: Row) -> dict[str, Any]:
  """What the harness measured of a task: {"metric", "value", "stderr", "examples", "metrics"}.

  Raises:
    UserError: if the task has no metric that a table can show.
  """
  metrics = {}  # "acc,none" -> "acc"; of several filters the first
  for name, value in evaluated["results"][row.task].items():
    if "," in name and isinstance(value, (int, float)):
      metrics.setdefault(name.partition(",")[0], value)
  shown = [row.metric] if row.metric else [m for m in METRICS if m in metrics]
  if not shown or shown[0] not in metrics:
    raise UserError(
      f"task {row.task} measures {', '.join(metrics) or 'nothing'}, of which the table shows none"
    )
  return {
    "metric": shown[0],
    "value": metrics[shown[0]],
    "stderr": metrics.get(f"{shown[0]}_stderr"),
    "examples": evaluated["n-samples"][row.task]["effective"],
    "metrics": metrics,
  }


# --------------------------------------------------------------------- tables


def table(
  rows: Sequence[Row],
  sizes: Sequence[str],
  results: Mapping[tuple[str, str], Mapping[str, Any]],
  losses: Mapping[str, float],
) -> tuple[list[str], list[list[str]]]:
  """Header and rows in the shape of Tables 9 to 13: percentages, their average, nats per token."""
  cells = [
    [row.label, *(f"{100 * results[row.task, size]['value']:.2f}" for size in sizes)]
    for row in rows
  ]
  mean = lambda size: sum(results[row.task, size]["value"] for row in rows) / len(rows)
  cells.append(["Average", *(f"{100 * mean(size):.2f}" for size in sizes)])
  if losses:
    cells.append(["Loss", *(f"{losses[size]:.3f}" for size in sizes)])
  return ["Downstream Task", *sizes], cells


def write_tables(
  directory: storage.Path, header: list[str], cells: list[list[str]], record: Mapping[str, Any]
) -> list[storage.Path]:
  """table.md, table.csv and table.json; the last with what the others round."""
  escaped = [[text.replace("|", "\\|") for text in row] for row in (header, *cells)]
  lines = ["| " + " | ".join(row) + " |" for row in escaped]
  lines.insert(1, "| --- |" + " ---: |" * (len(header) - 1))
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows([header, *cells])
  contents = {
    "table.md": "\n".join(lines) + "\n",
    "table.csv": text.getvalue(),
    "table.json": runtime.to_json(record, 1) + "\n",
  }
  directory.mkdir(parents=True, exist_ok=True)
  for name, content in contents.items():
    storage.replace_file(directory / name, content.encode())
  return [directory / name for name in contents]


def validation_losses(model: LanguageModel, granularities: Sequence[gran.Granularity]) -> dict:
  """{size: nats per token} as `evaluate` measures it; {} where the model's data is not here."""
  try:
    task: Any = open_task(model)
  except (UserError, OSError) as e:
    print(f"no row of losses: {first_line(e)}")
    return {}
  results = evaluate(model, task, granularities, consistency=False)
  return {r.granularity: r.metrics["loss"] for r in results}


def measure(
  rows: Sequence[Row],
  sizes: Sequence[str],
  key: Callable[[Row], Mapping[str, Any]],
  store: Store,
  open_row: Callable[[Row], Any],
  run: Callable[[Any, Row, str], dict[str, Any]],
) -> dict[tuple[str, str], dict[str, Any]]:
  """Results of every row and size, measured where the store has none.

  Args:
    key: of a row: all that its results depend on but for the size.
    open_row: loads a row's task, once for all sizes.
    run: measures (task, row, size).
  """
  results = {}
  with tqdm.tqdm(total=len(rows) * len(sizes), unit="result", desc="downstream") as bar:
    for number, row in enumerate(rows, 1):
      task, of_row = None, key(row)
      for size in sizes:
        bar.set_description(f"task {number} of {len(rows)}, {row.task}, {size}")
        own = {**of_row, "granularity": size}
        found = store.read(own)
        if found is None:
          task = task or open_row(row)
          found = store.write(own, run(task, row, size))
        results[row.task, size] = found
        bar.update()
  return results


def digest(files: Iterable[pathlib.Path]) -> str | None:
  """Of the names and contents of files; None where there are none."""
  found = sorted(files)
  total = hashlib.sha256()
  for file in found:
    with file.open("rb") as f:
      total.update(f"{file.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
  return total.hexdigest() if found else None


def main(argv) -> None:
  cli.check(argv)
  workdir = cli.required(_WORKDIR)
  out = storage.path(_OUT.value or storage.path(workdir) / "downstream")
  needed_by = "downstream"
  lm_eval = import_extra("lm_eval", needed_by, "eval")
  tasks = import_extra("lm_eval.tasks", needed_by, "eval")
  from matformer_jax.harness import model as harness

  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  import_extra("datasets", needed_by, "eval").disable_progress_bars()
  runtime.enable_compilation_cache()
  manager = tasks.TaskManager(include_path=[str(TASKS_DIR), *_INCLUDE_PATH.value])
  rows = parse_tasks(_TASKS.value or ["paper25"], manager.all_subtasks, manager.all_tasks)
  for row in rows:
    local_data(_DATA.value, row.task)
  model = load(workdir, _STEP.value, LanguageModel)
  chosen = [gran.parse(g, model.config) for g in _GRANULARITIES.value]
  chosen = list(dict.fromkeys(chosen or gran.trained(model.config)))
  sizes = [gran.to_text(g, model.config) for g in chosen]
  settings = {
    "step": model.step,
    "checkpoint": checkpoint.read_meta(model.workdir, model.step)["seal"],
    "num_fewshot": _NUM_FEWSHOT.value,
    "limit": _LIMIT.value,
    "include_path": digest(
      f for d in _INCLUDE_PATH.value for f in storage.local(d, "--include_path").rglob("*.yaml")
    ),
    "dtype": _DTYPE.value,
    "max_length": _MAX_LENGTH.value,
    "lm_eval": lm_eval.__version__,
  }

  def key(row: Row) -> dict[str, Any]:
    metadata = (manager.task_index[row.task].cfg or {}).get("metadata") or {}
    version = metadata.get("version") if isinstance(metadata, dict) else None
    data = digest(map(pathlib.Path, local_data(_DATA.value, row.task).values()))
    return {**settings, "task": row.task, "version": version, "metric": row.metric, "data": data}

  opened: dict[str, Any] = {}

  def run(task, row: Row, size: str) -> dict[str, Any]:
    if size not in opened:  # one at a time: each has its own copy of the weights
      opened.clear()
      opened[size] = harness.MatFormerLM(
        model=model,
        granularity=size,
        dtype=_DTYPE.value,
        max_length=_MAX_LENGTH.value,
        batch_tokens=_BATCH_TOKENS.value,
        batch_size=_BATCH_SIZE.value,
        quiet=True,
      )
    evaluated = lm_eval.simple_evaluate(
      model=opened[size],
      tasks=[task],
      num_fewshot=_NUM_FEWSHOT.value,
      limit=_LIMIT.value or None,
      bootstrap_iters=0,
      log_samples=False,
      task_manager=manager,
    )
    return result_of(evaluated, row)

  store = Store(out / "results")
  open_row = lambda row: load_task(manager, row.task, _DATA.value)
  results = measure(rows, sizes, key, store, open_row, run)
  losses = validation_losses(model, chosen) if _LOSS.value else {}
  header, cells = table(rows, sizes, results, losses)
  record = {**settings, "sizes": sizes, "loss": losses, "tasks": _by_task(rows, sizes, results)}
  paths = write_tables(out, header, cells, record)
  print(tables.table(header, cells))
  print("\nwrote " + ", ".join(map(str, paths)))


def _by_task(rows, sizes, results) -> dict[str, Any]:
  """{task: {"label", size: result without its key}}."""
  bare = lambda result: {name: value for name, value in result.items() if name != "key"}
  return {
    row.task: {"label": row.label, **{s: bare(results[row.task, s]) for s in sizes}} for row in rows
  }


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained or imported model.")
  _STEP = cli.define_step()
  _GRANULARITIES = flags.DEFINE_list(
    "granularities", [], "What to measure, e.g. S,M,'M*2+L*2',XL; default the trained sizes."
  )
  _TASKS = flags.DEFINE_list(
    "tasks", ["paper25"], "Names of lm-eval tasks, and paper25: the 25 of B.2."
  )
  _NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", 1, "Solved examples before each question.", lower_bound=0
  )
  _LIMIT = flags.DEFINE_integer("limit", 0, "Examples of each task; 0 is all.", lower_bound=0)
  _OUT = flags.DEFINE_string(
    "out", None, "Where tables and results go; default WORKDIR/downstream."
  )
  _DATA = flags.DEFINE_string(
    "data", None, "Directory of local examples, TASK/SPLIT.jsonl, for the tasks that it has."
  )
  _INCLUDE_PATH = flags.DEFINE_list("include_path", [], "Directories with more tasks, as YAML.")
  _DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "To compute in.")
  _MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 0, "Tokens of context; 0 is the model's own length.", lower_bound=0
  )
  _BATCH_TOKENS = flags.DEFINE_integer(
    "batch_tokens", 0, "Tokens scored together on a device; 0 is as suits it.", lower_bound=0
  )
  _BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 0, "Texts generated together on a device; 0 is as suits it.", lower_bound=0
  )
  _LOSS = flags.DEFINE_bool(
    "loss", True, "Also measure the validation loss, where its data is here."
  )
  cli.run(main)
