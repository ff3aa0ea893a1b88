"""Tokens per second of training steps here and in PyTorch, on the same CPUs.

  pip install -e '.[peers]'
  python benchmarks/train_peers.py
  python benchmarks/train_peers.py --shapes=A --modes=f32 --threads=1 --steps=0 --nocompile  # short

Ours is the Trainer's step of each size. The peer is a dense model of that size from `transformers`
(Arcee, whose FFN is ungated relu2 too) with SDPA attention, eager and by torch.compile, and
PyTorch's fused AdamW; initial weights, clipping, weight decay and learning rate are ours. Each
number of threads has a process of its own with as many CPUs, in which programs take turns; a rate
comes from a program's median step. XL is also trained by both for --steps on the standard library,
to compare losses.

Shapes: A has 16 layers, d_model 256, 16 heads, vocabulary 8192 and a batch of 1 x 512 tokens; Q is
that of configs/matlm.py:quickstart. Modes: f32, and mixed precision, float32 parameters with
bfloat16 products (dtype=bfloat16 here, torch.autocast there).

The last line is one JSON object: `train_f32`, `train_mixed` and, with --decode, `decode` beside
llama.cpp: our tokens/s (mean over the sizes) over the best peer's, geometric mean over shapes and
threads; null for what did not run.
"""

from __future__ import annotations

from collections.abc import Collection
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from absl import flags
import jax.numpy as jnp
import numpy as np
from timing import Program, Tokens, get_config, measure

from matformer_jax import cli, sharding, tables
from matformer_jax import granularity as gran
from matformer_jax.config import MatLMConfig
from matformer_jax.errors import UserError, first_line, import_extra
from matformer_jax.formats import families
from matformer_jax.models import slicing
from matformer_jax.tasks import make_task
from matformer_jax.training import optim
from matformer_jax.training.trainer import Trainer

SHAPES = {
  "A": {
    "batch_size": 1,
    "model.vocab_size": 8192,
    "model.num_layers": 16,
    "model.d_model": 256,
    "model.num_heads": 16,
    "model.seq_len": 512,
  },
  "Q": {},
}
DTYPES = {"f32": "float32", "mixed": "bfloat16"}
PEERS = ("eager", "compiled")


def make_trainer(shape: str, mode: str, steps: int = 0) -> Trainer:
  """On random tokens, or with `steps` on those of the quickstart's corpus."""
  config = get_config("matlm", "quickstart")
  config.update_from_flattened_dict(SHAPES[shape])
  config.model.update(activation="relu2", embedding_scale=1.0)  # as Arcee computes it
  config.dtype = DTYPES[mode]
  if steps:
    config.steps = steps
    task = make_task(config)
  else:
    task = Tokens(MatLMConfig.from_dict(config.model), config.batch_size)
  return Trainer(task, config, sharding.make_mesh({}))


def our_program(trainer: Trainer, granularity: gran.Granularity) -> Program:
  return Program(trainer.lower(granularity).compile(), trainer.init(0), trainer.batch(0))


class Peer:
  """A dense model of one size in PyTorch, with the trainer's initial weights and optimizer."""

  def __init__(self, trainer: Trainer, granularity: gran.Granularity):
    import torch

    self.torch = torch
    self.mixed = trainer.config.dtype == "bfloat16"
    self.model = _arcee(trainer, granularity)
    self.keys = keys = trainer.config.optim
    schedule = optim.make_schedule(keys, trainer.config.steps)
    self.learning_rates = iter(np.asarray(schedule(jnp.arange(trainer.config.steps))).tolist())
    parameters = list(self.model.parameters())
    self.optimizer = torch.optim.AdamW(
      [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
      ],
      betas=(keys.b1, keys.b2),
      eps=keys.eps,
      weight_decay=keys.weight_decay,
      fused=True,
    )

  def loss(self, tokens_BxT):
    """Mean next-token cross-entropy, its logits in float32."""
    torch = self.torch
    with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
      logits = self.model(tokens_BxT[:, :-1], use_cache=False).logits
    targets = tokens_BxT[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets)

  def program(self, batch, compiled: bool) -> Program:
    """Its train step; that of the compiled peer continues the same model."""
    torch = self.torch
    compute = torch.compile(self.loss, dynamic=False) if compiled else self.loss

    def step(state, batch):
      loss = compute(batch)
      self.optimizer.zero_grad()
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.keys.clip_norm)
      learning_rate = next(self.learning_rates)
      for group in self.optimizer.param_groups:
        group["lr"] = learning_rate
      self.optimizer.step()
      return state, {"loss": loss.item()}

    return Program(step, None, self.tensor(batch))

  def tensor(self, batch):
    return self.torch.tensor(np.asarray(batch), dtype=self.torch.int64)


