"""Workdirs and data in buckets, against a real server."""

import json
import pathlib
import random
import re
import shutil
import sysconfig
import time

from buckets import BUCKET
import gcsfs.retry
import helpers
from helpers import ONE_WIDTH, TWO_WIDTHS, run_program, train_args
import jax
import moto.server
import numpy as np
import pytest
from tfds_files import write_tfds

import matformer_jax
from matformer_jax import storage
from matformer_jax.checkpoints import card, checkpoint
from matformer_jax.data import store, text_sources
from matformer_jax.errors import UserError
from matformer_jax.formats import sources
from matformer_jax.hosts import lock


def test_what_is_no_path():
  for text, why in (
    ("az://b/x", "gs:// and s3://"),
    ("gs:///x", "names no bucket"),
    ("gs://", "names no bucket"),
  ):
    with pytest.raises(UserError, match=why):
      storage.path(text)
  for text, why in (("gs://b/x", "--out=gs://b/x must be of this machine"), ("az://b/x", "s3://")):
    with pytest.raises(UserError, match=why):
      storage.local(text, "--out")
  assert storage.path("~/x") == pathlib.Path.home() / "x"
  assert isinstance(storage.path("a://b/c".partition(":")[0]), pathlib.Path)


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(storage.SCHEMES, "gs", "no_such_package")
  with pytest.raises(UserError, match=r"no_such_package: pip install 'matformer_jax\[gcs\]'"):
    storage.path("gs://bucket/x")


@pytest.fixture(scope="module")
def s3():
  """A server of S3 in this process; settings for its clients."""
  server = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
  server.start()
  url = "http://{}:{}".format(*server.get_host_and_port())
  yield {
    "AWS_ENDPOINT_URL": url,
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
    "AWS_DEFAULT_REGION": "us-east-1",
  }
  server.stop()


@pytest.fixture
def s3_bucket(s3, monkeypatch):
  """A bucket of S3 of its own."""
  for name, value in s3.items():
    monkeypatch.setenv(name, value)
  name = f"bucket-{time.time_ns()}"
  storage.path(f"s3://{name}").mkdir()
  return storage.path(f"s3://{name}/deep")


@pytest.fixture(params=["here", "bucket", "s3_bucket"])
def directory(request, tmp_path):
  """A directory of this machine, and one of a bucket of each kind."""
  return tmp_path if request.param == "here" else request.getfixturevalue(request.param)


def test_files(directory):
  file = directory / "a.bin"
  assert storage.create_file(file, b"0123456789")
  assert not storage.create_file(file, b"other")
  assert file.read_bytes() == b"0123456789" and storage.size(file) == 10
  assert storage.read_range(file, 2, 5) == b"234"
  assert storage.read_ranges([(file, 0, 2), (file, 7, 10)]) == [b"01", b"789"]
  assert b"".join(storage.blocks(file)) == b"0123456789"
  before = storage.version(file)
  storage.replace_file(file, b"x" * 10)
  assert file.read_bytes() == b"x" * 10 and storage.version(file) != before
  storage.copy_file(file, directory / "b.bin")
  assert storage.files(directory) == [directory / "a.bin", directory / "b.bin"]
  with pytest.raises(FileNotFoundError):
    storage.size(directory / "c.bin")


def test_directories(directory):
  (directory / "one" / "deep").mkdir(parents=True)
  for name in ("one/x.txt", "one/deep/y.txt", "two.txt"):
    storage.replace_file(directory / name, name.encode())
  assert storage.sizes(directory / "one") == {
    directory / "one/deep/y.txt": 14,
    directory / "one/x.txt": 9,
  }
  assert list(storage.matching(f"{directory}/**/*.txt")) == sorted(
    directory / name for name in ("one/deep/y.txt", "one/x.txt", "two.txt")
  )
  storage.move(directory / "one", directory / "three")
  assert not (directory / "one").exists()
  assert (directory / "three" / "deep" / "y.txt").read_text() == "one/deep/y.txt"
  storage.move(directory / "two.txt", directory / "three" / "two.txt")
  assert len(storage.files(directory)) == 3
  assert storage.sizes(directory / "three" / "two.txt") == {directory / "three" / "two.txt": 7}
  assert storage.local_copy(directory / "three" / "two.txt").read_text() == "two.txt"
  copy = storage.local_copy(directory / "three")
  assert (copy / "deep" / "y.txt").read_text() == "one/deep/y.txt"
  storage.remove(directory / "three")
  assert storage.files(directory) == []


