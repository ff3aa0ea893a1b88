"""A wheel, installed away from any checkout, is complete."""

import json
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

import helpers
from helpers import ROOT
import pytest


@pytest.mark.slow
def test_an_installed_wheel_trains(tmp_path):

  def run(*args, **kwargs) -> str:
    result = subprocess.run(
      [*map(str, args)], timeout=300, capture_output=True, text=True, **kwargs
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout

  pip = "pip", "--quiet", "--disable-pip-version-check"
  # From a copy: building leaves files in the tree.
  ignored = shutil.ignore_patterns(".*", "build", "runs", "site", "*.egg-info")
  shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
  run(
    *(sys.executable, "-m", *pip, "wheel", "--no-deps", "--no-build-isolation"),
    *("--wheel-dir", tmp_path, tmp_path / "source"),
  )
  (wheel,) = tmp_path.glob("*.whl")
  environment = tmp_path / "environment"
  venv.create(environment, symlinks=True, with_pip=False)
  site = sysconfig.get_path("purelib", vars={"base": str(environment)})
  python = environment / "bin" / "python"
  run(sys.executable, "-m", *pip, "--python", python, "install", "--no-deps", wheel)
  # The other packages are those of this environment. It is added as a path, so that its own .pth
  # files, among them that of an editable install, are not read.
  others = [path for path in sys.path if path.endswith("site-packages")]
  (pathlib.Path(site) / "others.pth").write_text("\n".join(others) + "\n")
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  env = {k: v for k, v in helpers.PROGRAM_ENV.items() if k != "PYTHONPATH"}
  place = run(python, "-c", "import matformer_jax as m; print(m.__file__)", cwd=elsewhere, env=env)
  assert place.startswith(str(environment))
  run(
    *(environment / "bin" / "matformer", "train", "--config=matlm:tiny", "--workdir=run"),
    *("--config.steps=3", f"--config.sampling={helpers.ONE_SIZE}", "--config.eval.every=0"),
    cwd=elsewhere,
    env=env,
  )
  steps = (elsewhere / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in steps] == [1, 2, 3]