def _arcee(trainer: Trainer, granularity: gran.Granularity):
  import torch
  import transformers
  from transformers.integrations.sdpa_attention import sdpa_attention_forward

  # Under a name of its own SDPA gets no mask but `is_causal`, when compiled too.
  transformers.AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
  model_config = trainer.task.model_config
  config = gran.submodel_config(model_config, granularity)
  params = slicing.slice_params(trainer.init(0).params, model_config, granularity)
  (width,) = {config.ffn_widths[span.ffn] for span in config.spans}
  model = transformers.ArceeForCausalLM(
    transformers.ArceeConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.d_model,
      intermediate_size=width,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      max_position_embeddings=config.seq_len,
      rms_norm_eps=config.norm_eps,
      tie_word_embeddings=True,
      bos_token_id=None,
      eos_token_id=None,
      attn_implementation="causal_sdpa",
    )
  )
  arrays = families.dense_arrays(config, params, families.FAMILIES["ArceeForCausalLM"])
  weights = {name: torch.tensor(array) for name, array in arrays}
  model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
  return model.train()


# ----------------------------------------------------- in a process of its own


def progress(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


def rates(shape: str, mode: str) -> dict[str, dict[str, float]]:
  """Tokens per second by program and size."""
  import torch

  torch.compiler.reset()  # else past 8 programs of a function the rest run eagerly
  trainer = make_trainer(shape, mode)
  batch = trainer.batch(0)
  programs: dict[str, dict[str, Program]] = {"ours": {}} | {name: {} for name in PEERS}
  for name, granularity in zip(trainer.names, trainer.granularities):
    programs["ours"][name] = our_program(trainer, granularity)
    peer = Peer(trainer, granularity)
    programs["eager"][name] = peer.program(batch, compiled=False)
    if _COMPILE.value:
      programs["compiled"][name] = peer.program(batch, compiled=True)
  try:
    for program in programs["compiled"].values():
      program.run(record=False)
  except RuntimeError as e:
    progress(f"torch.compile failed, so the peer is eager only: {first_line(e)}")
    programs["compiled"] = {}
  measure([p for of_size in programs.values() for p in of_size.values()], _ROUNDS.value)
  tokens = trainer.task.examples_per_step
  return {
    kind: {name: tokens / statistics.median(p.step_times) for name, p in of_size.items()}
    for kind, of_size in programs.items()
    if of_size
  }


def losses(mode: str, steps: int) -> dict[str, float]:
  """XL of Q on the same batches: mean losses of the last tenth, and how far apart one step was."""
  trainer = make_trainer("Q", mode, steps)
  xl = trainer.granularities[-1]
  peer = Peer(trainer, xl)
  programs = our_program(trainer, xl), peer.program(trainer.batch(0), compiled=False)
  found = []
  for i in range(steps):
    batch = trainer.batch(i)
    row = []
    for program, given in zip(programs, (batch, peer.tensor(batch))):
      program.state, out = program.step(program.state, given)
      row.append(float(out["loss"]))
    found.append(row)
  ours, theirs = np.mean(found[-max(1, steps // 10) :], axis=0)
  return {"ours": ours, "peer": theirs, "largest": float(np.abs(np.subtract(*zip(*found))).max())}


def work(threads: int) -> dict[str, Any]:
  """What one process measures."""
  import torch

  torch.set_num_threads(threads)
  found: dict[str, Any] = {"rates": {mode: {} for mode in _MODES.value}, "losses": {}}
  for mode in _MODES.value:
    for shape in _SHAPES.value:
      progress(f"{mode}, shape {shape}, threads: {threads}")
      found["rates"][mode][shape] = rates(shape, mode)
    if _STEPS.value:
      progress(f"{mode}, {_STEPS.value} steps of both")
      found["losses"][mode] = losses(mode, _STEPS.value)
  return found


# ------------------------------------------------------------------- a report


def run_pinned(file: str, threads: int, *options: str) -> Any:
  """The JSON object that a benchmark prints last, run on as many CPUs as threads.

  JAX has as many threads as there are CPUs where it starts.
  """
  os.sched_setaffinity(0, _CPUS[:threads])
  command = [sys.executable, str(pathlib.Path(__file__).with_name(file)), *options]
  out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
  return json.loads(out.splitlines()[-1])


def mean(of_size: dict[str, float]) -> float:
  return statistics.mean(of_size.values())


def geometric_mean(ratios: list[float]) -> float | None:
  return statistics.geometric_mean(ratios) if ratios else None


def report(threads: int, found: dict[str, Any]) -> dict[str, list[float]]:
  """Prints what a process measured; returns ratios to the best peer by mode, one per shape."""
  ratios: dict[str, list[float]] = {}
  rows, sizes = [], []
  for mode, shapes in found["rates"].items():
    ratios[mode] = []
    for shape, programs in shapes.items():
      means = {kind: mean(of_size) for kind, of_size in programs.items()}
      ours = means["ours"]
      ratios[mode].append(ours / max(means[kind] for kind in PEERS if kind in means))
      for kind, of_size in programs.items():
        sizes = list(of_size)
        cells = [f"{rate:,.0f}" for rate in (*of_size.values(), means[kind])]
        rows.append([f"{mode} {shape} {kind}", *cells, f"{ours / means[kind]:.2f}"])
  print(f"\nTokens/s, threads: {threads}\n")
  print(tables.table(["program", *sizes, "mean", "ours / it"], rows), flush=True)
  for mode, loss in found["losses"].items():
    print(
      f"\n{mode}: after {_STEPS.value} steps XL's loss is {loss['ours']:.4f} here and "
      f"{loss['peer']:.4f} in PyTorch; in no step do they differ by more than {loss['largest']:.1e}"
    )
  return ratios


def decode_ratio(threads: int) -> float:
  """Tokens per second of decoding, mean over the sizes, over llama.cpp's."""
  found = run_pinned("decode_peers.py", threads, f"--threads={threads}").values()
  return sum(size["ours"] for size in found) / sum(size["llama_cpp"] for size in found)


def check_values(flag: flags.FlagHolder, known: Collection[str]) -> None:
  for value in flag.value:
    if value not in known:
      raise UserError(f"--{flag.name}={value} is not one of {', '.join(known)}")


def main(argv) -> None:
  cli.check(argv)
  for package in ("torch", "transformers", *(["llama_cpp"] if _DECODE.value else [])):
    import_extra(package, "this benchmark", "peers")
  if _WORKER.value:
    print(json.dumps(work(len(_CPUS))))
    return
  check_values(_SHAPES, SHAPES)
  check_values(_MODES, DTYPES)
  check_values(_THREADS, [str(n + 1) for n in range(len(_CPUS))])
  counts = [int(count) for count in _THREADS.value]
  ratios: dict[str, list[float]] = {mode: [] for mode in DTYPES}
  for i, threads in enumerate(counts, 1):
    losses_once = [] if i == len(counts) else ["--steps=0"]
    options = (*sys.argv[1:], *losses_once, "--worker")
    found = run_pinned(pathlib.Path(__file__).name, threads, *options)
    for mode, of_shapes in report(threads, found).items():
      ratios[mode] += of_shapes
  result = {f"train_{mode}": geometric_mean(of_mode) for mode, of_mode in ratios.items()}
  decode = [decode_ratio(threads) for threads in counts] if _DECODE.value else []
  print("\n" + json.dumps(result | {"decode": geometric_mean(decode)}))


if __name__ == "__main__":
  _CPUS = sorted(os.sched_getaffinity(0))
  _SHAPES = flags.DEFINE_list("shapes", list(SHAPES), "Of A and Q.")
  _MODES = flags.DEFINE_list("modes", list(DTYPES), "Of f32 and mixed.")
  _THREADS = flags.DEFINE_list("threads", ["1", "2"], "Numbers of threads, each on its own CPU.")
  _ROUNDS = flags.DEFINE_integer("rounds", 7, "In each, all programs take their turn.", 1)
  _COMPILE = flags.DEFINE_bool("compile", True, "Also time the peer by torch.compile.")
  _STEPS = flags.DEFINE_integer("steps", 500, "To compare losses after; 0 does not.", 0)
  _DECODE = flags.DEFINE_bool("decode", False, "Also run decode_peers.py.")
  _WORKER = flags.DEFINE_bool("worker", False, "Internal: measure in this process.")
  cli.run(main)