def test_what_grows_is_staged(directory):
  storage.replace_file(directory / "log.jsonl", b"1\n")
  staging = storage.Staging(directory)
  path = staging.fetch("log.jsonl")
  with open(path, "a") as f:
    f.write("2\n")
  (staging.local / "board").mkdir()
  (staging.local / "board" / "events").write_text("e")
  staging.sync()
  assert (directory / "log.jsonl").read_text() == "1\n2\n"
  assert (directory / "board" / "events").read_text() == "e"


def test_what_is_written_aside(directory):
  with pytest.raises(ZeroDivisionError), storage.written_aside(directory / "out") as temporary:
    temporary.mkdir()
    (temporary / "half").write_text("half")
    raise ZeroDivisionError
  assert storage.files(directory) == []
  with storage.written_aside(directory / "out") as temporary:
    temporary.mkdir()
    (temporary / "whole").write_text("whole")
  with storage.written_aside(directory / "file.gguf") as temporary:
    temporary.write_text("one file")
  assert (directory / "out" / "whole").read_text() == "whole"
  assert (directory / "file.gguf").read_text() == "one file"


def test_two_jobs_are_noticed(bucket, monkeypatch):
  monkeypatch.setattr(lock, "SETTLE_S", 0.1)
  with lock.hold(bucket):
    with pytest.raises(UserError, match="is in use by another job: process"), lock.hold(bucket):
      pass
  monkeypatch.setattr(lock, "_machine", lambda: "elsewhere")
  with lock.hold(bucket, beat_s=0.1):
    monkeypatch.setattr(lock, "_machine", lambda: "here")
    with pytest.raises(UserError, match="in use by another job"), lock.hold(bucket, stale_s=5.0):
      pass
  assert storage.files(bucket) == []
  dead = lock._Lock(bucket / lock.LOCK_FILE, None, 1, 1, "--workdir")._content()
  storage.create_file(bucket / lock.LOCK_FILE, dead.replace(b"here", b"gone"))
  with lock.hold(bucket, stale_s=0.5):
    assert (bucket / lock.LOCK_FILE).read_bytes() != dead
  assert storage.files(bucket) == []


def test_a_lock_whose_answer_was_lost(bucket, monkeypatch):
  """The client asks again, and is told that there is one: its own."""
  create = storage.create_file
  monkeypatch.setattr(storage, "create_file", lambda *args: create(*args) and False)
  with lock.hold(bucket):
    assert (bucket / lock.LOCK_FILE).exists()


def test_what_may_work_later():
  def told_by(function, *args):
    try:
      function(*args)
    except Exception as e:
      return e

  answer = lambda code: gcsfs.retry.HttpError({"code": code, "message": "no"})
  forbidden = told_by(gcsfs.retry.validate_response, 403, b"", "path")
  missing = told_by(gcsfs.retry.validate_response, 404, b"", "path")
  assert isinstance(forbidden, OSError) and storage.is_refusal(forbidden)
  assert isinstance(missing, FileNotFoundError) and not storage.is_refusal(missing)
  assert [storage.is_outage(answer(code)) for code in (503, 429, 401)] == [True, True, False]
  assert not storage.is_outage(forbidden)
  assert not storage.is_refusal(OSError("local")) and not storage.is_outage(ValueError("bug"))
  wrapped = UserError("cannot write")
  wrapped.__cause__ = ValueError("UNAVAILABLE: bucket")
  assert storage.is_outage(wrapped)
  lost = ValueError("UNAVAILABLE: a save failed")
  lost.__cause__ = jax.errors.JaxRuntimeError("UNAVAILABLE: recvmsg: Connection reset by peer")
  assert not storage.is_outage(lost)


