"""One federated LoRA job, done in fedclip's peers: each in its users' idiom and its own venv."""
