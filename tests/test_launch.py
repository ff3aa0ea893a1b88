"""The launch scripts, against programs on PATH that stand for gcloud, kubectl, xpk and Slurm."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import helpers
from helpers import ROOT
import pytest
import yaml

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh")) + [LAUNCH / "slurm.sbatch"]
TRAIN = ["--", "--config=configs/matlm.py:850M", "--workdir=/mnt/runs/it's here"]
SETTINGS = {
  "TPU_NAME": "pod",
  "ZONE": "us-east1-c",
  "PROJECT": "mine",
  "CLUSTER": "big",
  "IMAGE": "registry/matformer:1",
  "POLL_SECONDS": "0.05",
  "RUN_ID": "first",
}

# Logs its arguments; answers `describe` with the next of its states, `ssh` with the next code.
STUB = """#!/usr/bin/env bash
exec 9>"$STUB_DIR/lock"; flock 9  # several may be called at the same time
printf '%s\\n' "$(basename "$0") ${*@Q}" >> "$STUB_DIR/calls"
next() {
  local file="$STUB_DIR/$1" first
  [ -s "$file" ] || { echo "$2"; return; }
  first=$(head -n 1 "$file"); sed -i 1d "$file"; echo "$first"
}
case "$*" in
  *" describe "*) state=$(next states READY); [ "$state" != ABSENT ] || exit 1; echo "$state" ;;
  *"matformer_jax.train"*) exit "$(next codes 0)" ;;
  "apply -f -") cat > "$STUB_DIR/applied" ;;
esac
"""


class Cloud:
  """A PATH of nothing but stubs and the system's own tools."""

  def __init__(self, root: pathlib.Path):
    self.root = root
    self.bin = root / "bin"
    self.bin.mkdir()
    for name in ("gcloud", "kubectl", "xpk", "srun", "sbatch", "scontrol"):
      (self.bin / name).write_text(STUB)
      (self.bin / name).chmod(0o755)
    self.env = {
      **helpers.PROGRAM_ENV,
      **SETTINGS,
      "STUB_DIR": str(root),
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "PYTHON": sys.executable,
    }

  def answers(self, states=(), codes=()) -> None:
    (self.root / "states").write_text("".join(f"{s}\n" for s in states))
    (self.root / "codes").write_text("".join(f"{c}\n" for c in codes))

  def run(
    self, script: str, *args, timeout=helpers.BACKSTOP_S, **env
  ) -> subprocess.CompletedProcess:
    return subprocess.run(
      [LAUNCH / script, *args],
      env={**self.env, **env},
      timeout=timeout,
      capture_output=True,
      text=True,
      cwd=self.root,
    )

  def calls(self) -> list[str]:
    path = self.root / "calls"
    return path.read_text().splitlines() if path.exists() else []

  def verbs(self) -> list[str]:
    """What was asked of gcloud, in order: create, describe, ssh..."""
    return [call.split("'")[7] for call in self.calls() if call.startswith("gcloud")]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
  return Cloud(tmp_path)


