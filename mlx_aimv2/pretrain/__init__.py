"""The paper's own pre-training objective (arXiv 2411.14402) and LiT tuning.

Read in this order: `prefix`, `decoder`, `losses`, `objective`, then `train`; `lit` tunes what they leave.
"""
