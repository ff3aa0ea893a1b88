"""Deliberate faults, and the tests that notice them: do the tests test anything?

  python tests/faults.py                      every fault; exit code 1 if one goes unnoticed
  python tests/faults.py --only "z-loss"      those whose name contains it
  python tests/faults.py --check              the named tests pass without any fault
  python tests/faults.py --list

Each fault is one replacement of text, made in a copy of the tree, where the tests that should
fail are then run without the slow ones. A text that has moved or changed is an error, which
test_faults.py finds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = pathlib.Path("build", "test-cache")
TIMEOUT_S = 1800
TESTS_FAILED = 1  # pytest's exit code; the others mean that it could not run them


@dataclasses.dataclass(frozen=True)
class Fault:
  """A change that a test should notice.

  Attributes:
    name: what is wrong with it.
    file: below matformer_jax/.
    old: occurs exactly once in the file.
    new: what replaces it.
    tests: pytest's names of tests below tests/, none of them slow; at least one must fail.
  """

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]

  def apply(self, root: pathlib.Path = ROOT) -> str:
    """The file with the fault. Raises ValueError where the text is not there, or not once."""
    source = (root / "matformer_jax" / self.file).read_text()
    if source.count(self.old) != 1:
      raise ValueError(
        f"{self.name!r}: matformer_jax/{self.file} holds {source.count(self.old)} times: {self.old}"
      )
    return source.replace(self.old, self.new)


FAULTS = (
  Fault(
    "slice from the end",
    "models/slicing.py",
    "slice(lengths.get(axis))",
    "slice(-lengths.get(axis, 0), None)",
    ("test_model.py::test_equals_the_reference[S-change0]",),
  ),
  Fault(
    "slice m + 1 neurons",
    "config.py",
    "self.ffn_widths[span.ffn] // self.ffn_groups,",
    "self.ffn_widths[span.ffn] // self.ffn_groups + 1,",
    ("test_model.py::test_equals_the_reference[S-change0]",),
  ),
  Fault(
    "sampler ignores the seed",
    "granularity.py",
    "SeedSequence((seed, step))",
    "SeedSequence((0, step))",
    ("test_granularity.py::test_sampling_is_a_pure_function_with_the_right_frequencies",),
  ),
  Fault(
    "sampler ignores the step",
    "granularity.py",
    "SeedSequence((seed, step))",
    "SeedSequence((seed, 0))",
    ("test_granularity.py::test_sampling_is_a_pure_function_with_the_right_frequencies",),
  ),
  Fault(
    "two hosts draw differently",
    "training/loop.py",
    "trainer.draw(step)",
    "trainer.draw(step + self.hosts.index)",
    ("test_train.py::test_every_process_draws_what_seed_and_step_say",),
  ),
  Fault(
    "different draws are not noticed",
    "hosts/multihost.py",
    "if draw != draws[0]:",
    "if draw > 2**32:",
    ("test_operations.py::test_processes_that_draw_differently_are_stopped",),
  ),
  Fault(
    "embedding gradient dropped on one fsdp shard",
    "sharding.py",
    "return (_on_tensor_shards(scatter, axes)(cotangent).astype(param_dtype),)",
    "kept = ('vocab' not in axes) | (jax.lax.axis_index(FSDP) != 1)\n"
    "  return (_on_tensor_shards(scatter, axes)(cotangent).astype(param_dtype) * kept,)",
    ("test_train.py::test_meshes_agree[mesh0]",),
  ),
  Fault(
    "loss is a mean over padded rows too",
    "evals/__init__.py",
    "stacked[:, stacked[0, :, 0] > 0]",
    "stacked",
    ("test_losses.py::test_rows_that_fill_a_batch_do_not_count",),
  ),
  Fault(
    "z-loss has no gradient",
    "models/losses.py",
    "(1.0 + 2.0 * z_loss * lse) / total",
    "1.0 / total",
    ("test_losses.py::test_value_and_gradient",),
  ),
  Fault(
    "distillation weighs by the temperature, not its square",
    "models/losses.py",
    "teacher.temperature**2",
    "teacher.temperature",
    ("test_distill.py::test_value_and_gradient",),
  ),
  Fault(
    "XL is its own teacher",
    "training/distill.py",
    "return bool(self.parent) or granularity != gran.full(self.model)",
    "return True",
    ("test_distill.py::test_a_step_by_hand",),
  ),
  Fault(
    "a resumed run takes another parent",
    "training/distill.py",
    '{"parent": fingerprint}',
    '{"parent": ""}',
    ("test_distill.py::test_distilling_from_a_parent_resumes_bit_exactly",),
  ),
  Fault(
    "acceptance is <=, so that 0 <= 0 accepts",
    "decoding/speculative.py",
    "uniform < ratio",
    "uniform <= ratio",
    ("test_speculative.py::test_acceptance_by_hand",),
  ),
  Fault(
    "acceptance on the wrong side",
    "decoding/speculative.py",
    "uniform < ratio",
    "ratio <= uniform",
    ("test_speculative.py::test_acceptance_by_hand",),
  ),
  Fault(
    "after a rejection, a draw from p",
    "decoding/speculative.py",
    "jnp.maximum(row(jnp.exp(log_p)) - row(q), 0.0)",
    "jnp.maximum(row(jnp.exp(log_p)), 0.0)",
    ("test_speculative.py::test_acceptance_by_hand",),
  ),
  Fault(
    "not normalised after top-p, so that residuals are wrong",
    "decoding/decode.py",
    "    logits = jnp.where(logits < least, -jnp.inf, logits)\n  return",
    "    return jnp.where(logits < least, -jnp.inf, jax.nn.log_softmax(logits))\n  return",
    ("test_decode.py::test_log_probs",),
  ),
  Fault(
    "cache written one position late",
    "models/attention.py",
    "  batch, _, _, length, _ = old.shape[-5:]\n",
    "  batch, _, _, length, _ = old.shape[-5:]\n  start = start + 1\n",
    ("test_decode.py::test_greedy_equals_rerunning_the_model[unrolled]",),
  ),
  Fault(
    "manifest compares shapes only",
    "checkpoints/checkpoint.py",
    '("shape", "dtype", "checksum"),',
    '("shape",),',
    ("test_checkpoint.py::test_a_changed_value_is_named",),
  ),
  Fault(
    "damaged newest step ends the search",
    "checkpoints/checkpoint.py",
    "problem = str(e)\n    problem = next(",
    "problem = None\n    problem = next(",
    ("test_checkpoint.py::test_an_empty_step_directory_does_not_block",),
  ),
  Fault(
    "damaged newest step is used",
    "checkpoints/checkpoint.py",
    'if meta["seal"] != _seal(meta) or meta["step"] != step:',
    'if meta["step"] != step:',
    ("test_checkpoint.py::test_a_damaged_newest_step_is_not_used",),
  ),
  Fault(
    "Mix'n'Match rounds up",
    "granularity.py",
    "return max(\n    (g for g, c in zip(ladder, costs) if c <= limit * (1 + 1e-9))",
    "return min(\n    (g for g, c in zip(ladder, costs) if c >= limit * (1 - 1e-9))",
    ("test_granularity.py::test_every_kind_of_budget_is_kept_and_used_up",),
  ),
  Fault(
    "weight decay on norms",
    "training/optim.py",
    'lambda path, _: "embed" in logical_axes(path_names(path))',
    "lambda path, _: True",
    ("test_train.py::test_weight_decay_spares_norm_scales",),
  ),
  Fault(
    "RoPE base is another",
    "models/ops.py",
    "frequency = base **",
    "frequency = (10 * base) **",
    ("test_model.py::test_equals_the_reference[S-change0]",),
  ),
  Fault(
    "dropout in evaluation",
    "evals/classification.py",
    "granularity=granularity, return_features=features)",
    "granularity=granularity, return_features=features,\n"
    "    seeds_B=jnp.arange(len(images), dtype=jnp.uint32))",
    ("test_matvit.py::test_evaluation_drops_nothing",),
  ),
  Fault(
    "SIGTERM during evaluation loses the step",
    "training/loop.py",
    "if self.stopped or evaluates or _due(config.checkpoint.every, step):",
    "if self.stopped or _due(config.checkpoint.every, step):",
    ("test_train.py::test_a_stop_during_evaluation_keeps_the_step",),
  ),
  Fault(
    "validation documents are trained on",
    "data/store.py",
    'return [("validation" if number % self.every == self.every // 2 else "train", text)]',
    "held_out = number % self.every == self.every // 2\n"
    '      return [("train", text), ("validation", text)][: 1 + held_out]',
    ("test_data.py::test_store_holds_every_document_once",),
  ),
  Fault(
    "ends held out of few documents are trained on",
    "data/store.py",
    '("train", text[:end])',
    '("train", text)',
    ("test_data.py::test_a_corpus_of_few_documents_holds_out_the_end_of_each",),
  ),
  Fault(
    "Muon takes keys for queries",
    "training/muon.py",
    "_Projections(x[:, :-2], x[:, -2:])",
    "_Projections(x[:, :-1], x[:, -1:])",
    ("test_muon.py::test_equals_muon_on_plain_matrices_and_adamw_elsewhere[grouped]",),
  ),
  Fault(
    "special tokens spelled out in a text become special",
    "data/tokenizer.py",
    "self._hf.encode_special_tokens = True",
    "self._hf.encode_special_tokens = False",
    ("test_tokenizer.py::test_types_of_gguf_tokens",),
  ),
  Fault(
    "documents begin without bos",
    "data/store.py",
    "tokenizer.bos() + ids if piece.begins else ids",
    "ids",
    ("test_tokenizer.py::test_a_run_on_a_tokenizer_json",),
  ),
  Fault(
    "a stream shows the beginning of a stop string",
    "serving/text.py",
    "held = max((_overlap(text, s) for s in self._stop), default=0)",
    "held = 0",
    ("test_serve.py::test_stop_strings_do_not_depend_on_the_tokens",),
  ),
  Fault(
    "a chat message can end itself and begin another",
    "serving/chat.py",
    'self._start_of_special.sub(_MARK, text.replace(_MARK, ""))',
    "text",
    ("test_serve.py::test_a_message_cannot_end_itself",),
  ),
  Fault(
    "a client that leaves a stream keeps its slot",
    "serving/replies.py",
    "self._generation.cancel()",
    "pass",
    ("test_serve.py::test_a_client_that_leaves_frees_its_slot[True]",),
  ),
)


@contextlib.contextmanager
def copy_of_tree():
  """A copy of what the tests need. Its cache is linked, not copied: nothing writes to a file
  of the cache that is there."""
  (ROOT / "build").mkdir(exist_ok=True)
  with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="fault-") as directory:
    copy = pathlib.Path(directory) / "tree"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "site", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    if (ROOT / CACHE).is_dir():
      shutil.copytree(ROOT / CACHE, copy / CACHE, copy_function=os.link)
    yield copy


def run_tests(root: pathlib.Path, tests) -> tuple[int | None, str]:
  """(pytest's exit code or None after TIMEOUT_S, its output)."""
  options = ["-p", "no:cacheprovider", "-m", "not slow", "-x", "-rfE", "--durations=0"]
  command = [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in tests)]
  env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "180"}
  try:
    done = subprocess.run(
      command, cwd=root, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
  except subprocess.TimeoutExpired as e:
    return None, str(e)
  return done.returncode, done.stdout + done.stderr


def catch(fault: Fault) -> tuple[bool, str]:
  """(whether the fault was noticed, by what or why not)."""
  with copy_of_tree() as root:
    (root / "matformer_jax" / fault.file).write_text(fault.apply(root))
    code, output = run_tests(root, fault.tests)
  if code == TESTS_FAILED:
    return True, re.findall(r"^(?:FAILED|ERROR) tests/(.*)", output, re.M)[0]
  if code == 0:
    return False, "NOT CAUGHT"
  return False, f"the tests did not run (exit code {code}):\n{output[-2000:]}"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--only", default="", help="faults whose name contains this")
  parser.add_argument("--check", action="store_true", help="run the tests without any fault")
  parser.add_argument("--list", action="store_true", help="name the faults and their tests")
  args = parser.parse_args()
  faults = [fault for fault in FAULTS if args.only in fault.name]
  if not faults:
    parser.error(f"no fault is called {args.only!r}; --list names them")
  if args.list:
    for fault in faults:
      print(f"{fault.name:56} {', '.join(fault.tests)}")
    return 0
  if args.check:
    code, output = run_tests(ROOT, sorted({name for fault in faults for name in fault.tests}))
    print(output)
    return int(code != 0)
  missed = 0
  print(f"{'fault':56} {'seconds':>7}  caught by", flush=True)
  for fault in faults:
    started = time.monotonic()
    caught, by = catch(fault)
    missed += not caught
    print(f"{fault.name:56} {time.monotonic() - started:7.0f}  {by}", flush=True)
  print(f"{len(faults) - missed} of {len(faults)} faults caught")
  return int(missed > 0)


if __name__ == "__main__":
  sys.exit(main())
