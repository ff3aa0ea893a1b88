"""Names, parsing, counts (Table 4), sampling (Table 6), Mix'n'Match (Table 5)."""

import collections
import dataclasses

import helpers
import jax
import numpy as np
import pytest

from matformer_jax import UserError
from matformer_jax import granularity as gran
from matformer_jax.config import MatLMConfig
from matformer_jax.models import matlm, slicing


def model_config(row: str) -> MatLMConfig:
  return MatLMConfig.from_dict(helpers.get_config(row).model)


# Table 4, in millions: total, non-embedding (XL, L, M, S) and FFN (XL).
TABLE_4 = {
  "78M": ((78, 74, 72, 71), (12.6, 8.4, 6.3, 5.3), 8.4),
  "180M": ((180, 164, 157, 152), (50, 33.7, 25.3, 21.1), 33.6),
  "310M": ((310, 272, 253, 244), (113, 75, 56, 47), 75.6),
  "463M": ((463, 397, 363, 346), (201, 134, 100, 84), 134),
  "850M": ((850, 696, 620, 582), (453, 302, 227, 189), 302),
}


@pytest.mark.parametrize("row", TABLE_4)
def test_counts_match_table_4(row):
  total, non_embedding, ffn = TABLE_4[row]
  counts = [gran.count(model_config(row), name) for name in ("XL", "L", "M", "S")]
  # Half a printed unit, or 1.2%: the paper rounds some figures up, some down, and
  # its non-embedding column exceeds 4 d^2 + 2 d d_ff per layer by up to 0.15M.
  close = lambda ours, printed: abs(ours / 1e6 - printed) <= max(0.012 * printed, 0.06)
  for n, t, e in zip(counts, total, non_embedding):
    assert close(n.params, t), (n.params, t)
    assert close(n.non_embedding_params, e), (n.non_embedding_params, e)
  assert close(counts[0].ffn_params, ffn)


def test_counts_of_the_2_6b_model():
  config = model_config("2.6B")
  assert round(gran.count(config, "XL").params / 1e9, 1) == 2.6
  assert round(gran.count(config, "S").params / 1e9, 1) == 1.5


@pytest.mark.parametrize("row", [*TABLE_4, "2.6B", "quickstart", "tiny"])
@pytest.mark.parametrize("change", [{}, {"gated": True}, {"nested_heads": True, "head_groups": 1}])
def test_counts_equal_the_real_tree(row, change):
  config = dataclasses.replace(model_config(row), **change)
  params = jax.eval_shape(lambda: matlm.init_params(config, jax.random.key(0)))
  for g in gran.trained(config):
    sub = jax.eval_shape(lambda p: slicing.slice_params(p, config, g), params)
    n = gran.count(config, g)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(sub) == n.params
    assert size(sub) - sub["embedding"].size == n.non_embedding_params
    assert sum(size(run["ffn"]) for run in sub["blocks"].values()) == n.ffn_params


def test_table_4_rows_are_the_papers_setup():
  for row in TABLE_4:
    config = helpers.get_config(row)
    assert config.batch_size * config.model.seq_len == 2**20
    tokens = config.steps * config.batch_size * config.model.seq_len
    published = {"78M": 10, "180M": 20, "310M": 30, "463M": 40, "850M": 80}[row]
    assert tokens == pytest.approx(4 * published * 1e9, rel=1e-3)


@pytest.mark.parametrize(
  "text,ffn",
  [
    ("S", (0,) * 4),
    ("XL", (3,) * 4),
    ("M*2+L*2", (1, 1, 2, 2)),
    ("S+M+L+XL", (0, 1, 2, 3)),
    (" M * 3 + XL ", (1, 1, 1, 3)),
  ],
)
def test_parse(small, text, ffn):
  g = gran.parse(text, small)
  assert g.ffn == ffn and g.heads == (3,) * 4
  assert gran.parse(gran.to_text(g, small), small) == g
  assert gran.parse(ffn, small) == g and gran.parse(g, small) == g


def test_parse_heads(small):
  nested = dataclasses.replace(small, nested_heads=True)
  g = gran.parse("M*2+L*2/XL", nested)
  assert g.ffn == (1, 1, 2, 2) and g.heads == (3,) * 4
  assert gran.parse(gran.to_text(g, nested), nested) == g
  assert gran.parse("M", nested).heads == (1,) * 4


