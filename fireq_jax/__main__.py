"""``python -m fireq_jax`` is the command ``fireq-jax``."""

from fireq_jax.cli import app

app()
