"""What `scripts/pretrain_tiny.py` is made of: data, augmentation, training and export of `tiny`."""