@pytest.mark.parametrize(
  "bad,words",
  [
    ("Q", "'Q' is not a size"),
    ("m", "did you mean M"),
    ("M*3", "3 layers"),
    ("M*5", "5 layers"),
    ("M*x", "'x' is not a number"),
    ("", "is not a size"),
    ("M*0+L*4", "'0'"),
    ((0, 1), "2 layers"),
    (7, "index 7"),
    ("M/XL", "nested_heads=False"),
    ("M*99999999999", "'99999999999' is not a number of layers"),
    ((0.5,) * 4, "is neither text"),
    ([0, 1, 2, "S"], "is neither text"),
    (None, "is neither text"),
  ],
)
def test_parse_errors_name_the_value(small, bad, words):
  with pytest.raises(UserError, match="granularity") as e:
    gran.parse(bad, small)
  assert words in str(e.value)


def test_sampling_is_a_pure_function_with_the_right_frequencies(small):
  for preset, row in gran.SAMPLING_PRESETS.items():
    p = gran.sampling_probabilities(preset, small)
    assert p == pytest.approx(row)
    draws = [gran.sample_index(3, step, p) for step in range(4000)]
    assert draws == [gran.sample_index(3, step, p) for step in range(4000)]
    counts = collections.Counter(draws)
    for i in range(4):
      # Five standard deviations of a binomial: a false alarm in 2e6.
      assert abs(counts[i] - 4000 * p[i]) < 5 * (4000 * p[i] * (1 - p[i])) ** 0.5
  assert [gran.sample_index(4, s, p) for s in range(50)] != [
    gran.sample_index(3, s, p) for s in range(50)
  ]


def test_a_zero_probability_is_never_drawn(small):
  p = gran.sampling_probabilities("0/0.5/0.5/0", small)
  assert {gran.sample_index(0, s, p) for s in range(500)} == {1, 2}


@pytest.mark.parametrize(
  "bad",
  ["nope", "0.5/0.5", "0.5/0.5/0.5/0.5", (-1, 1, 0.5, 0.5), "nan/0/0/1", (float("nan"),) * 4],
)
def test_sampling_errors(small, bad):
  with pytest.raises(UserError, match="sampling"):
    gran.sampling_probabilities(bad, small)


SHAPE_RULES = {
  "increasing": lambda x: x == sorted(x),
  "decreasing": lambda x: x == sorted(x, reverse=True),
  "increasing-decreasing": lambda x: is_peak(x) and abs(first_run(x) - first_run(x[::-1])) <= 1,
  "decreasing-increasing": lambda x: is_peak([-i for i in x]),
}


def is_peak(x) -> bool:
  """Rises, then falls; either part may be missing."""
  top = x.index(max(x))
  return x[: top + 1] == sorted(x[: top + 1]) and x[top:] == sorted(x[top:], reverse=True)


def first_run(x) -> int:
  """How many layers of the smaller size come before the first larger one."""
  return next((i for i, v in enumerate(x) if v > min(x)), len(x))


@pytest.mark.parametrize("layers", [4, 5])
@pytest.mark.parametrize("shape", gran.SHAPES)
def test_ladders_have_their_shape_and_least_slope(small, shape, layers):
  config = dataclasses.replace(small, num_layers=layers, spans=None)
  ladder = gran.mix_n_match_ladder(config, shape)
  assert len(ladder) == 3 * layers + 1
  sizes = [gran.count(config, g).params for g in ladder]
  assert sizes == sorted(set(sizes))
  for g in ladder:
    assert max(g.ffn) - min(g.ffn) <= 1
    assert SHAPE_RULES[shape](list(g.ffn)), g.ffn
  increasing = gran.mix_n_match_ladder(config)
  assert sizes == [gran.count(config, g).params for g in increasing]


def test_ladder_of_an_extracted_model(small):
  config = gran.submodel_config(small, gran.parse("S*1+L*3", small))
  text = [gran.to_text(g, config) for g in gran.mix_n_match_ladder(config)]
  assert [gran.to_text(g, config) for g in gran.trained(config)] == ["S", "S*1+M*3", "S*1+L*3"]
  assert text[0] == "S" and text[-1] == "S*1+L*3" and len(set(text)) == len(text) == 7


@pytest.mark.parametrize(
  "budget,expected",
  [("226.6M", "M"), ("245.5M", "M*12+L*4"), ("278.5M", "M*5+L*11"), ("377.6M", "L*8+XL*8")],
)
def test_mix_n_match_reproduces_table_5(budget, expected):
  config = model_config("850M")
  g = gran.mix_n_match(config, f"nonembedding:{budget}")
  assert gran.to_text(g, config) == expected
  assert g == gran.mix_n_match(config, nonembedding=float(budget[:-1]) * 1e6)
  # Its printed budget, truncated to whole millions, is this configuration's size.
  assert int(gran.count(config, g).non_embedding_params / 1e6) == int(float(budget[:-1]))


