"""Images: opened from any source, checked and turned into pixels."""

from mlx_aimv2.images.open import DECODE, FAST, POLICY, TRUNCATED, ImageInput, OpenImage, Policy, open_image, to_rgb

__all__ = ["DECODE", "FAST", "POLICY", "TRUNCATED", "ImageInput", "OpenImage", "Policy", "open_image", "to_rgb"]