def test_shellcheck():
  checker = pathlib.Path(sys.executable).parent / "shellcheck"
  result = subprocess.run([checker, "-x", "-P", ROOT, *SCRIPTS], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", [s.name for s in SCRIPTS if s.name != "common.sh"])
def test_help(script, cloud):
  result = cloud.run(script, "--help")
  assert result.returncode == 0 and script in result.stdout and len(result.stdout) > 200
  assert not cloud.calls()


DRY_RUNS = {
  "tpu_vm.sh": (
    ["all"],
    [
      "tpu-vm' 'create' 'pod'",
      "--worker=all",
      "git' 'archive'",
      "exec ../.venv",
      "tpu-vm' 'delete' 'pod'",
    ],
  ),
  "queued_resource.sh": (
    ["run"],
    ["queued-resources' 'create' 'pod'", "--node-id=pod", "--spot", "exec"],
  ),
  "jobset.sh": (["apply"], ["kubectl' 'apply'", "kind: JobSet", "registry/matformer:1"]),
  "xpk.sh": (["create"], ["xpk' 'workload' 'create'", "--tpu-type=", "exec python"]),
  "slices.sh": (
    ["run"],
    ["'describe' 'pod-0'", "'ssh' 'pod-0'", "'ssh' 'pod-1'", "MEGASCALE_NUM_SLICES=2"],
  ),
  "babysit.sh": (["--tpu=pod"], ["tpu-vm' 'create' 'pod'", "matformer_jax.train"]),
}


@pytest.mark.parametrize("script", DRY_RUNS)
def test_a_dry_run_prints_the_commands_and_runs_none(script, cloud):
  args, words = DRY_RUNS[script]
  result = cloud.run(script, *args, "--dry-run", *TRAIN, SPOT="1")
  assert result.returncode == 0, result.stderr
  for word in words:
    assert word in result.stdout, (word, result.stdout)
  assert "configs/matlm.py:850M" in result.stdout
  assert not cloud.calls()


def test_dry_runs_without_a_cloud(cloud):
  result = cloud.run("local_multiprocess.sh", "3", "--dry-run", *TRAIN[1:])
  assert result.stdout.count("--process_id=") == 3 and "'--num_processes=3'" in result.stdout
  result = cloud.run("slurm.sbatch", "--dry-run", *TRAIN[1:])
  assert "'srun'" in result.stdout and not cloud.calls()


# ------------------------------------------------------------------- preemption


def test_babysit_through_preemption(cloud):
  """Ready, preempted while training, gone, ready again, done."""
  cloud.answers(states=["READY", "PREEMPTED"], codes=[255, 0])
  result = cloud.run("babysit.sh", "--tpu=pod", "--backoff=0", *TRAIN)
  assert result.returncode == 0, result.stderr
  assert cloud.verbs() == ["describe", "ssh", "describe", "delete", "create", "scp", "ssh", "ssh"]
  assert "ended with 42; restart 1" in result.stderr
  training = [c for c in cloud.calls() if "matformer_jax.train" in c]
  assert len(training) == 2 and training[0] == training[1]
  assert "exec ../.venv/bin/python" in training[0] and "it'\\''" in training[0]


def test_a_queued_resource_through_suspension(cloud):
  cloud.answers(
    states=[
      "ABSENT",
      "WAITING_FOR_RESOURCES",
      "PROVISIONING",
      "SUSPENDED",
      "ABSENT",
      "ACTIVE",
      "ACTIVE",
    ],
    codes=[42, 0],
  )
  result = cloud.run("babysit.sh", "--tpu=pod", "--queued", "--backoff=0", *TRAIN)
  assert result.returncode == 0, result.stderr
  assert cloud.verbs() == [
    "describe",
    "create",
    "describe",
    "describe",
    "describe",
    "delete",
    "describe",
    "create",
    "describe",
    "scp",
    "ssh",
    "ssh",
    "describe",
    "ssh",
  ]


def test_slices_go_on_without_a_lost_one(cloud):
  """Two are ready; one is lost; the other goes on alone, once asked to."""
  ready = ["READY", "READY"]
  cloud.answers(states=[*ready, "10.0.0.2", "READY", "PREEMPTED", "READY", "PREEMPTED", "10.0.0.2"])
  (cloud.root / "codes").write_text("42\n42\n0\n")
  flags = ["--tpu=pod", "--slices=2", "--elastic", "--backoff=0"]
  result = cloud.run("babysit.sh", *flags, *TRAIN)
  assert result.returncode == 0, result.stderr
  assert "going on with 1 of 2 slices" in result.stderr
  training = [c for c in cloud.calls() if "matformer_jax.train" in c]
  found = [re.search(r"NUM_SLICES=(\d) MEGASCALE_SLICE_ID=(\d)", c).groups() for c in training]
  assert sorted(found[:2]) == [("2", "0"), ("2", "1")] and found[2:] == [("1", "0")]
  assert all("10.0.0.2" in call for call in training)
  assert not any("create" in call or "delete" in call for call in cloud.calls())


def test_slices_are_all_made_again_unless_elastic(cloud):
  cloud.answers(states=["READY", "READY", "10.0.0.2"])
  (cloud.root / "codes").write_text("42\n255\n0\n0\n")
  result = cloud.run("babysit.sh", "--tpu=pod", "--slices=2", "--backoff=0", *TRAIN)
  assert result.returncode == 0, result.stderr
  assert "ended with 42; restart 1" in result.stderr
  training = [c for c in cloud.calls() if "matformer_jax.train" in c]
  assert len(training) == 4 and all("NUM_SLICES=2" in call for call in training)


def test_an_error_in_one_slice_is_no_reason_to_restart(cloud):
  (cloud.root / "codes").write_text("42\n1\n")
  result = cloud.run("slices.sh", "run", *TRAIN)
  assert result.returncode == 1


@pytest.mark.parametrize("code,restarts", [(0, 0), (1, 0), (137, 0), (42, 2), (143, 2)])
def test_babysit_restarts_on_retryable_codes_only(code, restarts, cloud):
  script = cloud.root / "train.sh"
  script.write_text(f'#!/bin/sh\necho "$@" >> {cloud.root}/runs\nexit {code}\n')
  script.chmod(0o755)
  result = cloud.run(
    "babysit.sh",
    "--max-restarts=2",
    "--backoff=0",
    "--",
    str(script),
    "--workdir={run_id}/x",
    RUN_ID="",
  )
  assert result.returncode == code
  runs = (cloud.root / "runs").read_text().splitlines()
  assert len(runs) == restarts + 1 and len(set(runs)) == 1  # one run id
  assert "{run_id}" not in runs[0] and runs[0].startswith("--workdir=20")


def test_babysit_passes_sigterm_on_and_stops(cloud):
  script = cloud.root / "train.py"
  script.write_text(
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))\n"
    "print('ready', flush=True)\ntime.sleep(1800)\n"
  )
  process = subprocess.Popen(
    [LAUNCH / "babysit.sh", "--", sys.executable, script],
    env=cloud.env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=helpers.BACKSTOP_S)
  assert process.returncode == 143 and "after 0 restarts" in errors


