"""One pass from weights to GGUF files: a plan first (types from the engine, sizes, offsets), then the work.

plan(draft, [Recipe(quant("Q4_K_M"))], folder) → check_outputs(plan) → run(plan)
"""

from .onepass import Result, run
from .plan import OutputPlan, Plan, check_outputs, conversion, describe, plan
from .recipe import Recipe, parse_tensor_type

__all__ = [
    "OutputPlan", "Plan", "Recipe", "Result", "check_outputs", "conversion", "describe", "parse_tensor_type", "plan",
    "run",
]  # fmt: skip
