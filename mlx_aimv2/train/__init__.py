"""The training engine of `fit`, `pretrain` and `lit`: one loop, one optimizer, one schedule, one state file."""
