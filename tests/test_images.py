"""Image sources, operations, and batches addressed by step."""

import errno
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib

from helpers import PROGRAM_ENV, ROOT
import numpy as np
from PIL import Image, ImageChops, ImageFilter
import pytest
from tfds_files import write_tfds

from matformer_jax import UserError
from matformer_jax.data import augment, image_sources
from matformer_jax.data.augment import RANDAUGMENT, Transform
from matformer_jax.data.batches import Corrupt, ImageBatches, LabelledBatches, read_ahead


def picture(seed: int = 0, size=(40, 30), mode: str = "RGB") -> Image.Image:
  """A smooth one with some noise, as photographs are."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
  smooth = np.asarray(small.resize(size, Image.Resampling.BICUBIC), int)
  noisy = np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)
  return Image.fromarray(noisy).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind)
  return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
  """Two classes, JPEG and PNG, a colour and a grey one."""
  for split, count in (("train", 4), ("validation", 3)):
    for c, name in enumerate(("cat", "dog")):
      (tmp_path / split / name).mkdir(parents=True)
      for i in range(count):
        kind, suffix = (("JPEG", "JPG"), ("PNG", "png"))[i % 2]
        image = picture(10 * c + i, mode="L" if i == 3 else "RGB")
        (tmp_path / split / name / f"{i}.{suffix}").write_bytes(encoded(image, kind))
  return tmp_path


def batches(
  source: image_sources.Images, size=8, batch_size=4, transform="", **kwargs
) -> ImageBatches:
  return ImageBatches(
    source,
    batch_size,
    Transform(transform or f"resize({size})", size),
    kwargs.pop("corrupt", Corrupt("error")),
    kwargs.pop("seed", 3),
    **kwargs,
  )


# ------------------------------------------------------------------- sources


def test_digits():
  train, validation = (
    image_sources.open_images("sklearn:digits", s, channels=1) for s in ("train", "validation")
  )
  assert (train.size, validation.size, train.num_classes) == (1438, 359, 10)
  assert train.fingerprint != validation.fingerprint
  image, (label,) = train.decode(0)
  assert image.size == (8, 8) and image.mode == "L" and 0 <= label < 10
  rows = lambda s: {np.asarray(s.decode(i)[0]).tobytes() for i in range(s.size)}
  assert not rows(train) & rows(validation)


def write_idx(path, array: np.ndarray, packed: bool) -> None:
  content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
  if packed:
    path = path.with_name(path.name + ".gz")
    content = gzip.compress(content)
  path.write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
  rng = np.random.default_rng(0)
  pixels, labels = rng.integers(0, 256, (12, 6, 5), np.uint8), (np.arange(12) % 3).astype(np.uint8)
  for part in ("train", "t10k"):
    write_idx(tmp_path / f"{part}-images-idx3-ubyte", pixels, packed)
    write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels, packed)
  found = image_sources.open_images(f"idx:{tmp_path}", "test", channels=1)
  assert found.size == 12 and found.num_classes == 3
  np.testing.assert_array_equal(np.asarray(found.decode(7)[0]), pixels[7])
  assert found.decode(7)[1] == (1,)
  kept = image_sources.open_images(f"idx:{tmp_path}", "train", classes=(2, 0))
  assert kept.size == 8 and kept.class_names == ("2", "0") and kept.fingerprint != found.fingerprint
  assert [kept.read(i).labels for i in range(3)] == [(1,), (0,), (1,)]
  broken = next(tmp_path.glob("t10k-images*"))
  broken.write_bytes(broken.read_bytes()[:-20])
  with pytest.raises(UserError, match="t10k-images.* is damaged"):
    image_sources.open_images(f"idx:{tmp_path}", "test")


def test_folder(folder):
  train = image_sources.open_images(f"folder:{folder}", "train")
  assert train.class_names == ("cat", "dog") and train.size == 8
  image, label = train.decode(7)
  assert image.mode == "RGB" and image.size == (40, 30) and label == (1,)
  grey = image_sources.open_images(f"folder:{folder}", "train", channels=1)
  assert grey.decode(0)[0].mode == "L"
  with pytest.raises(UserError, match="has no split 'val'; it has train, validation"):
    image_sources.open_images(f"folder:{folder}", "val")


def test_several_right_answers(folder):
  """As ImageNet ReaL: some images have several labels, some none."""
  answers = {"cat/0.JPG": ["cat", "dog"], "cat/1.png": []}
  (folder / "validation_labels.json").write_text(json.dumps(answers))
  validation = image_sources.open_images(f"folder:{folder}", "validation")
  assert validation.max_labels == 2
  reader = LabelledBatches(validation, 4, Transform("resize(8)", 8), Corrupt("error"))
  assert reader.num_batches == 2
  np.testing.assert_array_equal(reader.batch(0)["labels"], [[0, 1], [-1, -1], [0, -1], [1, -1]])
  last = reader.batch(1)  # filled with images that count for nothing
  np.testing.assert_array_equal(last["labels"], [[1, -1], [1, -1], [-1, -1], [-1, -1]])
  assert last["image"].shape == (4, 8, 8, 3) and not last["image"][2:].any()
  with pytest.raises(UserError, match="training needs one each"):
    batches(validation)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize("several", [False, True])
def test_tfds(tmp_path, file_format, several):
  import tensorflow_datasets as tfds

  label = tfds.features.ClassLabel(names=["cat", "dog", "eel"])
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "answer": tfds.features.Sequence(label) if several else label,
    }
  )
  pictures = [picture(i) for i in range(5)]
  answers = [[1], [0, 2], [2], [], [0]] if several else [[1], [0], [2], [1], [0]]
  write_tfds(
    tmp_path,
    "photos",
    features,
    "validation",
    file_format,
    [{"image": encoded(p), "answer": a} for p, a in zip(pictures, answers)],
  )
  found = image_sources.open_images(
    "tfds:photos/plain", "validation", data_dir=str(tmp_path), label="answer"
  )
  assert found.class_names == ("cat", "dog", "eel") and found.max_labels == 1 + several
  found = pickle.loads(pickle.dumps(found))  # as a worker process gets it
  for i in (3, 0, 4, 1):  # in any order
    image, labels = found.decode(i)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(pictures[i]))
    assert list(labels) == answers[i]
  assert "tensorflow" not in sys.modules
  with pytest.raises(UserError, match="no split 'test'; it has validation"):
    image_sources.open_images("tfds:photos/plain", "test", data_dir=str(tmp_path))
  with pytest.raises(UserError, match="no feature 'label'"):
    image_sources.open_images("tfds:photos/plain", "validation", data_dir=str(tmp_path))


@pytest.mark.parametrize(
  "source,words",
  [
    ("digits", "not a source of images"),
    ("sklearn:iris", "only sklearn:digits"),
    ("idx:/nowhere", "there is no train-images"),
    ("folder:/nowhere", "no split 'train'"),
    ("tfds:nope", "no prepared dataset 'nope'"),
  ],
)
def test_source_mistakes(source, words):
  with pytest.raises(UserError, match=words):
    image_sources.open_images(source, "train")


# ---------------------------------------------------------------- operations

GREY = (128, 128, 128)


def pixels(image: Image.Image) -> np.ndarray:
  return np.asarray(image).astype(float)


def blended(image, other, factor):
  """Pillow's ImageEnhance: other + factor * (image - other), cut to a byte."""
  return np.clip(pixels(other) + factor * (pixels(image) - pixels(other)), 0, 255)


