"""Forward step, loss, gradients, logging: what Megatron's training loop calls."""
