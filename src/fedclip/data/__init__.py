"""Images, labels, prompts, and how they are shared out between clients."""