def shifted(image, x, y):
  """Grey moves in from where the picture moved away: an input pixel (x + i, y + j) at (i, j)."""
  out = Image.new("RGB", image.size, GREY)
  out.paste(image, (-x, -y))
  return out


def equalized(image):
  """Each channel's histogram made flat, by Pillow's integer formula."""
  out = np.empty_like(np.asarray(image))
  for c in range(3):
    channel = np.asarray(image)[..., c]
    counts = np.bincount(channel.ravel(), minlength=256)
    step = (counts.sum() - counts[counts > 0][-1]) // 255
    table = (step // 2 + np.cumsum(counts) - counts) // step
    out[..., c] = np.minimum(table, 255)[channel]
  return out


# Level 0.5; what each operation must give, from first principles or another route in Pillow.
EXPECTED = {
  "autocontrast": lambda x: np.stack(
    [
      np.clip((c - c.min()) * (255 / (c.max() - c.min())), 0, 255)
      for c in np.moveaxis(pixels(x), 2, 0)
    ],
    2,
  ),
  "equalize": equalized,
  "invert": lambda x: 255 - pixels(x),
  "posterize": lambda x: np.asarray(x) & 0b11000000,
  "solarize": lambda x: np.where(pixels(x) < 128, pixels(x), 255 - pixels(x)),
  "color": lambda x: pixels(x),  # factor 1.0
  "contrast": lambda x: blended(x, x, 1.0),
  "brightness": lambda x: pixels(x),
  "sharpness": lambda x: pixels(x),
  "solarize_add": lambda x: np.where(pixels(x) < 128, np.minimum(pixels(x) + 55, 255), pixels(x)),
}
LEVEL_15 = {  # at 1.5 an enhancement's factor is 2.8
  "color": lambda x: blended(x, x.convert("L").convert("RGB"), 2.8),
  "contrast": lambda x: blended(
    x, Image.new("L", x.size, int(np.asarray(x.convert("L")).mean() + 0.5)).convert("RGB"), 2.8
  ),
  "brightness": lambda x: blended(x, Image.new("RGB", x.size), 2.8),
  "sharpness": lambda x: blended(x, x.filter(ImageFilter.SMOOTH), 2.8),
  "solarize": lambda x: pixels(x),  # a threshold above every byte
  "solarize_add": lambda x: np.where(pixels(x) < 128, np.minimum(pixels(x) + 165, 255), pixels(x)),
  "posterize": lambda x: np.asarray(x) & 0b11111100,
}


@pytest.mark.parametrize("level,name", [(0.5, n) for n in EXPECTED] + [(1.5, n) for n in LEVEL_15])
def test_operations_on_values(level, name):
  image = picture()
  have = RANDAUGMENT[name](image, level, np.random.default_rng(0))
  want = (EXPECTED if level == 0.5 else LEVEL_15)[name](image)
  assert have.mode == "RGB" and np.abs(pixels(have) - want).max() <= 1


@pytest.mark.parametrize(
  "name,either",
  [
    ("translate_x", lambda x: [shifted(x, s * 50 // 5, 0) for s in (1, -1)]),
    ("translate_y", lambda x: [shifted(x, 0, s * 50 // 5) for s in (1, -1)]),
    ("rotate", lambda x: [x.rotate(s * 15 / 5, fillcolor=GREY) for s in (1, -1)]),
  ],
)
def test_operations_on_places(name, either):
  """At level 0.1; both directions come up."""
  image, seen = picture(), set()
  for seed in range(12):
    have = RANDAUGMENT[name](image, 0.1, np.random.default_rng(seed))
    same = [not ImageChops.difference(have, want).getbbox() for want in either(image)]
    assert sum(same) == 1
    seen.add(same.index(True))
  assert seen == {0, 1}


@pytest.mark.parametrize("name,axis", [("shear_x", 1), ("shear_y", 0)])
def test_shear_moves_each_line_by_its_place(name, axis):
  image = picture()
  have, x = pixels(RANDAUGMENT[name](image, 1.0, np.random.default_rng(1))), pixels(image)
  have, x = (np.moveaxis(a, 1 - axis, 0) for a in (have, x))
  moved = set()
  for line in (4, 12, 20):
    for shift in (
      round(0.3 * (line + 0.5) - 0.5),
      round(0.3 * (line + 0.5)),
      round(0.3 * (line + 0.5) + 0.5),
    ):
      for sign, (a, b) in (
        (1, (have[line][: -shift or None], x[line][shift:])),
        (-1, (have[line][shift:], x[line][: len(x[line]) - shift])),
      ):
        if np.array_equal(a, b):
          moved.add((line, sign))
  assert {line for line, _ in moved} == {4, 12, 20} and len({sign for _, sign in moved}) == 1


def test_cutout_is_a_grey_square():
  image = picture(size=(200, 200))
  have = RANDAUGMENT["cutout"](image, 0.5, np.random.default_rng(0))
  box = ImageChops.difference(have, image).getbbox()
  assert 15 <= box[2] - box[0] <= 40 and 15 <= box[3] - box[1] <= 40
  assert set(map(tuple, np.asarray(have)[box[1] : box[3], box[0] : box[2]].reshape(-1, 3))) == {
    GREY
  }


@pytest.mark.parametrize("name", RANDAUGMENT)
def test_operations_take_grey_images(name):
  for level in (0.1, 1.0, 1.5):
    have = RANDAUGMENT[name](picture(mode="L"), level, np.random.default_rng(0))
    assert have.mode == "L" and have.size == (40, 30)


def test_crops():
  image, rng = picture(size=(64, 48)), np.random.default_rng(0)
  assert augment.resize_small(image, rng, 24).size == (32, 24)
  np.testing.assert_array_equal(
    pixels(augment.center_crop(image, rng, 20)), pixels(image)[14:34, 22:42]
  )
  shifts = {augment.pad_crop(image, np.random.default_rng(i), 1).tobytes() for i in range(60)}
  assert len(shifts) == 9 and image.tobytes() in shifts
  flips = {augment.flip(image, np.random.default_rng(i)).tobytes() for i in range(20)}
  assert flips == {image.tobytes(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()}
  # Areas of crops from a coordinate ramp: at least 5%, spread to all.
  across, down = np.meshgrid(np.arange(200), np.arange(200))
  ramp = Image.fromarray(np.stack([across, down, 0 * down], 2).astype(np.uint8))
  areas, aspects = [], []
  for i in range(300):
    crop = pixels(augment.inception_crop(ramp, np.random.default_rng(i), 32))
    width, height = (np.ptp(crop[..., c]) * 32 / 31 for c in (0, 1))
    areas.append(width * height / 200**2)
    aspects.append(width / height)
  assert min(areas) > 0.04 and max(areas) > 0.85 and 0.4 < np.mean(areas) < 0.55
  assert min(aspects) > 0.68 and max(aspects) < 1.45


@pytest.mark.parametrize(
  "text,words",
  [
    ("flop", r"'flop' is not an operation; did you mean 'flip'"),
    ("resize", "wrong arguments in 'resize'"),
    ("resize(8,8)", "wrong arguments"),
    ("flip(", "'flip\\(' is not an operation"),
  ],
)
def test_transform_mistakes(text, words):
  with pytest.raises(UserError, match=words):
    Transform(text, 8, "data.train_transform")


def test_a_wrong_size_is_told():
  with pytest.raises(UserError, match=r"gives images of 40 x 30 pixels, and the model takes 8 x 8"):
    Transform("flip", 8)(picture(), np.random.default_rng(0))


# ------------------------------------------------------------------- batches


def test_batches_are_a_function_of_seed_and_step(folder):
  source = image_sources.open_images(f"folder:{folder}", "train")
  options = dict(transform="inception_crop(8)|flip|randaugment(2,9)", mixup=0.5)
  reader = batches(source, **options)
  wanted = [reader.batch(step) for step in range(6)]
  again = batches(image_sources.open_images(f"folder:{folder}", "train"), **options)
  for step in (4, 0, 5):
    for rows in (range(0, 2), range(1, 4)):  # on any number of hosts
      part = again.batch(step, rows)
      for key, value in part.items():
        np.testing.assert_array_equal(value, wanted[step][key][rows])
  other = batches(source, seed=4, **options)
  assert any(not np.array_equal(other.batch(s)["image"], wanted[s]["image"]) for s in range(6))
  # Each image once an epoch (2 steps), augmented anew in the next.
  for epoch in range(3):
    assert sorted(reader.image_ids(2 * epoch) + reader.image_ids(2 * epoch + 1)) == list(range(8))
  assert len({int(s) for b in wanted for s in b["seed"]}) == 24
  assert all(len(set(b["mix"])) == 1 and 0.5 <= b["mix"][0] <= 1 for b in wanted)


def test_workers_read_the_same(folder):
  source = image_sources.open_images(f"folder:{folder}", "train")
  reader = batches(source, transform="inception_crop(8)|flip")
  rows = [range(0, 2), range(2, 4)]
  plain = list(read_ahead(reader, 3, 7, rows, 0))
  workers = list(read_ahead(reader, 3, 7, rows, 2))
  assert len(plain) == len(workers) == 5
  for a, b in zip(plain, workers):
    for x, y in zip(a, b):
      for key in x:
        np.testing.assert_array_equal(x[key], y[key])


def test_corrupt_images(folder, tmp_path, capsys):
  (folder / "train" / "cat" / "0.JPG").write_bytes(b"\xff\xd8 no jpeg")
  (folder / "train" / "dog" / "1.png").write_bytes(
    (folder / "train" / "dog" / "1.png").read_bytes()[:300]
  )
  source = image_sources.open_images(f"folder:{folder}", "train")
  with pytest.raises(
    UserError, match=r"train/(cat/0.JPG|dog/1.png) of .* is no image that can be read"
  ):
    for step in range(2):
      batches(source).batch(step)
  corrupt = Corrupt("skip", tmp_path)
  reader = batches(source, corrupt=corrupt)
  found = [reader.batch(step) for step in range(4)]
  assert all(b["image"].shape == (4, 8, 8, 3) for b in found) and len(corrupt.skipped) == 2
  assert len((tmp_path / "skipped_images.txt").read_text().splitlines()) == 2
  assert "2 so far" in capsys.readouterr().err
  checked = LabelledBatches(source, 8, Transform("resize(8)", 8), corrupt).batch(0)
  assert (checked["labels"] == -1).sum() == 2


def test_images_of_too_many_pixels(folder, tmp_path, capsys):
  """A few bytes can claim to be an image that fills the memory."""
  claims = bytearray(encoded(picture()))
  claims[16:24] = struct.pack(">II", 50_000, 50_000)
  claims[29:33] = struct.pack(">I", zlib.crc32(claims[12:29]))
  (folder / "train" / "dog" / "1.png").write_bytes(claims)
  source = image_sources.open_images(f"folder:{folder}", "train")
  with pytest.raises(UserError, match=r"dog/1.png .*2500000000 pixels.*data.max_pixels"):
    for step in range(2):
      batches(source).batch(step)
  reader = batches(source, corrupt=Corrupt("skip", tmp_path))
  assert all(reader.batch(step)["image"].shape == (4, 8, 8, 3) for step in range(2))
  assert "dog/1.png" in (tmp_path / "skipped_images.txt").read_text()
  # The limit is the user's. All others have 40 x 30 pixels.
  (folder / "train" / "dog" / "1.png").unlink()
  strict = image_sources.open_images(f"folder:{folder}", "train", max_pixels=1198)
  with pytest.raises(UserError, match=r"1200 pixels.*1198"):
    batches(strict).batch(0)
  program = (
    "from matformer_jax.data import image_sources\n"
    f"images = image_sources.open_images('folder:{folder}', 'train', max_pixels=1200)\n"
    "assert all(images.decode(i) for i in range(images.size))\n"
  )
  command = [sys.executable, "-c", program]
  result = subprocess.run(command, cwd=ROOT, env=PROGRAM_ENV, capture_output=True, text=True)
  assert (result.returncode, result.stderr) == (0, "")  # within the limit, not a warning either
  with pytest.raises(UserError, match="max_pixels=0"):
    image_sources.open_images(f"folder:{folder}", "train", max_pixels=0)


def test_whatever_pillow_raises_is_a_corrupt_image(folder, monkeypatch):
  def fail(*args):
    raise TypeError("'float' object cannot be interpreted as an integer")

  source = image_sources.open_images(f"folder:{folder}", "train")
  monkeypatch.setattr(image_sources.Image, "open", fail)
  with pytest.raises(image_sources.CorruptImage, match="cat/0.JPG .* no image that can be read"):
    source.decode(0)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_what_the_system_refuses_is_not_skipped(folder, tmp_path, monkeypatch, number):
  def fail(*args):
    raise OSError(number, os.strerror(number))

  reader = batches(
    image_sources.open_images(f"folder:{folder}", "train"), corrupt=Corrupt("skip", tmp_path)
  )
  monkeypatch.setattr(image_sources.Image, "open", fail)
  with pytest.raises(UserError, match=rf"cannot be read \({os.strerror(number)}\)"):
    reader.batch(0)
