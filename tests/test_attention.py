"""Packed documents: each is computed as if it were alone in its row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode import decoder
from test_speculative import speculate
from test_train import MODEL, StubTask, make_trainer

from matformer_jax import UserError, sharding
from matformer_jax import granularity as gran
from matformer_jax.config import Execution
from matformer_jax.decoding.speculative import SpeculativeDecoder
from matformer_jax.models import attention, dynamic, losses, matlm, ops
from matformer_jax.tpu import hlo

# Documents of 5, 1, 7 and 3 tokens, and of 9 and 7; numbers need not start at 0 or be dense.
SEGMENTS = np.array([[2] * 5 + [3] + [7] * 7 + [8] * 3, [0] * 9 + [4] * 7], np.int32)
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 16)).astype(np.int32)


def documents(segments_T) -> list[slice]:
  """Where the documents of a row lie, written without the code under test."""
  edges = [t for t in range(len(segments_T)) if t == 0 or segments_T[t] != segments_T[t - 1]]
  return [slice(a, b) for a, b in zip(edges, [*edges[1:], len(segments_T)])]


def own_document(segments_BxT) -> np.ndarray:
  """bool [B, T, S]: may token t see token s? One token at a time."""
  length = segments_BxT.shape[1]
  return np.array(
    [[[s <= t and row[s] == row[t] for s in range(length)] for t in range(length)]
     for row in segments_BxT]
  )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _logits(params, tokens, segments, config, execution, granularity):
  model = matlm.MatLM(config, execution)
  return model.apply({"params": params}, tokens, granularity=granularity, segments_BxT=segments)


def logits(config, params, granularity="XL", execution=Execution(), tokens=TOKENS, seg=SEGMENTS):
  return _logits(params, tokens, seg, config, execution, gran.parse(granularity, config))


EXECUTIONS = {
  "unrolled": Execution(),
  "blocks of 5": Execution(attention_block=5),
  "scan, remat": Execution(scan_layers=True, remat="attn_out"),
}


@pytest.mark.parametrize(
  "name,granularity",
  [*((name, "M*2+L*2") for name in EXECUTIONS), ("unrolled", "S"), ("unrolled", "M"),
   ("unrolled", "L"), ("unrolled", "XL")],
)  # fmt: skip
def test_a_document_is_computed_as_if_alone(small, small_params, name, granularity):
  have = logits(small, small_params, granularity, EXECUTIONS[name])
  for row in range(2):
    for place in documents(SEGMENTS[row]):
      padded = np.zeros((2, 16), np.int32)
      padded[0, : place.stop - place.start] = TOKENS[row, place]
      alone = logits(small, small_params, granularity, EXECUTIONS[name], padded, None)
      np.testing.assert_allclose(
        have[row, place], alone[0, : place.stop - place.start], atol=1e-5, rtol=1e-5
      )


@pytest.mark.parametrize("name", EXECUTIONS)
def test_a_document_moves_no_bit_of_another(small, lively_params, name):
  want = np.asarray(logits(small, lively_params, execution=EXECUTIONS[name]))
  changed = TOKENS.copy()
  changed[0, 6:13] = (changed[0, 6:13] + 1) % 64
  have = np.asarray(logits(small, lively_params, execution=EXECUTIONS[name], tokens=changed))
  others = np.ones((2, 16), bool)
  others[0, 6:13] = False
  np.testing.assert_array_equal(have[others], want[others])
  assert np.all(np.abs(have - want).max(-1)[~others] > 1e-3)


def test_traced_granularity_keeps_documents_apart(small, lively_params):
  g = gran.parse("M*2+L*2", small)
  have = jax.jit(functools.partial(dynamic.apply_dynamic, config=small))(
    lively_params, TOKENS, dynamic.layer_indices(g), segments_BxT=SEGMENTS
  )
  np.testing.assert_allclose(have, logits(small, lively_params, g), atol=1e-5, rtol=1e-5)


def test_document_origins():
  want = [[t.start for t in documents(row) for _ in range(t.stop - t.start)] for row in SEGMENTS]
  np.testing.assert_array_equal(ops.document_origins(SEGMENTS), want)


def plain_attention(q, k, v, visible_BxTxS):
  scores = jnp.einsum("banth,bansh->bants", q, k)
  scores = jnp.where(visible_BxTxS[:, None, None], scores, -jnp.inf)
  return jnp.einsum("bants,bansh->banth", jax.nn.softmax(scores), v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [5, 16])
def test_gradient_within_documents(causal, block):
  q, k, v, g = (
    jax.random.normal(key, (2, 2, 3, 16, 8)) for key in jax.random.split(jax.random.key(0), 4)
  )
  visible = own_document(SEGMENTS)
  visible = visible if causal else visible | visible.swapaxes(1, 2)
  want, back = jax.vjp(lambda *a: plain_attention(*a, visible), q, k, v)
  origin = ops.document_origins(SEGMENTS)
  have, ours = jax.vjp(lambda *a: attention.blocked_attention(*a, causal, block, origin), q, k, v)
  np.testing.assert_allclose(have, want, atol=1e-5)
  for a, b in zip(ours(g), back(g)):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
  "mesh,block", [(None, 256), (None, 128), (dict(fsdp=2, tensor=2, data=2), 256)]
)
def test_the_tpu_kernel_keeps_documents_apart(mesh, block, monkeypatch):
  """Interpreted on CPU, alone and split over a mesh; in one block and two; unequal documents."""
  monkeypatch.setattr(attention, "kernel_block", lambda *sizes: (block, block == 256))
  execution = Execution(mesh=mesh and sharding.make_mesh(mesh))
  q, k, v = (
    jax.random.normal(key, (4, 2, 2, 256, 16)) for key in jax.random.split(jax.random.key(0), 3)
  )
  cuts = np.array([[10, 200], [128, 129], [1, 255], [100, 101]])
  origin = ops.document_origins((np.arange(256) >= cuts[..., None]).sum(1).astype(np.int32))
  weights = jnp.arange(16.0)

  def run(f):
    return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(f(*qkv) * weights), (0, 1, 2)))(q, k, v)

  ours = run(lambda *qkv: attention.flash_attention(*qkv, True, execution, origin, interpret=True))
  plain = run(lambda *qkv: attention.blocked_attention(*qkv, True, 128, origin))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


# ------------------------------------------------------------------- decoding

PROMPTS = [TOKENS[0].tolist(), TOKENS[1, :10].tolist(), [5], [7, 8]]
DOCUMENTS = [SEGMENTS[0].tolist(), SEGMENTS[1, :10].tolist(), [3], [0, 0]]
LAST = [PROMPTS[0][13:], PROMPTS[1][9:], [5], [7, 8]]  # the document that is continued


def continued(d, params, prompts, segments=None, chunks=(100,)):
  """The tokens that each prompt gets."""
  weights = d.lay_out(params)
  state = d.prefill(weights, prompts, 12, range(4), segments=segments)
  for steps in chunks:
    state = d.advance(weights, state, steps)
  return [row[len(p) :] for row, p in zip(state.sequences(), prompts)]


@pytest.mark.parametrize("scan", [False, True])
def test_a_prompt_of_documents_continues_its_last(small, lively_params, scan):
  d = decoder(small, "M*2+L*2", Execution(scan_layers=scan, flat_weights=not scan))
  want = continued(d, lively_params, LAST)
  assert continued(d, lively_params, PROMPTS, DOCUMENTS, (1, 4, 100)) == want
  assert continued(d, lively_params, PROMPTS) != want  # the documents matter here


def test_the_cache_holds_each_document_as_if_alone(small, lively_params):
  d = decoder(small)
  weights = d.lay_out(lively_params)
  key = lambda prompts, segments: np.asarray(
    d.prefill(weights, prompts, 4, range(len(prompts)), segments=segments).cache[-1]["k"]
  )
  packed = key(PROMPTS, DOCUMENTS)
  alone = key([PROMPTS[0][place] for place in documents(SEGMENTS[0])], None)
  for i, place in enumerate(documents(SEGMENTS[0])):
    want = alone[i, :, :, : place.stop - place.start]
    np.testing.assert_allclose(packed[0, :, :, place], want, atol=1e-5)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "two caches"])
def test_speculation_after_documents(small, lively_params, share):
  """Also after a last document of one token, where a draft of its own reads one before."""
  draft, verifier = decoder(small, "S"), decoder(small)
  s = SpeculativeDecoder(verifier, draft, (3,), share)
  weights = verifier.lay_out(lively_params)
  state = s.prefill(weights, weights, PROMPTS, 12, range(4), DOCUMENTS)
  state, stats = s.advance(weights, weights, state, 100)
  have = [row[len(p) :] for row, p in zip(state.sequences(), PROMPTS)]
  assert have == continued(verifier, lively_params, LAST)
  _, alone = speculate(s, lively_params, LAST)
  np.testing.assert_array_equal(stats.accepted, alone.accepted)  # the draft is right too


@pytest.mark.parametrize(
  "segments,words",
  [
    ([[0]], "1 lists for 2 prompts"),
    ([[0], [0]], r"segments\[1\] has 1 numbers for a prompt of 2"),
    ([[0], [1, 0]], r"segments\[1\] = \[1, 0\] falls"),
  ],
)
def test_segments_that_do_not_fit(small, lively_params, segments, words):
  d = decoder(small)
  with pytest.raises(UserError, match=words):
    d.prefill(d.lay_out(lively_params), [[1], [2, 3]], 4, range(2), segments=segments)


# ------------------------------------------------------------------- training


class Packed(StubTask):
  """Rows of documents; the loss is over every token."""

  def batch(self, step, rows):
    tokens = super().batch(step, rows)
    cuts = np.random.default_rng(step).integers(1, 16, (16, 2))[rows]
    segments = (np.arange(17) >= cuts[..., None]).sum(1).astype(np.int32)
    return {"tokens": tokens, "segments": segments}

  def batch_shapes(self, batch_size):
    shape = jax.ShapeDtypeStruct((batch_size, 17), jnp.int32)
    return {"tokens": shape, "segments": shape}

  def loss(self, sub_config, execution, sub_params, batch, teacher=None):
    hidden, embedding = matlm.MatLM(sub_config, execution).apply(
      {"params": sub_params},
      batch["tokens"][:, :-1],
      segments_BxT=batch["segments"][:, :-1],
      return_hidden=True,
    )
    targets = batch["tokens"][:, 1:]
    objective, loss = losses.chunked_cross_entropy(hidden, embedding, targets, 1, 0.0)
    return objective, {"loss": loss}


def packed_step(mesh, index, config=MODEL):
  """(loss, gradient norm, collectives of the program) of a step."""
  trainer = dataclasses.replace(make_trainer(mesh, config), task=Packed(config))
  program = trainer.lower(trainer.granularities[index]).compile()
  _, out = program(trainer.init(0), trainer.batch(1))
  return float(out["loss"]), float(out["grad_norm"]), hlo.totals(program.as_text())


def test_a_sharded_step_on_documents():
  """data 2 x fsdp 2 x tensor 2 computes what one device does; nesting adds no collective."""
  mesh = dict(data=2, fsdp=2, tensor=2)
  want, have = packed_step(None, 1), packed_step(mesh, 1)
  np.testing.assert_allclose(have[:2], want[:2], rtol=2e-5)
  whole = packed_step(mesh, 3)[2]
  assert {k: v[0] for k, v in have[2].items()} == {k: v[0] for k, v in whole.items()}
