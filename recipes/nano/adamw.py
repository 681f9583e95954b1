"""AdamW, under 5 % warm-up and a cosine to zero; its learning rate is not tuned for this track."""

from torch.optim import AdamW

from pylo_integrations.evaluation import SCHEDULES

LR = 3e-3


def build(model, steps):
    return [(AdamW(model.parameters(), LR, fused=True), SCHEDULES["cosine"])]