@pytest.mark.parametrize(
  "budget,kind,number,relative",
  [
    ("0.6x", "params", 0.6, True),
    ("620M", "params", 620e6, False),
    ("ffn:94M", "ffn", 94e6, False),
    ("ffn:0.5x", "ffn", 0.5, True),
    ("1.2GFLOP", "flops", 1.2e9, False),
    ("2e9", "params", 2e9, False),
    ("flops:1.2G", "flops", 1.2e9, False),
    ("15ms", "latency", 0.015, False),
    ("decode:400us", "decode", 4e-4, False),
    ("params:12345", "params", 12345, False),
  ],
)
def test_budgets_parse(budget, kind, number, relative):
  have = gran._parse_budget(budget)
  assert have[0] == kind and have[1] == pytest.approx(number) and have[2] == relative


def test_every_kind_of_budget_is_kept_and_used_up(small):
  ladder = gran.mix_n_match_ladder(small)
  for kind, (_, cost) in gran.COSTS.items():
    for g, wider in zip(ladder, ladder[1:]):
      assert gran.mix_n_match(small, **{kind: cost(small, g)}) == g
      assert gran.mix_n_match(small, **{kind: cost(small, wider) - 1}) == g
    assert gran.mix_n_match(small, f"{kind}:1x") == ladder[-1]


@pytest.mark.parametrize(
  "budget,words",
  [
    ("10", "below the smallest.*S.*XL"),
    ("1G", "above the largest"),
    ("0.01x", "below"),
    ("1.5x", "above"),
    ("fast", "does not parse"),
    ("wdith:3M", "'wdith' is not one of"),
    ("ffn:3ms", "unit"),
    ("params:3GFLOP", "unit"),
    ("latency:3M", "unit"),
    ("15ms", "profile"),
    ("1..2M", "does not parse"),
  ],
)
def test_budget_errors_name_the_budget(small, budget, words):
  with pytest.raises(UserError, match=words) as e:
    gran.mix_n_match(small, budget)
  assert budget in str(e.value)


def test_one_budget_at_a_time(small):
  for args, kwargs in [((), {}), (("0.6x",), {"params": 3}), ((), {"params": 3, "ffn": 2})]:
    with pytest.raises(UserError, match="one budget"):
      gran.mix_n_match(small, *args, **kwargs)
  with pytest.raises(UserError, match="shape='zigzag'"):
    gran.mix_n_match(small, "0.6x", shape="zigzag")


# What follows from other fields, and would be copied with them.
UNSET = dict(spans=None, num_kv_heads=0, head_dim=0, ffn_widths=())


@pytest.mark.parametrize(
  "change,words",
  [
    ({"num_heads": 5}, "num_heads=5"),
    ({"ffn_ratios": (2, 1)}, "ffn_ratios"),
    ({"ffn_ratios": (0.3, 1)}, "0.3"),
    ({"ffn_groups": 3}, "ffn_groups=3"),
    ({"activation": "tanh"}, "tanh"),
    ({"vocab_size": 0}, "vocab_size=0"),
    ({"nested_heads": True, "num_heads": 2}, "head ratio 0.25"),
    ({"num_heads": 32}, "even"),
    ({"num_kv_heads": 3}, "num_kv_heads=3"),
    ({"num_kv_heads": -1}, "num_kv_heads=-1"),
    ({"num_kv_heads": 2, "nested_heads": True}, "head ratio 0.25 x num_kv_heads=2"),
    ({"num_kv_heads": 2, "head_groups": 4}, "num_kv_heads=2"),
    ({"head_dim": 7}, "head_dim = 7"),
    ({"ffn_widths": (8, 4), "ffn_ratios": ()}, "ffn_widths=(8, 4)"),
    ({"ffn_widths": (8, 16)}, "set one of them"),
    ({"ffn_widths": (7, 16), "ffn_ratios": (), "ffn_groups": 2}, "ffn_widths has FFN width 7"),
    ({"rope_scaling": (8.0, 4.0, 1.0, 64.0)}, "rope_scaling=(8.0, 4.0, 1.0, 64.0)"),
    ({"embedding_scale": -1.0}, "embedding_scale=-1.0"),
  ],
)
def test_model_config_errors_name_the_value(small, change, words):
  with pytest.raises(UserError) as e:
    dataclasses.replace(small, **UNSET | change)
  assert words in str(e.value)


def test_unknown_model_key_suggests_the_near_one(small):
  with pytest.raises(UserError, match="did you mean 'num_layers'"):
    MatLMConfig.from_dict({**small.to_dict(), "num_layer": 3})


def test_config_round_trips(small):
  assert MatLMConfig.from_dict(small.to_dict()) == small
  sub = gran.submodel_config(small, gran.parse("S*1+M*3", small))
  assert MatLMConfig.from_dict(sub.to_dict()) == sub
  assert np.sum([r.num_layers for r in sub.spans]) == 4
