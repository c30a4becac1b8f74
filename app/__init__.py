"""Diskless: serve scikit-learn models straight from Cloudflare R2, from object storage to memory to REST."""

__version__ = "0.1.0"
