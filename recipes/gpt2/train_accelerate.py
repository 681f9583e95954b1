"""The GPT-2 of train.py in a plain Accelerate loop, with the same configuration files and options.

Example: python train_accelerate.py tiny --max_steps 50 --output_dir runs/gpt2-accelerate
"""

import sys
from pathlib import Path

try:
    import torch
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import GradientAccumulationPlugin, set_seed
    from language_model import load_data, make_model, parse
    from torch.utils.data import DataLoader
    from transformers import get_scheduler

    from pylo_integrations import create_optimizer
    from pylo_integrations.accelerate import attach, prepare_scheduler
except ModuleNotFoundError as error:
    sys.exit(f"this recipe needs {error.name}: pip install 'pylo-integrations[recipes]', in a clone '.[recipes]'")

recipe, args = parse(sys.argv[1:], __doc__)
accumulation = args.gradient_accumulation_steps
training, _, description = load_data(recipe)
accelerator = Accelerator(
    gradient_accumulation_plugin=GradientAccumulationPlugin(accumulation, sync_with_dataloader=False),
    mixed_precision="bf16" if args.bf16 else "no",
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
)
accelerator.print(description)
set_seed(args.seed)
model = make_model(recipe)
optimizer = create_optimizer(model, args.optim.value, args.learning_rate, args.weight_decay)
scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(args.max_steps), args.max_steps)
loader = DataLoader(training, args.train_batch_size, shuffle=True, drop_last=True, generator=torch.Generator())
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
scheduler = prepare_scheduler(accelerator, scheduler)
attach(accelerator, optimizer, num_steps=args.max_steps)

batch, last_batch = 0, args.max_steps * accumulation
if args.resume_from_checkpoint:
    accelerator.load_state(args.resume_from_checkpoint)
    batch = int(Path(args.resume_from_checkpoint).name.removeprefix("batch-"))
while batch < last_batch:
    epoch, done = divmod(batch, len(loader))
    loader.set_epoch(epoch)
    for inputs in accelerator.skip_first_batches(loader, done):
        batch += 1
        with accelerator.accumulate(model):
            loss = model(**inputs).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if batch % (args.logging_steps * accumulation) == 0:
            accelerator.print(f"step {batch // accumulation}: loss {loss.item():.4f}", flush=True)
        if batch % (args.save_steps * accumulation) == 0:
            accelerator.save_state(Path(args.output_dir, f"batch-{batch}"))
        if batch == last_batch:
            break
