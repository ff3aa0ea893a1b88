"""Flax modules. `layers` is shared by every model; `matlm` is the decoder."""
