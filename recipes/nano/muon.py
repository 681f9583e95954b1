"""torch's Muon for hidden matrices and AdamW for all else, under 5 % warm-up and a cosine to zero; not tuned."""

from torch.optim import AdamW, Muon

from pylo_integrations.evaluation import SCHEDULES

LR = 1e-2


def build(model, steps):
    hidden = [param for name, param in model.named_parameters() if param.dim() == 2 and name.startswith("blocks.")]
    rest = [param for name, param in model.named_parameters() if param.dim() < 2 or not name.startswith("blocks.")]
    muon = Muon(hidden, LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [(muon, SCHEDULES["cosine"]), (AdamW(rest, LR, fused=True), SCHEDULES["cosine"])]
