"""Measurements of trained models."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Result:
  """Measurements of one granularity, means over validation examples.

  Attributes:
    granularity: canonical text.
    examples: predictions measured: tokens or images.
    metrics: what was measured, by name:
      loss: as in training, nats per example.
      perplexity: exp(loss), of tokens.
      accuracy: top-1, of images that have a label.
      agreement: share of examples whose most likely answer is the largest granularity's.
      kl: KL(largest granularity || this one), nats per example.
  """

  granularity: str
  examples: int
  metrics: dict[str, float]
