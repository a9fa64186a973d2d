"""Networks as plain `nn.Module`s; nothing here imports Lightning."""
