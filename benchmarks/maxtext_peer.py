"""MaxText in an environment of its own, and its train step compiled there for a TPU slice."""

from __future__ import annotations

from collections.abc import Sequence
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from matformer_jax.errors import UserError, did_you_mean
from matformer_jax.training.trainer import Trainer

REQUIREMENT = "maxtext[tpu]==0.2.5"


class MaxText:
  """MaxText in an environment of its own."""

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self.python = directory / "bin" / "python"
    if not self.versions:
      self._install()
    if not self.versions:
      raise UserError(
        f"--maxtext_env={directory}: {REQUIREMENT} was installed, but is not found there"
      )

  @property
  def versions(self) -> dict[str, str]:
    """Of its packages; empty where MaxText is not installed."""
    names = ("maxtext", "jax", "libtpu")
    code = f"import importlib.metadata as m; print(*(m.version(n) for n in {names}))"
    if not self.python.exists():
      return {}
    done = _run([self.python, "-c", code])
    return dict(zip(names, done.stdout.split())) if done.returncode == 0 else {}

  def _install(self) -> None:
    if not self.python.exists():
      if self.directory.exists() and any(self.directory.iterdir()):
        raise UserError(f"--maxtext_env={self.directory} is neither empty nor an environment")
      self._make("-m", "venv", self.directory, python=_python_312())
    print(
      f"installing {REQUIREMENT} into {self.directory}: minutes, 3 GB", file=sys.stderr, flush=True
    )
    self._make("-m", "pip", "install", "-q", REQUIREMENT, python=self.python)

  def _make(self, *arguments, python) -> None:
    done = _run([python, *arguments])
    if done.returncode:
      raise UserError(f"--maxtext_env={self.directory} cannot be made: {_reason(done.stdout)}")

  def slice_name(self, topology: str) -> str:
    """What MaxText calls a topology, v5p-128 for v5p:4x4x4. Raises UserError if nothing."""
    table = next(self.directory.glob("lib/python*/site-packages/maxtext/utils/accelerator_to_*.py"))
    rows = re.findall(r'"([\w-]+)": SystemCharacteristics\("tpu", "([\w:]+)"', table.read_text())
    known = {theirs.replace("v5:", "v5p:"): name for name, theirs in rows}
    if topology not in known:
      raise UserError(
        f"--topology={topology!r}: MaxText has no such slice{did_you_mean(topology, known)}"
      )
    return known[topology]

  def compile(
    self, trainer: Trainer, topology: str, remat: str, options: Sequence[str] = ()
  ) -> tuple[str, dict[str, int]] | None:
    """The step of a dense model of XL's shape: its optimized HLO, and its memory by purpose.

    None where it does not fit.
    """
    with tempfile.TemporaryDirectory() as directory:
      command = [self.python, "-m", "maxtext.trainers.pre_train.train_compile"]
      command += [f"{k}={v}" for k, v in _config(trainer, directory).items()]
      command += [f"compile_topology={self.slice_name(topology)}", f"remat_policy={remat}"]
      # The rest of the slice's description is in the environment already.
      env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TPU_LIBRARY_PATH")}
      env["JAX_PLATFORMS"] = "cpu"
      done = _run([*command, *options], env=env, cwd=directory)
      if "RESOURCE_EXHAUSTED" in done.stdout:
        return None
      dumps = list(pathlib.Path(directory).glob("hlo/*.after_codegen.txt"))
      if done.returncode or not dumps:
        raise UserError(f"MaxText's train_compile failed: {_reason(done.stdout)}")
      text = max(dumps, key=lambda path: path.stat().st_size).read_text()
    return text, _memory(done.stdout)


def _config(trainer: Trainer, directory: str) -> dict[str, Any]:
  model = trainer.task.model_config
  return {
    "run_name": "pod_peers",
    "base_output_directory": f"{directory}/out",
    "compile_topology_num_slices": 1,
    "compile_xla_flags": f"--xla_dump_to={directory}/hlo",
    "enable_checkpointing": "false",
    "dataset_type": "synthetic",
    "decoder_block": "llama2",
    "base_num_decoder_layers": model.num_layers,
    "base_emb_dim": model.d_model,
    "base_num_query_heads": model.num_heads,
    "base_num_kv_heads": model.num_heads,
    "head_dim": model.head_dim,
    "base_mlp_dim": model.ffn_widths[-1],
    "mlp_activations": "['gelu']",
    "vocab_size": model.vocab_size,
    "logits_via_embedding": "true",
    "max_target_length": model.seq_len,
    "per_device_batch_size": trainer.config.batch_size / trainer.mesh.size,
    "attention": "flash",
    "dtype": "bfloat16",
    "weight_dtype": "float32",
    "opt_type": "adamw",
    "ici_fsdp_parallelism": -1,
  }


def _run(command: list, **options) -> subprocess.CompletedProcess:
  """Its output and errors together, as text."""
  return subprocess.run(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
  )


def _python_312() -> str:
  for python in (sys.executable, shutil.which("python3.12")):
    code = "import sys; sys.exit(sys.version_info[:2] != (3, 12))"
    if python and _run([python, "-c", code]).returncode == 0:
      return python
  raise UserError(
    f"{REQUIREMENT} needs Python 3.12, and there is no python3.12 on the PATH; install it, or give "
    "--maxtext_env=DIR of an environment that has MaxText"
  )


def _reason(output: str) -> str:
  """The last line of a program's output, which names the error."""
  return next((line for line in reversed(output.splitlines()) if line.strip()), "no output")[:300]


def _memory(output: str) -> dict[str, int]:
  """As `planning.estimate.memory`, from what `train_compile` prints."""
  size = {k: int(v) for k, v in re.findall(r"(?<=\W)(\w+)_size_in_bytes=(\d+)", output)}
  return {
    "arguments": size["argument"],
    "outputs": size["output"] - size["alias"],
    "temporaries": size["temp"],
    "code": size["generated_code"],
  }
