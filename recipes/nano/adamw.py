"""AdamW, under 5 % warm-up and a cosine to zero; the best of 1e-3, 3e-3 and 1e-2."""

from torch.optim import AdamW

from pylo_integrations.evaluation import SCHEDULES

LR = 3e-3


def build(model, steps):
    return [(AdamW(model.parameters(), LR, fused=True), SCHEDULES["cosine"])]
