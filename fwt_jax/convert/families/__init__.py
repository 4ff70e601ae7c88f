"""The families of public checkpoints that are known, by the ``model_type`` of their config.json.

A family is a function from config.json to a ``HybridConfig``, and a table of names: see ``table.py``.
"""

from fwt_jax.convert.families import fla, kimi, olmo, qwen
from fwt_jax.convert.families.table import Entry, Family

__all__ = ["FAMILIES", "Entry", "Family"]

FAMILIES: dict[str, Family] = {**fla.FAMILIES, **qwen.FAMILIES, **olmo.FAMILIES, **kimi.FAMILIES}
