"""One pass from weights to GGUF files: a plan first (types from the engine, sizes, offsets), then the work.

plan(draft, [Recipe(quant("Q4_K_M"))], folder) → check_outputs(plan) → run(plan)
"""

from . import streaming
from .onepass import Result, run
from .plan import OutputPlan, Plan, check_outputs, conversion, describe, plan
from .recipe import Recipe, parse_tensor_type
from .streaming import low_disk_plan, run_low_disk

__all__ = [
    "OutputPlan", "Plan", "Recipe", "Result", "check_outputs", "conversion", "describe", "low_disk_plan",
    "parse_tensor_type", "plan", "run", "run_low_disk", "streaming",
]  # fmt: skip