def test_babysit_backs_off(cloud):
  started = time.time()
  result = cloud.run(
    "babysit.sh",
    "--max-restarts=2",
    "--backoff=1",
    "--",
    "false_42.sh",
    PATH=f"{_exits(cloud, 42)}:{cloud.env['PATH']}",
  )
  assert result.returncode == 42
  assert time.time() - started >= 3  # a lower bound: it did pause
  assert "in 1 s" in result.stderr and "in 2 s" in result.stderr


def _exits(cloud, code) -> pathlib.Path:
  path = cloud.bin / "false_42.sh"
  path.write_text(f"#!/bin/sh\nexit {code}\n")
  path.chmod(0o755)
  return cloud.bin


def test_slurm_queues_again_when_preempted_only(cloud):
  for code, requeued in ((143, True), (42, True), (1, False), (0, False)):
    cloud.answers(codes=[code])
    (cloud.root / "calls").write_text("")
    result = cloud.run("slurm.sbatch", *TRAIN[1:], SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(ROOT))
    assert result.returncode == code
    assert ("scontrol 'requeue' '77'" in cloud.calls()) == requeued
  text = (LAUNCH / "slurm.sbatch").read_text()
  assert "#SBATCH --requeue" in text and "#SBATCH --signal=TERM@300" in text


# -------------------------------------------------------------------- manifests

# Field names of the JobSet v1alpha2 custom resource definition, and of the batch/v1 Job and
# core/v1 Pod fields used here, as published.
FIELDS = {
  "": {"apiVersion", "kind", "metadata", "spec", "status"},
  "spec": {
    "coordinator",
    "dependsOn",
    "failurePolicy",
    "managedBy",
    "network",
    "replicatedJobs",
    "startupPolicy",
    "successPolicy",
    "suspend",
    "ttlSecondsAfterFinished",
    "volumeClaimPolicies",
  },
  "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
  "spec.failurePolicy.rules": {
    "action",
    "name",
    "onJobFailureMessagePatterns",
    "onJobFailureReasons",
    "targetReplicatedJobs",
  },
  "spec.replicatedJobs": {"dependsOn", "groupName", "name", "replicas", "template"},
  "spec.replicatedJobs.template": {"metadata", "spec"},
  "spec.replicatedJobs.template.spec": {
    "activeDeadlineSeconds",
    "backoffLimit",
    "backoffLimitPerIndex",
    "completionMode",
    "completions",
    "managedBy",
    "manualSelector",
    "maxFailedIndexes",
    "parallelism",
    "podFailurePolicy",
    "podReplacementPolicy",
    "selector",
    "successPolicy",
    "suspend",
    "template",
    "ttlSecondsAfterFinished",
  },
  "spec.replicatedJobs.template.spec.podFailurePolicy": {"rules"},
  "spec.replicatedJobs.template.spec.podFailurePolicy.rules": {
    "action",
    "onExitCodes",
    "onPodConditions",
  },
  "spec.replicatedJobs.template.spec.podFailurePolicy.rules.onExitCodes": {
    "containerName",
    "operator",
    "values",
  },
  "spec.replicatedJobs.template.spec.template": {"metadata", "spec"},
}
ACTIONS = {
  "FailJobSet",
  "RestartJobSet",
  "RestartJobSetAndIgnoreMaxRestarts",
  "RestartJob",
  "RestartJobAndIgnoreMaxRestarts",
}