def test_tokens_are_read_by_range(bucket, gcs):
  shards = [np.arange(1000, dtype=np.uint16), np.arange(1000, 1500, dtype=np.uint16)]
  arrays = []
  for i, shard in enumerate(shards):
    storage.replace_file(bucket / f"{i}.bin", shard.tobytes())
    arrays.append(store._Ranges(bucket / f"{i}.bin", shard.dtype, len(shard)))
  there, here = store.Tokens(arrays, np.uint16), store.Tokens(shards, np.uint16)
  at_once, most = [], []

  def stall(method, path):
    at_once.append(path)
    most.append(len(at_once))
    time.sleep(0.2)
    at_once.pop()

  gcs.stall = stall
  slices = [slice(3, 9), slice(990, 1010), slice(1400, 1500), slice(5, 5), slice(1490, 1600)]
  for a, b in zip(there.read(slices), here.read(slices), strict=True):
    np.testing.assert_array_equal(a, b)
  assert max(most) > 1  # windows of a batch are not waited for one by one
  gcs.stall = lambda method, path: None
  assert there[1234] == 1234
  np.testing.assert_array_equal(there[10:1200:7], here[10:1200:7])
  places = np.array([0, 10, 500], np.uint64)
  storage.replace_file(bucket / "starts.bin", places.tobytes())
  documents = store.Documents([(0, store._Ranges(bucket / "starts.bin", places.dtype, 3))])
  np.testing.assert_array_equal(documents.starts(5, 600), [10, 500])


def test_a_tfds_dataset_in_a_bucket(bucket, tmp_path):
  import tensorflow_datasets as tfds

  rows = [{"text": f"document {i}".encode()} for i in range(20)]
  features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
  write_tfds(tmp_path, "notes", features, "train", "tfrecord", rows)
  for file in storage.files(tmp_path):
    storage.replace_file(bucket / file.relative_to(tmp_path), file.read_bytes())
  corpora = [text_sources.open_corpus("tfds:notes/plain:text", str(d)) for d in (tmp_path, bucket)]
  here, there = (list(c.part(0, 1)) for c in corpora)
  assert here == there and len(here) == 20


def test_checkpoints_are_not_in_s3(s3, s3_bucket):
  result = run_program("train", *train_args(s3_bucket), env=s3)
  assert result.returncode == 1 and "Traceback" not in result.stderr
  assert f"{s3_bucket}: checkpoints can be in gs:// or on a file system" in result.stderr


# -------------------------------------------------------------------- programs

SHORT = dict(
  steps=12, checkpoint__every=4, log_every=1, eval__every=0, eval__batches=1, **TWO_WIDTHS
)


def trajectory(workdir) -> list[tuple]:
  rows = (workdir / "metrics.jsonl").read_text().splitlines()
  return [tuple(json.loads(row)[k] for k in ("step", "granularity", "loss")) for row in rows]


