"""Train the adapter under torchrun: `python -m torch.distributed.run -m wuxia_core.train RUN`."""