def check_fields(node, path="") -> None:
  if isinstance(node, list):
    for item in node:
      check_fields(item, path)
  elif isinstance(node, dict) and path in FIELDS:
    assert node.keys() <= FIELDS[path], (path, node.keys() - FIELDS[path])
    for key, value in node.items():
      check_fields(value, f"{path}.{key}".lstrip("."))


def test_the_jobset_follows_the_schema(cloud):
  result = cloud.run("jobset.sh", "apply", *TRAIN, HOSTS="8", TPU_TOPOLOGY="4x8")
  assert result.returncode == 0, result.stderr
  manifest = yaml.safe_load((cloud.root / "applied").read_text())
  check_fields(manifest)
  assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert {r["action"] for r in manifest["spec"]["failurePolicy"]["rules"]} <= ACTIONS
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 8
  pod = job["template"]["spec"]
  assert pod["containers"][0]["args"] == TRAIN[1:]
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
  # Retryable codes are left to the restart policy; a mistake ends the job.
  assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1]
  assert "volumes" not in pod and "serviceAccountName" not in pod


def test_a_jobset_with_a_volume_and_an_account(cloud):
  result = cloud.run("jobset.sh", "apply", *TRAIN, CLAIM="shared", SERVICE_ACCOUNT="trainer")
  assert result.returncode == 0, result.stderr
  manifest = yaml.safe_load((cloud.root / "applied").read_text())
  check_fields(manifest)
  pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["serviceAccountName"] == "trainer"
  (volume,), (mount,) = pod["volumes"], pod["containers"][0]["volumeMounts"]
  assert volume["persistentVolumeClaim"] == {"claimName": "shared"}
  assert mount == {"name": volume["name"], "mountPath": "/mnt/runs"}


def test_a_wrong_field_would_be_seen():
  with pytest.raises(AssertionError, match="maxRestart"):
    check_fields({"spec": {"failurePolicy": {"maxRestart": 3}}})


def test_sky_and_docker():
  sky = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  assert sky["run"].startswith("exec ") and sky["resources"]["use_spot"]
  docker = (LAUNCH / "Dockerfile").read_text()
  assert "\nUSER trainer\n" in docker and 'ENTRYPOINT ["python"' in docker
  pins = (LAUNCH / "constraints.txt").read_text().split()
  assert all("==" in pin for pin in pins) and any(p.startswith("libtpu==") for p in pins)


@pytest.mark.parametrize(
  "script,args,words",
  [
    ("tpu_vm.sh", ["fly"], "unknown action 'fly'"),
    ("babysit.sh", [], "no command"),
    ("babysit.sh", ["--elastic", "--", "true"], "--elastic needs --slices=N"),
    ("babysit.sh", ["--slices=2", "--", "true"], "--slices=2 needs --tpu=NAME"),
    ("babysit.sh", ["--slices=two", "--", "true"], "is not a number of slices"),
    ("local_multiprocess.sh", ["two"], "number of processes"),
    ("xpk.sh", ["create"], "no arguments"),
  ],
)
def test_mistakes(script, args, words, cloud):
  result = cloud.run(script, *args)
  assert result.returncode == 1 and words in result.stderr and not cloud.calls()


@pytest.mark.slow
def test_two_local_processes(tmp_path, cloud):
  changes = dict(steps=4, eval__every=0, eval__batches=1, **helpers.ONE_WIDTH)
  args = helpers.train_args(tmp_path / "run", **changes)
  result = subprocess.run(
    [LAUNCH / "local_multiprocess.sh", "2", *args],
    env=cloud.env,
    timeout=helpers.BACKSTOP_S,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert "[0] done: 4 steps" in result.stdout and "2 x cpu of 2 processes" in result.stdout