def checksums(workdir) -> dict:
  """Of every leaf of the last step."""
  return checkpoint.read_meta(workdir, checkpoint.steps(workdir)[-1])["manifest"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> pathlib.Path:
  """A short run on this machine."""
  workdir = tmp_path_factory.mktemp("straight") / "run"
  result = run_program("train", *train_args(workdir, **SHORT))
  assert result.returncode == 0, result.stderr
  return workdir


@pytest.fixture(scope="module")
def faulty_run(gcs) -> str:
  """The same run in a bucket that answers every tenth request with 429, 500 or 503."""
  workdir, before = f"gs://{BUCKET}/faulty", gcs.requests
  gcs.fail_every = 10
  result = run_program("train", *train_args(workdir, **SHORT), env=gcs.env)
  gcs.fail_every = 0
  assert result.returncode == 0, result.stderr
  assert gcs.requests - before > 100
  return workdir


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_same_run(bucket, straight, faulty_run):
  workdir = storage.path(faulty_run)
  assert checksums(workdir) == checksums(straight)
  assert trajectory(workdir) == trajectory(straight)
  names = lambda directory: {p.name for p in directory.iterdir()}
  assert names(workdir) == names(straight)
  assert checkpoint.steps(workdir) == checkpoint.steps(straight) == [8, 12]
  assert storage.files(workdir / "tensorboard")


@pytest.mark.slow
def test_it_is_read_where_it_is(gcs, bucket, straight, faulty_run, tmp_path):
  def run(module, *args):
    result = run_program(module, *args, env=gcs.env)
    assert result.returncode == 0, result.stderr
    return result.stdout

  here, there = matformer_jax.load(straight), matformer_jax.load(faulty_run)
  tokens = np.arange(20)
  np.testing.assert_array_equal(here.logits(tokens, "G1"), there.logits(tokens, "G1"))
  small = f"{bucket}/small"
  run("extract", f"--workdir={faulty_run}", "--granularity=G1", f"--out={small}")
  assert checkpoint.steps(small) == [12]
  table, plot = bucket / "loss.json", bucket / "loss.png"
  run("evaluate", f"--workdir={small}", "--batches=1", f"--json={table}", f"--plot={plot}")
  run("evaluate", f"--workdir={straight}", "--batches=1", f"--json={tmp_path / 'loss.json'}")
  loss = lambda path: json.loads(path.read_text())["granularities"]
  (whole,) = loss(table).values()
  assert whole["loss"] == pytest.approx(loss(tmp_path / "loss.json")["G1"]["loss"], rel=1e-6)
  assert plot.read_bytes().startswith(b"\x89PNG")
  again = run("train", *train_args(faulty_run, **SHORT))
  assert f"nothing to do: {faulty_run} is at step 12" in again
  tuned = f"{bucket}/tuned"
  run("train", *train_args(tuned, **SHORT | dict(steps=2, init_from=faulty_run)))
  assert checkpoint.steps(tuned) == [2]
  run("search", f"--workdir={faulty_run}", "--random=2", "--batches=1", f"--out={bucket}/search")
  assert len(storage.files(bucket / "search")) == 3
  run("export", f"--workdir={small}", "--format=hf", f"--out={bucket}/hf", "--check=False")
  assert (bucket / "hf" / "model.safetensors").exists()
  run("import_model", f"--from={bucket}/hf", f"--out={bucket}/imported", "--order=none")
  assert card.read(bucket / "imported")["imported"]["from"] == f"{bucket}/hf"


def test_a_bad_model_in_a_bucket_is_named_as_given(bucket):
  with pytest.raises(UserError, match=re.escape(f"--from={bucket}/none does not exist")):
    sources.open_source(bucket / "none")
  storage.replace_file(bucket / "model" / "config.json", b"{")
  with pytest.raises(UserError, match=re.escape(f"--from={bucket}/model: config.json cannot be")):
    sources.open_source(bucket / "model")


@pytest.mark.slow
def test_a_corpus_in_a_bucket(gcs, bucket, tmp_path):
  """Prepared from there to there; the same tokens as on this machine, and trained on."""
  library = pathlib.Path(sysconfig.get_paths()["stdlib"])
  texts = sorted(library.glob("*.py"))[:12]
  for text in texts:
    shutil.copy(text, tmp_path / text.name)
    storage.replace_file(bucket / "text" / "deep" / text.name, text.read_bytes())
  flags = ["--vocab_size=500", "--tokenizer_type=bpe", "--validation_fraction=0.2", "--workers=2"]
  stores = []
  for source, out in (
    (f"text:{tmp_path}/*.py", tmp_path / "store"),
    (f"text:{bucket}/text/**/*.py", bucket / "store"),
  ):
    made = run_program("data.prepare", f"--source={source}", f"--out={out}", *flags, env=gcs.env)
    assert made.returncode == 0, made.stderr
    stores.append(store.open_store(out))
  here, there = stores
  assert here.fingerprint == there.fingerprint
  for split in store.SPLITS:
    np.testing.assert_array_equal(np.asarray(here.tokens[split]), np.asarray(there.tokens[split]))
  runs = []
  for name, out in (("a", tmp_path / "store"), ("b", bucket / "store")):
    changes = SHORT | dict(steps=3, data__source=f"tokens:{out}")
    result = run_program("train", *train_args(tmp_path / name, **changes), env=gcs.env)
    assert result.returncode == 0, result.stderr
    runs.append(checksums(tmp_path / name)["params"])
  assert runs[0] == runs[1]


@pytest.mark.slow
def test_kills_at_any_moment(gcs, bucket, tmp_path):
  """Ten, at random moments after the program has begun to train; saves are every second step."""
  changes = SHORT | ONE_WIDTH | dict(checkpoint__every=2, steps=40, checkpoint__keep_last=20)
  rng, kills, reached = random.Random(0), 0, 0
  whole, workdir = tmp_path / "run", bucket / "killed"
  assert run_program("train", *train_args(whole, **changes)).returncode == 0
  while kills < 10:
    process = helpers.Program("train", *train_args(workdir, **changes), env=gcs.env)
    until = f"step {min(reached + 2 + rng.randrange(2), 39)}/40"
    lines = iter(process.stdout.readline, "")
    assert any(until in line for line in lines), process.wait()
    time.sleep(rng.random() * 0.3)
    if process.poll() is not None:
      break
    process.kill()
    process.wait()
    kills += 1
    now = max(checkpoint.steps(workdir), default=0)
    assert now >= reached
    recorded = [step for step, *_ in trajectory(workdir)] if now else []
    assert recorded[:now] == list(range(1, now + 1))  # of all that is saved there is a record
    reached = now
  assert kills >= 8
  assert run_program("train", *train_args(workdir, **changes), env=gcs.env).returncode == 0
  assert trajectory(workdir) == trajectory(whole)
  assert checksums(workdir) == checksums(whole)


def test_a_stall(gcs, bucket, straight):
  """A request that takes ten seconds is waited for."""
  stalled = []

  def stall(method, path):
    if method == "POST" and "checkpoints" in path and not stalled:
      stalled.append(path)
      time.sleep(10)

  gcs.stall = stall
  result = run_program("train", *train_args(bucket, **SHORT), env=gcs.env)
  assert result.returncode == 0 and stalled
  assert checksums(bucket) == checksums(straight)


@pytest.mark.slow
@pytest.mark.parametrize("status", [503, 403])
def test_a_bucket_that_refuses_in_a_save(status, gcs, bucket, straight):
  """A clear error in bounded time; what was saved before is intact, and training goes on."""

  def die(method, path):
    if "checkpoints%2F8%2F" in path or "checkpoints/8/" in path:
      gcs.refusing = status

  gcs.stall = die
  changes = SHORT | dict(storage_timeout_s=20.0)
  result = run_program("train", *train_args(bucket, **changes), env=gcs.env)
  gcs.stall, gcs.refusing = lambda method, path: None, None
  # An outage may end; a right that is missing must be given first.
  assert result.returncode == {503: 42, 403: 1}[status], result.stderr[-2000:]
  assert "Traceback" not in result.stderr and "intact" in result.stderr
  assert checkpoint.steps(bucket) == [4]
  again = run_program("train", *train_args(bucket, **SHORT), env=gcs.env)
  assert again.returncode == 0 and "at step 4" in again.stdout, again.stderr
  assert checksums(bucket) == checksums(straight)
