"""Learning-rate schedule of the field: linear warm-up, then polynomial decay."""

from __future__ import annotations


def warmup_poly(
    step: int,
    total_steps: int,
    warmup_steps: int = 1500,
    warmup_ratio: float = 1e-6,
    power: float = 0.9,
) -> float:
    """Factor of the base learning rate for the 0-based optimizer step ``step``.

    Warm-up rises linearly from ``warmup_ratio``. The polynomial ``(1 - step / total) ** power``
    counts from step 0, so the factor drops where the warm-up ends (0.9993 to 0.9322 for 1500 of
    20 000 steps), as in the published schedules.
    """
    if step < warmup_steps:
        return 1.0 - (1.0 - step / warmup_steps) * (1.0 - warmup_ratio)
    return max(0.0, 1.0 - step / total_steps) ** power
